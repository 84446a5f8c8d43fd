"""The arena: every large array of a run, in regions of exactly the planned bytes.

A region is an anonymous private mapping, made resident at once, so that a job that starts does not die half-way.

Weights and KV stores ask the system for large pages (2 MiB on x86): they are read from end to end for each token, and
finding the 4 KiB pages of a gigabyte takes a third of the time. A large page only stands where it lies wholly within
regions that are resident anyway and stay until the end, so it costs no byte; the rest of a region keeps small pages.
A region whose bytes change (``resize``) has small pages only, so that any end of it can be given back.
"""

from __future__ import annotations

import mmap
from collections import Counter
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.errors import Incompatible, OverBudget
from barefoot.core.ledger import Entry, Footprint, Kind
from barefoot.core.lifetimes import ALIGNMENT
from barefoot.core.mapping import TAKES_BACK, map_private
from barefoot.core.units import format_bytes, round_up

U8 = npt.NDArray[np.uint8]


class _Region:
    """``used`` bytes of ``memory`` are handed out, at most those of ``planned``."""

    def __init__(self, planned: Entry, mapping: mmap.mmap | None) -> None:
        self.planned = planned
        self.used = 0
        self._mapping = mapping
        self.memory: U8 = np.empty(0, np.uint8) if mapping is None else np.frombuffer(mapping, np.uint8)

    def give_back(self, start: int) -> None:
        """Let go of the pages from byte ``start`` on; they read as zeros afterwards."""
        if not TAKES_BACK:
            raise Incompatible(
                "this system does not take back a part of a process's memory",
                cure="begin anew with a smaller --memory",
            )
        first = round_up(start, mmap.PAGESIZE)
        if self._mapping is not None and first < len(self._mapping):
            self._mapping.madvise(mmap.MADV_DONTNEED, first, len(self._mapping) - first)


class Arena:
    """Hands out arrays from the regions of ``footprint``, one for each entry, named by its owner.

    A region is mapped at the first ``take`` from it. It never grows: what was not planned is refused.
    """

    def __init__(self, footprint: Footprint) -> None:
        self._planned = {e.owner: e for e in footprint.entries}
        if len(self._planned) != len(footprint.entries):
            raise ValueError("two entries of the footprint have the same owner")
        self._regions: dict[str, _Region] = {}

    def take(self, owner: str, n_bytes: int) -> U8:
        """``n_bytes`` zeroed bytes of that owner's region, on a cache line; what follows starts on the next one.

        Raises
        ------
        OverBudget : more than was planned for the owner.
        """
        if owner not in self._planned:
            raise OverBudget(f"no memory was planned for {owner!r}", needed=n_bytes, available=0)
        region = self._regions.get(owner) or self._regions.setdefault(owner, _resident(self._planned[owner]))
        size = round_up(n_bytes, ALIGNMENT)
        available = region.planned.bytes - region.used
        if size > available:
            raise OverBudget(
                f"{owner} asks for {format_bytes(size)}, and {format_bytes(available)} of its planned "
                f"{format_bytes(region.planned.bytes)} are left",
                needed=region.used + size,
                available=region.planned.bytes,
            )
        start, region.used = region.used, region.used + size
        return region.memory[start : start + n_bytes]

    def resize(self, planned: Entry, most_bytes: int) -> U8:
        """Let the region of an owner have the bytes that ``planned`` states from now on, and return all its addresses.

        The region is the beginning of ``most_bytes`` addresses, and only that is resident: what stays keeps its place
        and content, what is new is zero, and what goes is given back to the system at once.

        Raises
        ------
        Incompatible : it is fewer bytes than before, and this system does not take them back; nothing has changed.
        """
        region = self._regions.get(planned.owner) or _elastic(planned, most_bytes)
        if planned.bytes < region.used:
            region.give_back(planned.bytes)
        ops.populate(region.memory[region.used : planned.bytes])
        region.planned, region.used = planned, planned.bytes
        self._regions[planned.owner], self._planned[planned.owner] = region, planned
        return region.memory

    def lend(self, owner: str) -> None:
        """Count all planned bytes of an owner as used: it maps its memory itself, and keeps to what was planned."""
        region = self._regions[owner] = _Region(self._planned[owner], None)
        region.used = region.planned.bytes

    def floats(self, owner: str, *shape: int) -> npt.NDArray[np.float32]:
        """A float32 array of ``shape``."""
        return self.take(owner, 4 * int(np.prod(shape))).view(np.float32).reshape(shape)

    def release(self, owner: str) -> None:
        """Give a region back to the system, as soon as the last array of it is gone. An unused owner is no error."""
        self._regions.pop(owner, None)

    def used(self) -> dict[Kind, int]:
        """Bytes handed out and not released, alignment included, by kind."""
        totals: Counter[Kind] = Counter()
        for region in self._regions.values():
            totals[region.planned.kind] += region.used
        return dict(totals)

    def used_by_owner(self) -> dict[str, int]:
        return {owner: region.used for owner, region in self._regions.items()}


def _resident(planned: Entry) -> _Region:
    """A region of exactly the planned bytes, all of them resident."""
    advice = "MADV_HUGEPAGE" if planned.kind in ("weights", "kv") else None
    region = _Region(planned, map_private(planned.bytes, advice) if planned.bytes else None)
    ops.populate(region.memory)
    return region


def _elastic(planned: Entry, most_bytes: int) -> _Region:
    """A region of no bytes yet, with addresses for the most that it may have."""
    n_bytes = round_up(most_bytes, mmap.PAGESIZE)
    mapping = map_private(n_bytes, "MADV_NOHUGEPAGE", promised=False) if n_bytes else None
    return _Region(replace(planned, terms=()), mapping)
