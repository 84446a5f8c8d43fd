"""mse — ranges of least squared error, plain or weighted by the inputs that the weights will meet.

A Survey of Quantization Methods for Efficient Neural Network Inference (Gholami et al. 2021, arXiv:2103.13630), section
III.C: calibration by the mean squared error. With ``weighted`` a column counts as its inputs' mean square does, the
diagonal of the Hessian of the product's error, as importance matrices do for GGUF files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from barefoot import ops
from barefoot.ops.grids import F32, Grid
from barefoot.weights.solvers import Inputs, Knowledge, Solution, Solver, solve_groups


@dataclass(frozen=True)
class Mse(Solver, name="mse", papers=(14,), status="stable"):
    weighted: bool = False

    @property
    def wants(self) -> Knowledge:  # type: ignore[override]
        return "squares" if self.weighted else "nothing"

    def solve(self, weight: F32, grid: Grid, inputs: Inputs | None) -> Solution:
        if not self.weighted:
            return solve_groups(weight, grid, least_error(weight, grid))
        assert inputs is not None
        return solve_groups(weight, grid, least_error(weight, grid, inputs.squares))


def least_error(weight: F32, grid: Grid, importance: F32 | None = None) -> F32:
    """Parameters (rows, groups, p) of least squared error, columns (cols,) or elements counting as ``importance`` says.

    Never worse than the whole range: :func:`barefoot.ops.fit_groups`.
    """
    rows, cols = weight.shape
    params = np.empty((rows, cols // grid.group, grid.n_params), np.float32)
    ops.fit_groups(weight, grid, params, importance=importance)
    return params
