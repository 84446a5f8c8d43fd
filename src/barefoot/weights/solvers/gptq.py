"""gptq — column by column, each rounding error undone as far as the later columns can.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) in the form of LDLQ (Chee et al. 2023, arXiv:2307.13304, theorem 6: the
two are the same). For a row w and inputs x the error of the product is (w − ŵ) H (w − ŵ)ᵀ with H = mean of x xᵀ. With
H = (I + M) D (I + M)ᵀ, M strictly upper triangular and D diagonal, it is a sum over columns of D_kk times the square of

    (w_k − ŵ_k) + Σ_{j<k} (w_j − ŵ_j) M_jk

so column k is rounded to the level nearest to w_k + Σ_{j<k} (w_j − ŵ_j) M_jk. No inverse is ever formed.

Columns are taken in order, or with ``order`` by falling diagonal of H. The parameters of a group are fitted on the
targets that its columns would have if it were not rounded itself (with ``order``, on the weights), by the least error
with elements counting as D_kk; without ``refine``, by the range. ``damp`` × the mean of the diagonal is added to H's.
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

BLOCK = 128  # columns between two products with all errors so far
FACTOR_BLOCK = 256


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
        cols, group = weight.shape[1], grid.group
        order = np.argsort(-np.diag(inputs.hessian), kind="stable") if self.order else np.arange(cols)
        mixing, importance = feedback(inputs.hessian[np.ix_(order, order)], self.damp)
        by_column = np.empty(cols, np.float32)
        by_column[order] = importance
        fixed = self._params(weight, grid, by_column) if self.order else None
        found: list[F32] = []
        codes, errors = np.empty(weight.shape, np.uint8), np.empty(weight.shape, np.float32)
        step = max(BLOCK, group) // group * group
        for start in range(0, cols, step):
            stop = min(start + step, cols)
            columns = order[start:stop]
            own = weight[:, columns]
            targets = own + errors[:, :start] @ mixing[:start, start:stop]
            for k in range(start, stop):
                if fixed is not None:
                    params = fixed[:, order[k] // group]
                elif k % group == 0:
                    ahead = slice(k - start, k - start + group)
                    params = self._params(targets[:, ahead], grid, by_column[k : k + group])[:, 0]
                    found.append(params)
                code = grid.round(targets[:, k - start, None], params)
                codes[:, order[k]] = code[:, 0]
                errors[:, k] = own[:, k - start] - grid.values(code, params)[:, 0]
                targets[:, k - start + 1 :] += errors[:, k, None] * mixing[k, k + 1 : stop]
        return Solution(codes, np.stack(found, axis=1) if fixed is None else fixed)

    def _params(self, x: F32, grid: Grid, importance: F32) -> F32:
        """(rows, groups of ``x``, p)"""
        groups = np.ascontiguousarray(x).reshape(-1, grid.group)
        if self.refine:
            params = least_error(grid, groups, repeated(importance, len(x), grid.group))
        else:
            params = grid.plain(groups)
        return params.reshape(len(x), x.shape[1] // grid.group, -1)


def feedback(hessian: F32, damp: float) -> tuple[F32, F32]:
    """M float32 (n, n), strictly upper triangular, and the diagonal of D, float32 (n,), of the damped H.

    Memory: H once more in double precision, and M.

    Raises
    ------
    InvalidInput : H is not finite.
    """
    if not np.isfinite(hessian).all():
        raise InvalidInput("the inputs of a matrix are not finite, so errors can't be weighed", cure="use other text")
    factor = hessian[::-1, ::-1].astype(np.float64)
    mean = float(np.mean(np.diag(factor)))
    # Without any input H becomes the identity: plain rounding.
    factor[np.diag_indices_from(factor)] += damp * mean if mean > 0 else 1.0
    _cholesky_in_place(factor)
    upper = factor[::-1, ::-1]  # H = upper upperᵀ: the factor of the reversed matrix, reversed
    diagonal = np.diag(upper).copy()
    mixing: F32 = np.triu((upper / diagonal).astype(np.float32), 1)
    return mixing, (diagonal**2).astype(np.float32)


def _cholesky_in_place(a: npt.NDArray[np.float64]) -> None:
    """The lower triangle of ``a`` becomes L of a = L Lᵀ; the rest is left as it is. numpy's own needs copies."""
    n = len(a)
    for start in range(0, n, FACTOR_BLOCK):
        stop = min(start + FACTOR_BLOCK, n)
        corner = np.linalg.cholesky(a[start:stop, start:stop])
        a[start:stop, start:stop] = corner
        a[stop:, start:stop] = np.linalg.solve(corner, a[stop:, start:stop].T).T
        for row in range(stop, n, FACTOR_BLOCK):
            rows = slice(row, min(row + FACTOR_BLOCK, n))
            a[rows, stop : rows.stop] -= a[rows, start:stop] @ a[stop : rows.stop, start:stop].T
