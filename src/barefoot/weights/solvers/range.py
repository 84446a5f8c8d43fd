"""range — round to nearest on the range of each group; the baseline of all solvers.

A Survey of Quantization Methods for Efficient Neural Network Inference (Gholami et al. 2021, arXiv:2103.13630), section
III.C: calibration by the smallest and the largest value.
"""

from __future__ import annotations

from dataclasses import dataclass

from barefoot.ops.grids import F32, Grid
from barefoot.weights.solvers import Inputs, Solution, Solver, plain, solve_groups


@dataclass(frozen=True)
class Range(Solver, name="range", papers=(14,), status="stable"):
    def solve(self, weight: F32, grid: Grid, inputs: Inputs | None) -> Solution:
        return solve_groups(weight, grid, plain(weight, grid))
