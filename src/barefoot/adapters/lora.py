"""lora — a product of two thin matrices beside each frozen one.

LoRA (Hu et al. 2021, arXiv:2106.09685) as QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3) trains it over a
quantized base:

    y = x Wᵀ + alpha / rank × (dropout(x) Aᵀ) Bᵀ        A (rank, inputs), B (outputs, rank)

A starts uniform in ± 1 / sqrt(inputs), as a linear layer's weights do, and B at zero, so that training begins with the
model as it is. All seven matrices of a layer have one: QLoRA needs that to reach what full fine-tuning reaches, and
then the rank hardly matters.

Arrays: rank × (inputs + outputs) numbers for each matrix. Kept for the backward pass: the input of a matrix once for
all adapters that share it, and rank numbers a token for each.

Differs from QLoRA's defaults: rank 16 with alpha 32 and no dropout, where it has 64, 16 and 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from barefoot.adapters import Beside, Factor, Original, Targets
from barefoot.core.errors import InvalidInput
from barefoot.core.model import WeightSpec


@dataclass(frozen=True)
class LoRA(Beside, name="lora", papers=(90,)):
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Targets = "all"

    def __post_init__(self) -> None:
        self._check()
        if not self.alpha > 0:
            raise InvalidInput(f"lora: alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise InvalidInput(f"lora: dropout must lie between 0 and 1, got {self.dropout}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def beside(self, weight: WeightSpec, rank: int, step: int = 0, steps: int = 1) -> tuple[Factor, ...]:
        return (
            Factor(f"{weight.name}.A", rank, weight.cols),
            Factor(f"{weight.name}.B", weight.rows, rank),
        )

    def module(self, base: Any, weight: WeightSpec, rank: int, original: Original, random: Any) -> Any:
        from barefoot.adapters.driver.low_rank import LowRank

        a, b = self.beside(weight, rank)
        return LowRank(base, (a, b), self.scale, self.dropout, random)
