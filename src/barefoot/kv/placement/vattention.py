"""vattention — contiguous addresses for the longest sequence, pages behind them as sequences grow.

vAttention: Dynamic Memory Management for Serving LLMs without PagedAttention (Prabhu et al. 2024, arXiv:2405.04437).
Addresses cost nothing: every slot has them for a whole context, and gets memory page by page. Kernels see plain dense
arrays; there is no table of blocks. With len_i the tokens of slot i and 2L tensors of rows of ``row`` bytes (section 5;
other layouts are in :mod:`barefoot.kv.placement.geometry`):

    committed = Σ_i 2L · page · ⌈len_i · row / page⌉ + what is overcommitted      never more than ``pool_bytes``
    last pages' slack: less than 2L pages a slot; addresses: n_slots · 2L · (context · row, to whole pages)

1. *Before a step* all its pages are mapped, from the pool, then from what other slots have beyond their tokens, of the
   highest slot first. Where that is too little, :class:`~barefoot.kv.placement.slots.PoolExhausted` tells the scheduler
   to preempt; nothing has changed then.
2. *While it is computed* a thread maps what each sequence's next token needs, so that decoding waits for no page, and
   up to ``extra_groups`` for the ``look_ahead`` tokens after it. The next step waits for the thread.
3. *Deferred reclamation*: a sequence that ends leaves its pages in the slot, and the next one there finds them. They
   are taken when others need them (``reclaim=demand``, the default of the paper's code), one group at a time when the
   thread has nothing else to do (``idle``), or at once (``eager``).

*Differs from the paper* and its code (microsoft/vattention). Pages are counted exactly, where the code has whole tokens
a page. On demand only as many groups are taken as are short, not all that a slot has beyond its tokens; and never those
that a slot's own next token needs for the next token of another. The slot for a new sequence is the best fit of all,
where the code leaves the lowest only for one with fewer pages. A slot's tensors may have rows of different widths, and
rings. On the host page_bytes is the system's 4 KiB, not the 2 MiB or 64 KiB of GPUs, and a page that is given back
leaves the process: a pool is planned memory, not held memory.

Not here: pages shared by several slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from barefoot.core.errors import InvalidInput, OverBudget
from barefoot.core.ledger import Term
from barefoot.core.units import format_bytes
from barefoot.kv.placement import Placement
from barefoot.kv.placement.cache import VirtualCache
from barefoot.kv.placement.geometry import Geometry, VirtualTensor
from barefoot.kv.placement.pages import Pages
from barefoot.kv.placement.slots import RECLAIM, Slots


@dataclass(frozen=True)
class VAttention(Placement, name="vattention", papers=(24,), status="experimental"):
    """``pool_bytes`` of all slots together; None: as many as all slots can fill."""

    pool_bytes: int | None = None
    page_bytes: int = 4096
    background: bool = True
    look_ahead: int = 8
    extra_groups: int = 2
    reclaim: str = "demand"

    def __post_init__(self) -> None:
        if self.pool_bytes is not None and self.pool_bytes < 1:
            raise InvalidInput(f"vattention: pool_bytes must be at least 1, got {self.pool_bytes}")
        if self.page_bytes < 1 or min(self.look_ahead, self.extra_groups) < 0:
            raise InvalidInput(f"vattention: page_bytes must be at least 1, look_ahead and extra_groups 0, got {self}")
        if self.reclaim not in RECLAIM:
            raise InvalidInput(f"vattention: reclaim must be {', '.join(RECLAIM)}, got {self.reclaim!r}")

    def terms(self, tensors: Sequence[VirtualTensor], n_slots: int) -> tuple[Term, ...]:
        return (Term("pages", self.n_pages(Geometry(tensors, n_slots, self.page_bytes)), self.page_bytes),)

    def n_pages(self, geometry: Geometry) -> int:
        """Pages of the pool: those that fit in it, less a rest that no group could use.

        Raises
        ------
        OverBudget : fewer than one token needs.
        """
        every = geometry.n_slots * geometry.n_pages(geometry.n_groups)
        if self.pool_bytes is None:
            return every
        unit = math.gcd(*geometry.pages_of_groups())
        n_pages = min(every, self.pool_bytes // self.page_bytes // unit * unit)
        least = geometry.n_pages(1)
        if n_pages < least:
            needed = least * self.page_bytes
            raise OverBudget(
                f"a pool of {format_bytes(self.pool_bytes)} can't hold the first pages of a sequence, "
                f"{format_bytes(needed)}",
                needed=needed,
                available=self.pool_bytes,
                cure="give the cache a larger pool, or no placement",
            )
        return n_pages

    def open(self, tensors: Sequence[VirtualTensor], n_slots: int, pages: Pages) -> VirtualCache:
        geometry = Geometry(tensors, n_slots, self.page_bytes)
        n_pages = self.n_pages(geometry)
        slots = Slots(
            geometry, n_pages, look_ahead=self.look_ahead, extra_groups=self.extra_groups, reclaim=self.reclaim
        )
        try:
            pages.reserve(geometry.n_bytes, self.page_bytes, n_pages)
        except BaseException:
            pages.close()
            raise
        return VirtualCache(slots, pages, background=self.background)
