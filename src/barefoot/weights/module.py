"""The PyTorch driver of every weight format: modules that hold a matrix as its stored bytes and nothing else.

``PackedLinear`` stands where ``torch.nn.Linear`` stood, ``PackedEmbedding`` where ``torch.nn.Embedding`` did. Their
``weight`` is a buffer, uint8 (rows, bytes of a row), under the name that the dense weight had, so state dicts are the
tensors of a barefoot folder. Rows are decoded a tile at a time, in the forward pass and again in the backward one,
which reaches the inputs but never the weights: beside the stored bytes, one tile of at most ``TILE_BYTES`` is in
memory, on the host in one place that all modules of a thread share. Of a matrix that is
a sum, each part is a buffer of its own, ``weight+label``, and a tile is the whole matrix.

On a CUDA device with Triton, products of integer groups read the stored bytes themselves (``barefoot.ops.triton``). For
that ``PackedLinear`` rearranges its bytes as panels at the first product there, in place; state dicts keep the rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.ops import PackedWeight, blocks, panels, parts
from barefoot.weights import double_quantization, recycling
from barefoot.weights.structures import Matrix

TILE_BYTES = 4 << 20  # of decoded weights, float32; at least one row
_FLOATS = torch.empty(0)


class _Packed(nn.Module):
    """A matrix (rows, cols) in the block format ``format``, and the parts that are added to it.

    ``added``: kind and bytes of each part by its label.
    """

    weight: Tensor
    in_panels = False  # else in rows
    kinds: Mapping[str, str] = MappingProxyType({})  # of the parts, by the names of their buffers

    def __init__(
        self,
        format: str,
        rows: int,
        cols: int,
        added: Mapping[str, tuple[str, int]] | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.format, self.rows, self.cols = format, rows, cols
        self.kinds = {f"weight+{label}": kind for label, (kind, _) in (added or {}).items()}
        shape = (rows, blocks.row_bytes(format, cols))
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8, device=device))
        for label, (_, n_bytes) in (added or {}).items():
            self.register_buffer(f"weight+{label}", torch.empty(n_bytes, dtype=torch.uint8, device=device))

    @property
    def n_bytes(self) -> int:
        """Of the stored matrix."""
        return self.weight.numel() + sum(self.get_buffer(name).numel() for name in self.kinds)

    def hold(self, matrix: Matrix) -> None:
        """Take the bytes of a matrix that has this module's format, shape and parts.

        Raises
        ------
        InvalidInput : it has others.
        """
        held = {name: (kind, self.get_buffer(name).numel()) for name, kind in self.kinds.items()}
        mine = (self.format, tuple(self.weight.shape), held)
        data = {f"weight+{label}": part for label, part in matrix.parts.items()}
        theirs = (matrix.format, matrix.rows.shape, {name: (kind, each.size) for name, (kind, each) in data.items()})
        if mine != theirs:
            raise InvalidInput(f"expected a matrix of format, shape and parts {mine}, got {theirs}")
        device = self.weight.device
        self.weight, self.in_panels = torch.from_numpy(matrix.rows.copy()).to(device), False
        for name, (_, each) in data.items():
            setattr(self, name, torch.from_numpy(each.copy()).to(device))

    def pack(self, weight: Tensor) -> None:
        """Round a dense weight (rows, cols) to the nearest codes, and hold these.

        Raises
        ------
        InvalidInput : another shape, or a module with parts.
        Incompatible : a format that is never made from weights.
        """
        if weight.shape != (self.rows, self.cols):
            raise InvalidInput(f"expected a weight of shape ({self.rows}, {self.cols}), got {tuple(weight.shape)}")
        stored = blocks.encode(self.format, weight.detach().float().cpu().numpy())
        self.hold(Matrix(self.format, stored.reshape(self.rows, -1)))

    def stored_rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` as the file has them, uint8 (n, bytes of a row)."""
        return self.weight[start:stop]

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` as they are stored, float32 (n, cols), on the module's device."""
        return self._with_parts(decode(self.format, self.stored_rows(start, stop), self.cols), start, stop)

    def _with_parts(self, rows: Tensor, start: int, stop: int | None) -> Tensor:
        for name, kind in self.kinds.items():
            data = self.get_buffer(name)
            part = parts.lookup(kind).decode(self.rows, self.cols, data.cpu().numpy())
            rows += torch.from_numpy(part[start:stop]).to(data.device)
        return rows

    def tile(self, start: int, stop: int) -> Tensor:
        """As :meth:`dense`, on the host in this thread's scratch: gone with the next tile of any module."""
        if self.weight.is_cuda or self.kinds:
            return self.dense(start, stop)
        n = stop - start
        return decode(self.format, self.stored_rows(start, stop), self.cols, out=_scratch(n * self.cols).view(n, -1))

    def at(self, ids: Tensor) -> Tensor:
        """Rows by their numbers, int64 (n,), as they are stored, float32 (n, cols), on the module's device."""
        if self.kinds:
            return self.dense()[ids]
        return decode(self.format, self.stored_rows()[ids], self.cols)

    def tiles(self) -> Iterator[tuple[int, int]]:
        """First row and end of each tile."""
        step = self.rows if self.kinds else max(1, TILE_BYTES // (4 * self.cols))
        return ((start, min(start + step, self.rows)) for start in range(0, self.rows, step))


class PackedLinear(_Packed):
    """y = x Wᵀ (+ b), computed in the type of x.

    Parameters
    ----------
    format : id of a block format; ``"zero"`` where all lies in parts.
    in_features, out_features : columns and rows of W.
    bias : whether there is one, float32.
    added : kind and bytes of each part by its label.
    """

    def __init__(
        self,
        format: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        added: Mapping[str, tuple[str, int]] | None = None,
        device: Any = None,
    ) -> None:
        super().__init__(format, out_features, in_features, added, device)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            self.arrange()
        y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def arrange(self) -> bool:
        """Rearrange the bytes as panels where the Triton kernels take them; whether they lie so now."""
        gpu = None if self.in_panels or self.kinds else _gpu_products()
        if gpu is not None and gpu.supports(self.format, self.rows, self.cols):
            arranged = panels.pack(self.format, self.weight.cpu().numpy(), self.cols)
            self.weight = torch.from_numpy(arranged.reshape(self.weight.shape)).to(self.weight.device)
            self.in_panels = True
        return self.in_panels

    def stored_rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        if not self.in_panels:
            return super().stored_rows(start, stop)
        start, stop, _ = slice(start, stop).indices(self.rows)
        first, last = start // panels.ROWS, -(-stop // panels.ROWS)
        some = self.weight.view(self.rows // panels.ROWS, -1)[first:last].cpu().numpy()
        rows = panels.unpack(self.format, some, self.cols)[start - first * panels.ROWS : stop - first * panels.ROWS]
        return torch.from_numpy(rows).to(self.weight.device)

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ, from panels where the kernels compute, else by tiles of decoded rows."""
        gpu = _gpu_products() if self.in_panels else None
        y: Tensor
        if gpu is not None and gpu.computes(x):
            weight = gpu.PanelWeight(self.format, self.rows, self.cols, self.weight.view(-1))
            y = gpu.panel_matmul(x.reshape(-1, self.cols).contiguous(), weight)
            return y.view(*x.shape[:-1], self.rows)
        y = recycling.empty((*x.shape[:-1], self.rows), x)
        flat, into = x.reshape(-1, self.cols), y.view(-1, self.rows)
        for start, stop in self.tiles():
            torch.mm(flat, self.tile(start, stop).to(x.dtype).T, out=into[:, start:stop])
        return y

    def product_back(self, grad: Tensor) -> Tensor:
        """grad W, of the gradient of a product that of its input."""
        into = recycling.empty((*grad.shape[:-1], self.cols), grad)
        flat, rows = into.view(-1, self.cols), grad.reshape(-1, self.rows)
        for start, stop in self.tiles():
            tile = self.tile(start, stop).to(grad.dtype)
            torch.addmm(flat, rows[:, start:stop], tile, beta=float(start > 0), out=flat)
        return into

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.stored_rows()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.in_panels = False
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        added = "".join(f", {name.removeprefix('weight')}: {kind}" for name, kind in self.kinds.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format}{added}, bytes={self.n_bytes}"
        )


class DoubleLinear(PackedLinear):
    """A frozen matrix whose scales are quantized a second time, all together: ``weight`` is uint8 (bytes,), laid out as
    :mod:`barefoot.weights.double_quantization` says. Settings are a ``PackedLinear``'s."""

    def __init__(self, group: int, in_features: int, out_features: int, **settings: Any) -> None:
        super().__init__("zero", in_features, out_features, **settings)
        self.format, self.group = f"nf4_g{group} with double quantization", group
        n_bytes = double_quantization.n_bytes(self.rows * self.cols, group)
        self.weight = torch.empty(n_bytes, dtype=torch.uint8, device=self.weight.device)

    def arrange(self) -> bool:
        """Its bytes stay as they are."""
        return False

    def fill(self, pieces: Iterable[npt.NDArray[np.float32]]) -> None:
        """Round a weight to the nearest codes that comes in rows, some at a time."""
        stored = double_quantization.encode(pieces, self.rows * self.cols, self.group)
        self.weight = torch.from_numpy(stored).to(self.weight.device)

    def pack(self, weight: Tensor) -> None:
        self.fill([weight.detach().float().cpu().numpy()])

    def stored_rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """All bytes: those of a row lie in several places."""
        return self.weight

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        start, stop, _ = slice(start, stop).indices(self.rows)
        stored, n = self.weight.cpu().numpy(), self.rows * self.cols
        rows = double_quantization.decode(stored, n, self.group, start * self.cols, stop * self.cols)
        return self._with_parts(torch.from_numpy(rows.reshape(-1, self.cols)).to(self.weight.device), start, stop)

    def tile(self, start: int, stop: int) -> Tensor:
        if self.weight.is_cuda or self.kinds:
            return self.dense(start, stop)
        first, last, n = start * self.cols, stop * self.cols, self.rows * self.cols
        begin, end = double_quantization.span(self.group, first, last)
        room = _scratch(end - begin).numpy()
        rows = double_quantization.decode(self.weight.numpy(), n, self.group, first, last, room)
        return torch.from_numpy(rows.reshape(-1, self.cols))


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
        super().__init__(format, num_embeddings, embedding_dim, device=device)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.scale, self.dtype = scale, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return (self.at(ids.reshape(-1)) * self.scale).to(self.dtype).reshape(*ids.shape, self.cols)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, scale={self.scale:g}, format={self.format}, "
            f"bytes={self.n_bytes}"
        )


class _Product(torch.autograd.Function):
    """x Wᵀ; the backward pass decodes again by tiles of rows instead of keeping what the forward pass decoded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: PackedLinear) -> Tensor:
        ctx.module, ctx.kind = module, x.dtype
        return module.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (grad,) = grads
        if not ctx.needs_input_grad[0]:
            return None, None
        return ctx.module.product_back(grad).to(ctx.kind), None


def _gpu_products() -> Any:
    """The kernels' module, or None where Triton is not installed."""
    try:
        from barefoot.ops.triton import panel_matmul
    except ImportError:
        return None
    return panel_matmul


class _Scratch(threading.local):
    floats: Tensor | None = None


_shared = _Scratch()


def _scratch(n: int) -> Tensor:
    """So many numbers of the calling thread's scratch, which grows to the largest tile that was asked for."""
    if _shared.floats is None or len(_shared.floats) < n:
        _shared.floats = None  # goes before the larger one comes
        _shared.floats = torch.empty(n)
    return _shared.floats[:n]


def decode(format: str, rows: Tensor, cols: int, out: Tensor | None = None) -> Tensor:
    """Stored rows, uint8 (n, bytes of a row), as float32 (n, cols) on their device, or in ``out`` on the host.

    The kernels run on the host.
    """
    stored = rows.cpu().contiguous().numpy().reshape(-1)
    into = recycling.empty((len(rows), cols), _FLOATS) if out is None else out
    ops.embed(np.arange(len(rows), dtype=np.int32), PackedWeight(format, len(rows), cols, stored), into.numpy())
    return into.to(rows.device)
