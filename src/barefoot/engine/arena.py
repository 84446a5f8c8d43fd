"""The arena: every large array of a run, in regions of exactly the planned bytes.

A region is an anonymous private mapping, made resident at once, so that a job that starts does not die half-way.

Weights and KV stores ask the system for large pages (2 MiB on x86): they are read from end to end for each token, and
finding the 4 KiB pages of a gigabyte takes a third of the time. A large page only stands where it lies wholly within
regions that are resident anyway and stay until the end, so it costs no byte; the rest of a region keeps small pages.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import Counter

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.errors import OverBudget
from barefoot.core.ledger import Entry, Footprint, Kind
from barefoot.core.lifetimes import ALIGNMENT
from barefoot.core.units import format_bytes, round_up

U8 = npt.NDArray[np.uint8]


class _Region:
    def __init__(self, planned: Entry) -> None:
        self.planned = planned
        self.used = 0
        self.memory = _map(planned.bytes, read_often=planned.kind in ("weights", "kv"))


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
        region = self._regions.get(owner) or self._regions.setdefault(owner, _Region(self._planned[owner]))
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


def _map(n_bytes: int, *, read_often: bool) -> U8:
    if not n_bytes:
        return np.empty(0, np.uint8)
    if hasattr(mmap, "MAP_ANONYMOUS"):
        # Python's default for memory without a file is shared; only private pages count as the process's own.
        mapping = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if read_often and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                mapping.madvise(mmap.MADV_HUGEPAGE)
    else:
        mapping = mmap.mmap(-1, n_bytes)
    array = np.frombuffer(mapping, np.uint8)
    ops.populate(array)
    return array
