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

*Differs from the paper*, which shares 3-bit scales and zero points among 16 rows, with four f16 numbers for each 16 x 16
weights: rows stay independent here (they can be permuted, streamed and looked up), blocks fit every width that 64
divides, and the error at equal bytes is lower (``benchmarks/weights/spqr.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from barefoot.ops.payload import F32, U8, pack_chunks, unpack_chunks

ELEMENTS, GROUP = 64, 16
N_GROUPS = ELEMENTS // GROUP
BITS = (2, 3, 4)
HEADER = 1 + N_GROUPS
MOST = 15  # of a and j
LAST_STEP = 247  # the code of the largest d; beyond are infinity and NaN


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

    def decode(self, blocks: U8) -> F32:
        """The weights of ``blocks``, float32 (n, 64)."""
        _, scales, codes = self.split(blocks)
        scale = step_of(scales[:, :1]) * (scales[:, 1:] & 15).astype(np.float32)
        zero = self.zero_of(scales[:, 1:] >> 4)
        grouped = codes.reshape(-1, N_GROUPS, GROUP).astype(np.float32)
        return (scale[..., None] * (grouped - zero[..., None])).reshape(len(blocks), ELEMENTS)

    def encode(self, weights: F32) -> U8:
        """Rounded to nearest: the levels of each group span its range, as far as a and j allow. (n, 64) → bytes."""
        groups = weights.reshape(-1, N_GROUPS, GROUP)
        low, spread = groups.min(axis=2), np.ptp(groups, axis=2)
        step = spread / np.float32(self.levels)
        unit = nearest_step(step.max(axis=1) / np.float32(MOST))
        a = nearest(_over(step, step_of(unit)[:, None]))
        j = self.nearest_zero(_over(-low, step))
        scale, zero = step_of(unit)[:, None] * a.astype(np.float32), self.zero_of(j)
        codes = self.round(groups, scale[..., None], zero[..., None])
        scales = np.concatenate([unit[:, None], a | (j << np.uint8(4))], axis=1)
        return self.join(scales[:, :0], scales, codes.reshape(-1, ELEMENTS))

    def round(self, x: F32, scale: F32, zero: F32) -> U8:
        """The nearest codes, for arrays that broadcast."""
        codes: U8 = np.clip(np.rint(_over(x, scale) + zero), 0, self.levels).astype(np.uint8)
        return codes

    def zero_of(self, j: U8) -> F32:
        """The zero points of their codes."""
        zero: F32 = (8 + 3 * j.astype(np.float32)) * np.float32((1 << self.bits) / 64)
        return zero

    def nearest_zero(self, zero: F32) -> U8:
        """The codes of the nearest zero points."""
        return nearest((zero * np.float32(64 / (1 << self.bits)) - 8) / 3)


def nearest(x: F32) -> U8:
    """The nearest of 0 to 15."""
    codes: U8 = np.clip(np.rint(x), 0, MOST).astype(np.uint8)
    return codes


def step_of(code: U8) -> F32:
    """d of its code."""
    return (code.astype(np.uint16) << np.uint16(7)).view(np.float16).astype(np.float32) / np.float32(256)


def nearest_step(step: F32) -> U8:
    """The code of the nearest d, for d >= 0; the largest one for more than that."""
    bits = np.clip(step * np.float32(256), 0, np.float32(65504)).astype(np.float16).view(np.uint16).astype(np.uint32)
    return np.minimum((bits + 64) >> 7, LAST_STEP).astype(np.uint8)


def _over(a: F32, b: F32) -> F32:
    """a / b, 0 where b is 0."""
    a, b = np.broadcast_arrays(a, b)
    return np.divide(a, b, out=np.zeros(a.shape, np.float32), where=b > 0)


FORMATS = tuple(Bilevel(bits) for bits in BITS)
