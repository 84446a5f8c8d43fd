"""minifloat — floating point of 3 to 8 bits, any split into exponent and mantissa.

Post-Training Quantization with Low-precision Minifloats and Integers on FPGAs (Aggarwal et al. 2023, arXiv:2311.12359,
section II):

    w = scale × (−1)^s × 2^(max(E, 1) − bias) × ([E > 0] + M / 2^mantissa)        bias = 2^(exponent − 1) − 1

with scale = the group's largest magnitude over the format's. Subnormals are kept, and every code is a finite number, so
that E4M3 reaches 480 (a scale makes that immaterial). One exponent bit makes evenly spaced levels: use ``int``.

Bytes a group: 2 (scale, f16) + group × (1 + exponent + mantissa) / 8. The layout is documented bit by bit in
:mod:`barefoot.ops.blocks`. The levels of e2m0, e2m1, e2m2, e2m3 and e3m0 are small integers, so their products are
taken in integers, a shuffle turning codes into levels; those of all others in float32.

Differs from the paper: scales per group along the inputs, where it has one per output channel; rounding is the
solver's, to the nearest level, a tie to the even code. Activations are not rounded to minifloats.
"""

from __future__ import annotations

from dataclasses import dataclass

from barefoot.core.errors import InvalidInput
from barefoot.weights.formats import GROUPS, WeightFormat, check_knob


@dataclass(frozen=True)
class MinifloatGroups(WeightFormat, name="minifloat", papers=(10, 30), status="stable"):
    exponent: int = 2
    mantissa: int = 1
    group: int = 32

    def __post_init__(self) -> None:
        check_knob("minifloat", "group", self.group, GROUPS)
        if self.exponent == 1:
            raise InvalidInput("minifloat: one exponent bit is a uniform grid", cure="use int(symmetric=true)")
        from barefoot.ops.levels import SPLITS

        if (self.exponent, self.mantissa) not in SPLITS:
            known = ", ".join(f"({e}, {m})" for e, m in SPLITS)
            raise InvalidInput(
                f"minifloat: (exponent, mantissa) must be one of {known}, got ({self.exponent}, {self.mantissa})"
            )

    def layout(self, stored: str) -> str:
        return f"e{self.exponent}m{self.mantissa}_g{self.group}"
