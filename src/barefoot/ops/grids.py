"""Grids: the values that a group of weights can take, and how codes and parameters become the bytes of a block.

A *solver* decides which codes and which parameters a group gets; a *grid* knows what they mean. All functions work on
arrays of groups: ``x`` float32 (n, k) with one row for each group (k = the group's size, or any part of it), ``params``
float32 (n, p) as they will be stored (rounded to f16), ``codes`` uint8 (n, k).

    Uniform   w = scale × (code − zero)        symmetric; the scale may be negative
              w = scale × code + minimum       asymmetric
    Table     w = scale × table[code]          the levels of a number format that is not uniform, such as NF4 or FP4

All of it is float32 in a fixed order, sums by :func:`row_sums`, so that compiled kernels (``barefoot.ops.rounding``)
return the same bits for any grid that has a :class:`Levels`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

F16_MAX = 65504.0
LANES = 16  # running sums of a row


def to_f16(values: F32) -> F32:
    """Rounded to f16 and clipped to its range, as float32; zero has no sign."""
    rounded: F32 = np.clip(values, -F16_MAX, F16_MAX).astype(np.float16).astype(np.float32) + np.float32(0)
    return rounded


def row_sums(x: F32) -> F32:
    """The sum of each row (n, k) → (n,): sixteen running sums over the row, then halves added to halves."""
    sums = np.zeros((len(x), LANES), np.float32)
    for start in range(0, x.shape[1], LANES):
        some = x[:, start : start + LANES]
        sums[:, : some.shape[1]] += some
    for half in (8, 4, 2, 1):
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


class Levels(NamedTuple):
    """A grid in numbers: w = scale × values[rank], plus a minimum where ``has_minimum``; params (scale, minimum).

    ``values`` float32 (n ≤ 256) ascend; ``codes`` uint8 (n,) are their codes. Of an ``even`` grid, values and codes are
    consecutive integers, and the rank of a weight is that of the integer nearest to w / scale, ties to even. Otherwise
    it is the number of ``bounds``, float32 (n - 1,), that lie below w / scale. ``rule`` names how parameters follow
    from a group's range, mean or least squares, as in the grids of this module; None: in another way.
    """

    values: F32
    bounds: F32
    codes: U8
    even: bool
    has_minimum: bool
    group: int
    rule: Literal["range", "two means", "ternary"] | None


class Grid(ABC):
    """What solvers need to know of a format."""

    group: int

    @property
    def levels(self) -> Levels | None:
        """What compiled kernels need to do what the methods say; None where they can't."""
        return None

    @property
    def n_params(self) -> int:
        """Parameters of a group, p."""
        return int(self.spanning(*np.zeros((2, 1), np.float32)).shape[1])

    @abstractmethod
    def spanning(self, low: F32, high: F32) -> F32:
        """Parameters whose levels reach from ``low`` to ``high``, (n,) each → (n, p)."""

    def plain(self, x: F32) -> F32:
        """Parameters of plain rounding: levels reach from the least to the largest weight. x : float32 (n, group)"""
        return self.spanning(x.min(axis=1), x.max(axis=1))

    @abstractmethod
    def round(self, x: F32, params: F32) -> U8:
        """The code of the nearest level for each element."""

    @abstractmethod
    def values(self, codes: U8, params: F32) -> F32:
        """What the codes mean."""

    @abstractmethod
    def refit(self, x: F32, codes: U8, importance: F32) -> F32:
        """Parameters that make ``codes`` fit ``x`` best: weighted least squares, ``importance`` (n, k) ≥ 0."""


@dataclass(frozen=True)
class Uniform(Grid):
    """``bits`` equally spaced levels; params (scale) or (scale, minimum)."""

    bits: int
    group: int
    symmetric: bool = False

    @property
    def most(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def levels(self) -> Levels:
        codes = np.arange(self.most + 1)
        values = (codes - self.zero).astype(np.float32)
        rule: Literal["two means", "range"] = "two means" if self.bits == 1 else "range"
        return Levels(values, values[1:], codes.astype(np.uint8), True, not self.symmetric, self.group, rule)

    @property
    def zero(self) -> int:
        return 1 << (self.bits - 1) if self.symmetric else 0

    def spanning(self, low: F32, high: F32) -> F32:
        if self.symmetric:
            # The end of larger magnitude gets the code 0, which reaches one level further than the other end.
            extreme: F32 = np.where(-low > high, low, high).astype(np.float32)
            return to_f16(extreme / np.float32(-self.zero))[:, None]
        minimum = to_f16(low)
        return np.stack([to_f16((high - minimum) / np.float32(self.most)), minimum], axis=1)

    def plain(self, x: F32) -> F32:
        """As the role says; of one bit the means of a group's lower and upper part, two levels having no inside."""
        return self.spanning(*(_two_means(x) if self.bits == 1 else (x.min(axis=1), x.max(axis=1))))

    def round(self, x: F32, params: F32) -> U8:
        shifted = x if self.symmetric else x - params[:, 1:]
        codes: U8 = np.clip(np.rint(shifted * _inverse(params[:, :1])) + self.zero, 0, self.most).astype(np.uint8)
        return codes

    def values(self, codes: U8, params: F32) -> F32:
        if self.symmetric:
            return params[:, :1] * (codes.astype(np.float32) - np.float32(self.zero))
        return params[:, :1] * codes.astype(np.float32) + params[:, 1:]

    def refit(self, x: F32, codes: U8, importance: F32) -> F32:
        q = codes.astype(np.float32) - np.float32(self.zero)
        if self.symmetric:
            return _refit_scale(x, q, importance)
        total: F32 = np.maximum(row_sums(importance), np.float32(1e-30))
        mean_q: F32 = row_sums(importance * q) / total
        mean_x: F32 = row_sums(importance * x) / total
        above: F32 = q - mean_q[:, None]
        weighted: F32 = importance * above
        scale = to_f16(_ratio(row_sums(weighted * (x - mean_x[:, None])), row_sums(weighted * above)))
        return np.stack([scale, to_f16(mean_x - scale * mean_q)], axis=1)


def _refit_scale(x: F32, q: F32, importance: F32) -> F32:
    weighted = importance * q
    return to_f16(_ratio(row_sums(weighted * x), row_sums(weighted * q)))[:, None]


def _ratio(a: F32, b: F32) -> F32:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def _inverse(step: F32) -> F32:
    """1 / step, and 0 where the step is."""
    return np.divide(np.float32(1), step, out=np.zeros_like(step), where=step != 0)


@dataclass(frozen=True)
class Table(Grid):
    """Levels of a table, ascending from below to above zero, times one positive scale; params (scale,)."""

    table: tuple[float, ...]
    group: int

    @property
    def levels(self) -> Levels:
        values = np.asarray(self.table, np.float32)
        return Levels(
            values, _middles(values), np.arange(len(values), dtype=np.uint8), False, False, self.group, "range"
        )

    def spanning(self, low: F32, high: F32) -> F32:
        levels = np.asarray(self.table, np.float32)
        # The smallest scale that covers both ends.
        return to_f16(np.maximum(np.maximum(high, 0) / levels[-1], np.minimum(low, 0) / levels[0]))[:, None]

    def round(self, x: F32, params: F32) -> U8:
        codes: U8 = np.searchsorted(self.levels.bounds, x * _inverse(params)).astype(np.uint8)
        return codes

    def values(self, codes: U8, params: F32) -> F32:
        return params * np.asarray(self.table, np.float32)[codes]

    def refit(self, x: F32, codes: U8, importance: F32) -> F32:
        return _refit_scale(x, np.asarray(self.table, np.float32)[codes], importance)


def _middles(levels: F32) -> F32:
    """Half-way between neighbours."""
    middles: F32 = (levels[1:] + levels[:-1]) * np.float32(0.5)
    return middles


class Ternary(Table):
    """-scale, 0 and scale: codes 0, 1 and 2."""

    def __init__(self, group: int) -> None:
        super().__init__((-1.0, 0.0, 1.0), group)

    @property
    def levels(self) -> Levels:
        return super().levels._replace(rule="ternary")

    def plain(self, x: F32) -> F32:
        """The mean of the magnitudes above 0.7 of their mean (ternary weight networks, arXiv:1605.04711, section 2)."""
        magnitude = np.abs(x)
        threshold = np.float32(0.7) * (row_sums(magnitude) / np.float32(x.shape[1]))
        kept = magnitude > threshold[:, None]
        return to_f16(row_sums(np.where(kept, magnitude, np.float32(0))) / _count(kept))[:, None]


def _two_means(x: F32) -> tuple[F32, F32]:
    """The means of the lower and the upper part of each row, split half-way between them (Lloyd's iteration)."""
    low, high = x.min(axis=1), x.max(axis=1)
    for _ in range(8):
        upper = x > ((low + high) * np.float32(0.5))[:, None]
        total_upper, total_lower = (row_sums(np.where(part, x, np.float32(0))) for part in (upper, ~upper))
        high = np.where(upper.any(axis=1), total_upper / _count(upper), high).astype(np.float32)
        low = total_lower / _count(~upper)
    return low, high


def _count(chosen: npt.NDArray[np.bool_]) -> F32:
    """How many of each row, at least 1."""
    counts: F32 = np.maximum(chosen.sum(axis=1), 1).astype(np.float32)
    return counts
