"""The engine of all solvers that weigh errors by the Hessian of a product, whatever rounds inside it.

For a row w of weights, stored as ŵ, and inputs x, the error of the product is (w − ŵ) H (w − ŵ)ᵀ with H = mean of
x xᵀ. With H = (I + M) D (I + M)ᵀ, M strictly upper triangular and D diagonal, it is a sum over columns of D_kk times
the square of

    (w_k − ŵ_k) + Σ_{j<k} (w_j − ŵ_j) M_jk

so that each column, given the errors before it, has a target: w_k + Σ_{j<k} (w_j − ŵ_j) M_jk. :func:`propagate` forms
the targets block by block and leaves to its caller how a block is rounded to them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput
from barefoot.ops.grids import F32

F64 = npt.NDArray[np.float64]

BLOCK = 128  # columns between two products with all errors so far
FACTOR_BLOCK = 256

#: Rounds a block: own weights and targets (rows, n), the block's first column. It replaces targets by errors.
Inner = Callable[[F32, F32, int], None]


def propagate(weight: F32, mixing: F32, step: int, inner: Inner) -> F32:
    """Take the columns of ``weight`` in blocks of ``step``, each with the targets that all errors before it make.

    Returns all errors, float32 (rows, cols).
    """
    rows, cols = weight.shape
    errors = np.empty((rows, cols), np.float32)
    for start in range(0, cols, step):
        stop = min(start + step, cols)
        own = np.ascontiguousarray(weight[:, start:stop])
        targets = errors[:, :start] @ mixing[:start, start:stop]
        targets += own
        inner(own, targets, start)
        errors[:, start:stop] = targets
    return errors


def ridge(hessian: F32, damp: float) -> np.float32:
    """What is added to the diagonal: ``damp`` × its mean. Without any input 1, which means plain rounding."""
    mean = np.mean(np.diag(hessian), dtype=np.float64)
    return np.float32(damp * mean if mean > 0 else 1)


def feedback(hessian: F32, damp: float) -> tuple[F32, F32]:
    """M float32 (n, n), strictly upper triangular, and the diagonal of D, float32 (n,), of the damped H.

    Factors need double precision: inputs of a few tokens can be thousands of times larger than all others, and what is
    left of the diagonal is then a small difference.

    Raises
    ------
    InvalidInput : H is not finite.
    """
    if not np.isfinite(np.sum(hessian)):
        raise InvalidInput("the inputs of a matrix are not finite, so errors can't be weighed", cure="use other text")
    factor = np.empty(hessian.shape, np.float64)
    factor[:] = hessian[::-1, ::-1]
    factor[np.diag_indices_from(factor)] += ridge(hessian, damp)
    _cholesky_in_place(factor)
    upper = factor[::-1, ::-1]  # H = upper upperᵀ: the factor of the reversed matrix, reversed
    diagonal = np.diag(upper).copy()
    mixing = np.zeros(hessian.shape, np.float32)
    for row in range(len(mixing) - 1):
        mixing[row, row + 1 :] = upper[row, row + 1 :] / diagonal[row + 1 :]
    return mixing, (diagonal**2).astype(np.float32)


def _cholesky_in_place(a: F64) -> None:
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
