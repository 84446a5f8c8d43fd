"""int — uniform integer groups with round-to-nearest.

A Survey of Quantization Methods for Efficient Neural Network Inference (Gholami et al. 2021, arXiv:2103.13630): the
uniform quantizer of sections III.A to III.D at sub-channel granularity, that is, one scale for each group of ``group``
weights along the inputs.

    asymmetric   w = scale × q + minimum          q in 0 … 2^bits − 1, minimum and scale from the group's range
    symmetric    w = scale × (q − 2^(bits−1))     scale from the group's largest magnitude

One bit, always asymmetric, stores the two means of a group's lower and upper part instead of its range.

Scales and minimums are f16 and are rounded to f16 before codes are chosen. Bytes a group: 2 (scale) + 2 (minimum, only
asymmetric) + group × bits / 8 (codes). The layout is documented bit by bit in :mod:`barefoot.ops.blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass

from barefoot.core.errors import InvalidInput
from barefoot.weights.formats import GROUPS, WeightFormat, check_knob

BITS = (1, 2, 3, 4, 8)


@dataclass(frozen=True)
class IntegerGroups(WeightFormat, name="int", papers=(14,), status="stable"):
    bits: int = 4
    group: int = 32
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_knob("int", "bits", self.bits, BITS)
        check_knob("int", "group", self.group, GROUPS)
        if self.bits == 1 and self.symmetric:
            raise InvalidInput(
                "int: one bit is asymmetric, two values a group, got symmetric", cure="use 2 bits or more"
            )

    def layout(self, stored: str) -> str:
        return f"int{self.bits}_g{self.group}_{'sym' if self.symmetric else 'asym'}"
