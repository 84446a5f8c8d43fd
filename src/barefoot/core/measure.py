"""Instruments: what memory a process, a phase or a set of arrays really takes. One result record for all of them.

============  ================================================  ==================================================
what          instrument                                        beware
============  ================================================  ==================================================
process       :func:`resident`, :func:`peak_resident`           file-backed pages are apart: a mapped file that is
                                                                read counts, and the kernel may take it back
addresses     :func:`resident_at`                               exact; a page that was only ever read counts too
phase         :class:`PhaseMeter`                               resets the kernel's high-water mark where it can
numpy         :class:`TracedPeak`                               slow; sees Python's and numpy's allocations only
stored state  :func:`storage_bytes`                             counts distinct storages: views and ties once, and a
                                                                view's hidden base whole
fresh child   :func:`run_limited`                               a memory cgroup where one can be made (root)
============  ================================================  ==================================================

Linux keeps a process's resident counts in per-CPU batches of max(32, 2 × CPUs) pages, so a single reading may be off by
:data:`COUNTER_SLACK`. ``ru_maxrss`` is KiB on Linux and bytes on macOS; Windows has neither. What can't be measured is
None, never 0.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

KEPT_FREE = 2  # times what ``return_freed_memory`` is told
_STATUS = Path("/proc/self/status")
_PAGEMAP = Path("/proc/self/pagemap")
_HIGHEST_BIT = bytes(byte >> 7 for byte in range(256))
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CGROUP_V1 = Path("/sys/fs/cgroup/memory")

_CPUS = os.cpu_count() or 1
COUNTER_SLACK = max(32, 2 * _CPUS) * 4096 * _CPUS
"""Bytes by which the kernel's resident counters may lag behind."""


@dataclass(frozen=True)
class Resident:
    """Bytes of this process in physical memory: its own, backed by files, shared, and the sum."""

    anonymous: int
    file: int
    shared: int

    @property
    def total(self) -> int:
        return self.anonymous + self.file + self.shared


def _status_field(name: str) -> int | None:
    if not _STATUS.exists():
        return None
    match = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(match.group(1)) << 10 if match else None


def resident() -> Resident | None:
    """What is resident now; None where the system does not tell (only Linux does, apart by kind)."""
    fields = [_status_field(name) for name in ("RssAnon", "RssFile", "RssShmem")]
    if any(field is None for field in fields):
        return None
    anonymous, file, shared = (field or 0 for field in fields)
    return Resident(anonymous, file, shared)


def resident_at(address: int, n_bytes: int) -> int | None:
    """Bytes of the pages in these addresses that are in physical memory; None where the system does not tell."""
    if not _PAGEMAP.exists():
        return None
    size = mmap.PAGESIZE
    first, stop = address // size, -(-(address + n_bytes) // size)
    with _PAGEMAP.open("rb", buffering=0) as file:  # 64 bits a page, the highest one set where it is present
        file.seek(8 * first)
        entries = file.read(8 * (stop - first))
    return size * entries[7::8].translate(_HIGHEST_BIT).count(1)


def peak_resident() -> int | None:
    """The most that was ever resident in this process, in bytes, since its start or the last reset."""
    peak = _status_field("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:
        return None
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(usage if sys.platform == "darwin" else usage << 10)


def reset_peak() -> bool:
    """Let :func:`peak_resident` start again from what is resident now; False where the kernel does not offer it."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def release_free_memory() -> None:
    """Give the C allocator's free pages back to the system, so that freed memory leaves the resident set (glibc)."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError, TypeError):  # Windows: a library without a name is no string
        ctypes.CDLL(None).malloc_trim(0)


def return_freed_memory(at_once: int = 256 << 10) -> None:
    """Let the C allocator (glibc) return arrays of ``at_once`` bytes and more as soon as they are freed, and the end of
    the heap that smaller ones live in, beyond ``KEPT_FREE`` times as much.

    By itself it learns from the first ones to keep such memory, and what a process then has resident at its peak
    depends on all that it did before. What is returned must be made resident again: at 256 KiB that takes a third more
    time where matrices of 2,048 columns are solved, at 3 MiB nothing. Free memory before the heap's end stays.
    """
    import ctypes

    trim_threshold, mmap_threshold = -1, -3  # of malloc.h; to set them also ends its learning
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, at_once)
        libc.mallopt(trim_threshold, KEPT_FREE * at_once)


@dataclass(frozen=True)
class Measurement:
    """One result of one instrument, in bytes. ``before`` is what was there when the phase began."""

    instrument: str
    before: int
    peak: int

    @property
    def added(self) -> int:
        """Bytes on top of what was there: the figure that a prediction is held against."""
        return self.peak - self.before


class PhaseMeter:
    """Peak resident memory of a ``with`` block, from the kernel's high-water mark (never by polling).

    ``result`` is None after the block where the mark can't be reset, because a peak that may be an earlier one's is
    no measurement.
    """

    def __init__(self) -> None:
        self.result: Measurement | None = None

    def __enter__(self) -> PhaseMeter:
        self._reset = reset_peak()
        now = resident()
        self._before = now.total if now else 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        peak = peak_resident()
        if self._reset and peak is not None:
            self.result = Measurement("VmHWM", self._before, max(peak, self._before))


class TracedPeak:
    """Peak of Python's and numpy's own allocations in a ``with`` block, to the byte (tracemalloc)."""

    def __init__(self) -> None:
        self.result: Measurement | None = None

    def __enter__(self) -> TracedPeak:
        self._outermost = not tracemalloc.is_tracing()
        if self._outermost:
            tracemalloc.start()
        tracemalloc.reset_peak()
        self._before = tracemalloc.get_traced_memory()[0]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.result = Measurement("tracemalloc", self._before, tracemalloc.get_traced_memory()[1])
        if self._outermost:
            tracemalloc.stop()


def _storage(array: Any) -> tuple[int, int]:
    """(identity, bytes) of the memory that keeps ``array`` alive: a view's whole base, a tensor's whole storage."""
    if hasattr(array, "untyped_storage"):
        storage = array.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    base = array
    while getattr(base, "base", None) is not None and hasattr(base.base, "nbytes"):
        base = base.base
    return (id(base.obj), base.nbytes) if isinstance(base, memoryview) else (id(base), base.nbytes)


def storage_bytes(arrays: Iterable[Any]) -> int:
    """Bytes of the distinct storages behind numpy arrays or torch tensors.

    Two views of one array count once, and a small view of a large array counts as the large array, since that is what
    stays allocated.
    """
    return sum(dict(_storage(array) for array in arrays).values())


@dataclass(frozen=True)
class LimitedRun:
    """How a child process ended under a limit. ``peak_bytes`` is the cgroup's own maximum, page cache included."""

    returncode: int
    stdout: str
    stderr: str
    limit_bytes: int
    peak_bytes: int
    n_limit_hits: int

    @property
    def killed(self) -> bool:
        return self.returncode in (-9, 137)


def cgroup_reason() -> str | None:
    """Why :func:`run_limited` can't enforce a limit on this machine, or None when it can."""
    if not (_CGROUP_V1 / "memory.limit_in_bytes").exists():
        return f"no memory cgroup (v1) at {_CGROUP_V1}"
    if not os.access(_CGROUP_V1, os.W_OK) or os.geteuid() != 0:
        return "making a memory cgroup needs root"
    return None


@contextlib.contextmanager
def _cgroup(limit_bytes: int) -> Iterator[Path]:
    folder = _CGROUP_V1 / f"barefoot-{os.getpid()}-{os.urandom(4).hex()}"
    folder.mkdir()
    try:
        (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield folder
    finally:
        _remove(folder)


def _remove(cgroup: Path, seconds: float = 30.0) -> None:
    """A process that was killed still belongs to its cgroup for a while."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return cgroup.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def run_limited(command: Sequence[str], limit_bytes: int, **kwargs: Any) -> LimitedRun:
    """Run ``command`` in a new process inside a memory cgroup of ``limit_bytes``, which the kernel enforces.

    The child joins the cgroup before it executes, so all of its memory is charged. ``kwargs`` go to
    :class:`subprocess.Popen`.

    Raises
    ------
    RuntimeError : no cgroup can be made here; ask :func:`cgroup_reason` first.
    """
    reason = cgroup_reason()
    if reason is not None:
        raise RuntimeError(reason)
    with _cgroup(limit_bytes) as folder:
        join = f'echo $$ > "{folder}/cgroup.procs" && exec "$@"'
        done = subprocess.run(["/bin/sh", "-c", join, "sh", *command], capture_output=True, text=True, **kwargs)
        return LimitedRun(
            done.returncode,
            done.stdout,
            done.stderr,
            limit_bytes,
            int((folder / "memory.max_usage_in_bytes").read_text()),
            int((folder / "memory.failcnt").read_text()),
        )
