"""gptq — column by column, each rounding error undone as far as the later columns can; then again, by all columns.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) in the form of LDLQ (Chee et al. 2023, arXiv:2307.13304, theorem 6: the
two are the same): each column is rounded to the level nearest to its target, in the terms of :mod:`hessian`. No inverse
is ever formed. The parameters of a group are fitted on the targets that its columns would have if it were not rounded
itself, by the least error with elements counting as D_kk; without ``refine``, by the range.

The columns before a column can undo its error as well. ``sweeps`` times, all groups are gone through once more: given
all other columns as they are stored, a group first gets the parameters of least error, and then its columns are rounded
again one by one, each to the level nearest to what is best for it (coordinate descent, as in Nair and Suggala 2024,
arXiv:2406.17542). Nothing is done that would raise the error. On held-out inputs this takes 8 to 10 % off the error
that GPTQ leaves (benchmarks/quality/solvers.py).

Where the inputs that are met differ from those of the exact model, because of all that is rounded before, the matrix is
first replaced by the one that makes up for it best (:func:`barefoot.weights.solvers.hessian.corrected`), with ``drift``
as its ridge; 0 leaves it out, and nothing of the exact model is then looked at.

``damp`` × the mean of the diagonal is added to H's. Bytes of a solve: :func:`solve_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.ops.grids import F32, Grid, row_sums
from barefoot.weights.solvers import Inputs, Knowledge, Solution, Solver, plain
from barefoot.weights.solvers.hessian import (
    BLOCK,
    corrected,
    corrected_bytes,
    feedback,
    feedback_bytes,
    mixing_bytes,
    propagate,
    ridge,
)
from barefoot.weights.solvers.mse import least_error, settle


@dataclass(frozen=True)
class Gptq(Solver, name="gptq", papers=(), status="stable"):
    damp: float = 0.01
    refine: bool = True
    sweeps: int = 4
    drift: float = 0.3

    @property
    def wants(self) -> Knowledge:  # type: ignore[override]
        return "drift" if self.drift else "hessian"

    def __post_init__(self) -> None:
        if not 0 < self.damp < 10:
            raise InvalidInput(f"gptq: damp must lie between 0 and 10, got {self.damp}")
        if not 0 <= self.drift < 1000:
            raise InvalidInput(f"gptq: drift must lie between 0 and 1000, got {self.drift}")
        if self.sweeps < 0:
            raise InvalidInput(f"gptq: sweeps must be 0 or more, got {self.sweeps}")

    def solve(self, weight: F32, grid: Grid, inputs: Inputs | None) -> Solution:
        assert inputs is not None
        assert inputs.hessian is not None
        rounded = _Rounded(weight.shape, grid)
        errors = self._forward(corrected(weight, inputs, self.drift), rounded, inputs.hessian)
        for _ in range(self.sweeps):
            _sweep(rounded, errors, inputs.hessian, ridge(inputs.hessian, self.damp))
        return Solution(rounded.codes, rounded.stored)

    def workspace_bytes(self, rows: int, cols: int, grid: Grid) -> int:
        params = 4 * rows * (cols // grid.group) * grid.n_params
        corrected = 4 * rows * cols if self.drift else 0
        solving = corrected + solve_bytes(rows, cols, grid) - rows * cols
        return params + max(solving, corrected_bytes(rows, cols) - rows * cols if self.drift else 0)

    def _forward(self, weight: F32, rounded: _Rounded, hessian: F32) -> F32:
        """Round column by column; what is missing then, float32 (rows, cols)."""
        grid = rounded.grid
        mixing, importance = feedback(hessian, self.damp, _step(grid))

        def nearest(own: F32, targets: F32, corner: F32, first: int) -> None:
            for start in range(0, own.shape[1], grid.group):
                if start % grid.block == 0:
                    block, counts = slice(start, start + grid.block), importance[first + start :][: grid.block]
                    rounded.fit(first + start, np.ascontiguousarray(targets[:, block]), counts, self.refine)
                here = slice(start, start + grid.group)
                aims = np.ascontiguousarray(targets[:, here])
                if start % grid.block:
                    rounded.settle(first + start, aims, importance[first + start :][: grid.group])
                rounded.round(first + start, own[:, here], aims, corner[here, here])
                targets[:, here] = aims
                targets[:, here.stop :] += aims @ corner[here, here.stop :]

        return propagate(weight, mixing, nearest)


def _sweep(rounded: _Rounded, errors: F32, hessian: F32, damping: np.float32) -> None:
    """Go through all groups once more, given ``errors`` (rows, cols) of all columns, which are kept up to date."""
    group, step = rounded.grid.group, _step(rounded.grid)
    for start in range(0, errors.shape[1], step):
        panel = slice(start, start + step)
        pull = errors @ hessian[:, panel] + damping * errors[:, panel]
        for at in range(0, pull.shape[1], group):
            here = slice(start + at, start + at + group)
            corner = hessian[here, here] + damping * np.eye(group, dtype=np.float32)
            change = rounded.improve(here.start, np.ascontiguousarray(pull[:, at : at + group]), corner)
            errors[:, here] += change
            pull[:, at + group :] += change @ hessian[here, here.stop : panel.stop]


def _step(grid: Grid) -> int:
    """Columns of whole blocks that are taken at a time."""
    return max(BLOCK // grid.block, 1) * grid.block


def solve_bytes(rows: int, cols: int, grid: Grid) -> int:
    """The most that a solve allocates at a time beside the weight, H and the parameters, for groups with a minimum.

    The codes, and the most of: what finding M takes; M, all errors, and weights and targets of a block, with those of
    a group and its codes or what the group adds to the block; all errors, what pulls at a block, and nine arrays of a
    group.
    """
    group, step = grid.group, min(_step(grid), cols)
    block = max(step, group)
    factor = feedback_bytes(cols, step)
    forward = mixing_bytes(cols, step) + rows * (4 * cols + 8 * block + max(9 * group, 4 * block))
    sweep = rows * (4 * cols + 4 * block + 36 * group)
    return rows * cols + max(factor, forward, sweep)


class _Rounded:
    """Codes and stored parameters of a matrix that is being solved. A group goes by its first column."""

    def __init__(self, shape: tuple[int, int], grid: Grid) -> None:
        n_stored = grid.store(np.zeros((1, grid.block // grid.group, grid.n_params), np.float32)).shape[1]
        self.grid = grid
        self.codes = np.empty(shape, np.uint8)
        self.stored = np.empty((shape[0], shape[1] // grid.block, n_stored), np.float32)

    def fit(self, first: int, aims: F32, importance: F32, refine: bool) -> None:
        """Choose the parameters of the block that begins with the group."""
        found = least_error(aims, self.grid, importance) if refine else plain(aims, self.grid)
        self._block(first)[:] = found[:, 0]

    def settle(self, first: int, aims: F32, importance: F32) -> None:
        """Choose the group's own share of them again."""
        settle(aims, self.grid, self._block(first), self._at(first), importance)

    def round(self, first: int, own: F32, targets: F32, mixing: F32) -> None:
        """Choose the group's codes; its columns' ``targets`` are replaced by errors."""
        codes = np.empty(own.shape, np.uint8)
        params = np.ascontiguousarray(self._params(first)[:, None])
        own, mixing = np.ascontiguousarray(own), np.ascontiguousarray(mixing)
        ops.feedback_round(own, targets, self.grid, params, np.zeros(len(mixing), np.int32), mixing, codes)
        self.codes[:, first : first + self.grid.group] = codes

    def improve(self, first: int, pull: F32, corner: F32) -> F32:
        """Choose the group's parameters and codes again; returns what was stored less what is now, (rows, group).

        With ``corner``, H of the group's columns, and ``pull``, (w − ŵ) H for these, a change d of w − ŵ changes the
        error by 2 d · pull + d corner dᵀ.
        """
        codes = self.codes[:, first : first + self.grid.group]
        own = self.grid.values(codes, self._params(first))
        moved = self._moved(first, own, pull, corner)
        change: F32 = own - self.grid.values(codes, self.grid.expand(moved)[:, self._at(first)])
        through = change @ corner
        better = 2 * row_sums(change * pull) + row_sums(change * through) < 0
        self._block(first)[better] = moved[better]
        change[~better], through[~better] = 0, 0
        own -= change
        diagonal: F32 = np.diag(corner)
        through += pull
        through /= diagonal
        errors: F32 = np.add(own, through)
        self.round(first, own, errors, corner / diagonal)
        change += errors
        return change

    def _moved(self, first: int, own: F32, pull: F32, corner: F32) -> F32:
        """What to store for the parameters of least squares, given the codes."""
        params = self._params(first)
        levels = own if params.shape[1] == 1 else own - params[:, 1:]  # times the scale, which is taken out below
        basis = np.stack([levels, np.ones_like(own)][: params.shape[1]])  # (p, rows, group)
        through = basis @ corner
        normal = np.einsum("irc,jrc->rij", through, basis, dtype=np.float64)
        right = np.einsum("irc,rc->ri", basis, pull, dtype=np.float64)
        normal += np.eye(len(basis)) * (1e-6 * np.trace(normal, axis1=1, axis2=2) + 1e-30)[:, None, None]
        step = np.linalg.solve(normal, right[:, :, None])[:, :, 0].astype(np.float32)
        step[:, 0] *= params[:, 0]
        return self.grid.move(self._block(first), self._at(first), params + step)

    def _block(self, first: int) -> F32:
        """What is stored for the block of the group, (rows, k): a view."""
        return self.stored[:, first // self.grid.block]

    def _at(self, first: int) -> int:
        return first % self.grid.block // self.grid.group

    def _params(self, first: int) -> F32:
        """The group's parameters, (rows, p)."""
        return self.grid.expand(self._block(first))[:, self._at(first)]
