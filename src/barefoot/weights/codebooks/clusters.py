"""Clusters of numbers: the levels of least squared error for given values, by Lloyd's iteration in one dimension.

In one dimension clusters are intervals, so values are sorted once and every step is a search for the middles between
levels and a difference of running sums: O(levels × log n) whatever the number of values.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput

F32 = npt.NDArray[np.float32]


def clusters(values: F32, n_levels: int, importance: F32 | None = None, n_steps: int = 100) -> F32:
    """``n_levels`` levels, ascending, float32, that fit ``values`` of any shape, elements counting as ``importance``.

    Starts from quantiles, so the result depends on nothing but the arguments. Fewer distinct values than levels leave
    levels that no value is nearest to.

    Raises
    ------
    InvalidInput : no values, or values that are not finite.
    """
    flat = values.reshape(-1)
    if not flat.size or not np.isfinite(flat).all():
        raise InvalidInput("levels are clusters of finite numbers, and there must be some")
    order = np.argsort(flat, kind="stable")
    x = flat[order].astype(np.float64)
    mass = np.ones_like(x) if importance is None else importance.reshape(-1)[order].astype(np.float64)
    sums, masses = np.concatenate([[0], np.cumsum(mass * x)]), np.concatenate([[0], np.cumsum(mass)])
    levels = np.quantile(x, (np.arange(n_levels) + 0.5) / n_levels)
    ends = np.empty(0, np.intp)
    for _ in range(n_steps):
        before, ends = ends, np.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        if np.array_equal(before, ends):
            break
        edges = np.concatenate([[0], ends, [x.size]])
        inside = np.diff(masses[edges])
        levels = np.divide(np.diff(sums[edges]), inside, out=levels, where=inside > 0)
        levels.sort()  # rounding may swap levels that are equal
    return levels.astype(np.float32)
