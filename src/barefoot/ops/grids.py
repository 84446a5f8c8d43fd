"""Grids: the values that a group of weights can take, and how codes and parameters become the bytes of a block.

A *solver* decides which codes and which parameters a group gets; a *grid* knows what they mean. All functions work on
arrays of groups: ``x`` float32 (n, k) with one row for each group (k = the group's size, or any part of it), ``params``
float32 (n, p) as they will be stored (rounded to f16), ``codes`` uint8 (n, k).

    Uniform   w = scale × (code − zero)        symmetric; the scale may be negative
              w = scale × code + minimum       asymmetric
    Shifted   w = scale × (code − zero)        symmetric, and the scale a power of two
    Table     w = scale × table[code]          the levels of a number format that is not uniform, such as NF4 or FP4
    Special   the same, but one code stands for one of two special values, as the last bit of the scale says
    SubScaled Uniform, but scales (and minimums) are small integers times a number that a block of groups shares

What is *stored* for a block, float32 (n, k), is the parameters themselves where blocks are groups, so that k = p.

All of it is float32 in a fixed order, sums by :func:`row_sums`, so that compiled kernels (``barefoot.ops.rounding``)
return the same bits for any grid that has a :class:`Levels`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

F16_MAX = 65504.0
LANES = 16  # running sums of a row
TILE = 1 << 17  # weights that stay in the cache while they are compared with every level


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
    from a group's range, mean or least squares; None: in another way than :class:`Uniform`, :class:`Table` and
    :class:`Ternary` have it.
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
    def block(self) -> int:
        """Elements whose parameters are stored together: whole groups."""
        return self.group

    def store(self, wanted: F32) -> F32:
        """What to store for blocks whose groups should have the parameters ``wanted`` (n, groups, p)."""
        return wanted[:, 0]

    def expand(self, stored: F32) -> F32:
        """The parameters (n, groups, p) that ``stored`` (n, k) means."""
        return stored[:, None]

    def move(self, stored: F32, at: int, wanted: F32) -> F32:
        """``stored``, but for the group ``at`` of each block the parameters nearest to ``wanted`` (n, p)."""
        return to_f16(wanted)

    def neighbours(self, stored: F32, at: int) -> Iterator[F32]:
        """What else could be stored with only the group ``at`` changed, and little."""
        yield from ()

    @property
    def n_params(self) -> int:
        """Parameters of a group, p."""
        return int(self.spanning(*np.zeros((2, 1), np.float32)).shape[1])

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


@dataclass(frozen=True)
class Shifted(Grid):
    """Symmetric ``Uniform`` levels with a scale that is a power of two: block floating point; params (scale,)."""

    bits: int
    group: int

    @property
    def _levels(self) -> Uniform:
        return Uniform(self.bits, self.group, symmetric=True)

    @property
    def levels(self) -> Levels:
        return self._levels.levels._replace(rule=None)

    def move(self, stored: F32, at: int, wanted: F32) -> F32:
        return floor_power_of_two(np.abs(wanted) * np.float32(2**0.5))

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


class Nested(Grid):
    """Groups of :class:`Uniform`, a block of which stores its parameters together."""

    @property
    @abstractmethod
    def inner(self) -> Uniform:
        """The grid of a group by itself, whose parameters need not be stored."""

    @property
    def levels(self) -> Levels:
        return self.inner.levels

    def spanning(self, low: F32, high: F32) -> F32:
        return self.inner.spanning(low, high)

    def round(self, x: F32, params: F32) -> U8:
        return self.inner.round(x, params)

    def values(self, codes: U8, params: F32) -> F32:
        return self.inner.values(codes, params)

    def refit(self, x: F32, codes: U8, importance: F32) -> F32:
        return self.inner.refit(x, codes, importance)


@dataclass(frozen=True)
class SubScaled(Nested):
    """Groups share d (and dmin): scale = d × sub-scale (and minimum = −dmin × sub-minimum).

    Stored for each parameter: d, then the integers ``least`` to ``most`` of all groups. Their products are exact.
    """

    bits: int
    group: int
    symmetric: bool
    elements: int  # of a block
    least: int
    most: int

    @property
    def block(self) -> int:
        return self.elements

    @cached_property
    def inner(self) -> Uniform:
        return Uniform(self.bits, self.group, self.symmetric)

    def split(self, stored: F32) -> tuple[F32, F32]:
        """d of each parameter (n, p, 1), and the integers (n, p, groups)."""
        parts = stored.reshape(len(stored), -1, 1 + self.block // self.group)
        return parts[:, :, :1], parts[:, :, 1:]

    def join(self, shared: F32, integers: F32) -> F32:
        """The inverse of ``split``."""
        return np.concatenate([shared, integers], axis=2).reshape(len(shared), -1)

    def store(self, wanted: F32) -> F32:
        aims = wanted.transpose(0, 2, 1) * self._signs
        low, high = aims.min(axis=2, keepdims=True), aims.max(axis=2, keepdims=True)
        # The end of larger magnitude gets the integer of larger magnitude; without negative ones, the upper end.
        reach = (
            np.where(-low > high, low, high) / np.float32(self.least) if self.least else high / np.float32(self.most)
        )
        shared = to_f16(reach if self.least else np.maximum(reach, 0))
        return self.join(shared, self._integers(aims, shared))

    def expand(self, stored: F32) -> F32:
        shared, integers = self.split(stored)
        return (shared * integers * self._signs).transpose(0, 2, 1)

    def move(self, stored: F32, at: int, wanted: F32) -> F32:
        shared, integers = self.split(stored.copy())
        integers[:, :, at, None] = self._integers(wanted[:, :, None] * self._signs, shared)
        return self.join(shared, integers)

    def neighbours(self, stored: F32, at: int) -> Iterator[F32]:
        shared, integers = self.split(stored)
        for steps in product((0, -1, 1), repeat=shared.shape[1]):
            if any(steps):
                other = integers.copy()
                other[:, :, at] = np.clip(other[:, :, at] + np.array(steps, np.float32), self.least, self.most)
                yield self.join(shared, other)

    def _integers(self, aims: F32, shared: F32) -> F32:
        nearest: F32 = np.clip(np.rint(aims * _inverse(shared)), self.least, self.most)
        return nearest

    @property
    def _signs(self) -> F32:
        """By which the parameters of a group are their products, (p, 1)."""
        return np.array([[1]] if self.symmetric else [[1], [-1]], np.float32)


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


def _inverse(step: F32) -> F32:
    """1 / step, and 0 where the step is."""
    return np.divide(np.float32(1), step, out=np.zeros_like(step), where=step != 0)


@dataclass(frozen=True)
class Table(Grid):
    """Levels of a table on both sides of zero, in any order, times one positive scale; params (scale,)."""

    table: tuple[float, ...]
    group: int

    @property
    def levels(self) -> Levels:
        levels, codes = self.ascending
        return Levels(levels, self._bounds, codes, False, False, self.group, "range")

    @cached_property
    def ascending(self) -> tuple[F32, U8]:
        """The levels from the lowest to the highest, and their codes; of codes with the same level the first one."""
        levels, codes = np.unique(np.asarray(self.table, np.float32), return_index=True)
        return levels, codes.astype(np.uint8)

    @cached_property
    def _bounds(self) -> F32:
        """The largest numbers that each level but the last is nearest to; a tie goes to the even code."""
        levels, codes = self.ascending
        middles = (levels[1:] + levels[:-1]) * np.float32(0.5)
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
            ratio = part * _inverse(scale)
            for bound in self._bounds:
                below[start : start + step] += ratio > bound
        return self.ascending[1][below]

    def values(self, codes: U8, params: F32) -> F32:
        return params * np.asarray(self.table, np.float32)[codes]

    def refit(self, x: F32, codes: U8, importance: F32) -> F32:
        return _refit_scale(x, self.values(codes, np.ones((len(x), 1), np.float32)), importance)


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
