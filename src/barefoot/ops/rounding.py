"""Rounding weights to the levels of a grid: the ops in numpy, which compiled kernels match bit for bit.

Weights are float32 (rows, cols), cols whole groups of the grid, params float32 (rows, groups, p), codes uint8
(rows, cols). All is float32; products and sums are rounded one after the other (no fused multiply-add), sums of a
group are taken as ``grids.row_sums`` says, and rows don't depend on each other, so neither threads nor instruction sets
change a bit. Finite inputs are taken for granted, but for ``encode``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from barefoot.ops import blocks
from barefoot.ops.grids import F32, U8, Grid, row_sums

SHRINKS = np.linspace(1.0, 0.45, 12, dtype=np.float32)  # of both ends of a group's range
STEPS = np.array([-0.15, -0.1, -0.05, 0.05, 0.1, 0.15], np.float32)  # from there on, of each end by itself
REFITS = 2  # least-squares steps behind the search
ENCODED_AT_A_TIME = 1 << 14  # weights, in whole rows: so many arrays of numpy's come and go


def encode(format_id: str, weights: F32, out: U8) -> None:
    step = max(1, ENCODED_AT_A_TIME // weights.shape[1])
    for start in range(0, len(weights), step):
        out[start : start + step] = blocks.encode(format_id, weights[start : start + step])


def fit_groups(x: F32, grid: Grid, params: F32, importance: F32 | None = None) -> None:
    params[:] = least_error(grid, x.reshape(-1, grid.group), _counts(x, grid, importance)).reshape(params.shape)


def group_errors(x: F32, grid: Grid, params: F32, errors: F32, importance: F32 | None = None) -> None:
    groups, flat = x.reshape(-1, grid.group), params.reshape(-1, params.shape[2])
    errors[:] = _errors(grid, groups, flat, _counts(x, grid, importance)).reshape(errors.shape)


def _counts(x: F32, grid: Grid, importance: F32 | None) -> F32:
    counts: F32 = np.broadcast_to(np.float32(1) if importance is None else importance, x.shape)
    return counts.reshape(-1, grid.group)


def least_error(grid: Grid, x: F32, importance: F32) -> F32:
    """Parameters for groups ``x`` (n, group), elements counting as ``importance`` (n, group) says."""
    ends = np.stack([x.min(axis=1), x.max(axis=1)])
    best, least = np.zeros_like(grid.spanning(*ends)), np.full(len(x), np.inf, np.float32)
    reach = np.ones_like(ends)  # by what the ends are multiplied in the best range so far

    def offer(params: F32, its_reach: F32) -> None:
        errors = _errors(grid, x, params, importance)
        better = errors < least
        best[better], least[better], reach[:, better] = params[better], errors[better], its_reach[:, better]

    def reached(its_reach: F32) -> None:
        for params in grid.kinds(*(ends * its_reach)):
            offer(params, its_reach)

    for shrink in SHRINKS:
        reached(np.full_like(ends, shrink))
    for end in (0, 1):
        start = reach.copy()
        for step in STEPS:
            moved = start.copy()
            moved[end] += step
            reached(moved)
    for _ in range(REFITS):
        offer(grid.refit(x, grid.round(x, best), importance), reach.copy())
    return best


def _errors(grid: Grid, x: F32, params: F32, importance: F32) -> F32:
    off = x - grid.values(grid.round(x, params), params)
    return row_sums(importance * (off * off))


def round_groups(x: F32, grid: Grid, params: F32, codes: U8) -> None:
    codes[:] = grid.round(x.reshape(-1, grid.group), params.reshape(-1, params.shape[2])).reshape(x.shape)


def feedback_round(
    weights: F32,
    targets: F32,
    grid: Grid,
    params: F32,
    groups: npt.NDArray[np.int32],
    mixing: F32,
    codes: U8,
) -> None:
    for k, group in enumerate(groups):
        own = params[:, group]
        code = grid.round(targets[:, k, None], own)
        codes[:, k] = code[:, 0]
        targets[:, k] = weights[:, k] - grid.values(code, own)[:, 0]
        targets[:, k + 1 :] += targets[:, k, None] * mixing[k, k + 1 :]
