"""Which format each matrix of a model gets, so that the whole takes so many bytes and predicts as well as it can."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from barefoot.core.model import ModelSpec, WeightSpec
from barefoot.engine.sensitivity import Sensitivity, probe_of, rounded, sensitivity
from barefoot.engine.source import Source
from barefoot.io.files import atomic_writer
from barefoot.ops import blocks
from barefoot.ops.grids import Nested, Uniform
from barefoot.weights.allocate import Option, allocate
from barefoot.weights.solvers import solve_groups
from barefoot.weights.solvers.mse import least_error

F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
Progress = Callable[[int, int, str], None]  # matrices done, in all, and which is next

SAMPLE = 8, 32  # of a matrix's rows, on which formats' errors are compared: so many runs of so many
MOST_BITS = 9.0  # a weight: what is finer than this is not worth its bytes before float formats


def candidates() -> tuple[str, ...]:
    """The formats that are chosen among: integers of 2 bits and more, in groups with a scale of their own or a share in
    a block's. Levels that are not uniform gain less than finer groups of these do."""
    uniform = (name for name in blocks.names() if isinstance(blocks.lookup(name).grid, Uniform | Nested))
    return tuple(name for name in uniform if 2 <= blocks.bits_per_weight(name) <= MOST_BITS)


def options(
    source: Source, found: Sensitivity, formats: Sequence[str], progress: Progress | None = None
) -> dict[str, list[Option]]:
    """For each matrix the formats that it can have, with their bytes and what they cost in nats a token.

    A format's error, of the best ranges for its inputs, is compared with that of the probe on some of the rows.
    """
    report = progress or (lambda done, total, label: None)
    result: dict[str, list[Option]] = {}
    for done, (name, cost) in enumerate(sorted(found.cost.items())):
        report(done, len(found.cost), f"comparing formats of {name}")
        weight = source.weights[name]
        sample = _sample(source, weight)
        squares = found.squares.get(name)
        importance = np.ones(weight.cols, np.float32) if squares is None else squares
        unit = cost / max(_squared(rounded(sample, probe_of(weight.cols)) - sample, importance), 1e-30)
        result[name] = [
            Option(weight.rows * blocks.row_bytes(fmt, weight.cols), unit * _error(sample, fmt, importance), fmt)
            for fmt in formats
            if weight.cols % blocks.block_elements(fmt) == 0
        ]
    return result


def measured_options(
    source: Source, spec: ModelSpec, probes: Ids, kept: Path, progress: Progress | None = None
) -> dict[str, list[Option]]:
    """``options`` among all ``candidates`` by what ``sensitivity`` measures on ``probes``, int32 (n_windows, window).

    The file ``kept`` holds what was measured so far, and an interrupted call goes on with it.
    """
    key = [probes.tolist(), source.key]
    known: dict[str, float] = {}
    if kept.is_file():
        content = json.loads(kept.read_text())
        known = content["cost"] if content["key"] == key else {}

    def keep(cost: Mapping[str, float]) -> None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(kept) as file:
            file.write(json.dumps({"key": key, "cost": dict(cost)}).encode())

    return options(source, sensitivity(source, spec, probes, known, keep, progress), candidates(), progress)


def choose(spec: ModelSpec, choices: Mapping[str, Sequence[Option]], budget_bytes: int) -> dict[str, Option]:
    """The format of each matrix, at the least cost within ``budget_bytes`` for all weights, float32 vectors included.

    Raises
    ------
    OverBudget : even the smallest formats don't fit.
    """
    return allocate(choices, budget_bytes - vector_bytes(spec))


def vector_bytes(spec: ModelSpec) -> int:
    """Of norms and biases, which fits store in float32."""
    return sum(4 * w.n_elements for w in spec.weights if w.group == "norm")


def _sample(source: Source, weight: WeightSpec) -> F32:
    runs, length = SAMPLE
    if weight.rows <= runs * length:
        return source.floats(weight.name)
    starts = np.linspace(0, weight.rows - length, runs).astype(int)
    return np.concatenate([source.floats(weight.name, int(start), length) for start in starts])


def _error(sample: F32, format_id: str, importance: F32) -> float:
    grid = blocks.lookup(format_id).grid
    assert grid is not None
    solution = solve_groups(sample, grid, least_error(sample, grid, importance))
    return _squared(solution.weights(grid) - sample, importance)


def _squared(error: F32, importance: F32) -> float:
    return float(np.einsum("rc,rc,c->", error, error, importance))
