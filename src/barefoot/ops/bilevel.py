"""Bilevel groups: 16 weights share a scale and a zero point, and four groups of a row the unit of their scales.

SpQR (Dettmers et al. 2023, arXiv:2306.03078, section 4.1) pays for very small groups by quantizing their scales and
zero points too, *bilevel*. Here a block is 64 weights of a row, four groups of 16::

    w = d a (q - z)        q in 0..2^b - 1, a in 0..15 and d of a block
    z = 2^b (8 + 3 j) / 64        j in 0..15: from 1/8 to 53/64 of the codes

====== =========================================================================================
bytes  content
====== =========================================================================================
0      d: five bits of exponent and, below, three of mantissa: the f16 of the bits ``byte << 7``, over 256
1-4    group g of the block, byte 1 + g: a in the low half, j in the high half
rest   two chunks of 32 codes of 2, 3 or 4 bits (``barefoot.ops.payload``)
====== =========================================================================================

5 + 8 b bytes, so b + 0.625 bits a weight, as many as the paper's b + (3 + 3) / 16 + 64 / 16^2. Example: 3 bits, byte 0
= 0b01111100 (2^0 * 1.5 / 256), byte 1 = 0x2f: a = 15, j = 2, z = 8 * 14 / 64; code 7 of the first group is
``1.5 / 256 * 15 * (7 - 1.75)``. All products are exact in float32, in any order.

*Differs from the paper*, which shares 3-bit scales and zero points among 16 rows, with four f16 numbers for each 16 x
16 weights: rows stay independent here (they can be permuted, streamed and looked up), blocks fit every width that 64
divides, and the error at equal bytes is lower (``benchmarks/weights/bilevel.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

from barefoot.ops.grids import Nested, Uniform
from barefoot.ops.payload import F32, U8, pack_chunks, unpack_chunks

ELEMENTS, GROUP = 64, 16
N_GROUPS = ELEMENTS // GROUP
BITS = (2, 3, 4)
HEADER = 1 + N_GROUPS
MOST = 15  # of a and j
LAST_STEP = 247  # the code of the largest d; beyond are infinity and NaN
SHRINKS = np.array([1, 0.9, 0.8, 0.7, 0.6], np.float32)  # of a group's range, of which one is where a search begins
WIDTH = 2  # codes to either side that it looks at


@dataclass(frozen=True)
class Bilevel:
    """Blocks with codes of ``bits`` bits. ``scales`` are the five bytes before the codes."""

    bits: int

    numbers_bytes = 0  # of f16
    scales_bytes = HEADER

    @property
    def name(self) -> str:
        return f"bilevel{self.bits}"

    @property
    def n_bytes(self) -> int:
        return HEADER + self.bits * ELEMENTS // 8

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def split(self, blocks: U8) -> tuple[U8, U8, U8]:
        """``blocks`` uint8 (n, n_bytes) as no f16 numbers, the bytes of the scales, and the codes (n, 64)."""
        payload = blocks[:, HEADER:].reshape(len(blocks), -1, 4 * self.bits)
        return blocks[:, :0], blocks[:, :HEADER], unpack_chunks(payload, self.bits).reshape(len(blocks), -1)

    def join(self, numbers: U8, scales: U8, codes: U8) -> U8:
        """The inverse of ``split``."""
        payload = pack_chunks(codes.reshape(len(codes), -1, 32), self.bits)
        return np.concatenate([numbers, scales, payload.reshape(len(codes), -1)], axis=1)

    def read_params(self, numbers: U8, scales: U8) -> F32:
        """What :class:`BilevelGrid` stores, float32 (n, 9): the codes of d, of each a and of each j."""
        unit, sub = scales[:, :1], scales[:, 1:]
        return np.concatenate([unit, sub & np.uint8(15), sub >> np.uint8(4)], axis=1).astype(np.float32)

    def write_params(self, stored: F32) -> tuple[U8, U8]:
        """The inverse of ``read_params``."""
        codes = stored.astype(np.uint8)
        a, j = codes[:, 1 : 1 + N_GROUPS], codes[:, 1 + N_GROUPS :]
        scales = np.concatenate([codes[:, :1], a | (j << np.uint8(4))], axis=1)
        return scales[:, :0], scales

    def decode(self, blocks: U8) -> F32:
        """The weights of ``blocks``, float32 (n, 64)."""
        _, scales, codes = self.split(blocks)
        scale, zero = self.scale_of(scales[:, :1], scales[:, 1:])
        grouped = codes.reshape(-1, N_GROUPS, GROUP).astype(np.float32)
        return (scale[..., None] * grouped - (scale * zero)[..., None]).reshape(len(blocks), ELEMENTS)

    def encode(self, weights: F32) -> U8:
        """Weights (n, 64) as blocks, each group with the least squared error that a search finds."""
        codes, n = np.empty(weights.shape, np.uint8), len(weights)
        groups = [np.ascontiguousarray(weights[:, g : g + GROUP].T) for g in range(0, ELEMENTS, GROUP)]
        alike = np.ones((GROUP, 1), np.float32)
        starts = [self.span(x, alike) for x in groups]
        unit = nearest_step(np.max([step for step, _, _ in starts], axis=0) / np.float32(MOST))
        scales = np.empty((n, HEADER), np.uint8)
        scales[:, 0] = unit
        for g, (x, (step, zero, _)) in enumerate(zip(groups, starts, strict=True)):
            scales[:, 1 + g] = self.search(x, alike, step_of(unit), step, zero)
            codes[:, GROUP * g : GROUP * (g + 1)] = self.round(x, *self.scale_of(unit, scales[:, 1 + g])).T
        return self.join(scales[:, :0], scales, codes)

    # --- groups: float32 (16, n), a group a column ------------------------------------------------------------------

    def scale_of(self, unit: U8, sub: U8) -> tuple[F32, F32]:
        """Scales and zero points (n,) of the codes of d and the bytes of groups."""
        return step_of(unit) * (sub & np.uint8(15)).astype(np.float32), self.zero_of(sub >> np.uint8(4))

    def round(self, x: F32, scale: F32, zero: F32) -> U8:
        """The nearest codes. x (16, n) or any part of it; scale, zero (n,)"""
        codes: U8 = np.clip(np.rint(x * _inverse(scale) + zero), 0, self.levels).astype(np.uint8)
        return codes

    def span(self, x: F32, importance: F32) -> tuple[F32, F32, F32]:
        """Scales, zero points and squared errors (n,) of the best of some shrunken ranges, not rounded to their codes.

        importance : of the elements, (16, n) or (16, 1)
        """
        low, high = x.min(axis=0), x.max(axis=0)
        middle, spread = (low + high) / 2, high - low
        first, last = self.zero_of(np.array([0, MOST], np.uint8))
        reach = np.maximum(high / (self.levels - first), -low / last)  # a range far from zero takes wider steps
        best: tuple[F32, F32, F32] | None = None
        for shrink in SHRINKS:
            step = np.maximum(spread * (shrink / self.levels), reach)
            zero = np.clip(self.levels / 2 - middle * _inverse(step), first, last)
            error = self.errors(x, importance, step, zero)
            if best is None:
                best = step, zero, error
            better = error < best[2]
            best = tuple(np.where(better, new, old) for new, old in zip((step, zero, error), best, strict=True))  # type: ignore[assignment]
        assert best is not None
        return best

    def search(self, x: F32, importance: F32, unit: F32, step: F32, zero: F32) -> U8:
        """The byte (n,) of each group: the a and j of least squared error about those of ``step`` and ``zero``."""
        first_a, first_j = np.rint(step * _inverse(unit)), np.rint(self.zero_codes(zero))
        best, least = np.zeros(x.shape[1], np.uint8), np.full(x.shape[1], np.inf, np.float32)
        for da in range(-WIDTH, WIDTH + 1):
            a = np.clip(first_a + da, 0, MOST).astype(np.uint8)
            for dj in range(-WIDTH, WIDTH + 1):
                j = np.clip(first_j + dj, 0, MOST).astype(np.uint8)
                error = self.errors(x, importance, unit * a.astype(np.float32), self.zero_of(j))
                better = error < least
                least = np.where(better, error, least)
                best = np.where(better, a | (j << np.uint8(4)), best)
        return best

    def errors(self, x: F32, importance: F32, scale: F32, zero: F32) -> F32:
        """Sums of squared errors of the groups, (n,), elements counting as ``importance`` says."""
        at = x * _inverse(scale) + zero
        off = (at - np.clip(np.rint(at), 0, self.levels)) * scale
        held: F32 = (importance * off * off).sum(axis=0)
        lost: F32 = (importance * x * x).sum(axis=0)
        errors: F32 = np.where(scale > 0, held, lost)
        return errors

    def zero_of(self, j: U8) -> F32:
        """The zero points of their codes."""
        zero: F32 = (8 + 3 * j.astype(np.float32)) * np.float32((1 << self.bits) / 64)
        return zero

    def zero_codes(self, zero: F32) -> F32:
        """The inverse, not rounded."""
        codes: F32 = (zero * np.float32(64 / (1 << self.bits)) - 8) / np.float32(3)
        return codes


@dataclass(frozen=True)
class BilevelGrid(Nested):
    """The grid of the blocks of ``form``. Stored are codes: of d, of the four a and of the four j."""

    form: Bilevel
    group: int = GROUP

    @property
    def block(self) -> int:
        return ELEMENTS

    @cached_property
    def inner(self) -> Uniform:
        return Uniform(self.form.bits, GROUP)

    def store(self, wanted: F32) -> F32:
        step, zero = self._reaching(wanted)
        unit = nearest_step(step.max(axis=1) / np.float32(MOST))
        return self._stored(unit, *self._codes(unit, step, zero))

    def expand(self, stored: F32) -> F32:
        unit, a, j = self._split(stored)
        scale = step_of(unit)[:, None] * a.astype(np.float32)
        return np.stack([scale, -(scale * self.form.zero_of(j))], axis=2)

    def move(self, stored: F32, at: int, wanted: F32) -> F32:
        unit, a, j = self._split(stored)
        moved_a, moved_j = self._codes(unit, *self._reaching(wanted[:, None]))
        a[:, at], j[:, at] = moved_a[:, 0], moved_j[:, 0]
        return self._stored(unit, a, j)

    def neighbours(self, stored: F32, at: int) -> Iterator[F32]:
        columns = [1 + at, 1 + N_GROUPS + at]
        for steps in product(range(-WIDTH, WIDTH + 1), repeat=2):
            if any(steps):
                other = stored.copy()
                other[:, columns] = np.clip(other[:, columns] + np.array(steps, np.float32), 0, MOST)
                yield other

    def _reaching(self, wanted: F32) -> tuple[F32, F32]:
        """Steps and zero points (n, groups) that cover what (scale, minimum) do; wider where a range is far from 0."""
        step, low = wanted[..., 0], wanted[..., 1]
        high = low + step * np.float32(self.form.levels)
        first, last = self.form.zero_of(np.array([0, MOST], np.uint8))
        step = np.maximum(step, np.maximum(high / (np.float32(self.form.levels) - first), -low / last))
        middle = (low + high) / np.float32(2)
        zero: F32 = np.clip(np.float32(self.form.levels / 2) - middle * _inverse(step), first, last)
        return step, zero

    def _codes(self, unit: U8, step: F32, zero: F32) -> tuple[U8, U8]:
        nearest = (step * _inverse(step_of(unit))[:, None], self.form.zero_codes(zero))
        a, j = (np.clip(np.rint(each), 0, MOST).astype(np.uint8) for each in nearest)
        return a, j

    @staticmethod
    def _split(stored: F32) -> tuple[U8, U8, U8]:
        codes = stored.astype(np.uint8)
        return codes[:, 0], codes[:, 1 : 1 + N_GROUPS].copy(), codes[:, 1 + N_GROUPS :].copy()

    @staticmethod
    def _stored(unit: U8, a: U8, j: U8) -> F32:
        return np.concatenate([unit[:, None], a, j], axis=1).astype(np.float32)


def step_of(code: U8) -> F32:
    """d of its code."""
    return (code.astype(np.uint16) << np.uint16(7)).view(np.float16).astype(np.float32) / np.float32(256)


def nearest_step(step: F32) -> U8:
    """The code of the nearest d, for d >= 0; the largest one for more than that."""
    bits = np.clip(step * np.float32(256), 0, np.float32(65504)).astype(np.float16).view(np.uint16).astype(np.uint32)
    code: U8 = np.minimum((bits + 64) >> 7, LAST_STEP).astype(np.uint8)
    return code


def _inverse(x: F32) -> F32:
    """1 / x, 0 where x is 0."""
    return np.divide(np.float32(1), x, out=np.zeros_like(x), where=x > 0)


FORMATS = tuple(Bilevel(bits) for bits in BITS)
