"""Norms, turns and gates of a layer, as functions that allocate what they return and keep what their gradients need.

Written with PyTorch's own operations each would be several, with a whole tensor between every two: a third of the time
of a step, where what is freed goes back to the system at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from barefoot.weights.recycling import empty

_aten: Any = torch.ops.aten


def rms_norm(x: Tensor, factors: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x² + eps) × factors along the last axis, in float32. Kept: x, and a number for each row."""
    y: Tensor = _Norm.apply(x, factors, eps)
    return y


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Pairs of channels of x (batch, n, heads, head_dim) turned by their positions' angles, of which the first n of
    ``cos`` and ``sin`` (≥ n, pairs) are taken; channels behind the pairs stay. Kept: nothing but the angles."""
    y: Tensor = _Turn.apply(x, cos, sin, interleaved)
    return y


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """silu(gate) × up, or the tanh form of gelu(gate) × up. Kept: both."""
    y: Tensor = _Gate.apply(gate, up, activation)
    return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, factors, scale)
        return torch.mul(x, scale, out=empty(x.shape, x)).mul_(factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, factors, scale = ctx.saved_tensors
        width = x.shape[-1]
        by_x = by_factors = None
        if ctx.needs_input_grad[0]:
            by_x = torch.mul(grad, factors, out=empty(x.shape, x))
            along = torch.bmm(by_x.view(-1, 1, width), x.reshape(-1, width, 1)).view(scale.shape)
            along.mul_(scale).mul_(scale).mul_(scale).div_(width)
            by_x.mul_(scale).addcmul_(x, along, value=-1)
        if ctx.needs_input_grad[1]:
            normed = torch.mul(x, scale, out=empty(x.shape, x))
            by_factors = normed.mul_(grad).reshape(-1, width).sum(0).view(factors.shape)
        return by_x, by_factors, None


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, ctx.interleaved, -1), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: int) -> Tensor:
    y = empty(x.shape, x)
    n, half = x.shape[1], cos.shape[1]
    cos, sin = cos[:n, None], sin[:n, None]
    (a, b), (into_a, into_b) = (_pairs(some[..., : 2 * half], interleaved) for some in (x, y))
    torch.mul(a, cos, out=into_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=into_b).addcmul_(a, sin, value=sign)
    y[..., 2 * half :] = x[..., 2 * half :]
    return y


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, ...]:
    """First and second channels of the pairs, views of x (…, 2 pairs)."""
    half = x.shape[-1] // 2
    return x.unflatten(-1, (half, 2) if interleaved else (2, half)).unbind(-1 if interleaved else -2)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _activated(gate, activation).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        by_up = _activated(gate, ctx.activation).mul_(grad)
        by_gate = torch.mul(grad, up, out=empty(up.shape, up))
        if ctx.activation == "silu":
            _aten.silu_backward.grad_input(by_gate, gate, grad_input=by_gate)
        else:
            _aten.gelu_backward.grad_input(by_gate, gate, approximate="tanh", grad_input=by_gate)
        return by_gate, by_up, None


def _activated(gate: Tensor, activation: str) -> Tensor:
    y = empty(gate.shape, gate)
    return _aten.silu(gate, out=y) if activation == "silu" else _aten.gelu(gate, approximate="tanh", out=y)
