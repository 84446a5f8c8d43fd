"""A frozen product and the thin one beside it, as one function: y = x Wᵀ + scale × (x̃ Aᵀ) Bᵀ.

One function, so that nothing of the outputs' size is allocated but the output: the thin product is added in its place.
Kept for the backward pass are x̃ (the input itself, which products of the same input share, or what dropout made of it)
and its rank numbers a token, never a decoded weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from barefoot.adapters import Factor
from barefoot.adapters.driver.adapted import AdaptedLinear
from barefoot.adapters.files import Pair
from barefoot.weights.module import PackedLinear
from barefoot.weights.recycling import empty, product


class LowRank(AdaptedLinear):
    """``base`` and its factors A float32 (rank, inputs) and B float32 (outputs, rank), in the type of what comes in.

    ``random`` draws A's first values; B's are zero.
    """

    def __init__(
        self, base: PackedLinear, factors: tuple[Factor, Factor], scale: float, dropout: float, random: torch.Generator
    ) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        a, b = factors
        self.A, self.B = nn.Parameter(torch.empty(a.rows, a.cols)), nn.Parameter(torch.zeros(b.rows, b.cols))
        bound = a.cols**-0.5
        with torch.no_grad():
            self.A.uniform_(-bound, bound, generator=random)

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        return {"A": self.A, "B": self.B}

    def pair(self) -> Pair:
        return Pair(self.A.detach().numpy(), self.B.detach().numpy(), self.scale)

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout else None
        return _Adapted.apply(x, dropped, self.A, self.B, self.base, self.scale, self.only_for_gradients)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, base: PackedLinear, scale: float, idle: bool
    ) -> Tensor:
        seen = x if dropped is None else dropped
        if idle:
            y = empty((*x.shape[:-1], base.rows), x)
        else:
            y = base.product(x)
        thin = product(seen.reshape(-1, base.cols), a.to(x.dtype).T)
        if not idle:
            y.view(-1, base.rows).addmm_(thin, b.to(x.dtype).T, alpha=scale)
        ctx.base, ctx.scale, ctx.drops = base, scale, dropped is not None
        ctx.save_for_backward(seen, thin, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        seen, thin, a, b = ctx.saved_tensors
        base: PackedLinear = ctx.base
        grad = grads[0].reshape(-1, base.rows)
        of_thin = product(grad, b.to(grad.dtype)).mul_(ctx.scale)
        of_a = product(of_thin.T, seen.reshape(-1, base.cols), a)
        of_b = product(grad.T, thin, b).mul_(ctx.scale)
        into = base.product_back(grads[0]) if ctx.needs_input_grad[0] else None
        of_dropped = None
        if ctx.drops:
            if ctx.needs_input_grad[1]:
                of_dropped = product(of_thin, a.to(grad.dtype)).view_as(seen)
        elif into is not None:
            into.view(-1, base.cols).addmm_(of_thin, a.to(grad.dtype))
        return into, of_dropped, of_a, of_b, None, None, None
