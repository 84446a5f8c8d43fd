"""LaMDA's product: y = x Wᵀ + ((x Aᵀ) S) B, of which A never learns, and of B fewer rows as training goes on.

One function, which keeps x Aᵀ for the core's gradient, and for B's those columns of x Aᵀ S whose rows of B learn: never
the input. The rows that learn and those that are settled are two arrays, so that what a row gives up is free at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from barefoot.adapters import Original
from barefoot.adapters.driver.adapted import AdaptedLinear
from barefoot.adapters.files import Pair
from barefoot.adapters.lamda import LaMDA, principal
from barefoot.core.errors import Incompatible
from barefoot.core.model import WeightSpec
from barefoot.weights.module import PackedLinear
from barefoot.weights.recycling import empty, product


class Spectral(AdaptedLinear):
    """``base`` and its factors, float32. With ``init="spectral"`` the base is made anew, of what is left of W.

    Raises
    ------
    Incompatible : then, a base that can't be: one that has parts, or a format that is never made from weights.
    """

    A: Tensor
    settled_rows: Tensor

    def __init__(self, base: PackedLinear, weight: WeightSpec, knobs: LaMDA, rank: int, original: Original) -> None:
        super().__init__()
        self.base, self.rank, self._knobs, self._weight, self._original = base, rank, knobs, weight, original
        w = original(weight)
        a, b, values = principal(w, rank)
        core = torch.zeros(rank, rank)
        if knobs.init == "spectral":
            if base.kinds:
                raise Incompatible(
                    f"{knobs}: {weight.name} is a sum of blocks and other parts, and can't be made anew",
                    cure='use init="zero_core", which leaves the base as it is',
                )
            core = torch.diag(torch.from_numpy(values))
            w -= (w @ a.T) @ a
            try:
                base.pack(torch.from_numpy(w))
            except Incompatible as error:
                raise Incompatible(
                    f"{knobs}: what is left of {weight.name} can't be stored: {error}",
                    cure='state a format, as in --weights nf4, or use init="zero_core", which leaves the base as it is',
                ) from error
        self.register_buffer("A", torch.from_numpy(a))
        self.S, self.B = nn.Parameter(core), nn.Parameter(torch.from_numpy(b))
        self.register_buffer("settled_rows", torch.empty(0, base.rows))

    @property
    def learned(self) -> Mapping[str, nn.Parameter]:
        return {"S": self.S, "B": self.B} if len(self.B) else {"S": self.S}

    @property
    def settled(self) -> Mapping[str, Tensor]:
        return {"B": self.settled_rows} if len(self.settled_rows) else {}

    def advance(self, step: int, steps: int) -> Mapping[str, slice]:
        left, n = self._knobs.rows_learning(self.rank, step, steps), len(self.B)
        if left == n:
            return {}
        largest_first = self._knobs.order == "largest_first"
        stay, go = (slice(n - left, n), slice(n - left)) if largest_first else (slice(left), slice(left, n))
        rows = self.B.detach()
        done = [self.settled_rows, rows[go]]
        self.settled_rows = torch.cat(done if largest_first else done[::-1])
        self.B.data = rows[stay].clone()
        self.B.requires_grad_(left > 0)
        return {"B": stay}

    def pair(self) -> Pair:
        with torch.no_grad():
            settled, learning = self._split(self.S)
            b = (settled @ self.settled_rows + learning @ self.B).T.contiguous().numpy()
        if self._knobs.init == "spectral":
            b -= self._original(self._weight) @ self.A.numpy().T  # S_0 B_0 is what A takes from W
        return Pair(self.A.numpy(), b, self._knobs.scale)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Cored.apply(x, self.S, self.B, self)  # type: ignore[no-untyped-call]
        return y

    def _split(self, by_row: Tensor) -> tuple[Tensor, Tensor]:
        """Columns that meet B's settled rows, and its learning ones."""
        n = len(self.settled_rows)
        if self._knobs.order == "largest_first":
            return by_row[:, :n], by_row[:, n:]
        return by_row[:, self.rank - n :], by_row[:, : self.rank - n]


class _Cored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, core: Tensor, rows: Tensor, module: Spectral) -> Tensor:
        base, kind = module.base, x.dtype
        y = base.product(x)
        flat = y.view(-1, base.rows)
        inner = product(x.reshape(-1, base.cols), module.A.to(kind).T)
        settled, learning = module._split(core.to(kind))
        if len(module.settled_rows):
            flat.addmm_(inner @ settled, module.settled_rows.to(kind))
        outer = product(inner, learning)
        if len(rows):
            flat.addmm_(outer, rows.to(kind))
        ctx.module = module
        ctx.save_for_backward(inner, outer, core, rows)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inner, outer, core, rows = ctx.saved_tensors
        module: Spectral = ctx.module
        base = module.base
        grad = grads[0].reshape(-1, base.rows)
        kind = grad.dtype
        of_outer = empty((len(grad), module.rank), grad)
        settled, learning = module._split(of_outer)
        settled.copy_(grad @ module.settled_rows.to(kind).T)
        learning.copy_(grad @ rows.to(kind).T)
        of_core = product(inner.T, of_outer, core)
        of_rows = product(outer.T, grad, rows) if ctx.needs_input_grad[2] else None
        into = None
        if ctx.needs_input_grad[0]:
            into = base.product_back(grads[0])
            into.view(-1, base.cols).addmm_(of_outer @ core.to(kind).T, module.A.to(kind))
        return into, of_core, of_rows, None
