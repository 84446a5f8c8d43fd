"""gptq — column by column, each rounding error undone as far as the later columns can.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) in the form of LDLQ (Chee et al. 2023, arXiv:2307.13304, theorem 6: the
two are the same): each column is rounded to the level nearest to its target, in the terms of :mod:`hessian`. No inverse
is ever formed.

Columns are taken in order, or with ``order`` by falling diagonal of H. The parameters of a group are fitted on the
targets that its columns would have if it were not rounded itself (with ``order``, on the weights), by the least error
with elements counting as D_kk; without ``refine``, by the range. ``damp`` × the mean of the diagonal is added to H's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.ops.grids import F32, U8, Grid
from barefoot.weights.solvers import Inputs, Knowledge, Solution, Solver, by_group
from barefoot.weights.solvers.hessian import BLOCK, feedback, propagate
from barefoot.weights.solvers.mse import least_error


@dataclass(frozen=True)
class Gptq(Solver, name="gptq", papers=(), status="stable"):
    damp: float = 0.01
    order: bool = False
    refine: bool = True

    wants: ClassVar[Knowledge] = "hessian"

    def __post_init__(self) -> None:
        if not 0 < self.damp < 10:
            raise InvalidInput(f"gptq: damp must lie between 0 and 10, got {self.damp}")

    def solve(self, weight: F32, grid: Grid, inputs: Inputs | None) -> Solution:
        assert inputs is not None
        assert inputs.hessian is not None
        hessian = inputs.hessian
        if self.order:
            order = np.argsort(-np.diag(hessian), kind="stable")
            return self._in_order(weight, grid, hessian, order)
        mixing, importance = feedback(hessian, self.damp)
        codes = np.empty(weight.shape, np.uint8)
        params = np.empty((len(weight), weight.shape[1] // grid.group, grid.n_params), np.float32)

        def nearest(own: F32, targets: F32, first: int) -> None:
            for start in range(0, own.shape[1], grid.group):
                here, there = slice(start, start + grid.group), slice(first + start, first + start + grid.group)
                aims = np.ascontiguousarray(targets[:, here])
                group = slice(there.start // grid.group, there.start // grid.group + 1)
                params[:, group] = self._params(aims, grid, importance[there])
                codes[:, there] = _round(own[:, here], aims, grid, params[:, group], mixing[there, there])
                targets[:, here] = aims
                targets[:, here.stop :] += aims @ mixing[there, there.stop : first + own.shape[1]]

        propagate(weight, mixing, max(BLOCK, grid.group) // grid.group * grid.group, nearest)
        return Solution(codes, params)

    def _in_order(self, weight: F32, grid: Grid, hessian: F32, order: npt.NDArray[np.intp]) -> Solution:
        mixing, importance = feedback(hessian[np.ix_(order, order)], self.damp)
        by_column = np.empty_like(importance)
        by_column[order] = importance
        params, groups = self._params(weight, grid, by_column), (order // grid.group).astype(np.int32)
        codes = np.empty(weight.shape, np.uint8)

        def nearest(own: F32, targets: F32, first: int) -> None:
            here = slice(first, first + own.shape[1])
            codes[:, order[here]] = _round(own, targets, grid, params, mixing[here, here], groups[here])

        propagate(weight[:, order], mixing, BLOCK, nearest)
        return Solution(codes, params)

    def _params(self, x: F32, grid: Grid, importance: F32) -> F32:
        """(rows, groups of ``x``, p)"""
        if self.refine:
            return least_error(x, grid, importance)
        return by_group(x, grid, grid.plain(x.reshape(-1, grid.group)))


def _round(
    own: F32, targets: F32, grid: Grid, params: F32, mixing: F32, groups: npt.NDArray[np.int32] | None = None
) -> U8:
    """Codes of a block's columns, which all have the first group's parameters unless ``groups`` tells; ``targets`` are
    replaced by errors."""
    codes = np.empty(own.shape, np.uint8)
    of_column = np.zeros(own.shape[1], np.int32) if groups is None else groups
    own, params, mixing = (np.ascontiguousarray(each) for each in (own, params, mixing))
    ops.feedback_round(own, targets, grid, params, of_column, mixing, codes)
    return codes
