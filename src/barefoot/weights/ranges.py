"""Calibration: which range [low, high] a group's levels are to cover.

A Survey of Quantization Methods for Efficient Neural Network Inference (Gholami et al. 2021, arXiv:2103.13630), section
III.C. Each function takes groups (n, k) and returns (low, high), each (n,):

    extremes     the least and the largest element
    percentile   what leaves out the given share of the elements at each end
    least_error  the share of the extremes at which the squared error of a given grid is least
    entropy      ± the magnitude above which clipping loses the least information, by the Kullback-Leibler divergence
                 between the histogram of the magnitudes and the same on a coarse grid

For *static* ranges of activations, groups are samples of what flowed through on calibration inputs, or ranges are
averaged over batches by ``moving_average``; *dynamic* ranges come from the very tensor that is quantized.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput
from barefoot.weights.affine import Affine
from barefoot.weights.arrays import Array, namespace

Range = tuple[Array, Array]
SHRINKS = tuple(1 - i / 40 for i in range(1, 33))  # 0.975 down to 0.2 of the range
N_BINS = 2048


def extremes(x: Array) -> Range:
    xp = namespace(x)
    return xp.amin(x, axis=1), xp.amax(x, axis=1)


def percentile(x: Array, percent: float = 99.99) -> Range:
    """``percent`` of the elements lie at or below ``high``, and as many at or above ``low``.

    Raises
    ------
    InvalidInput : ``percent`` does not lie above 50 and up to 100.
    """
    if not 50 < percent <= 100:
        raise InvalidInput(f"a percentile above 50 and up to 100 is needed, got {percent}")
    xp = namespace(x)
    return xp.quantile(x, 1 - percent / 100, axis=1), xp.quantile(x, percent / 100, axis=1)


def least_error(x: Array, grid: Affine) -> Range:
    """Never a larger squared error than ``extremes`` have."""
    xp = namespace(x)
    low, high = extremes(x)
    best_low, best_high = low, high
    least = xp.sum((x - grid.rounded(x, low, high)) ** 2, axis=1)
    for shrink in SHRINKS:
        error = xp.sum((x - grid.rounded(x, low * shrink, high * shrink)) ** 2, axis=1)
        best_low = xp.where(error < least, low * shrink, best_low)
        best_high = xp.where(error < least, high * shrink, best_high)
        least = xp.where(error < least, error, least)
    return best_low, best_high


def entropy(x: Array, bits: int = 8, n_bins: int = N_BINS) -> Range:
    """Groups that nowhere fall below 0 get the range [0, t], others [-t, t].

    Zeros are exact on every grid and don't count: behind a ReLU they would be most of the histogram.
    """
    xp = namespace(x)
    magnitudes = np.abs(np.asarray(x, np.float64))
    t = [_threshold(group, 1 << (bits - 1), n_bins) for group in magnitudes]
    high = xp.asarray(np.asarray(t), dtype=x.dtype)
    return xp.where(xp.amin(x, axis=1) < 0, -high, xp.zeros_like(high)), high


def _threshold(magnitudes: npt.NDArray[np.float64], n_levels: int, n_bins: int) -> float:
    top = float(magnitudes.max())
    if top == 0:
        return 0.0
    histogram = np.histogram(magnitudes[magnitudes > 0], n_bins, (0, top))[0].astype(np.float64)
    step = max(1, n_bins // 128)
    candidates = range(max(n_levels, n_bins // 16), n_bins + 1, step)
    return top / n_bins * min(candidates, key=lambda n_kept: _divergence(histogram, n_kept, n_levels))


def _divergence(histogram: npt.NDArray[np.float64], n_kept: int, n_levels: int) -> float:
    """KL of the histogram clipped to ``n_kept`` bins to what ``n_levels`` levels can tell of it."""
    kept = histogram[:n_kept]
    clipped = kept.copy()
    clipped[-1] += histogram[n_kept:].sum()
    level = np.arange(n_kept) * n_levels // n_kept
    # The mass of a level is spread over those of its bins that are not empty.
    occupied = kept > 0
    mass = np.bincount(level, kept, n_levels) / np.maximum(np.bincount(level, occupied, n_levels), 1)
    coarse = np.where(occupied, mass[level], 0)
    p, q = clipped / clipped.sum(), coarse / max(coarse.sum(), 1)
    seen = p > 0
    # What was clipped into an empty bin has no counterpart: it counts as one in a million.
    return float(np.sum(p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-6))))


def moving_average(ranges: Iterable[Range], momentum: float = 0.9) -> Range:
    """The exponential average of ranges that were seen one after the other.

    Raises
    ------
    InvalidInput : there are none.
    """
    seen = iter(ranges)
    try:
        low, high = next(seen)
    except StopIteration:
        raise InvalidInput("a moving average of no ranges") from None
    for next_low, next_high in seen:
        low, high = momentum * low + (1 - momentum) * next_low, momentum * high + (1 - momentum) * next_high
    return low, high
