"""Look-up tables of an FPGA that one multiply-accumulate unit takes, by the formats of its operands. Simulated.

Post-Training Quantization with Low-precision Minifloats and Integers on FPGAs (Aggarwal et al. 2023, arXiv:2311.12359),
section IV, compares formats at the cost of hardware. *Differs from the paper*, which synthesised its operators: this is
an analytic model of 6-input look-up tables (LUT6), good for ranking formats, not for a data sheet. For K products
summed without any rounding::

    product      p q / 2                 p, q: bits of the operands' integers, signs and leading ones included
    exponents    max(e_w, e_a) + 1       where both are floats, the sum of the exponent fields
    shifter      width ⌈stages / 2⌉      a LUT6 is a multiplexer of 4; stages = ⌈log2(distinct shifts)⌉
    accumulator  width                   p + q + ⌈log2 K⌉ for integers, and the distinct shifts - 1 more for floats

An operand with e exponent bits is an integer of m + 1 bits and a sign, shifted to one of 2^e - 1 places: e = 1, an
integer, never moves. That is why integers stay cheap: the accumulator grows with 2^e, and the shifter with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Operand:
    """``exponent_bits`` 1 is an integer of ``mantissa_bits`` + 1 bits; ``signed`` adds one."""

    exponent_bits: int
    mantissa_bits: int
    signed: bool = True

    @property
    def integer_bits(self) -> int:
        return self.mantissa_bits + 1 + self.signed

    @property
    def places(self) -> int:
        """To which the integer may be shifted: subnormal numbers share the place of the smallest normal ones."""
        return (1 << self.exponent_bits) - 1


@dataclass(frozen=True)
class Luts:
    """LUT6 of one unit, by part."""

    product: int
    exponents: int
    shifter: int
    accumulator: int

    @property
    def total(self) -> int:
        return self.product + self.exponents + self.shifter + self.accumulator


def multiply_accumulate(w: Operand, x: Operand, n_products: int) -> Luts:
    """The unit that sums ``n_products`` products of a weight and an activation exactly."""
    shifts = w.places + x.places - 1
    width = w.integer_bits + x.integer_bits + shifts - 1 + math.ceil(math.log2(n_products))
    both_float = w.exponent_bits > 1 and x.exponent_bits > 1
    return Luts(
        math.ceil(w.integer_bits * x.integer_bits / 2),
        max(w.exponent_bits, x.exponent_bits) + 1 if both_float else 0,
        width * math.ceil(math.ceil(math.log2(shifts)) / 2),
        width,
    )
