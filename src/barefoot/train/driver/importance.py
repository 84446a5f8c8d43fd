"""What removing each row and column of a model's matrices would change, to first order: sums of |w × ∂L/∂w|.

The gradient of a matrix exists a tile of rows at a time, in the backward pass of its product, and only sums are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from barefoot.adapters.driver.adapted import AdaptedLinear
from barefoot.adapters.files import Pair
from barefoot.train import MicroBatch
from barefoot.train.driver.decoder import Decoder
from barefoot.train.losses import Loss
from barefoot.weights.module import PackedLinear

F32 = npt.NDArray[np.float32]


def importance(decoder: Decoder, batch: MicroBatch, loss: Loss) -> tuple[dict[str, F32], dict[str, F32]]:
    """Sums over the rows, and over the columns, of the base's matrices in the layers, by name.

    The loss is the mean of a single micro-batch, which holds all documents that count: of the sum of gradients the
    magnitude is taken once. The decoder's adapters are not used, and stay as they are.
    """
    scored: dict[str, _Scored] = {}
    replaced: list[tuple[Any, str, nn.Module]] = []
    for index, layer in enumerate(decoder.layers):
        own: Any = layer
        for role, module in list(own.items()):
            replaced.append((own, role, module))
            own[role] = scored[f"layers.{index}.{role}"] = _Scored(getattr(module, "base", module))
    try:
        decoder.loss(batch, loss).backward()
    finally:
        for own, role, module in replaced:
            own[role] = module
    rows = {name: module.rows.numpy() for name, module in scored.items()}
    return rows, {name: module.cols.numpy() for name, module in scored.items()}


class _Scored(AdaptedLinear):
    """The product alone. ``none`` only makes PyTorch ask for its gradient."""

    def __init__(self, base: PackedLinear) -> None:
        super().__init__()
        self.base, self.none = base, nn.Parameter(torch.zeros(()))
        self.rows, self.cols = torch.zeros(base.rows), torch.zeros(base.cols)

    @property
    def learned(self) -> Mapping[str, nn.Parameter]:
        return {}

    def pair(self) -> Pair:
        return Pair(np.zeros((0, self.base.cols), np.float32), np.zeros((self.base.rows, 0), np.float32), 1.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Scoring.apply(x, self.none, self)  # type: ignore[no-untyped-call]
        return y


class _Scoring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, none: Tensor, module: _Scored) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return module.base.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), module = ctx.saved_tensors, ctx.module
        base: PackedLinear = module.base
        seen, grad = x.reshape(-1, base.cols).float(), grads[0].reshape(-1, base.rows).float()
        for start, stop in base.tiles():
            change = (grad[:, start:stop].T @ seen).mul_(base.dense(start, stop)).abs_()
            module.rows[start:stop] = change.sum(1)
            module.cols += change.sum(0)
        return base.product_back(grads[0]) if ctx.needs_input_grad[0] else None, grad.new_zeros(()), None
