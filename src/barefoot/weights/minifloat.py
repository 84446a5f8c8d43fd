"""Minifloats: floating-point numbers of 3 to 8 bits, any split of exponent and mantissa, any bias.

Post-Training Quantization with Low-precision Minifloats and Integers on FPGAs (Aggarwal et al. 2023, arXiv:2311.12359),
section III. E{e}M{m} has a sign, e = 1..5 exponent bits and m ≥ 0 mantissa bits; every code is a finite number, there
are neither infinities nor NaNs. With exponent field E and mantissa field M::

    E = 0   ± 2^(1 - bias) M / 2^m              subnormal          largest = 2^(2^e - 1 - bias) (2 - 2^-m)
    E > 0   ± 2^(E - bias) (1 + M / 2^m)        normal             bias = 2^(e - 1) - 1 by default

E1 formats are integers: E1M(b - 2) has the levels of symmetric b-bit ones. ``unsigned`` formats have no sign bit, for
what a ReLU leaves. Rounding is to the nearest level, half to the even mantissa, *then* saturated: a number may round up
across a power of two.

**Code**: sign, exponent, mantissa, from the highest bit down. **Stored** for a matrix: a stream of codes, and in f16
for each row the magnitude that its largest level stands for::

    ceil(rows cols bits / 8) + 2 rows
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput
from barefoot.ops.levels import minifloat
from barefoot.weights import bitstream
from barefoot.weights.affine import SCALE_BYTES, stored_scale
from barefoot.weights.arrays import Array, namespace

F32 = npt.NDArray[np.float32]
MAX_EXPONENT_BITS = 5  # more would span more than float32 multiplies without overflow
NAME = re.compile(r"(U?)E(\d)M(\d)")


@dataclass(frozen=True)
class Minifloat:
    """``bias`` None: 2^(exponent_bits - 1) - 1."""

    exponent_bits: int
    mantissa_bits: int
    bias: int | None = None
    unsigned: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.exponent_bits <= MAX_EXPONENT_BITS or self.mantissa_bits < 0 or not 2 <= self.bits <= 8:
            raise InvalidInput(f"minifloats have 1 to {MAX_EXPONENT_BITS} exponent bits and 2 to 8 in all, got {self}")
        if not -100 <= self.offset <= 100:
            raise InvalidInput(f"a bias between -100 and 100 keeps levels in float32, got {self.bias}")

    def __str__(self) -> str:
        name = f"{'U' * self.unsigned}E{self.exponent_bits}M{self.mantissa_bits}"
        return name if self.bias is None else f"{name}, bias {self.bias}"

    @classmethod
    def named(cls, name: str) -> Minifloat:
        """``E2M1``; ``UE2M2`` without a sign.

        Raises
        ------
        InvalidInput : not such a name.
        """
        found = NAME.fullmatch(name)
        if not found:
            raise InvalidInput(f"minifloats are named as in E2M1 or UE2M2, got {name!r}")
        return cls(int(found[2]), int(found[3]), unsigned=bool(found[1]))

    @property
    def bits(self) -> int:
        return (not self.unsigned) + self.exponent_bits + self.mantissa_bits

    @property
    def offset(self) -> int:
        """The bias in numbers."""
        return (1 << (self.exponent_bits - 1)) - 1 if self.bias is None else self.bias

    @property
    def lowest_exponent(self) -> int:
        """Of normal numbers; subnormal ones share it."""
        return 1 - self.offset

    @property
    def largest(self) -> float:
        return 2.0 ** ((1 << self.exponent_bits) - 1 - self.offset) * (2 - 2.0**-self.mantissa_bits)

    def spacing(self, y: Array) -> Array:
        """The distance between levels around ``y``, of the lower side at powers of two."""
        xp = namespace(y)
        # frexp: magnitude = fraction × 2^exponent with fraction in [1/2, 1).
        exponent = xp.frexp(xp.clip(xp.abs(y), 2.0**self.lowest_exponent, self.largest))[1] - 1
        return xp.ldexp(xp.ones_like(y), exponent - self.mantissa_bits)

    def rounded(self, y: Array) -> Array:
        """The nearest level to each element of ``y``, beyond the ends the last one."""
        xp = namespace(y)
        spacing = self.spacing(y)
        return xp.clip(xp.round(y / spacing) * spacing, 0.0 if self.unsigned else -self.largest, self.largest)

    def encode(self, y: F32) -> npt.NDArray[np.uint8]:
        """Codes of the nearest levels; both zeros are 0."""
        level = self.rounded(y)
        magnitude, spacing = np.abs(level), self.spacing(level)
        mantissa = np.rint(magnitude / spacing).astype(np.int64)  # with its leading 1, if it is normal
        exponent = (np.log2(spacing) + self.mantissa_bits - self.lowest_exponent).astype(np.int64)
        # A normal number's leading 1 carries into the exponent field.
        code = mantissa + (exponent << self.mantissa_bits)
        sign = (level < 0).astype(np.int64) << (self.bits - 1)
        codes: npt.NDArray[np.uint8] = (code | sign).astype(np.uint8)
        return codes

    def decode(self, codes: npt.NDArray[np.uint8]) -> F32:
        return self.table()[codes]

    def table(self) -> F32:
        """The value of every code (2^bits,), ascending by magnitude, then the same with a minus."""
        values = np.array(minifloat(self.exponent_bits, self.mantissa_bits), np.float32)
        shifted: F32 = np.ldexp(values, (1 << (self.exponent_bits - 1)) - 1 - self.offset)
        return shifted[: 1 << self.bits]  # without a sign, the positive half

    def n_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a stored matrix (rows, cols)."""
        return bitstream.n_bytes(shape[0] * shape[1], self.bits) + SCALE_BYTES * shape[0]

    def scale(self, reach: Array) -> Array:
        """What levels are multiplied with, for the largest one to stand for ``reach`` as it is stored."""
        return stored_scale(reach) / self.largest


def formats(bits: int, unsigned: bool = False) -> tuple[Minifloat, ...]:
    """Every split of ``bits``, the integers (E1) first."""
    magnitude_bits = bits - (not unsigned)
    return tuple(
        Minifloat(e, magnitude_bits - e, unsigned=unsigned)
        for e in range(1, min(magnitude_bits, MAX_EXPONENT_BITS) + 1)
    )


def rounded_rows(weight: Array, fmt: Minifloat, shrink: float = 1.0) -> Array:
    """A matrix (rows, cols) with one scale for each row, at ``shrink`` times its largest magnitude."""
    xp = namespace(weight)
    scale = fmt.scale(xp.amax(xp.abs(weight), axis=1) * shrink)[:, None]
    return fmt.rounded(weight / scale) * scale
