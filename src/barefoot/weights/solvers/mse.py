"""mse — ranges of least squared error, plain or weighted by the inputs that the weights will meet.

A Survey of Quantization Methods for Efficient Neural Network Inference (Gholami et al. 2021, arXiv:2103.13630), section
III.C: calibration by the mean squared error. With ``weighted`` a column counts as its inputs' mean square does, the
diagonal of the Hessian of the product's error, as importance matrices do for GGUF files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from barefoot.ops.grids import F32, Grid
from barefoot.weights.solvers import Inputs, Knowledge, Solution, Solver, repeated, solve_groups

SHRINKS = np.linspace(1.0, 0.45, 12, dtype=np.float32)  # of the range
REFITS = 2  # least-squares steps behind the search


@dataclass(frozen=True)
class Mse(Solver, name="mse", papers=(14,), status="stable"):
    weighted: bool = False

    @property
    def wants(self) -> Knowledge:  # type: ignore[override]
        return "squares" if self.weighted else "nothing"

    def solve(self, weight: F32, grid: Grid, inputs: Inputs | None) -> Solution:
        x = weight.reshape(-1, grid.group)
        importance = None
        if self.weighted:
            assert inputs is not None
            importance = repeated(inputs.squares, len(weight), grid.group)
        return solve_groups(weight, grid, least_error(grid, x, importance))


def least_error(grid: Grid, x: F32, importance: F32 | None = None) -> F32:
    """Parameters of least squared error for groups ``x`` (n, group), elements counting as ``importance`` says.

    Tries shrunken ranges, then alternates rounding and least squares from the best of them. A step that doesn't help
    (parameters are rounded to f16) is not taken, so the result is never worse than the whole range.
    """
    weighting = np.ones_like(x) if importance is None else importance
    low, high = x.min(axis=1), x.max(axis=1)
    best, least = grid.spanning(low, high), np.full(len(x), np.inf, np.float32)

    def offer(params: F32) -> None:
        errors = _errors(grid, x, params, weighting)
        better = errors < least
        best[better], least[better] = params[better], errors[better]

    for shrink in SHRINKS:
        for params in grid.kinds(low * shrink, high * shrink):
            offer(params)
    for _ in range(REFITS):
        offer(grid.refit(x, grid.round(x, best), weighting))
    return best


def _errors(grid: Grid, x: F32, params: F32, importance: F32) -> F32:
    errors: F32 = (importance * (x - grid.values(grid.round(x, params), params)) ** 2).sum(axis=1)
    return errors
