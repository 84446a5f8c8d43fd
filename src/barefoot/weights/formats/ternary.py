"""ternary — groups of -scale, 0 and scale.

A Survey of Quantization Methods for Efficient Neural Network Inference (Gholami et al. 2021, arXiv:2103.13630), section
on extreme quantization: ternary weight networks (Li et al. 2016, arXiv:1605.04711), for each group of weights

    threshold  D = 0.7 × mean |w|
    scale      mean of |w| where |w| > D
    code       -1, 0 or 1: the nearest of the three values, where the paper cuts at D, which is almost the same place

Weights that were trained as ternary come out as they are, but for the scale's rounding to f16. Bytes a group: 2 (scale)
+ group / 4 (codes): two bits are stored where log2(3) = 1.58 would do, since the products read two planes of bits. The
layout is documented bit by bit in :mod:`barefoot.ops.blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass

from barefoot.weights.formats import GROUPS, WeightFormat, check_knob


@dataclass(frozen=True)
class TernaryGroups(WeightFormat, name="ternary", papers=(14,), status="experimental"):
    group: int = 128

    def __post_init__(self) -> None:
        check_knob("ternary", "group", self.group, GROUPS)

    def layout(self, stored: str) -> str:
        return f"ternary_g{self.group}"
