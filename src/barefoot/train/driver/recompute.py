"""A function of which only the input is kept: it is passed again in the backward pass.

As ``torch.utils.checkpoint``, which brings 75 MiB of PyTorch's compiler into memory with its first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Function(Protocol):
    def __call__(self, x: Tensor) -> Tensor: ...

    def again(self, x: Tensor) -> Tensor:
        """The same for its gradients alone: its value may be anything."""


def recompute(function: Function, x: Tensor, learned: Sequence[Tensor], *, draws: bool) -> Tensor:
    """``function(x)``, whose gradients reach x and ``learned``, all other tensors that learn in it.

    draws : whether it draws random numbers, which must be the same again.
    """
    y: Tensor = _Again.apply(function, draws, x, *learned)  # type: ignore[no-untyped-call]
    return y


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Function, draws: bool, x: Tensor, *learned: Tensor) -> Tensor:
        ctx.function, ctx.random = function, torch.get_rng_state() if draws else None
        ctx.save_for_backward(x, *learned)
        return function(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *learned = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2]
        x = x.detach().requires_grad_(wanted)
        after = None
        if ctx.random is not None:
            after = torch.get_rng_state()
            torch.set_rng_state(ctx.random)
        with torch.enable_grad():
            y = ctx.function.again(x)
        if after is not None:
            torch.set_rng_state(after)
        found = torch.autograd.grad(y, [x, *learned] if wanted else learned, grads[0])
        return None, None, *(found if wanted else (None, *found))
