"""The instruments, held against allocations of known size."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from barefoot.core import measure
from barefoot.core.mapping import map_private
from barefoot.core.units import MIB

SLACK = 2 * measure.COUNTER_SLACK  # of a difference between two readings
needs_cgroup = pytest.mark.skipif(measure.cgroup_reason() is not None, reason=str(measure.cgroup_reason()))
needs_linux = pytest.mark.skipif(measure.resident() is None, reason="this system does not tell resident memory by kind")


def touched(n_bytes: int) -> np.ndarray:
    """Fresh pages from the system: malloc would reuse what an earlier test gave back."""
    array = np.frombuffer(mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    array[::4096] = 1
    return array


@needs_linux
def test_phase_meter_sees_a_freed_allocation():
    with measure.PhaseMeter() as meter:
        block = touched(64 * MIB)
        del block
    assert meter.result is not None
    assert 64 * MIB - SLACK <= meter.result.added <= 65 * MIB


@needs_linux
def test_phase_meter_forgets_the_peak_before_it():
    block = touched(96 * MIB)
    del block
    with measure.PhaseMeter() as meter:
        small = touched(16 * MIB)
        del small
    assert meter.result is not None
    assert 16 * MIB - SLACK <= meter.result.added <= 17 * MIB


@needs_linux
def test_resident_tells_anonymous_from_file_pages(tmp_path):
    path = tmp_path / "mapped"
    path.write_bytes(b"\1" * (32 * MIB))
    before = measure.resident()
    mapped = np.memmap(path, np.uint8, "r")
    assert int(mapped[::4096].sum()) == 32 * MIB // 4096
    after = measure.resident()
    assert before is not None
    assert after is not None
    assert after.file - before.file == pytest.approx(32 * MIB, abs=MIB)
    assert abs(after.anonymous - before.anonymous) < 2 * MIB


@needs_linux
def test_resident_pages_of_addresses_are_exact():
    """Of 64 pages eight are written and one is read; half of them are given back."""
    mapping = map_private(64 * mmap.PAGESIZE, "MADV_NOHUGEPAGE", promised=False)
    pages = np.frombuffer(mapping, np.uint8).reshape(64, mmap.PAGESIZE)
    sizes = [measure.resident_at(pages.ctypes.data, pages.nbytes)]
    pages[::8, 5] = 1
    sizes.append(measure.resident_at(pages.ctypes.data, pages.nbytes))
    assert pages[3, 0] == 0
    sizes.append(measure.resident_at(pages.ctypes.data, pages.nbytes))
    mapping.madvise(mmap.MADV_DONTNEED, 0, 32 * mmap.PAGESIZE)
    sizes.append(measure.resident_at(pages.ctypes.data, pages.nbytes))
    assert sizes == [n * mmap.PAGESIZE for n in (0, 8, 9, 4)]
    assert measure.resident_at(pages[32].ctypes.data, 1) == mmap.PAGESIZE
    assert measure.resident_at(pages[33].ctypes.data, 7 * mmap.PAGESIZE) == 0
    assert not pages[:32].any()


def test_traced_peak_is_exact_but_for_a_constant():
    with measure.TracedPeak() as meter:
        block = np.empty(64 * MIB, np.uint8)
        del block
    assert meter.result is not None
    assert 64 * MIB <= meter.result.added <= 64 * MIB + 4096


def test_storage_bytes_counts_storages_not_shapes():
    base = np.zeros((1000, 8), np.float32)
    assert measure.storage_bytes([base]) == 32_000
    assert measure.storage_bytes([base, base[:10], base.T]) == 32_000
    assert measure.storage_bytes([base[:, :1]]) == 32_000
    assert measure.storage_bytes([base, base.copy()]) == 64_000


def test_storage_bytes_sees_a_buffer_behind_views():
    buffer = bytearray(5000)
    views = [np.frombuffer(buffer, np.uint8, 100, offset) for offset in (0, 100)]
    assert measure.storage_bytes(views[:1]) == measure.storage_bytes([views[0][:5]])


@needs_cgroup
def test_cgroup_kills_what_exceeds_it_and_spares_what_does_not():
    code = "b = bytearray({} << 20); b[::4096] = b'1' * len(b[::4096])"
    small = measure.run_limited([sys.executable, "-c", code.format(32)], 64 * MIB)
    large = measure.run_limited([sys.executable, "-c", code.format(96)], 64 * MIB)
    assert (small.returncode, small.killed) == (0, False)
    assert 32 * MIB <= small.peak_bytes <= 64 * MIB
    assert large.killed


@needs_cgroup
def test_a_cgroup_goes_when_the_last_of_its_processes_does():
    done = measure.run_limited(["sh", "-c", "sleep 0.5 > /dev/null 2>&1 &"], 64 * MIB)
    assert done.returncode == 0
    assert not list(Path("/sys/fs/cgroup/memory").glob(f"barefoot-{os.getpid()}-*"))


@needs_linux
def test_peak_resident_of_a_fresh_process():
    code = (
        "from barefoot.core import measure; r = measure.resident().total; b = bytearray(80 << 20); "
        "b[::4096] = b'1' * len(b[::4096]); del b; print(measure.peak_resident() - r)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 80 * MIB - SLACK <= int(out) <= 82 * MIB
