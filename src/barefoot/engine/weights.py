"""Loading: from the file straight into the arena, by pieces, converted and rearranged tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.errors import CorruptFile
from barefoot.core.model import ModelSpec, WeightSpec
from barefoot.engine.arena import Arena
from barefoot.engine.files import WeightFiles
from barefoot.engine.footprint import staging_sizes, tile_rows
from barefoot.engine.placement import Placement, Resident, stored_bytes
from barefoot.engine.stream import byte_range
from barefoot.io.types import TensorInfo
from barefoot.ops import PackedWeight, Part, blocks, dispatch

U8 = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]  # bytes of the file done, bytes in all

PIECE_BYTES = 4 << 20  # read at a time: progress is seen, and pages leave the cache soon


def load(
    spec: ModelSpec,
    placement: Placement,
    tensors: Mapping[str, TensorInfo],
    files: WeightFiles,
    arena: Arena,
    progress: Progress | None = None,
) -> tuple[dict[str, Sum], dict[str, npt.NDArray[np.float32]]]:
    """Matrices and vectors in memory, by barefoot's names. Norms that files store as w - 1 are made w.

    Raises
    ------
    CorruptFile : the file can't be read to its end, or a part contradicts itself.
    """
    total = sum(stored_bytes(resident.weight) for resident in placement.resident)
    done = 0
    matrices: dict[str, Sum] = {}
    vectors: dict[str, npt.NDArray[np.float32]] = {}
    loader = _Loader(placement, tensors, files, arena)
    for resident in placement.resident:
        weight = resident.weight
        target = arena.take(f"weights.{weight.group}", weight.rows * blocks.row_bytes(resident.format, weight.cols))
        for n_bytes in loader.fill(resident, target):
            done += n_bytes
            if progress is not None:
                progress(done, total)
        if weight.group == "norm":
            vector = target.view(np.float32)
            if spec.norm_plus_one and weight.name.endswith("norm"):
                vector += 1
            vectors[weight.name] = vector
        else:
            matrix = Sum.of(weight, resident.format, resident.layout)
            matrix.blocks.bind(target)
            for part, each in zip(weight.parts, matrix.parts, strict=True):
                data = arena.take(f"weights.{weight.group}", part.n_bytes)
                files.read(tensors[part.source].shard, tensors[part.source].offset, data)
                bind_part(each, data, part.source)
                done += part.n_bytes
                if progress is not None:
                    progress(done, total)
            matrices[weight.name] = matrix
    return matrices, vectors


@dataclass(frozen=True)
class Sum:
    """A matrix as products take it: its blocks, and what is added to them."""

    blocks: PackedWeight
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, weight: WeightSpec, format_id: str, layout: dispatch.Layout) -> Sum:
        """Not yet bound to memory."""
        parts = tuple(Part(p.kind, weight.rows, weight.cols) for p in weight.parts)
        return cls(PackedWeight(format_id, weight.rows, weight.cols, layout=layout), parts)


def bind_part(part: Part, data: U8, source: str) -> None:
    """Let a part read ``data``, which came from the tensor ``source``.

    Raises
    ------
    CorruptFile : they don't describe such a part.
    """
    try:
        part.bind(data)
    except ValueError as error:
        raise CorruptFile(f"{source}: {error}") from None


class _Loader:
    """Fills targets; holds the staging arrays, which go when it goes."""

    def __init__(
        self, placement: Placement, tensors: Mapping[str, TensorInfo], files: WeightFiles, arena: Arena
    ) -> None:
        self._tensors, self._files = tensors, files
        raw, decoded, elements = staging_sizes(placement)
        if raw:
            self._raw = arena.take("staging", raw)
        if elements:
            self._decoded = arena.take("staging", decoded).view(np.float32)

    def fill(self, resident: Resident, target: U8) -> Iterator[int]:
        """Fill ``target``, yielding the bytes of the file after each piece."""
        if resident.converted or resident.layout != "rows":
            yield from self._stage(resident, target)
        else:
            yield from self._copy(resident.weight, target)

    def _copy(self, weight: WeightSpec, target: U8) -> Iterator[int]:
        tensor = self._tensors[weight.source]
        offset, _ = byte_range(weight, tensor)
        for start in range(0, target.nbytes, PIECE_BYTES):
            piece = target[start : start + PIECE_BYTES]
            self._files.read(tensor.shard, offset + start, piece)
            yield piece.nbytes

    def _stage(self, resident: Resident, target: U8) -> Iterator[int]:
        weight = resident.weight
        tensor = self._tensors[weight.source]
        step = tile_rows(resident)
        packed = target.reshape(weight.rows, -1)
        for first in range(0, weight.rows, step):
            n_rows = min(step, weight.rows - first)
            offset, n_bytes = byte_range(weight, tensor, first, n_rows)
            rows = self._raw[:n_bytes]
            self._files.read(tensor.shard, offset, rows)
            to = packed[first : first + n_rows]
            if resident.converted:
                rows = self._convert(resident, rows, to if resident.layout == "rows" else np.empty_like(to))
            if resident.layout == "panels":
                ops.pack_panels(resident.format, rows, n_rows, weight.cols, to)
            elif resident.layout == "lut":
                ops.pack_lut(resident.format, rows, n_rows, weight.cols, to)
            yield n_bytes

    def _convert(self, resident: Resident, raw: U8, out: U8) -> U8:
        """``out`` (rows, row_bytes), filled with what the stored rows ``raw`` hold."""
        weight, n_rows = resident.weight, len(out)
        tile = self._decoded[: n_rows * weight.cols].reshape(n_rows, weight.cols)
        ids = np.arange(n_rows, dtype=np.int32)
        ops.embed(ids, PackedWeight(weight.format, n_rows, weight.cols, raw), tile)
        ops.encode(resident.format, tile, out)
        return out
