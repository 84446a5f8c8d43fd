"""Attention as a differentiable function of a stream of documents (:mod:`barefoot.ops.flash`).

Saved for the backward pass are q, k, v, the outputs and the logarithms of sums, nothing else: what that and the passes
themselves take is in :class:`barefoot.train.attention.AttentionShape`. Float32 on the CPU goes to the compiled kernels,
tensors on a CUDA device to Triton's. What neither computes (kernels that were not built, other types on the CPU) goes,
document by document, to PyTorch's own attention, or is written out where a window or a soft cap asks for it; then those
bytes don't hold. Bfloat16 on the CPU is kept as it is, and computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from barefoot import ops
from barefoot.weights.recycling import empty

_FLOATS, _BYTES = torch.empty(0), torch.empty(0, dtype=torch.uint8)


def attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, scale: float, window: int = 0, softcap: float = 0.0
) -> Tensor:
    """Causal attention within each document, (n, n_heads, head_dim) in the dtype of ``q``.

    Parameters
    ----------
    q : (n, n_heads, head_dim); k, v : (n, n_kv_heads, head_dim); copied where they are not contiguous
    lengths : tokens of the documents, n in all
    scale : factor of the scores; window : how many tokens a query sees, its own included, 0 = all; softcap : c > 0
        puts scores through c * tanh(score / c)

    Raises
    ------
    ValueError : lengths that are not n in all.
    """
    if sum(lengths) != len(q) or min(lengths, default=0) < 0:
        raise ValueError(f"the documents' lengths must be {len(q)} in all, got {sum(lengths)}")
    if computed_by(q) == "torch":
        return _by_document(q, k, v, lengths, scale=scale, window=window, softcap=softcap)
    options = _Options(tuple(lengths), scale, window, softcap)
    attended: Tensor = _Attention.apply(q.contiguous(), k.contiguous(), v.contiguous(), options)
    return attended


def computed_by(q: Tensor) -> Literal["native", "triton", "torch"]:
    """Whose attention a tensor of this type on this device goes to."""
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16) and ops.isa() != "numpy":
        return "native"
    return "triton" if q.is_cuda and q.dtype != torch.float64 and _has_triton() else "torch"


def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return bool(has_triton())


class _Options(NamedTuple):
    lengths: tuple[int, ...]
    scale: float
    window: int
    softcap: float


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: _Options) -> Tensor:
        out, lse = (_native_forward if q.device.type == "cpu" else _triton_forward)(q, k, v, options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        backward = _native_backward if d_out.device.type == "cpu" else _triton_backward
        return *backward(d_out.contiguous(), q, k, v, out, lse, ctx.options), None


def _native_forward(q: Tensor, k: Tensor, v: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    out, lse = empty(q.shape, _FLOATS), torch.empty(q.shape[1], len(q))
    given: Any = [*map(_array, (q, k, v)), np.array(options.lengths, np.int64), *map(_array, (out, lse))]
    ops.flash_forward(*given, **_cut(options), scratch=_scratch(q, k, options, backward=False))
    return out.to(q.dtype), lse


def _native_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    by_q, by_k, by_v = gradients = tuple(empty(x.shape, _FLOATS) for x in (q, k, v))
    known = map(_array, (d_out, q, k, v, out, lse))
    given: Any = [*known, np.array(options.lengths, np.int64), *map(_array, gradients)]
    ops.flash_backward(*given, **_cut(options), scratch=_scratch(q, k, options, backward=True))
    return by_q.to(q.dtype), by_k.to(q.dtype), by_v.to(q.dtype)


def _array(x: Tensor) -> Any:
    return x.detach().float().numpy()


def _cut(options: _Options) -> dict[str, Any]:
    return {"scale": options.scale, "window": options.window, "softcap": options.softcap}


def _scratch(q: Tensor, k: Tensor, options: _Options, *, backward: bool) -> Any:
    size = ops.flash_scratch_bytes(options.lengths, q.shape[1], k.shape[1], q.shape[2], backward=backward)
    return empty((size,), _BYTES).numpy()


def _triton_forward(q: Tensor, k: Tensor, v: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    from barefoot.ops.triton import flash

    return flash.flash_forward(q, k, v, **options._asdict())


def _triton_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    from barefoot.ops.triton import flash

    return flash.flash_backward(d_out, q, k, v, out, lse, **options._asdict())


def _by_document(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, scale: float, window: int, softcap: float
) -> Tensor:
    parts = []
    documents = zip(*(x.split(tuple(lengths)) for x in (q, k, v)), strict=True)
    for each in documents:
        queries, keys, values = (x.transpose(0, 1) for x in each)
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=0) for x in (keys, values))
        n = queries.shape[1]
        if not softcap and (not window or window >= n):
            out = F.scaled_dot_product_attention(queries[None], keys[None], values[None], is_causal=True, scale=scale)
            parts.append(out[0].transpose(0, 1))
            continue
        scores = (queries @ keys.transpose(-1, -2)) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        ahead = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device)
        seen = (ahead >= 0) & (ahead < (window or n))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        parts.append((weights @ values).transpose(0, 1))
    return torch.cat(parts) if parts else torch.zeros_like(q)
