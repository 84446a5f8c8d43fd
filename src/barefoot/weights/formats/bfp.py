"""bfp — block floating point: integers that share an exponent.

The number format of Accurate Block Quantization in LLMs with Outliers (Trukhanov and Soloveychik 2024,
arXiv:2403.20137), there called BFP(mantissa + 8):

    w = 2^(e − mantissa + 2) × q        e = exponent of the block's largest magnitude, q of ``mantissa`` bits, signed

Values in the top half step saturate; solvers that look for better scales try the next exponent too.

Bytes a block: 1 (exponent) + block × mantissa / 8. The layout is documented bit by bit in :mod:`barefoot.ops.blocks`;
products are those of integers.

Differs from the paper: there blocks hold keys, here weights, and two's complement has one level more below zero.
"""

from __future__ import annotations

from dataclasses import dataclass

from barefoot.weights.formats import GROUPS, WeightFormat, check_knob

MANTISSAS = (3, 4, 6, 8)


@dataclass(frozen=True)
class BlockFloat(WeightFormat, name="bfp", papers=(41,), status="stable"):
    mantissa: int = 4
    block: int = 32

    def __post_init__(self) -> None:
        check_knob("bfp", "mantissa", self.mantissa, MANTISSAS)
        check_knob("bfp", "block", self.block, GROUPS)

    def layout(self, stored: str) -> str:
        return f"bfp{self.mantissa}_g{self.block}"
