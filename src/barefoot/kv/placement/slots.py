"""Which groups of pages each slot has: the decisions of vAttention, without a call to the system.

A slot that has tokens is active, one without is idle; pages that a slot has beyond its tokens are *overcommitted*. All
functions that decide return changes, what is given back first, and leave the pages as they are: who made a change says
so by ``apply``.
"""

from __future__ import annotations

from collections.abc import Sequence

from barefoot.core.errors import InvalidInput, OverBudget
from barefoot.core.units import format_bytes
from barefoot.kv.placement.geometry import Change, Geometry

RECLAIM = ("demand", "idle", "eager")


class PoolExhausted(OverBudget):
    """The sequences of a step need more pages than the pool has; nothing was changed, and they are as they were.

    ``needed`` and ``available`` are bytes of all active sequences and of the pool.
    """


class Slots:
    """``geometry.n_slots`` slots that share ``n_pages`` pages.

    Parameters
    ----------
    look_ahead : tokens that :meth:`ahead` looks beyond a length, at most, after the first.
    extra_groups : groups that it maps for them at a time, at most.
    reclaim : an idle slot keeps its pages until others need them (``demand``), gives one group back whenever nothing
        else is to be done (``idle``), or all of them when it is freed (``eager``).

    Attributes
    ----------
    lengths : tokens of each slot.
    mapped : groups that each slot has.
    """

    def __init__(
        self, geometry: Geometry, n_pages: int, *, look_ahead: int = 8, extra_groups: int = 2, reclaim: str = "demand"
    ) -> None:
        self.geometry, self.n_pages = geometry, n_pages
        self._look_ahead, self._extra_groups, self._reclaim = look_ahead, extra_groups, reclaim
        self.lengths = [0] * geometry.n_slots
        self.mapped = [0] * geometry.n_slots

    @property
    def n_committed(self) -> int:
        """Pages of all slots."""
        return sum(map(self.geometry.n_pages, self.mapped))

    def alloc(self, n_tokens: int) -> int:
        """Give an idle slot to a sequence that starts with ``n_tokens``: the one whose pages fit it best, that is the
        fewest that are enough, else the most that there are; the lowest of equals.

        Raises
        ------
        InvalidInput : no slot is idle.
        """
        idle = [slot for slot, length in enumerate(self.lengths) if not length]
        if not idle:
            raise InvalidInput(
                f"all {self.geometry.n_slots} slots are taken",
                cure="wait until a sequence ends, or preempt one: free its slot, and prefill it again later",
            )
        need = self.geometry.groups(n_tokens)
        enough = [slot for slot in idle if self.mapped[slot] >= need]
        slot = min(enough, key=lambda s: self.mapped[s]) if enough else max(idle, key=lambda s: self.mapped[s])
        self.lengths[slot] = n_tokens
        return slot

    def free(self, slot: int) -> list[Change]:
        """The slot's sequence has ended."""
        self.lengths[slot] = 0
        return self._cut([slot], [0] * len(self.mapped)) if self._reclaim == "eager" else []

    def step(self, lengths: Sequence[int]) -> list[Change]:
        """What must happen before the slots have ``lengths`` tokens: pages for all of them, taken from the pool, then
        from what is overcommitted, of the highest slot first.

        Raises
        ------
        InvalidInput : not one length, at least 0, for each slot.
        PoolExhausted : even then they are too few.
        """
        if len(lengths) != len(self.mapped) or min(lengths) < 0:
            raise InvalidInput(f"expected {len(self.mapped)} lengths of at least 0, got {list(lengths)}")
        needed = [self.geometry.groups(n) for n in lengths]
        changes = self._grow(needed)
        if changes is None:
            n_needed, page = sum(map(self.geometry.n_pages, needed)), self.geometry.page_bytes
            raise PoolExhausted(
                f"{sum(n > 0 for n in lengths)} sequences need {format_bytes(n_needed * page)}, and the pool has "
                f"{format_bytes(self.n_pages * page)}",
                needed=n_needed * page,
                available=self.n_pages * page,
                cure="preempt a sequence (free it, and prefill it again later), or give the cache a larger pool",
            )
        self.lengths = list(lengths)
        return changes

    def ahead(self) -> list[Change]:
        """What can be done while the step is computed.

        Pages for each active slot's next token; then, from the pool alone, a few groups for tokens after it; and where
        nothing of this is to be done, ``idle`` gives back one group of the highest idle slot, sparing the one that the
        next sequence gets if it is long.
        """
        needed = [self.geometry.groups(n + 1) if n else 0 for n in self.lengths]
        changes = self._grow(needed)
        if changes is None:  # the next step will preempt, unless a sequence ends before
            return []
        changes += self._look_further(changes)
        return self._cut_one() if not changes and self._reclaim == "idle" else changes

    def trim(self) -> list[Change]:
        """Give back all that is overcommitted."""
        return self._cut(range(len(self.mapped)), [self.geometry.groups(n) for n in self.lengths])

    def apply(self, change: Change) -> None:
        """The change was made."""
        assert self.mapped[change.slot] == (change.first if change.commit else change.stop)
        self.mapped[change.slot] = change.stop if change.commit else change.first
        assert self.n_committed <= self.n_pages

    def _grow(self, needed: Sequence[int]) -> list[Change] | None:
        """Let each slot have ``needed`` groups at least; None where the pool has too few pages."""
        pages = self.geometry.n_pages
        grown = [
            Change(slot, has, need, True)
            for slot, (has, need) in enumerate(zip(self.mapped, needed, strict=True))
            if has < need
        ]
        short = sum(pages(c.stop) - pages(c.first) for c in grown) - (self.n_pages - self.n_committed)
        taken = []
        for slot in reversed(range(len(needed))):
            first = stop = self.mapped[slot]
            while short > 0 and first > needed[slot]:
                first -= 1
                short -= pages(first + 1) - pages(first)
            if first < stop:
                taken.append(Change(slot, first, stop, False))
        return None if short > 0 else taken + grown

    def _look_further(self, changes: Sequence[Change]) -> list[Change]:
        """Groups for the tokens after the next one, as far as pages are free once ``changes`` are made."""
        pages, mapped = self.geometry.n_pages, list(self.mapped)
        for change in changes:
            mapped[change.slot] = change.stop if change.commit else change.first
        free = self.n_pages - sum(map(pages, mapped))
        further: list[Change] = []
        for token in range(2, self._look_ahead + 2):
            for slot, length in enumerate(self.lengths):
                first = mapped[slot]
                if not length or self.geometry.groups(length + token) <= first:
                    continue
                size = pages(first + 1) - pages(first)
                if len(further) == self._extra_groups or size > free:
                    return further
                mapped[slot], free = first + 1, free - size
                further.append(Change(slot, first, first + 1, True))
        return further

    def _cut(self, slots: Sequence[int], kept: Sequence[int]) -> list[Change]:
        return [Change(s, kept[s], self.mapped[s], False) for s in slots if self.mapped[s] > kept[s]]

    def _cut_one(self) -> list[Change]:
        idle = [slot for slot, length in enumerate(self.lengths) if not length and self.mapped[slot]]
        spared = max(idle, key=lambda s: self.mapped[s], default=None)
        highest = max((slot for slot in idle if slot != spared), default=None)
        return [] if highest is None else [Change(highest, self.mapped[highest] - 1, self.mapped[highest], False)]
