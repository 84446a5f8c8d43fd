"""A decoder layer over a stream of documents, its matrices frozen in blocks and adapted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from barefoot.weights.training.layer import LayerFunction

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StreamLayer(LayerFunction):
    """
    Attributes
    ----------
    cos, sin : of each token's position in its document, float32 (N, rot_dim / 2).
    lengths : of the documents, N in all.
    products : by role, what multiplies by a matrix.
    """

    lengths: tuple[int, ...] = ()
    products: Mapping[str, Product] = field(default_factory=dict)

    def _product(self, weights: Mapping[str, Tensor], role: str, x: Tensor) -> Tensor:
        y = self.products[role](x).float()
        return y + weights[f"{role}_bias"].reshape(-1) if f"{role}_bias" in weights else y

    def _mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if len(self.lengths) == 1:
            return super()._mix(q, k, v)
        documents = zip(*(x.split(self.lengths, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([LayerFunction._mix(self, *document) for document in documents], dim=1)
