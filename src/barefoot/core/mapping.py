"""Private memory without a file, taken from the system page by page and given back to it."""

from __future__ import annotations

import contextlib
import mmap
import sys

TAKES_BACK = hasattr(mmap, "MADV_DONTNEED") and sys.platform.startswith("linux")
"""Whether the system takes back a part of a mapping at once. Elsewhere the same advice leaves the pages resident."""

# Addresses are not promised memory: there may be more of them than the machine has. Python names the flag from 3.13 on.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform.startswith("linux") else 0)


def map_private(n_bytes: int, advice: str | None = None, *, promised: bool = True) -> mmap.mmap:
    """``n_bytes`` > 0 of addresses whose pages become resident when they are first used.

    Parameters
    ----------
    advice : ``"MADV_HUGEPAGE"`` or ``"MADV_NOHUGEPAGE"``, where the kernel knows it.
    promised : whether the system is asked to have memory for all of it.

    Raises
    ------
    OSError : the system refuses so many addresses.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, n_bytes)
    # Python's default for memory without a file is shared; only private pages count as the process's own.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0 if promised else _NO_RESERVE)
    mapping = mmap.mmap(-1, n_bytes, flags=flags)
    if advice is not None and hasattr(mmap, advice):
        with contextlib.suppress(OSError):  # a kernel without large pages
            mapping.madvise(getattr(mmap, advice))
    return mapping
