"""Rows of a weight as barefoot's blocks, whatever the file keeps them as, and in the order that another file wants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.errors import Incompatible
from barefoot.core.model import ModelSpec, WeightSpec
from barefoot.engine.repacking import repacked
from barefoot.io.inventory import Checkpoint
from barefoot.ops import PackedWeight, blocks

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

PIECE_BYTES = 4 << 20  # of a weight that is in memory at once


@dataclass(frozen=True)
class Rearranged:
    """The weights of a model as a file of another layout has them, piece by piece. Sums of parts are refused.

    ``target`` is the spec of that layout: Llama's GGUF files keep the rows of q and k so that rotated pairs are
    neighbours, and Gemma's folders norms as w − 1.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    target: ModelSpec

    def __post_init__(self) -> None:
        summed = sorted({part.kind for weight in self.spec.weights for part in weight.parts})
        if summed:
            raise Incompatible(
                f"{self.spec.name} has matrices that are sums, of blocks and {', '.join(summed)}, which no other "
                f"program's file can hold",
                cure="fit the model again without a structure",
            )

    def pieces(self, weight: WeightSpec) -> Iterator[U8]:
        """A matrix's rows, uint8 (n, row_bytes) at a time, in the format that it is stored in."""
        order = self._row_order(weight)
        whole = 1 if order is None else self.spec.head_dim
        step = max(1, PIECE_BYTES // (blocks.row_bytes(weight.format, weight.cols) * whole)) * whole
        for start in range(0, weight.rows, step):
            rows = read_rows(self.checkpoint, weight, start, min(step, weight.rows - start))
            yield rows if order is None else rows[order[start : start + len(rows)] - start]

    def vector(self, weight: WeightSpec) -> F32:
        """A vector, float32 (1, n)."""
        values = decode(weight.format, read_rows(self.checkpoint, weight), weight.cols)
        if weight.name.endswith("norm"):
            values += np.float32(self.spec.norm_plus_one) - np.float32(self.target.norm_plus_one)
        return values

    def _row_order(self, weight: WeightSpec) -> npt.NDArray[np.int64] | None:
        """For each row of the target its row in the source, heads together; None where they are the same."""
        role = weight.name.rsplit(".", 1)[-1]
        if weight.layer is None or role not in ("q", "k"):
            return None
        here, there = self.spec.layers[weight.layer].rope, self.target.layers[weight.layer].rope
        if here.interleaved == there.interleaved:
            return None
        n_heads = self.spec.n_heads if role == "q" else self.spec.n_kv_heads
        order = halves_order(n_heads, self.spec.head_dim, here.dim)
        return order if here.interleaved else np.argsort(order)


def halves_order_of(spec: ModelSpec, weight: WeightSpec) -> npt.NDArray[np.int64] | None:
    """For each row of a weight as Hugging Face has it, its row in the model's file; None where they are the same."""
    role = weight.name.rsplit(".", 1)[-1].removesuffix("_bias")
    if role not in ("q", "k") or weight.layer is None or not spec.layers[weight.layer].rope.interleaved:
        return None
    n_heads = spec.n_heads if role == "q" else spec.n_kv_heads
    return halves_order(n_heads, spec.head_dim, spec.layers[weight.layer].rope.dim)


def halves_order(n_heads: int, head_dim: int, rot_dim: int) -> npt.NDArray[np.int64]:
    """For each row of a layout that rotates channels i and i + dim / 2, its row in one that rotates 2i and 2i + 1."""
    half = rot_dim // 2
    within = np.arange(head_dim)
    within[:half], within[half:rot_dim] = np.arange(0, rot_dim, 2), np.arange(1, rot_dim, 2)
    return (np.arange(n_heads)[:, None] * head_dim + within).reshape(-1)


def read_rows(checkpoint: Checkpoint, weight: WeightSpec, first: int = 0, n_rows: int | None = None) -> U8:
    """Rows of a weight in its stored format, uint8 (n_rows, row_bytes); all from ``first`` on without ``n_rows``.

    A matrix that another program packed is read whole for this.
    """
    n_rows = weight.rows - first if n_rows is None else n_rows
    if weight.packed_bytes:
        linear = checkpoint.linears[weight.source]
        raw = {name: np.empty(part.n_bytes, np.uint8) for name, part in linear.parts.items()}
        for name, part in linear.parts.items():
            checkpoint.read_into(part.name, raw[name])
        return repacked(linear, raw, weight.row_start + first, n_rows)
    rows = np.empty((n_rows, blocks.row_bytes(weight.format, weight.cols)), np.uint8)
    checkpoint.read_into(weight.source, rows, weight.row_start + first, n_rows)
    return rows


def decode(format_id: str, rows: U8, cols: int) -> F32:
    """Stored rows as float32 (n, cols), by the kernels."""
    out = np.empty((len(rows), cols), np.float32)
    packed = PackedWeight(format_id, len(rows), cols, np.ascontiguousarray(rows).reshape(-1))
    ops.embed(np.arange(len(rows), dtype=np.int32), packed, out)
    return out
