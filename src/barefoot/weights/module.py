"""The PyTorch driver of every weight format: modules that hold a matrix as its stored bytes and nothing else.

``PackedLinear`` stands where ``torch.nn.Linear`` stood, ``PackedEmbedding`` where ``torch.nn.Embedding`` did. Their
``weight`` is a buffer, uint8 (rows, bytes of a row), under the name that the dense weight had, so state dicts are the
tensors of a barefoot folder. Rows are decoded a tile at a time, in the forward pass and again in the backward one,
which reaches the inputs but never the weights: beside the stored bytes, one tile of at most ``TILE_BYTES`` is in
memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.ops import PackedWeight, blocks

TILE_BYTES = 4 << 20  # of decoded weights, float32; at least one row


class _Packed(nn.Module):
    """A matrix (rows, cols) in the block format ``format``."""

    weight: Tensor

    def __init__(self, format: str, rows: int, cols: int, device: Any = None) -> None:
        super().__init__()
        self.format, self.rows, self.cols = format, rows, cols
        shape = (rows, blocks.row_bytes(format, cols))
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8, device=device))

    @property
    def n_bytes(self) -> int:
        """Of the stored matrix."""
        return self.rows * blocks.row_bytes(self.format, self.cols)

    def pack(self, weight: Tensor) -> None:
        """Round a dense weight (rows, cols) to the nearest codes, and hold these.

        Raises
        ------
        InvalidInput : another shape.
        Incompatible : a format that is never made from weights.
        """
        if weight.shape != (self.rows, self.cols):
            raise InvalidInput(f"expected a weight of shape ({self.rows}, {self.cols}), got {tuple(weight.shape)}")
        stored = blocks.encode(self.format, weight.detach().float().cpu().numpy())
        self.weight = torch.from_numpy(stored.reshape(self.rows, -1)).to(self.weight.device)

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` as they are stored, float32 (n, cols), on the module's device."""
        return decode(self.format, self.weight[start:stop], self.cols)

    def tiles(self) -> Iterator[tuple[int, int]]:
        """First row and end of each tile."""
        step = max(1, TILE_BYTES // (4 * self.cols))
        return ((start, min(start + step, self.rows)) for start in range(0, self.rows, step))


class PackedLinear(_Packed):
    """y = x Wᵀ (+ b), computed in the type of x.

    Parameters
    ----------
    format : id of a block format.
    in_features, out_features : columns and rows of W.
    bias : whether there is one, float32.
    """

    def __init__(self, format: str, in_features: int, out_features: int, *, bias: bool = False, device: Any = None):
        super().__init__(format, out_features, in_features, device)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _TiledProduct.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format}, bytes={self.n_bytes}"
        )


class PackedEmbedding(_Packed):
    """Rows of a packed matrix by their numbers, times ``scale`` (Gemma's models have one), in the type ``dtype``."""

    def __init__(
        self,
        format: str,
        num_embeddings: int,
        embedding_dim: int,
        *,
        scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> None:
        super().__init__(format, num_embeddings, embedding_dim, device)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.scale, self.dtype = scale, dtype

    def forward(self, ids: Tensor) -> Tensor:
        rows = decode(self.format, self.weight[ids.reshape(-1)], self.cols)
        return (rows * self.scale).to(self.dtype).reshape(*ids.shape, self.cols)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, scale={self.scale:g}, format={self.format}, "
            f"bytes={self.n_bytes}"
        )


class _TiledProduct(torch.autograd.Function):
    """x Wᵀ by tiles of rows; the backward pass decodes again instead of keeping what the forward pass decoded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: PackedLinear) -> Tensor:
        ctx.module, ctx.kind = module, x.dtype
        y = x.new_empty(*x.shape[:-1], module.rows)
        for start, stop in module.tiles():
            y[..., start:stop] = x @ module.dense(start, stop).to(x.dtype).T
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (grad,) = grads
        if not ctx.needs_input_grad[0]:
            return None, None
        into = grad.new_zeros(*grad.shape[:-1], ctx.module.cols)
        for start, stop in ctx.module.tiles():
            into += grad[..., start:stop] @ ctx.module.dense(start, stop).to(grad.dtype)
        return into.to(ctx.kind), None


def decode(format: str, rows: Tensor, cols: int) -> Tensor:
    """Stored rows, uint8 (n, bytes of a row), as float32 (n, cols) on their device; the kernels run on the host."""
    stored = rows.cpu().contiguous().numpy().reshape(-1)
    out = np.empty((len(rows), cols), np.float32)
    ops.embed(np.arange(len(rows), dtype=np.int32), PackedWeight(format, len(rows), cols, stored), out)
    return torch.from_numpy(out).to(rows.device)
