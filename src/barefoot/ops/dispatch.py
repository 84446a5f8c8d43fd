"""Which layout decodes fastest here: measured once per machine and kept in the cache folder, beside the device probe.

Three layouts hold the same bytes: ``rows`` as in the file, ``panels`` (:mod:`barefoot.ops.panels`) and ``lut``
(:mod:`barefoot.ops.lut`). Which multiplies one token faster depends on the bits of a code, on whether the matrix stays
in the cache, on the instruction set and on the threads, so it is measured: each of ``KINDS`` (a format for each number
of bits) at two shapes, one that a core's own cache holds and one that it doesn't.

File ``layouts.json``: ``{"version", "machine", "backend", "threads", "seconds": {kind: {size: {layout: seconds}}}}``.
Anything that doesn't match this process is measured again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core import device
from barefoot.ops import blocks, lut, panels

VERSION = 1
KINDS = {
    "1": "int1_g128_asym",
    "2": "int2_g64_asym",
    "2, no minimum": "ternary_g128",
    "3": "int3_g64_asym",
    "4": "int4_g32_asym",
    "4, no minimum": "q4_0",
    "5": "q5_0",
    "8": "q8_0",
}
SHAPES = {"small": (576, 1536), "large": (4096, 4096)}  # rows, columns
SMALL_WEIGHTS = 2 << 20  # up to so many weights a matrix counts as small
COPIES_BYTES = 32 << 20  # of a large matrix in rotation, at most 3 copies
REPEATS = {"small": 48, "large": 12}

Seconds = dict[str, dict[str, dict[str, float]]]
Timer = Callable[[Callable[[], None]], float]


def layouts_of(format_id: str, n_rows: int, n_cols: int) -> tuple[str, ...]:
    """The layouts that a matrix of that format and shape can have; ``rows`` is always among them."""
    found = {"panels": panels, "lut": lut}
    return ("rows", *(name for name, layout in found.items() if layout.supports(format_id, n_rows, n_cols)))


def choose(format_id: str, n_rows: int, n_cols: int, table: Mapping[str, Any] | None = None) -> str:
    """The fastest layout for decoding with that matrix: rows, panels or lut.

    ``table`` is what :func:`measure` returned; by default the one kept for this machine. Without any, panels where they
    exist.
    """
    possible = layouts_of(format_id, n_rows, n_cols)
    kind = _kind(format_id)
    table = cached() if table is None else table
    if len(possible) == 1:
        return possible[0]
    if table is None or kind is None:
        return "panels" if "panels" in possible else "rows"
    seconds = table["seconds"][kind]["small" if n_rows * n_cols <= SMALL_WEIGHTS else "large"]
    return min(possible, key=lambda layout: seconds.get(layout, float("inf")))


def _kind(format_id: str) -> str | None:
    group = blocks.lookup(format_id).group
    if group is None:
        return None
    alone = f"{group.bits}, no minimum"
    return alone if alone in KINDS and not group.has_minimum else str(group.bits)


def cached() -> dict[str, Any] | None:
    """The table of this machine, these kernels and this number of threads; None if there is none."""
    try:
        table = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(table, dict) and all(table.get(key) == value for key, value in _identity().items())
    return table if same else None


def path() -> Path:
    return device.cache_folder() / "layouts.json"


def _identity() -> dict[str, Any]:
    machine = {"machine": device.machine_id(), "backend": ops.backend(), "threads": ops.n_threads()}
    return {"version": VERSION, **machine, "kinds": list(KINDS.values())}


def measure(timer: Timer | None = None) -> dict[str, Any]:
    """Time every kind, size and layout (under 2 s), keep the table and return it. ``timer(work)`` returns seconds."""
    seconds: Seconds = {}
    for kind, format_id in KINDS.items():
        seconds[kind] = {}
        for size, (n_rows, n_cols) in SHAPES.items():
            seconds[kind][size] = _race(format_id, n_rows, n_cols, REPEATS[size], timer or _elapsed)
    table = {**_identity(), "seconds": seconds}
    path().parent.mkdir(parents=True, exist_ok=True)
    temporary = path().with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(table, indent=1), encoding="utf-8")
    temporary.replace(path())
    return table


def _elapsed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _race(format_id: str, n_rows: int, n_cols: int, repeats: int, timer: Timer) -> dict[str, float]:
    """Seconds of the fastest of ``repeats`` products with one token, for each layout, taken in turns.

    The time of a product depends on neither the codes nor their order, so that one buffer with finite scales serves
    every layout.
    """
    n_bytes = n_rows * blocks.row_bytes(format_id, n_cols)
    n_copies = max(1, min(3, COPIES_BYTES // n_bytes))
    buffers = [np.full(n_bytes, 0x15, np.uint8) for _ in range(n_copies)]
    layouts = layouts_of(format_id, n_rows, n_cols)
    weights = {
        layout: [ops.PackedWeight(format_id, n_rows, n_cols, each, layout) for each in buffers] for layout in layouts
    }
    x: npt.NDArray[np.float32] = np.ones((1, n_cols), np.float32)
    out = np.empty((1, n_rows), np.float32)
    scratch = np.empty(ops.matmul_scratch_bytes(1, n_cols, looks_up=True), np.uint8)
    best = dict.fromkeys(layouts, float("inf"))
    for i in range(repeats):
        for layout in layouts:
            weight = weights[layout][i % n_copies]
            best[layout] = min(best[layout], timer(lambda w=weight: ops.matmul(x, [w], [out], scratch=scratch)))  # type: ignore[misc]
    return best
