"""nf4 — four bits at the quantiles of the normal distribution.

NF4 (Dettmers et al. 2023, arXiv:2305.14314, section 3), one of the non-uniform quantizers of A Survey of Quantization
Methods for Efficient Neural Network Inference (Gholami et al. 2021, arXiv:2103.13630, section III.F):

    w = scale × level[q]        q in 0 … 15, levels from −1 to 1; scale = the group's largest magnitude

Levels hold equal shares of a normal distribution; zero is one of them, and there is one more above it than below.

Bytes a group: 2 (scale, f16) + group / 2 (codes). The layout is documented bit by bit in :mod:`barefoot.ops.blocks`;
in products a shuffle turns four bits into the level's byte.

Differs from the paper: levels are multiples of 1/127 (:mod:`barefoot.ops.levels`), which changes squared errors by less
than 0.6% on normal and Laplace weights; scales are f16. With ``double`` levels are the paper's, and float32 scales are
quantized a second time, together for the whole matrix, so that rows are no longer independent of each other: no
product of the engine reads that, only the frozen base of ``barefoot tune`` holds it. Bytes, layout and decoder:
:mod:`barefoot.weights.double_quantization`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from barefoot.core.errors import Incompatible
from barefoot.core.ledger import Term
from barefoot.weights.formats import GROUPS, WeightFormat, check_knob


@dataclass(frozen=True)
class NormalFloat(WeightFormat, name="nf4", papers=(14, 90), status="stable"):
    group: int = 64
    double: bool = False

    def __post_init__(self) -> None:
        check_knob("nf4", "group", self.group, GROUPS)

    def layout(self, stored: str) -> str:
        if self.double:
            raise Incompatible(
                f"{self} is no layout of rows, which the engine, embeddings and heads read: only the frozen base "
                f"of barefoot tune holds it, in matrices of layers",
                cure=f'use nf4, or in barefoot tune --weights "attn={self} ffn={self}"',
            )
        return f"nf4_g{self.group}"

    def terms(self, name: str, rows: int, cols: int, stored: str) -> tuple[Term, ...]:
        if not self.double:
            return super().terms(name, rows, cols, stored)
        from barefoot.weights.double_quantization import sizes

        of_scales, scales, codes = sizes(rows * cols, self.group)
        parts = (("codes", codes, 1), ("scales", scales, 1), ("scales of scales, and their mean", of_scales + 1, 4))
        return tuple(Term(f"{name} {part}", count, size) for part, count, size in parts)

    def filled(self, stored: str) -> str:
        return "f32" if self.double else self.layout(stored)

    def linear(self, rows: int, cols: int, stored: str, **settings: Any) -> Any:
        if not self.double:
            return super().linear(rows, cols, stored, **settings)
        from barefoot.weights.module import DoubleLinear

        return DoubleLinear(self.group, cols, rows, **settings)
