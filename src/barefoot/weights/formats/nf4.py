"""nf4 — four bits at the quantiles of the normal distribution.

NF4 (Dettmers et al. 2023, arXiv:2305.14314, section 3), one of the non-uniform quantizers of A Survey of Quantization
Methods for Efficient Neural Network Inference (Gholami et al. 2021, arXiv:2103.13630, section III.F):

    w = scale × level[q]        q in 0 … 15, levels from −1 to 1; scale = the group's largest magnitude

Levels hold equal shares of a normal distribution; zero is one of them, and there is one more above it than below.

Bytes a group: 2 (scale, f16) + group / 2 (codes). The layout is documented bit by bit in :mod:`barefoot.ops.blocks`;
in products a shuffle turns four bits into the level's byte.

Differs from the paper: levels are multiples of 1/127 (:mod:`barefoot.ops.levels`), which changes squared errors by less
than 0.6% on normal and Laplace weights; scales are f16, where the paper quantizes float32 ones a second time.
"""

from __future__ import annotations

from dataclasses import dataclass

from barefoot.weights.formats import GROUPS, WeightFormat, check_knob


@dataclass(frozen=True)
class NormalFloat(WeightFormat, name="nf4", papers=(14,), status="stable"):
    group: int = 64

    def __post_init__(self) -> None:
        check_knob("nf4", "group", self.group, GROUPS)

    def layout(self, stored: str) -> str:
        return f"nf4_g{self.group}"
