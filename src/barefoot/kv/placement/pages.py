"""Pages behind reserved addresses: the protocol, and the process's own memory.

Host memory is a private mapping without a promise of memory (``MAP_NORESERVE``), without large pages, which would turn
one touched byte into 2 MiB. Pages are committed by ``MADV_POPULATE_WRITE`` (Linux 5.14; before, by a write to each) and
given back by ``MADV_DONTNEED``, after which they are gone at once and read as zeros. ``MADV_FREE`` would leave them
resident until the system runs short.
"""

from __future__ import annotations

import errno
import mmap
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import Incompatible, InvalidInput, OverBudget
from barefoot.core.mapping import TAKES_BACK, map_private
from barefoot.core.units import format_bytes

U8 = npt.NDArray[np.uint8]

_POPULATE_WRITE = 23  # Python does not name it
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


class Pages(Protocol):
    """Addresses, some of which have memory. ``start`` and ``n_bytes`` are multiples of the reserved page's bytes."""

    @property
    def committed_bytes(self) -> int: ...

    def reserve(self, n_bytes: int, page_bytes: int, n_pages: int) -> None:
        """Take ``n_bytes`` of addresses, of which at most ``n_pages`` pages will have memory at once.

        To be called once; where it fails, ``close`` gives back what it had taken.

        Raises
        ------
        InvalidInput : the system has no pages of that size.
        Incompatible, OverBudget : it does not give so many addresses, or so much memory.
        """

    def commit(self, start: int, n_bytes: int) -> None:
        """Give memory to addresses that have none: all of it, or none of it and an error.

        Raises
        ------
        OverBudget : the system has no more.
        """

    def release(self, start: int, n_bytes: int) -> None:
        """Take the memory from addresses that have it."""

    def close(self) -> None:
        """Give back everything; addresses are not to be used any more."""


class HostPages:
    """Memory of this process.

    Attributes
    ----------
    memory : uint8 (n_bytes,), all addresses. What has no memory reads as zeros, and takes some when it is written.
    """

    memory: U8

    def __init__(self) -> None:
        self._mapping: mmap.mmap | None = None
        self.committed_bytes = 0

    def reserve(self, n_bytes: int, page_bytes: int, n_pages: int) -> None:
        if not TAKES_BACK:
            raise Incompatible(
                "this system does not take back a part of a process's memory",
                cure="keep all of the cache resident: no placement",
            )
        if page_bytes % mmap.PAGESIZE:
            raise InvalidInput(f"page_bytes must be a multiple of {mmap.PAGESIZE} on this system, got {page_bytes}")
        try:
            mapping = map_private(n_bytes, "MADV_NOHUGEPAGE", promised=False)
        except OSError as error:
            raise Incompatible(
                f"the system refuses to reserve {format_bytes(n_bytes)} of addresses{refusal_reason()}",
                cure="lift that limit, take fewer sequences or a shorter context, or keep the cache resident",
            ) from error
        self._mapping, self.memory = mapping, np.frombuffer(mapping, np.uint8)

    def commit(self, start: int, n_bytes: int) -> None:
        assert self._mapping is not None
        try:
            self._mapping.madvise(_POPULATE_WRITE, start, n_bytes)
        except OSError as error:
            if error.errno != errno.EINVAL:
                self._mapping.madvise(mmap.MADV_DONTNEED, start, n_bytes)
                raise OverBudget(
                    f"the system has no {format_bytes(n_bytes)} more for keys and values",
                    needed=self.committed_bytes + n_bytes,
                    available=self.committed_bytes,
                    cure="give the cache a smaller pool",
                ) from error
            self.memory[start : start + n_bytes : mmap.PAGESIZE] = 0  # a kernel before 5.14
        self.committed_bytes += n_bytes

    def release(self, start: int, n_bytes: int) -> None:
        assert self._mapping is not None
        self._mapping.madvise(mmap.MADV_DONTNEED, start, n_bytes)
        self.committed_bytes -= n_bytes

    def close(self) -> None:
        if self._mapping is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)
        self.committed_bytes = 0


def refusal_reason() -> str:
    """What is known to make a system refuse addresses, as the end of a sentence; empty where nothing of it is here."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        return f": this process may have {format_bytes(limit)} of them (ulimit -v)"
    if _OVERCOMMIT.exists() and _OVERCOMMIT.read_text().strip() == "2":
        return ": it has memory for all that it promises (vm.overcommit_memory=2)"
    return ""
