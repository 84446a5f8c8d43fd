"""adamw — Adam with weight decay beside the gradient, its moments in memory.

Adam (Kingma and Ba 2014, arXiv:1412.6980) with decoupled weight decay (Loshchilov and Hutter 2017, arXiv:1711.05101),
as PyTorch computes it, one array after the other:

    m = β₁ m + (1 − β₁) g        v = β₂ v + (1 − β₂) g²        w = (1 − η λ) w − η m̂ / (√v̂ + ε)

Bytes: 8 a number that learns, for m and v; during a step 8 a number of the largest array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from barefoot.core.ledger import Term
from barefoot.optim import Optimizer


@dataclass(frozen=True)
class Adam(Optimizer, name="adamw", papers=(), status="stable"):
    def state_terms(self, sizes: Sequence[int]) -> tuple[Term, ...]:
        return (Term("first and second moments", 2 * sum(sizes), 4),)

    def step_terms(self, sizes: Sequence[int]) -> tuple[Term, ...]:
        return (Term("a step of the largest array", 2 * max(sizes), 4),)

    def over(self, parameters: Sequence[Any], folder: Path, **rule: Any) -> Any:
        from barefoot.optim.driver.adamw import AdamW

        return AdamW(parameters, **rule)
