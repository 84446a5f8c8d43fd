"""The blocks of 256 weights of GGUF files: q2_k .. q6_k, whose scales have scales, and the ternary tq1_0 and tq2_0.

A K-quant super-block has one f16 scale d (and a scale of minimums, dmin), and a small integer *sub-scale* (and
sub-minimum) for each 16 or 32 weights: w = d * sub_scale * (q - zero), or d * sub_scale * q - dmin * sub_minimum.

Codes lie in *planes*: one of the low bits and in some a second one of the high bits. In each, fields of the same 32 (or
64) bytes, low bits of the bytes first, are one run of 32 (64) elements after the other. So the codes of q2_k are bits
2(c % 4) .. 2(c % 4) + 1 of byte 16 + 32(c // 4) + j for element j of chunk c.

Sub-scales are 16 bytes or 12:

* q2_k, 16 bytes: the scale (low half) and the minimum (high half) of each 16 weights;
* q6_k, 16 bytes: the scale of each 16 weights, signed;
* q3_k, 12 bytes: sixteen numbers of 6 bits. Number i is the low half of byte i (i < 8) or the high half of byte i - 8,
  and two high bits at bit 2(i // 4) of byte 8 + i % 4. The scale of each 16 weights is its number less 32;
* q4_k, q5_k, 12 bytes: eight scales and eight minimums of 6 bits, one for each 32 weights. Bytes 0-3 and 4-7 hold
  scales 0-3 and minimums 0-3 in their low six bits; bytes 8-11 hold the low four bits of scales 4-7 (low half) and of
  minimums 4-7 (high half), whose two high bits are the top bits of bytes 0-3 and 4-7.

The arithmetic is that of the ``gguf`` package's ``dequantize``, float32, in the same order: results are equal bit for
bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot.ops.grids import SubScaled
from barefoot.ops.payload import F32, U8, f16_at, nibbles, pack_fields, scaled, unpack_fields

I16 = npt.NDArray[np.int16]

ELEMENTS = 256


@dataclass(frozen=True)
class Plane:
    """``width`` bits of each code, from byte ``start`` of the block on; a field of ``n_shared`` bytes is a run."""

    start: int
    width: int
    n_shared: int = 32

    @property
    def where(self) -> slice:
        return slice(self.start, self.start + ELEMENTS * self.width // 8)


@dataclass(frozen=True)
class SuperBlock:
    """Where the parts of a block lie.

    Attributes
    ----------
    numbers_at, numbers_bytes : its f16 scale d, then dmin where there are minimums.
    scales_at, scales_bytes : the sub-scales; no bytes for one scale per block.
    planes : the bits of the codes, low ones first.
    sub_scales : their bytes, as ``split`` returns them, to sub-scales (and sub-minimums) float32 (n, 8 or 16).
    write_sub_scales : the inverse, of int16 (n, 1 or 2, 8 or 16).
    zero : the code that stands for 0.
    pairs : the sub-scales are stored as in q4_k.
    """

    name: str
    n_bytes: int
    numbers_at: int
    numbers_bytes: int
    scales_at: int
    scales_bytes: int
    planes: tuple[Plane, ...]
    sub_scales: Callable[[U8], tuple[F32, ...]] | None = None
    write_sub_scales: Callable[[I16], U8] | None = None
    zero: int = 0
    pairs: bool = False

    @property
    def bits(self) -> int:
        return sum(plane.width for plane in self.planes)

    @property
    def _numbers(self) -> slice:
        return slice(self.numbers_at, self.numbers_at + self.numbers_bytes)

    @property
    def _scales(self) -> slice:
        return slice(self.scales_at, self.scales_at + self.scales_bytes)

    def split(self, blocks: U8) -> tuple[U8, U8, U8]:
        """``blocks`` uint8 (n, n_bytes) as the bytes of its f16 numbers, of its sub-scales, and its codes (n, 256).

        Twelve bytes of sub-scales are always sixteen numbers in the order of q3_k; those of q4_k and q5_k are the
        eight scales, then the eight minimums.
        """
        codes, low = np.zeros((len(blocks), ELEMENTS), np.uint8), 0
        for plane in self.planes:
            codes |= unpack_fields(blocks[:, plane.where], plane.n_shared, plane.width) << np.uint8(low)
            low += plane.width
        scales = blocks[:, self._scales]
        return blocks[:, self._numbers], pack_six(_read_pairs(scales)) if self.pairs else scales, codes

    def join(self, numbers: U8, scales: U8, codes: U8) -> U8:
        """The inverse of ``split``."""
        blocks, low = np.empty((len(codes), self.n_bytes), np.uint8), 0
        blocks[:, self._numbers] = numbers
        blocks[:, self._scales] = _write_pairs(unpack_six(scales)) if self.pairs else scales
        for plane in self.planes:
            blocks[:, plane.where] = pack_fields(codes >> np.uint8(low), plane.n_shared, plane.width)
            low += plane.width
        return blocks

    def read_params(self, numbers: U8, scales: U8) -> F32:
        """What a grid stores, float32 (n, k), from what ``split`` returns: see ``grids.SubScaled``."""
        assert self.sub_scales is not None
        shared = np.ascontiguousarray(numbers).view(np.float16).astype(np.float32)[:, :, None]
        integers = np.stack(self.sub_scales(scales), axis=1)
        return np.concatenate([shared, integers], axis=2).reshape(len(numbers), -1)

    def write_params(self, stored: F32) -> tuple[U8, U8]:
        """The inverse of ``read_params``."""
        assert self.write_sub_scales is not None
        parts = stored.reshape(len(stored), self.numbers_bytes // 2, -1)
        numbers = np.ascontiguousarray(parts[:, :, 0].astype(np.float16)).view(np.uint8)
        return numbers, self.write_sub_scales(parts[:, :, 1:].astype(np.int16))

    def decode(self, blocks: U8) -> F32:
        """The weights of ``blocks``, float32 (n, 256)."""
        numbers, scales, codes = self.split(blocks)
        d, centred = f16_at(numbers, 0), codes.astype(np.int8) - np.int8(self.zero)
        if self.sub_scales is None:
            return scaled(centred, d)
        sub_scale, *sub_minimum = self.sub_scales(scales)
        offsets = [-(f16_at(numbers, 2) * each) for each in sub_minimum]
        return scaled(centred, d * sub_scale, *offsets)


def pack_six(values: U8) -> U8:
    """Sixteen numbers of 6 bits (n, 16) in 12 bytes, in the order of q3_k."""
    high = pack_fields(values >> np.uint8(4), 4, 2)
    return np.concatenate([(values[:, :8] & np.uint8(15)) | (values[:, 8:] << np.uint8(4)), high], axis=1)


def unpack_six(packed: U8) -> U8:
    """The inverse of ``pack_six``."""
    return nibbles(packed[:, :8]) | (unpack_fields(packed[:, 8:], 4, 2) << np.uint8(4))


def _read_pairs(packed: U8) -> U8:
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    return np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4), b & 63, (c >> 4) | ((b >> 6) << 4)], axis=1)


def _write_pairs(values: U8) -> U8:
    scales, more_scales, minimums, more_minimums = np.split(values, 4, axis=1)
    a = scales | ((more_scales >> 4) << 6)
    b = minimums | ((more_minimums >> 4) << 6)
    return np.concatenate([a, b, (more_scales & 15) | ((more_minimums & 15) << 4)], axis=1)


def _halves(packed: U8) -> tuple[F32, ...]:
    return (packed & 15).astype(np.float32), (packed >> 4).astype(np.float32)


def _six_less_32(packed: U8) -> tuple[F32, ...]:
    return ((unpack_six(packed).astype(np.int8) - np.int8(32)).astype(np.float32),)


def _six_and_minimums(packed: U8) -> tuple[F32, ...]:
    values = unpack_six(packed).astype(np.float32)
    return values[:, :8], values[:, 8:]


def _signed(packed: U8) -> tuple[F32, ...]:
    return (packed.view(np.int8).astype(np.float32),)


def _write_halves(values: I16) -> U8:
    return (values[:, 0] | values[:, 1] << 4).astype(np.uint8)


def _write_six_less_32(values: I16) -> U8:
    return pack_six((values[:, 0] + 32).astype(np.uint8))


def _write_six(values: I16) -> U8:
    return pack_six(values.reshape(len(values), 16).astype(np.uint8))


def _write_signed(values: I16) -> U8:
    return values[:, 0].astype(np.int8).view(np.uint8)


_FOURS, _THREES = (_halves, _write_halves), (_six_less_32, _write_six_less_32)
_SIXES, _EIGHTS = (_six_and_minimums, _write_six), (_signed, _write_signed)
K_QUANTS = (
    SuperBlock("q2_k", 84, 80, 4, 0, 16, (Plane(16, 2),), *_FOURS),
    SuperBlock("q3_k", 110, 108, 2, 96, 12, (Plane(32, 2), Plane(0, 1)), *_THREES, zero=4),
    SuperBlock("q4_k", 144, 0, 4, 4, 12, (Plane(16, 4),), *_SIXES, pairs=True),
    SuperBlock("q5_k", 176, 0, 4, 4, 12, (Plane(48, 4), Plane(16, 1)), *_SIXES, pairs=True),
    SuperBlock("q6_k", 210, 208, 2, 192, 16, (Plane(0, 4, 64), Plane(128, 2)), *_EIGHTS, zero=32),
)
GRIDS = {
    "q2_k": SubScaled(2, 16, symmetric=False, elements=ELEMENTS, least=0, most=15),
    "q3_k": SubScaled(3, 16, symmetric=True, elements=ELEMENTS, least=-32, most=31),
    "q4_k": SubScaled(4, 32, symmetric=False, elements=ELEMENTS, least=0, most=63),
    "q5_k": SubScaled(5, 32, symmetric=False, elements=ELEMENTS, least=0, most=63),
    "q6_k": SubScaled(6, 16, symmetric=True, elements=ELEMENTS, least=-128, most=127),
}
TQ2_0 = SuperBlock("tq2_0", 66, 64, 2, 66, 0, (Plane(0, 2),), zero=1)

TQ1_0_BYTES = 54
_POWERS_OF_3 = np.array([1, 3, 9, 27, 81], np.uint8).reshape(-1, 1)


def decode_tq1_0(blocks: U8) -> F32:
    """0-47 five codes of 0..2 a byte; 48-51 four codes a byte; 52-53 d; w = d * (q - 1).

    A byte is a fraction of 256 in base 3, rounded up: code k is the integer part of 3 * (byte * 3^k mod 256) / 256.
    Codes 0 of bytes 0-31 are elements 0-31, codes 1 the next 32, up to codes 4; then bytes 32-47, then bytes 48-51.
    """
    parts = [(blocks[:, None, :32], 5), (blocks[:, None, 32:48], 5), (blocks[:, None, 48:52], 4)]
    digits = [(part * _POWERS_OF_3[:n]).reshape(len(blocks), -1) for part, n in parts]
    codes = (np.concatenate(digits, axis=1).astype(np.uint16) * 3) >> 8
    return scaled(codes.astype(np.int8) - np.int8(1), f16_at(blocks, 52))
