"""Solvers: which codes and parameters a matrix gets on the grid of its format.

A solver sees one matrix at a time, with what calibration knows about its inputs, and works on plain arrays. Formats
don't know solvers, and solvers know formats only through :class:`barefoot.ops.grids.Grid`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from barefoot import ops
from barefoot.core.technique import Technique
from barefoot.ops.grids import F32, U8, Grid

Knowledge = Literal["nothing", "squares", "hessian"]


@dataclass(frozen=True)
class Inputs:
    """What calibration measured of a matrix's inputs x, float32 (n, cols).

    ``squares`` : mean of x², (cols,). ``hessian`` : mean of x xᵀ, (cols, cols), or None where no solver wants it.
    """

    squares: F32
    hessian: F32 | None = None


@dataclass(frozen=True)
class Solution:
    """``codes`` uint8 (rows, cols), and ``params`` float32 (rows, groups, p) as they will be stored."""

    codes: U8
    params: F32

    def weights(self, grid: Grid) -> F32:
        """What is stored, float32 (rows, cols)."""
        n, groups, p = self.params.shape
        values = grid.values(self.codes.reshape(n * groups, -1), self.params.reshape(-1, p))
        return values.reshape(self.codes.shape)


class Solver(Technique):
    """The role. ``wants`` says what calibration must measure; without it, a fit needs no text at all."""

    wants: ClassVar[Knowledge] = "nothing"

    @abstractmethod
    def solve(self, weight: F32, grid: Grid, inputs: Inputs | None) -> Solution:
        """Codes and parameters for ``weight`` float32 (rows, cols); cols must be whole groups of the grid.

        ``inputs`` is what ``wants`` asks for; it may be None only for ``"nothing"``.
        """


ROLE = Solver


def solve_groups(weight: F32, grid: Grid, params: F32) -> Solution:
    """Every weight to its nearest level, for parameters (rows, groups, p)."""
    codes = np.empty(weight.shape, np.uint8)
    ops.round_groups(weight, grid, params, codes)
    return Solution(codes, params)


def by_group(weight: F32, grid: Grid, params: F32) -> F32:
    """Parameters (rows × groups, p) as (rows, groups, p)."""
    return params.reshape(len(weight), weight.shape[1] // grid.group, -1)
