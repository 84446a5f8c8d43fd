"""Rows of like distribution side by side, so that the position of a row says which codebook is its own.

Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings (Yvinec et al. 2023,
arXiv:2309.17361), section 3.1. Rows are output neurons; their order is free where the consumer can follow it, a hidden
layer's where the next matrix permutes its columns. With G groups of M rows, row i belongs to group ⌊i G / M⌋.

*Differs from the paper*, which does not name its clustering: rows are described by 17 quantiles, and k-means fills
groups of equal size, the nearest pair of row and group first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput

F32 = npt.NDArray[np.float32]
Integers = npt.NDArray[np.intp]
N_QUANTILES = 17


def group_of_rows(n_rows: int, n_groups: int) -> Integers:
    """The group of each row (n_rows,), by its position.

    Raises
    ------
    InvalidInput : fewer rows than groups.
    """
    if not 1 <= n_groups <= n_rows:
        raise InvalidInput(f"{n_rows} rows make 1 to {n_rows} groups, got {n_groups}")
    return np.arange(n_rows) * n_groups // n_rows


def order_by_distribution(weight: F32, n_groups: int, n_steps: int = 10) -> Integers:
    """The order (rows,) in which to take the rows of ``weight`` (rows, cols): new row i is old row ``order[i]``."""
    group = group_of_rows(len(weight), n_groups)
    capacity = np.bincount(group, minlength=n_groups)
    quantiles = np.quantile(weight, np.linspace(0, 1, N_QUANTILES), axis=1).T.astype(np.float64)
    member = np.empty(len(weight), np.intp)
    member[np.argsort(weight.std(axis=1), kind="stable")] = group
    for _ in range(n_steps):
        centres = np.stack([quantiles[member == g].mean(axis=0) for g in range(n_groups)])
        before, member = member, _filled(_distances(quantiles, centres), capacity)
        if np.array_equal(before, member):
            break
    return np.argsort(member, kind="stable")


def _distances(points: npt.NDArray[np.float64], centres: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Squared, (points, centres)."""
    distances: npt.NDArray[np.float64] = (
        (points**2).sum(axis=1)[:, None] - 2 * points @ centres.T + (centres**2).sum(axis=1)
    )
    return distances


def _filled(costs: npt.NDArray[np.float64], capacity: Integers) -> Integers:
    """A group for each row, no group above its capacity: pairs in the order of their cost."""
    n_rows, n_groups = costs.shape
    member, left = np.full(n_rows, -1), capacity.copy()
    for pair in np.argsort(costs, axis=None, kind="stable"):
        row, g = divmod(int(pair), n_groups)
        if member[row] < 0 and left[g]:
            member[row], left[g] = g, left[g] - 1
    return member
