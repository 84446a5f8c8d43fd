"""Which layout is fastest here: measured once per machine and kept in the cache folder, beside the device probe.

Three layouts hold the same bytes: ``rows`` as in the file, ``panels`` (:mod:`barefoot.ops.panels`) and ``lut``
(:mod:`barefoot.ops.lut`). Which is faster depends on the bits of a code, on whether the matrix stays in the cache, on
the instruction set and on the threads, so it is measured: each of ``KINDS`` (a format for each number of bits) at two
shapes, one that a core's own cache holds and one that it doesn't; one token, and a prompt of ``PROMPT_TOKENS``, which
other kernels multiply. A layout's time is that of an answer's token and a prompt's token together.

A *class* of matrices is ``"kind/size"``, such as ``"2-sym/large"``: what :func:`faster` says where to leave the panels,
what the planner states in a plan, and what the engine places weights by (:func:`choose`).

File ``layouts.json``: ``{"version", "machine", "backend", "threads", "seconds", "prompt_seconds"}``, the last two
``{kind: {size: {layout: seconds a token}}}``. Anything that doesn't match this process is measured again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core import device
from barefoot.core.errors import InvalidInput
from barefoot.ops import blocks, lut, panels

Layout = Literal["rows", "panels", "lut"]

VERSION = 2
KINDS = {
    "1": "int1_g128_asym",
    "2": "int2_g64_asym",
    "2-sym": "ternary_g128",
    "3": "int3_g64_asym",
    "4": "int4_g32_asym",
    "4-sym": "q4_0",
    "5": "q5_0",
    "8": "q8_0",
}  # -sym: without minimums
SHAPES = {"small": (576, 1536), "large": (4096, 4096)}  # rows, columns
SMALL_WEIGHTS = 2 << 20  # up to so many weights a matrix counts as small
COPIES_BYTES = 32 << 20  # of a large matrix in rotation, at most 3 copies
REPEATS = {"small": 48, "large": 12}
PROMPT_TOKENS = 32
PROMPT_REPEATS = {"small": 6, "large": 3}
MARGIN = 0.95  # of the panels' time: what is not clearly faster stays in panels

Timer = Callable[[Callable[[], None]], float]


def layouts_of(format_id: str, n_rows: int, n_cols: int) -> tuple[Layout, ...]:
    """The layouts that a matrix of that format and shape can have; ``rows`` is always among them, ``panels`` next."""
    has_panels, has_lut = panels.supports(format_id, n_rows, n_cols), lut.supports(format_id, n_rows, n_cols)
    return ("rows", *(("panels",) if has_panels else ()), *(("lut",) if has_lut else ()))


def choose(format_id: str, n_rows: int, n_cols: int, layouts: Mapping[str, Layout]) -> Layout:
    """The layout of a matrix: what ``layouts`` says of its class if it can have it, else panels if they exist."""
    possible = layouts_of(format_id, n_rows, n_cols)
    wanted = layouts.get(class_of(format_id, n_rows, n_cols) or "")
    return wanted if wanted in possible else "panels" if "panels" in possible else "rows"


def class_of(format_id: str, n_rows: int, n_cols: int) -> str | None:
    """The class whose measurement counts for that matrix; None for those that none of ``KINDS`` stands for."""
    group = blocks.lookup(format_id).group
    if group is None or not group.is_affine:
        return None
    alone = f"{group.bits}-sym"
    kind = alone if alone in KINDS and not group.has_minimum else str(group.bits)
    return f"{kind}/{'small' if n_rows * n_cols <= SMALL_WEIGHTS else 'large'}"


def faster(table: Mapping[str, Any] | None) -> dict[str, Layout]:
    """Class → layout, of those that :func:`measure` found clearly faster otherwise than in panels; {} without a table.

    A matrix for which that layout does not exist stays in panels, so only one that is faster than these counts.
    """
    found: dict[str, Layout] = {}
    for kind, sizes in (table or {"seconds": {}})["seconds"].items():
        for size, seconds in sizes.items():
            total = {layout: s + table["prompt_seconds"][kind][size][layout] for layout, s in seconds.items()}  # type: ignore[index]
            best = min(total, key=total.__getitem__)
            if total[best] < MARGIN * total["panels"]:
                found[f"{kind}/{size}"] = best
    return found


def parse_layouts(text: str) -> dict[str, Layout]:
    """Class → layout from ``"2-sym/large=lut 3/small=rows"``; ``"panels"``: none.

    Raises
    ------
    InvalidInput : unreadable, or an unknown class or layout.
    """
    classes = [f"{kind}/{size}" for kind in KINDS for size in SHAPES]
    found: dict[str, Layout] = {}
    for part in text.split() if text.strip() != "panels" else ():
        name, _, layout = part.partition("=")
        if name not in classes or layout not in get_args(Layout):
            raise InvalidInput(
                f"can't read the layouts {text!r}",
                cure=f'write "panels", or "2/large=lut 3/small=rows" with classes among {", ".join(classes)}',
            )
        found[name] = layout  # type: ignore[assignment]
    return found


def format_layouts(layouts: Mapping[str, Layout]) -> str:
    """The text that ``parse_layouts`` reads back."""
    return " ".join(f"{name}={layout}" for name, layout in sorted(layouts.items())) or "panels"


def cached(n_threads: int | None = None) -> dict[str, Any] | None:
    """The table of this machine, these kernels and ``n_threads`` (None: the current number); None if there is none."""
    try:
        table = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(table, dict) and all(table.get(key) == value for key, value in _identity(n_threads).items())
    return table if same else None


def path() -> Path:
    return device.cache_folder() / "layouts.json"


def _identity(n_threads: int | None = None) -> dict[str, Any]:
    threads = ops.n_threads() if n_threads is None else n_threads
    machine = {"machine": device.machine_id(), "backend": ops.backend(), "threads": threads}
    return {"version": VERSION, **machine, "kinds": list(KINDS.values())}


def measure(timer: Timer | None = None) -> dict[str, Any]:
    """Time every kind, size and layout (about 3 s), keep the table and return it. ``timer(work)`` returns seconds."""
    seconds, prompt_seconds = (
        {
            kind: {
                size: _race(format_id, *shape, n_tokens, repeats[size], timer or _elapsed)
                for size, shape in SHAPES.items()
            }
            for kind, format_id in KINDS.items()
        }
        for n_tokens, repeats in ((1, REPEATS), (PROMPT_TOKENS, PROMPT_REPEATS))
    )
    table = {**_identity(), "seconds": seconds, "prompt_seconds": prompt_seconds}
    path().parent.mkdir(parents=True, exist_ok=True)
    temporary = path().with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(table, indent=1), encoding="utf-8")
    temporary.replace(path())
    return table


def _elapsed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _race(format_id: str, n_rows: int, n_cols: int, n_tokens: int, repeats: int, timer: Timer) -> dict[Layout, float]:
    """Seconds a token of the fastest of ``repeats`` products with ``n_tokens``, for each layout, taken in turns.

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
    x: npt.NDArray[np.float32] = np.ones((n_tokens, n_cols), np.float32)
    out = np.empty((n_tokens, n_rows), np.float32)
    scratch = np.empty(ops.matmul_scratch_bytes(n_tokens, n_cols, looks_up=True), np.uint8)
    best = dict.fromkeys(layouts, float("inf"))
    for i in range(repeats):
        for layout in layouts:
            weight = weights[layout][i % n_copies]
            best[layout] = min(best[layout], timer(lambda w=weight: ops.matmul(x, [w], [out], scratch=scratch)))  # type: ignore[misc]
    return {layout: each / n_tokens for layout, each in best.items()}
