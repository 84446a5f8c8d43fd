"""Uniform quantizers: equally spaced levels, symmetric or not, for any granularity.

A Survey of Quantization Methods for Efficient Neural Network Inference (Gholami et al. 2021, arXiv:2103.13630),
sections III.A and III.B. For a group with the range [α, β], widened to hold 0, and b bits::

    code = clip(round(x / S) + Z, 0, 2^b - 1)            x̂ = S (code - Z)

    asymmetric   S = (β - α) / (2^b - 1)                 Z = round(-α / S)
    restricted   S = max(-α, β) / (2^(b-1) - 1)          Z = 2^(b-1); the code 0 is never used
    full         S = 2 max(-α, β) / (2^b - 1)            Z = 2^(b-1); one more level below 0 than above

0 is always a level, so padding, ReLU and pruned weights stay exact. Inside the range no element moves by more than S/2.
A restricted grid is the only one that is its own mirror image: a product with it needs no zero point at all.

**Stored**, for each group: S in f16, rounded up so that the range stays covered, and where asymmetric Z in 1 byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from barefoot.core.errors import InvalidInput
from barefoot.weights.arrays import Array, namespace

Symmetry = Literal["asymmetric", "restricted", "full"]
SCALE_BYTES = 2


@dataclass(frozen=True)
class Affine:
    """``bits`` 1 to 8 (2 to 8 where symmetric). Groups are arrays (n, k), ranges (n,), parameters (n, 1)."""

    bits: int = 8
    symmetry: Symmetry = "asymmetric"

    def __post_init__(self) -> None:
        if self.symmetry not in get_args(Symmetry):
            raise InvalidInput(f"symmetry is one of {', '.join(get_args(Symmetry))}, got {self.symmetry!r}")
        least = 1 if self.symmetry == "asymmetric" else 2
        if not least <= self.bits <= 8:
            raise InvalidInput(f"a grid that is {self.symmetry} has {least} to 8 bits, got {self.bits}")

    @property
    def least(self) -> int:
        """The smallest code."""
        return 1 if self.symmetry == "restricted" else 0

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def group_bytes(self) -> int:
        """Bytes of a group's parameters."""
        return SCALE_BYTES + (self.symmetry == "asymmetric")

    def parameters(self, low: Array, high: Array) -> tuple[Array, Array]:
        """Scale and zero point of ranges ``low``..``high``, each (n, 1), as they are stored."""
        xp = namespace(low)
        low, high = xp.clip(low, None, 0)[:, None], xp.clip(high, 0, None)[:, None]
        if self.symmetry == "asymmetric":
            scale = stored_scale((high - low) / self.levels)
            return scale, xp.clip(xp.round(-low / scale), 0, self.levels)
        reach = xp.where(-low > high, -low, high)
        steps = self.levels / 2 if self.symmetry == "full" else (self.levels - 1) / 2
        scale = stored_scale(reach / steps)
        return scale, xp.zeros_like(scale) + (1 << (self.bits - 1))

    def quantize(self, x: Array, scale: Array, zero: Array) -> Array:
        """Codes as whole numbers of ``x``'s own type."""
        xp = namespace(x)
        return xp.clip(xp.round(x / scale) + zero, self.least, self.levels)

    def dequantize(self, codes: Array, scale: Array, zero: Array) -> Array:
        return scale * (codes - zero)

    def rounded(self, x: Array, low: Array, high: Array) -> Array:
        """What ``x`` becomes, for ranges (n,)."""
        scale, zero = self.parameters(low, high)
        return self.dequantize(self.quantize(x, scale, zero), scale, zero)


def stored_scale(scale: Array) -> Array:
    """The f16 number above ``scale``, in ``scale``'s own type; 1 for a group of zeros."""
    xp = namespace(scale)
    # f16 rounds by at most 2^-11 of a number, or 2^-25 below its normal ones.
    above = xp.asarray(xp.asarray(scale * (1 + 2.0**-10) + 2.0**-25, dtype=xp.float16), dtype=scale.dtype)
    return xp.where(above > 0, above, xp.ones_like(above))
