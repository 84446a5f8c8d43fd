"""How many threads the kernels use. The compiled pool follows this number; the numpy reference ignores it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from barefoot.core.errors import InvalidInput

MAX_THREADS = 256

_n_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
_listener: Callable[[int], None] | None = None


def get() -> int:
    """The number of threads in use; at first the cores this process may run on."""
    return _n_threads


def set_threads(n: int) -> None:
    """Use ``n`` threads (1 to 256), the caller's included, from the next op on."""
    global _n_threads
    if not 1 <= n <= MAX_THREADS:
        raise InvalidInput(f"threads must be 1 to {MAX_THREADS}, got {n}")
    _n_threads = n
    if _listener is not None:
        _listener(n)


def on_change(listener: Callable[[int], None]) -> None:
    """Call ``listener`` with the number of threads, now and whenever it changes."""
    global _listener
    _listener = listener
    listener(_n_threads)


def loaded_openmp() -> int | None:
    """The address of ``GOMP_parallel`` where this process has loaded GNU's OpenMP, as PyTorch does on Linux."""
    with contextlib.suppress(OSError, AttributeError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.partition("/")[2]
            if path.rpartition("/")[2].startswith("libgomp"):
                return ctypes.cast(ctypes.CDLL(f"/{path}").GOMP_parallel, ctypes.c_void_p).value
    return None
