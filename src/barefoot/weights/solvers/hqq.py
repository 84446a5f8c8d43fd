"""hqq — half-quadratic splitting: a sparse error, without any data.

Half-Quadratic Quantization (Badri and Shaji 2023, mobiusml). With few outliers among the errors W − Ŵ, an l_p norm
(p < 1) of the errors is a better aim than their squares. Splitting the error into a sparse part E and a rest,

    E       ← shrink_p(W − Ŵ, β)           soft thresholding, generalized to p < 1
    minimum ← mean of (W − E − scale × code) over the group
    β       ← κ β

is repeated, for some groups at a time whose arrays stay in the cache, until the error of none of them falls. Scales
stay those of the range; only asymmetric uniform grids have a minimum to move, and other grids get the least squares of
:mod:`mse` instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from barefoot.core.errors import InvalidInput
from barefoot.ops.grids import F32, Grid, Uniform, to_f16
from barefoot.weights.solvers import Inputs, Solution, Solver, solve_groups
from barefoot.weights.solvers.mse import least_error

TILE = 1 << 16  # weights that are gone over at a time


@dataclass(frozen=True)
class Hqq(Solver, name="hqq", papers=(), status="stable"):
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    steps: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1 or self.beta <= 0 or self.kappa < 1 or self.steps < 1:
            raise InvalidInput(f"hqq: expected 0 < p <= 1, beta > 0, kappa >= 1 and steps >= 1, got {self}")

    def solve(self, weight: F32, grid: Grid, inputs: Inputs | None) -> Solution:
        if not isinstance(grid, Uniform) or grid.symmetric:
            return solve_groups(weight, grid, least_error(weight, grid))
        groups = weight.reshape(-1, grid.group)
        best = np.empty((len(groups), 2), np.float32)
        step = max(1, TILE // grid.group)
        for start in range(0, len(groups), step):
            best[start : start + step] = self._fitted(groups[start : start + step], grid)
        return solve_groups(weight, grid, best.reshape(len(weight), -1, 2))

    def workspace_bytes(self, rows: int, cols: int, grid: Grid) -> int:
        """All parameters twice, while they are stored, and ten arrays of a tile."""
        return super().workspace_bytes(rows, cols, grid) + 10 * 4 * min(TILE, rows * cols)

    def _fitted(self, x: F32, grid: Uniform) -> F32:
        """The best parameters (n, 2) that are found for groups x (n, group)."""
        best = grid.plain(x)
        params, beta = best.copy(), self.beta
        least = np.full(len(x), np.inf, np.float32)
        for _ in range(self.steps):
            codes = grid.round(x, params)
            error = x - grid.values(codes, params)
            mean = np.abs(error).mean(axis=1)
            better = mean < least
            if not better.any():
                break
            best[better], least[better] = params[better], mean[better]
            rest = x - shrink(error, beta, self.p) - params[:, :1] * codes
            params[:, 1] = to_f16(rest.mean(axis=1))
            beta *= self.kappa
        return best


def shrink(x: F32, beta: float, p: float) -> F32:
    """The generalized soft threshold: sign(x) max(|x| − |x|^(p−1) / β, 0)."""
    magnitude = np.abs(x)
    power = np.maximum(magnitude, np.float32(1e-12)) ** np.float32(p - 1)
    result: F32 = np.sign(x) * np.maximum(magnitude - power / np.float32(beta), 0)
    return result
