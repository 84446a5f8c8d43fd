"""bitmod — minifloats of 3 or 4 bits whose negative zero is a special value, chosen for each group.

BitMoD: Bit-serial Mixture-of-Datatype LLM Acceleration (Chen et al. 2024, arXiv:2411.11745, section III):

    bits   levels                              special value: inside the range, or beyond it
    3      0, ±1, ±2, ±4                       +3 or −3, +6 or −6
    4      0, ±1, ±2, ±3, ±4, ±6, ±8, ±12      +10 or −10, +16 or −16

Each group takes the one of the four special values that gives the least squared error, with scale = largest magnitude /
largest level. Plain rounding (``range``) is the paper's search; solvers that look for better scales try all four values
at each of them.

Bytes a group: 2 (scale, f16) + group × bits / 8: 3.125 or 4.125 bits a weight with 128. The choice takes no bytes: the
scale's last bit says whether the special value lies inside or beyond, and its sign mirrors the levels. The layout is
documented bit by bit in :mod:`barefoot.ops.blocks`; in products a shuffle turns codes into levels and a comparison puts
the special ones in.

Differs from the paper: it stores an 8-bit scale and a 2-bit choice a group and an f16 scale a row, which for groups of
128 columns is 3/64 − 16/columns bits a weight less (benchmarks/quality/tables.py measures both). There is
no bit-serial hardware here: products are taken as with other codes.
"""

from __future__ import annotations

from dataclasses import dataclass

from barefoot.weights.formats import GROUPS, WeightFormat, check_knob

BITS = (3, 4)


@dataclass(frozen=True)
class BitMod(WeightFormat, name="bitmod", papers=(30,), status="stable"):
    bits: int = 3
    group: int = 128

    def __post_init__(self) -> None:
        check_knob("bitmod", "bits", self.bits, BITS)
        check_knob("bitmod", "group", self.group, GROUPS)

    def layout(self, stored: str) -> str:
        return f"bitmod{self.bits}_g{self.group}"
