"""Measuring this machine, once: memory bandwidth, arithmetic, disk, and what a run's own libraries keep resident.

Each measurement runs in a child process (``python -m barefoot.core.probe WHAT``), so that the caller's peak memory
stays what it was, and a child that is killed for want of memory leaves its numbers out instead of ending the caller.
:func:`probe` stores the result beside the model cache; :mod:`barefoot.core.device` reads it.
"""

from __future__ import annotations

import datetime
import importlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from barefoot.core import device
from barefoot.core.measure import resident
from barefoot.core.units import MIB

BLOCK_BYTES = 1 * MIB
SCAN_BYTES = 256 * MIB  # several times any last-level cache that is shared among few cores
FILE_BYTES = 128 * MIB
SECONDS_EACH = 1.0  # of measuring, a number


def _best_rate(work: Callable[[], object], amount: float, seconds: float = SECONDS_EACH) -> float:
    """Amount a second of the fastest repetition: what the machine can do when nothing else disturbs it."""
    best, end = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        work()
        now = time.perf_counter()
        best = max(best, amount / (now - start))
        if now >= end:
            return best


def _in_threads(work: Callable[[int], object], n_threads: int) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure_compute() -> dict[str, float]:
    """Read bandwidth with one thread and with all (10^9 bytes a second), f32 operations a second.

    Reading is a matrix-vector product whose vector stays in cache; arithmetic is a product of square matrices. Both
    leave numpy's interpreter lock, so that Python threads run side by side.
    """
    import numpy as np

    n_threads = device.usable_threads()
    size = min(SCAN_BYTES, device.available_memory()[0] // 4)
    columns = 4096
    rows = max(n_threads, size // (4 * columns))
    matrix = np.ones((rows, columns), np.float32)
    vector = np.ones(columns, np.float32)
    parts = np.array_split(matrix, n_threads)
    side = 768
    left = np.ones((side, side), np.float32)

    def square(_: int) -> None:
        for _ in range(4):
            np.matmul(left, left)

    return {
        "read_gb_s_one_thread": _best_rate(lambda: matrix @ vector, matrix.nbytes) / 1e9,
        "read_gb_s_all_threads": _best_rate(lambda: _in_threads(lambda i: parts[i] @ vector, n_threads), matrix.nbytes)
        / 1e9,
        "f32_ops": _best_rate(lambda: _in_threads(square, n_threads), 4 * n_threads * 2 * side**3),
    }


def measure_kernels() -> dict[str, float]:
    """What the engine's own products reach with all threads: 8-bit operations a second of a chunk of tokens on 4-bit
    weights, and the seconds of a product so small that only its call counts."""
    import numpy as np

    ops = importlib.import_module("barefoot.ops")  # by name: a process of its own, not a part of this layer
    ops.set_threads(device.usable_threads())

    def product(n_tokens: int, side: int) -> Callable[[], object]:
        weight = ops.PackedWeight("q4_0", side, side, np.ones(side * side // 32 * 18, np.uint8), layout="panels")
        x, out = np.ones((n_tokens, side), np.float32), np.empty((n_tokens, side), np.float32)
        scratch = np.empty(ops.matmul_scratch_bytes(n_tokens, side, "int8"), np.uint8)
        return lambda: ops.matmul(x, [weight], [out], activations="int8", scratch=scratch)

    n_tokens, side = 128, 1024
    return {
        "int8_ops": _best_rate(product(n_tokens, side), 2 * n_tokens * side**2),
        "op_seconds": 1 / _best_rate(product(1, 64), 1, 0.2),
    }


def measure_disk(file: Path | None = None) -> dict[str, Any]:
    """Sequential reads of 1 MiB past the page cache, 10^9 bytes a second, of ``file`` or of a temporary one.

    The temporary file lies in the cache folder, where models are, and is removed. Where the system can't bypass its
    cache for the file, the number is left out.
    """
    if not hasattr(os, "O_DIRECT"):
        return {}
    if file is not None:
        return _read_past_cache(file)
    folder = device.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="probe-") as temporary:
        block = os.urandom(BLOCK_BYTES)  # not compressible, so that no layer below can cheat
        for _ in range(FILE_BYTES // BLOCK_BYTES):
            temporary.write(block)
        temporary.flush()
        os.fsync(temporary.fileno())
        return _read_past_cache(Path(temporary.name))


def _read_past_cache(file: Path) -> dict[str, Any]:
    n_blocks = min(file.stat().st_size, FILE_BYTES) // BLOCK_BYTES
    if not n_blocks:
        return {}
    try:
        handle = os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # a file system without direct reads
        return {}
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as block:  # page-aligned, as direct reads require

            def read_all() -> None:
                for i in range(n_blocks):
                    os.preadv(handle, [block], i * BLOCK_BYTES)

            return {"disk_gb_s": _best_rate(read_all, n_blocks * BLOCK_BYTES) / 1e9}
    except OSError:
        return {}
    finally:
        os.close(handle)


def measure_reserved() -> dict[str, int]:
    """Resident bytes of a process that has imported and warmed up all that a run needs, before it runs anything."""
    # By name: this is a process of its own that does what the layers above do, not a part of this layer.
    importlib.import_module("barefoot.plan.warm").warm_up()
    now = resident()
    return {} if now is None else {"reserved_bytes": now.total}


_MEASUREMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "compute": measure_compute,
    "kernels": measure_kernels,
    "disk": measure_disk,
    "reserved": measure_reserved,
}


def _in_child(what: str) -> dict[str, Any]:
    """The numbers of one measurement; none when the child failed, for instance for want of memory."""
    environment = dict(os.environ)
    if what == "compute":  # one thread for each product: the probe makes its own threads
        environment |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    source = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, "-m", __name__ if __name__ != "__main__" else "barefoot.core.probe", what],
        capture_output=True,
        env={**environment, "PYTHONPATH": path},
        timeout=60,
        check=False,
    )
    try:
        data = json.loads(result.stdout)
    except ValueError:
        return {}
    return data if result.returncode == 0 and isinstance(data, dict) else {}


def probe() -> dict[str, Any]:
    """Measure this machine (under 10 s) and keep the result; returns it.

    Numbers that could not be measured are missing, and whoever reads the result then uses stated defaults.
    """
    result: dict[str, Any] = {
        "version": device.PROBE_VERSION,
        "machine": device.machine_id(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
    for what in _MEASUREMENTS:
        result |= _in_child(what)
    path = device.probe_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
    temporary.replace(path)
    return result


if __name__ == "__main__":
    json.dump(_MEASUREMENTS[sys.argv[1]](), sys.stdout)
