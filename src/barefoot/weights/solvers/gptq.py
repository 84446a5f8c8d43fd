"""gptq — column by column, each rounding error undone as far as the later columns can.

GPTQ (Frantar et al. 2022, arXiv:2210.17323); SpQR (Dettmers et al. 2023, arXiv:2306.03078) and others build on it. For
a row w and inputs x the error of the product is (w − ŵ) H (w − ŵ)ᵀ with H = mean of x xᵀ. When column k is fixed at ŵ_k
the rest moves by

    w_j ← w_j − (w_k − ŵ_k) / U_kk × U_kj     for j > k,     H⁻¹ = Uᵀ U, U upper triangular

Columns are taken in order, or with ``order`` by falling diagonal of H; parameters of a group are fitted on its weights
as they are when its first column comes up (with ``order``, on the original ones), elements counting as 1 / U_kk².

``damp`` × the mean of the diagonal is added to H's diagonal. Columns that no input ever reached count as if their
inputs were tiny. ``refine`` fits parameters by least error instead of by the range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput
from barefoot.ops.grids import F32, Grid
from barefoot.weights.solvers import Inputs, Knowledge, Solution, Solver, repeated
from barefoot.weights.solvers.mse import least_error

BLOCK = 128  # columns whose updates are applied to the rest of the matrix at once


@dataclass(frozen=True)
class Gptq(Solver, name="gptq", papers=(57, 58), status="stable"):
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
        cols = weight.shape[1]
        order = np.argsort(-np.diag(inputs.hessian), kind="stable") if self.order else np.arange(cols)
        hessian = inputs.hessian[np.ix_(order, order)]
        factor = inverse_factor(hessian, self.damp)
        importance = np.empty(cols, np.float32)
        importance[order] = 1 / np.diag(factor) ** 2
        fixed = self._params(weight, grid, importance) if self.order else None
        return self._sweep(weight, grid, factor, order, importance, fixed)

    def _params(self, weight: F32, grid: Grid, importance: F32) -> F32:
        """(rows, groups of ``weight``, p)"""
        x = np.ascontiguousarray(weight).reshape(-1, grid.group)
        if self.refine:
            params = least_error(grid, x, repeated(importance, len(weight), grid.group))
        else:
            params = grid.spanning(x.min(axis=1), x.max(axis=1))
        return params.reshape(len(weight), weight.shape[1] // grid.group, -1)

    def _sweep(
        self,
        weight: F32,
        grid: Grid,
        factor: F32,
        order: npt.NDArray[np.int64],
        importance: F32,
        fixed: F32 | None,
    ) -> Solution:
        rows, cols = weight.shape
        group = grid.group
        codes = np.empty((rows, cols), np.uint8)
        found: list[F32] = []
        left = weight[:, order].astype(np.float32, copy=True)
        step = max(BLOCK, group) // group * group
        for start in range(0, cols, step):
            stop = min(start + step, cols)
            errors = np.empty((rows, stop - start), np.float32)
            for k in range(start, stop):
                if fixed is not None:
                    params = fixed[:, order[k] // group]
                elif k % group == 0:
                    params = self._params(left[:, k : k + group], grid, importance[k : k + group])[:, 0]
                    found.append(params)
                column = left[:, k : k + 1]
                code = grid.round(column, params)
                codes[:, order[k]] = code[:, 0]
                error = (column - grid.values(code, params)) / factor[k, k]
                errors[:, k - start] = error[:, 0]
                left[:, k + 1 : stop] -= error * factor[k, k + 1 : stop]
            left[:, stop:] -= errors @ factor[start:stop, stop:]
        return Solution(codes, np.stack(found, axis=1) if fixed is None else fixed)


def inverse_factor(hessian: F32, damp: float) -> F32:
    """U of H⁻¹ = Uᵀ U for the damped H, float32 upper triangular (n, n).

    Raises
    ------
    InvalidInput : H is not finite.
    """
    if not np.isfinite(hessian).all():
        raise InvalidInput("the inputs of a matrix are not finite: its Hessian can't be used", cure="use other text")
    damped = hessian.astype(np.float64)
    mean = float(np.mean(np.diag(damped)))
    # An H of zeros (no input at all) becomes the identity: plain rounding.
    damped[np.diag_indices_from(damped)] += damp * mean if mean > 0 else 1.0
    # H = L Lᵀ with H in reversed order gives the upper factor of the inverse without forming the inverse.
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    upper = lower[::-1, ::-1]  # H = upper upperᵀ, upper triangular
    inverse = np.linalg.inv(upper)
    factor: F32 = np.triu(inverse).astype(np.float32)
    return factor
