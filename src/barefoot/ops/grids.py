"""Grids: the values that a group of weights can take, and how codes and parameters become the bytes of a block.

A *solver* decides which codes and which parameters a group gets; a *grid* knows what they mean. All functions work on
arrays of groups: ``x`` float32 (n, k) with one row for each group (k = the group's size, or any part of it), ``params``
float32 (n, p) as they will be stored (rounded to f16), ``codes`` uint8 (n, k).

    Uniform   w = scale × (code − zero)        symmetric; the scale may be negative
              w = scale × code + minimum       asymmetric
    Shifted   w = scale × (code − zero)        symmetric, and the scale a power of two
    Table     w = scale × table[code]          the levels of a number format that is not uniform, such as NF4 or FP4
    Special   the same, but one code stands for one of two special values, as the last bit of the scale says
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

F16_MAX = 65504.0
TILE = 1 << 17  # weights that stay in the cache while they are compared with every level


def to_f16(values: F32) -> F32:
    """Rounded to f16 and clipped to its range, as float32."""
    rounded: F32 = np.clip(values, -F16_MAX, F16_MAX).astype(np.float16).astype(np.float32)
    return rounded


class Grid(ABC):
    """What solvers need to know of a format."""

    group: int

    @abstractmethod
    def spanning(self, low: F32, high: F32) -> F32:
        """Parameters whose levels reach from ``low`` to ``high``, (n,) each → (n, p)."""

    def kinds(self, low: F32, high: F32) -> Iterator[F32]:
        """The same for each kind of group that the grid has; solvers try all of them."""
        yield self.spanning(low, high)

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
    def levels(self) -> int:
        return (1 << self.bits) - 1

    @property
    def zero(self) -> int:
        return 1 << (self.bits - 1) if self.symmetric else 0

    def spanning(self, low: F32, high: F32) -> F32:
        if self.symmetric:
            # The end of larger magnitude gets the code 0, which reaches one level further than the other end.
            extreme: F32 = np.where(-low > high, low, high).astype(np.float32)
            return to_f16(extreme / np.float32(-self.zero))[:, None]
        minimum = to_f16(low)
        return np.stack([to_f16((high - minimum) / np.float32(self.levels)), minimum], axis=1)

    def plain(self, x: F32) -> F32:
        """As the role says; of one bit the means of a group's lower and upper part, two levels having no inside."""
        return self.spanning(*(_two_means(x) if self.bits == 1 else (x.min(axis=1), x.max(axis=1))))

    def round(self, x: F32, params: F32) -> U8:
        step = params[:, :1]
        shifted = x if self.symmetric else x - params[:, 1:]
        ratio = np.divide(shifted, step, out=np.zeros_like(shifted), where=step != 0)
        codes: U8 = np.clip(np.rint(ratio) + self.zero, 0, self.levels).astype(np.uint8)
        return codes

    def values(self, codes: U8, params: F32) -> F32:
        if self.symmetric:
            return params[:, :1] * (codes.astype(np.float32) - np.float32(self.zero))
        return params[:, :1] * codes.astype(np.float32) + params[:, 1:]

    def refit(self, x: F32, codes: U8, importance: F32) -> F32:
        q = codes.astype(np.float32) - np.float32(self.zero)
        if self.symmetric:
            return to_f16(_ratio((importance * q * x).sum(axis=1), (importance * q * q).sum(axis=1)))[:, None]
        total = np.maximum(importance.sum(axis=1, keepdims=True), np.float32(1e-30))
        mean_q = (importance * q).sum(axis=1, keepdims=True) / total
        mean_x = (importance * x).sum(axis=1, keepdims=True) / total
        spread = (importance * (q - mean_q) ** 2).sum(axis=1)
        scale = to_f16(_ratio((importance * (q - mean_q) * (x - mean_x)).sum(axis=1), spread))
        return np.stack([scale, to_f16(mean_x[:, 0] - scale * mean_q[:, 0])], axis=1)


@dataclass(frozen=True)
class Shifted(Grid):
    """Symmetric ``Uniform`` levels with a scale that is a power of two: block floating point; params (scale,)."""

    bits: int
    group: int

    @property
    def _levels(self) -> Uniform:
        return Uniform(self.bits, self.group, symmetric=True)

    def spanning(self, low: F32, high: F32) -> F32:
        """By the largest magnitude's exponent, at which the top half step saturates."""
        return floor_power_of_two(largest(low, high) / np.float32(2 ** (self.bits - 2)))[:, None]

    def kinds(self, low: F32, high: F32) -> Iterator[F32]:
        """That scale, and the one above, at which nothing saturates."""
        for factor in (1, 2):
            yield np.minimum(factor * self.spanning(low, high), np.float32(2.0**127))

    def round(self, x: F32, params: F32) -> U8:
        return self._levels.round(x, params)

    def values(self, codes: U8, params: F32) -> F32:
        return self._levels.values(codes, params)

    def refit(self, x: F32, codes: U8, importance: F32) -> F32:
        best = self._levels.refit(x, codes, importance)
        return floor_power_of_two(np.abs(best) * np.float32(2**0.5))  # the nearest, in the ratio


def largest(low: F32, high: F32) -> F32:
    """The larger magnitude of two ends."""
    magnitude: F32 = np.maximum(-low, high)
    return magnitude


def floor_power_of_two(values: F32) -> F32:
    """The largest powers of two that are not above ``values``, 2^-126 to 2^127; 0 for 0."""
    exponents = np.frexp(values)[1] - 1
    powers: F32 = np.ldexp(np.float32(1), np.clip(exponents, -126, 127)).astype(np.float32)
    return np.where(values > 0, powers, np.float32(0))


def _ratio(a: F32, b: F32) -> F32:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


@dataclass(frozen=True)
class Table(Grid):
    """Levels of a table on both sides of zero, in any order, times one positive scale; params (scale,)."""

    table: tuple[float, ...]
    group: int

    @cached_property
    def ascending(self) -> tuple[F32, U8]:
        """The levels from the lowest to the highest, and their codes; of codes with the same level the first one."""
        levels, codes = np.unique(np.asarray(self.table, np.float32), return_index=True)
        return levels, codes.astype(np.uint8)

    @cached_property
    def _bounds(self) -> F32:
        """The largest numbers that each level but the last is nearest to; a tie goes to the even code."""
        levels, codes = self.ascending
        middles = (levels[1:] + levels[:-1]) / 2
        return np.where(codes[1:] % 2 == 0, np.nextafter(middles, levels[:-1]), middles)

    def spanning(self, low: F32, high: F32) -> F32:
        # The smallest scale that covers both ends.
        top, bottom = np.float32(max(self.table)), np.float32(min(self.table))
        return to_f16(np.maximum(np.maximum(high, 0) / top, np.minimum(low, 0) / bottom))[:, None]

    def round(self, x: F32, params: F32) -> U8:
        # Counting the bounds below, all of them, is 10 to 20 times as fast as searching: it has no branches.
        below, step = np.zeros(x.shape, np.uint8), max(1, TILE // x.shape[1])
        for start in range(0, len(x), step):
            part, scale = x[start : start + step], params[start : start + step]
            ratio = np.divide(part, scale, out=np.zeros_like(part), where=scale != 0)
            for bound in self._bounds:
                below[start : start + step] += ratio > bound
        return self.ascending[1][below]

    def values(self, codes: U8, params: F32) -> F32:
        return params * np.asarray(self.table, np.float32)[codes]

    def refit(self, x: F32, codes: U8, importance: F32) -> F32:
        q = self.values(codes, np.ones((len(x), 1), np.float32))
        return to_f16(_ratio((importance * q * x).sum(axis=1), (importance * q * q).sum(axis=1)))[:, None]


@dataclass(frozen=True)
class Special(Grid):
    """Symmetric levels of a table, where the code of negative zero stands for a special value; params (scale,).

    The scale's last f16 bit says which one of ``specials``: the one inside the table's range or the one beyond. A
    negative scale mirrors the levels, so that the special value can lie on either side.
    """

    table: tuple[float, ...]
    specials: tuple[float, float]
    group: int

    @cached_property
    def _tables(self) -> tuple[Table, Table]:
        negative_zero = len(self.table) // 2
        inside, beyond = (
            Table((*self.table[:negative_zero], special, *self.table[negative_zero + 1 :]), self.group)
            for special in self.specials
        )
        return inside, beyond

    def spanning(self, low: F32, high: F32) -> F32:
        return next(self.kinds(low, high))

    def kinds(self, low: F32, high: F32) -> Iterator[F32]:
        """The largest magnitude over the largest level, for each special value and sign."""
        for i, table in enumerate(self._tables):
            scale = with_last_bit(largest(low, high) / np.float32(max(table.table)), i)
            yield scale[:, None]
            yield -scale[:, None]

    def plain(self, x: F32) -> F32:
        """The kind of least squared error (arXiv:2411.11745, section III.C)."""
        least, best = np.full(len(x), np.inf, np.float32), np.empty((len(x), 1), np.float32)
        for params in self.kinds(x.min(axis=1), x.max(axis=1)):
            errors = ((x - self.values(self.round(x, params), params)) ** 2).sum(axis=1)
            better = errors < least
            best[better], least[better] = params[better], errors[better]
        return best

    def round(self, x: F32, params: F32) -> U8:
        codes, which = np.empty(x.shape, np.uint8), last_bit(params[:, 0])
        for i, table in enumerate(self._tables):
            codes[which == i] = table.round(x[which == i], params[which == i])
        return codes

    def values(self, codes: U8, params: F32) -> F32:
        both = np.array([table.table for table in self._tables], np.float32)
        return params * both[last_bit(params).astype(np.uint8), codes]

    def refit(self, x: F32, codes: U8, importance: F32) -> F32:
        best, most = np.zeros((len(x), 1), np.float32), np.full(len(x), -1, np.float32)
        for i, table in enumerate(self._tables):
            q = table.values(codes, np.ones((len(x), 1), np.float32))
            products, squares = (importance * q * x).sum(axis=1), (importance * q * q).sum(axis=1)
            scale = _ratio(products, squares)
            gained = scale * products  # squared error less than with a scale of 0
            better = gained > most
            most[better] = gained[better]
            best[better, 0] = np.copysign(with_last_bit(np.abs(scale), i), scale)[better]
        return best


def with_last_bit(values: F32, bit: int) -> F32:
    """The nearest f16 numbers to ``values`` ≥ 0 whose last bit is ``bit``, as float32."""
    values = np.minimum(values, np.float32(F16_MAX))
    bits = values.astype(np.float16).view(np.uint16)
    wrong = (bits & 1) ^ np.uint16(bit)
    below, above = (each.view(np.float16).astype(np.float32) for each in (bits - wrong * (bits > 0), bits + wrong))
    below = np.where(last_bit(below) == bit, below, above)  # zero has none below
    return np.where(values - below <= above - values, below, above)


def last_bit(params: F32) -> npt.NDArray[np.bool_]:
    """Whether it is set in f16 numbers that are given as float32."""
    return (params.astype(np.float16).view(np.uint16) & 1).astype(bool)


class Ternary(Table):
    """-scale, 0 and scale: codes 0, 1 and 2."""

    def __init__(self, group: int) -> None:
        super().__init__((-1.0, 0.0, 1.0), group)

    def plain(self, x: F32) -> F32:
        """The mean of the magnitudes above 0.7 of their mean (ternary weight networks, arXiv:1605.04711, section 2)."""
        magnitude = np.abs(x)
        kept = magnitude > np.float32(0.7) * magnitude.mean(axis=1, keepdims=True)
        total = magnitude.sum(axis=1, where=kept)
        return to_f16(total / np.maximum(kept.sum(axis=1), 1).astype(np.float32))[:, None]


def _two_means(x: F32) -> tuple[F32, F32]:
    """The means of the lower and the upper part of each row, split half-way between them (Lloyd's iteration)."""
    low, high = x.min(axis=1), x.max(axis=1)
    for _ in range(8):
        upper = x > ((low + high) / 2)[:, None]
        n_upper = upper.sum(axis=1)
        total_upper, total_lower = x.sum(axis=1, where=upper), x.sum(axis=1, where=~upper)
        high = np.where(n_upper > 0, total_upper / np.maximum(n_upper, 1), high).astype(np.float32)
        low = (total_lower / np.maximum(x.shape[1] - n_upper, 1)).astype(np.float32)
    return low, high
