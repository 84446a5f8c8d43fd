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
from barefoot.weights.solvers import Inputs, Knowledge, Solution, Solver, solve_groups, stored


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
    """What to store of parameters, (rows, blocks, k), for the least squared error of each group, or nearly so.

    ``importance``: how much a column (cols,) or an element (rows, cols) counts. Never worse than the whole range:
    :func:`barefoot.ops.fit_groups`. Where a block's groups share numbers, these are chosen for what the groups want,
    and then the groups look for better parameters around those that they got.
    """
    rows, cols = weight.shape
    wanted = np.empty((rows, cols // grid.group, grid.n_params), np.float32)
    ops.fit_groups(weight, grid, wanted, importance=importance)
    params = stored(grid, wanted)
    if grid.block > grid.group:
        for first in range(0, cols, grid.group):
            here = slice(first, first + grid.group)
            of_block = params[:, first // grid.block]
            counts = None if importance is None else np.ascontiguousarray(importance[..., here])
            settle(np.ascontiguousarray(weight[:, here]), grid, of_block, first % grid.block // grid.group, counts)
    return params


def settle(x: F32, grid: Grid, params: F32, at: int, importance: F32 | None = None) -> None:
    """Replace ``params`` (rows, k) by neighbours that serve group ``at`` of their block, x (rows, group), better."""
    errors, least = np.empty((2, len(x), 1), np.float32)

    def measure(candidate: F32, into: F32) -> None:
        own = np.ascontiguousarray(grid.expand(candidate)[:, at, None])
        ops.group_errors(x, grid, own, into, importance=importance)

    measure(params, least)
    for candidate in grid.neighbours(params.copy(), at):
        measure(candidate, errors)
        better = errors[:, 0] < least[:, 0]
        params[better], least[better] = candidate[better], errors[better]
