"""What removing each row and column of a model's matrices would change, to first order: sums of |w × ∂L/∂w|.

One layer of the model is in memory at a time: each is read for the forward pass, of which its input is kept, and again
for the backward one. The gradient of a matrix exists a tile of rows at a time, and only sums are kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from barefoot.train import MicroBatch
from barefoot.train.driver.cross_entropy import cross_entropy
from barefoot.train.driver.decoder import Frozen, turns_of
from barefoot.train.losses import Loss
from barefoot.weights.module import PackedLinear

F32 = npt.NDArray[np.float32]


def importance(model: Frozen, batch: MicroBatch, loss: Loss, layers: range) -> tuple[dict[str, F32], dict[str, F32]]:
    """Sums over the rows, and over the columns, of the matrices of ``layers``, by name.

    Parameters
    ----------
    model : with no layer in memory (``resident=False``), and again so behind it.
    batch : all documents that count: of the mean loss's gradient, summed over them, the magnitude is taken once.
    """
    rows: dict[str, F32] = {}
    cols: dict[str, F32] = {}
    if not layers:
        return rows, cols
    turns, inputs, x = turns_of(model.spec, batch.lengths), [], model.embedded(batch)
    with torch.no_grad():
        for index in range(model.spec.n_layers):
            model.load_layer(index)
            if index >= layers.start:
                inputs.append(x)
            x = model.layer(index, turns, batch.lengths)(x)
            model.drop_layer(index)
    x.requires_grad_()
    labels = torch.from_numpy(batch.labels)
    of_all = cross_entropy(loss, model.normed(x), model.head, labels, softcap=model.spec.logit_softcap)
    (grad,) = torch.autograd.grad(of_all, x)
    del x, of_all
    for index in reversed(range(layers.start, model.spec.n_layers)):
        model.load_layer(index)
        scored = _scored(model.layers[index]) if index in layers else {}
        x = inputs.pop().requires_grad_()
        (grad,) = torch.autograd.grad(model.layer(index, turns, batch.lengths)(x), x, grad)
        rows |= {f"layers.{index}.{role}": module.rows.numpy() for role, module in scored.items()}
        cols |= {f"layers.{index}.{role}": module.cols.numpy() for role, module in scored.items()}
        model.drop_layer(index)
    return rows, cols


def _scored(layer: Any) -> dict[str, _Scored]:
    """The layer's products, in their places."""
    found = {role: _Scored(base) for role, base in layer.items()}
    for role, module in found.items():
        layer[role] = module
    return found


class _Scored(nn.Module):
    """The product alone, which sums while its gradient passes."""

    def __init__(self, base: PackedLinear) -> None:
        super().__init__()
        self.base = base
        self.rows, self.cols = torch.zeros(base.rows), torch.zeros(base.cols)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Scoring.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class _Scoring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: _Scored) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return module.base.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), module = ctx.saved_tensors, ctx.module
        base: PackedLinear = module.base
        seen, grad = x.reshape(-1, base.cols).float(), grads[0].reshape(-1, base.rows).float()
        for start, stop in base.tiles():
            change = (grad[:, start:stop].T @ seen).mul_(base.tile(start, stop)).abs_()
            module.rows[start:stop] = change.sum(1)
            module.cols += change.sum(0)
        return base.product_back(grads[0]), None
