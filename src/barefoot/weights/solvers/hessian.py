"""The engine of all solvers that weigh errors by the Hessian of a product, whatever rounds inside it.

For a row w of weights, stored as ŵ, and inputs x, the error of the product is (w − ŵ) H (w − ŵ)ᵀ with H = mean of
x xᵀ. With H = (I + M) D (I + M)ᵀ, M strictly upper triangular and D diagonal, it is a sum over columns of D_kk times
the square of

    (w_k − ŵ_k) + Σ_{j<k} (w_j − ŵ_j) M_jk

so that each column, given the errors before it, has a target: w_k + Σ_{j<k} (w_j − ŵ_j) M_jk. :func:`propagate` forms
the targets block by block and leaves to its caller how a block is rounded to them.

M is kept as panels of a block's columns, each with the rows down to its diagonal: a little over half of a square.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput
from barefoot.ops.grids import F32
from barefoot.weights.solvers import Inputs

F64 = npt.NDArray[np.float64]

BLOCK = 128  # columns between two products with all errors so far

#: Rounds a block: own weights and targets (rows, n), M of the block itself (n, n), its first column. It replaces
#: targets by errors.
Inner = Callable[[F32, F32, F32, int], None]


def propagate(weight: F32, mixing: Sequence[F32], inner: Inner) -> F32:
    """Take the columns of ``weight`` block by block, each with the targets that all errors before it make.

    ``mixing`` as :func:`feedback` returns it. Returns all errors, float32 (rows, cols).
    """
    errors = np.empty(weight.shape, np.float32)
    for panel in mixing:
        stop, n = panel.shape
        start = stop - n
        own = np.ascontiguousarray(weight[:, start:stop])
        targets = errors[:, :start] @ panel[:start]
        targets += own
        inner(own, targets, panel[start:], start)
        errors[:, start:stop] = targets
    return errors


def corrected(weight: F32, inputs: Inputs, damp: float) -> F32:
    """What to round instead of ``weight``: W + R (H + λ I)⁻¹, R what is missing, or W C with C the drift.

    Behind matrices that are rounded inputs are x, not x', and hidden states h, not h'. Of all matrices this one brings
    its product with x nearest to W x' (+ h' − h), in the mean square with ``damp`` × the mean of H's diagonal as a
    ridge, without which it would learn the text by heart. Without h this is the optimum of asymmetric calibration (Li
    et al. 2025, arXiv:2504.02692).
    """
    assert inputs.hessian is not None
    if inputs.drift is not None:
        right = weight @ inputs.drift
    elif inputs.missing is not None:
        right = inputs.missing.copy()
    else:
        return weight
    panels = _reversed_cholesky(inputs.hessian, float(ridge(inputs.hessian, damp)), BLOCK)
    # X U Uᵀ = right, panel by panel: first Y Uᵀ = right from the last one on, then X U = Y from the first one on.
    spans = [slice(len(panel) - panel.shape[1], len(panel)) for panel in panels]
    for at in reversed(range(len(panels))):
        here = spans[at]
        some = right[:, here].astype(np.float64)
        for later in range(at + 1, len(panels)):
            some -= right[:, spans[later]] @ panels[later][here].T
        right[:, here] = np.linalg.solve(panels[at][here], some.T).T
    for at, here in enumerate(spans):
        some = right[:, here].astype(np.float64)
        for earlier in range(at):
            some -= right[:, spans[earlier]] @ panels[at][spans[earlier]]
        right[:, here] = np.linalg.solve(panels[at][here].T, some.T).T
    right += weight
    return right


def corrected_bytes(rows: int, cols: int) -> int:
    """The most that :func:`corrected` allocates, its result included: the factor, and some columns three times, with
    what LAPACK copies."""
    step = min(BLOCK, cols)
    return 4 * rows * cols + 4 * cols * (cols + step) + 3 * 8 * rows * step + lapack_bytes(step, rows)


def lapack_bytes(step: int, most: int) -> int:
    """What ``numpy.linalg.solve`` copies of a corner of ``step`` columns and up to ``most`` right-hand sides; numpy
    does not tell tracemalloc of it."""
    return 8 * step * (step + most)


def ridge(hessian: F32, damp: float) -> np.float32:
    """What is added to the diagonal: ``damp`` × its mean. Without any input 1, which means plain rounding."""
    mean = np.mean(np.diag(hessian), dtype=np.float64)
    return np.float32(damp * mean if mean > 0 else 1)


def feedback(hessian: F32, damp: float, step: int = BLOCK) -> tuple[list[F32], F32]:
    """M and the diagonal of D, float32 (n,), of the damped H.

    M, strictly upper triangular, in panels of ``step`` columns, the last one of what is left: rows 0 to stop of columns
    start to stop, float32 (stop, stop - start).

    Factors need double precision: inputs of a few tokens can be thousands of times larger than all others, and what is
    left of the diagonal is then a small difference.

    Raises
    ------
    InvalidInput : H is not finite.
    """
    if not np.isfinite(np.sum(hessian)):
        raise InvalidInput("the inputs of a matrix are not finite, so errors can't be weighed", cure="use other text")
    panels = _reversed_cholesky(hessian, float(ridge(hessian, damp)), step)
    diagonal = np.concatenate([np.diag(panel[len(panel) - panel.shape[1] :]) for panel in panels])
    mixing: list[F32] = []
    while panels:  # those in double precision leave as those of M come
        panel = panels.pop()
        stop, n = panel.shape
        panel /= diagonal[stop - n : stop]
        panel[stop - n :][np.tril_indices(n)] = 0
        mixing.append(panel.astype(np.float32))
    return mixing[::-1], (diagonal**2).astype(np.float32)


def mixing_bytes(cols: int, step: int = BLOCK) -> int:
    """Of the panels that :func:`feedback` returns."""
    return 2 * cols * (cols + min(step, cols))


def feedback_bytes(cols: int, step: int = BLOCK) -> int:
    """The most that :func:`feedback` allocates: the factor in double precision and a panel of M, or LAPACK's copies of
    one of its own."""
    step = min(step, cols)
    return 2 * mixing_bytes(cols, step) + max(4 * cols * step, 16 * step**2, lapack_bytes(step, cols))


def _reversed_cholesky(hessian: F32, added: float, step: int) -> list[F64]:
    """U, upper triangular, of H + ``added`` I = U Uᵀ, in panels like those of M; below its diagonal is anything.

    From the last panel to the first, each less what the later ones account for. numpy's own needs copies of the whole.
    """
    n = len(hessian)
    panels: list[F64] = []
    for start in reversed(range(0, n, step)):
        stop = min(start + step, n)
        panel = hessian[:stop, start:stop].astype(np.float64)
        panel[np.arange(start, stop), np.arange(stop - start)] += added
        for later in panels:
            panel -= later[:stop] @ later[start:stop].T
        # U of the corner is L of the corner in reverse, in reverse.
        corner = np.linalg.cholesky(panel[start:][::-1, ::-1])[::-1, ::-1]
        panel[start:] = corner
        panel[:start] = np.linalg.solve(corner, panel[:start].T).T
        panels.append(panel)
    return panels[::-1]
