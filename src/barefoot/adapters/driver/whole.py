"""A matrix that learns itself, all of it in float32: how a pruned copy is aligned before adapters are trained on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from barefoot.adapters.driver.adapted import AdaptedLinear
from barefoot.adapters.files import Pair
from barefoot.core.errors import Incompatible
from barefoot.weights.module import PackedLinear


class Whole(AdaptedLinear):
    """The product with a decoded copy of ``base``; ``settle`` rounds it into the base's format."""

    def __init__(self, base: PackedLinear) -> None:
        super().__init__()
        self.base, self.W = base, nn.Parameter(base.dense())

    @property
    def learned(self) -> Mapping[str, nn.Parameter]:
        return {"W": self.W}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W.to(x.dtype))

    def settle(self) -> None:
        self.base.pack(self.W.detach())

    def pair(self) -> Pair:
        raise Incompatible("a matrix that has learned as a whole is no pair of thin factors")


@contextmanager
def whole_matrices(layers: nn.ModuleList) -> Iterator[None]:
    """While active the matrices of these layers learn, and not their adapters; then the base holds what they became."""
    adapted = [(layer, dict(layer.items())) for layer in layers]  # type: ignore[operator]
    for layer, modules in adapted:
        own: Any = layer
        for role, module in modules.items():
            base: Any = getattr(module, "base", module)
            own[role] = Whole(base)
    try:
        yield
    finally:
        for layer, modules in adapted:
            own = layer
            for role, module in modules.items():
                own[role].settle()
                own[role] = module
