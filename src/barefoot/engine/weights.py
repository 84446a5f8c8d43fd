"""Loading: from the file straight into the arena, by pieces, converted and rearranged tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.errors import CorruptFile
from barefoot.core.model import ModelSpec, PartSpec, WeightSpec
from barefoot.engine.arena import Arena
from barefoot.engine.files import WeightFiles
from barefoot.engine.footprint import staging, tile_rows
from barefoot.engine.placement import Placement, Resident, piece_bytes
from barefoot.engine.repacking import repacked
from barefoot.engine.stream import byte_range
from barefoot.io.quantized import PackedLinear
from barefoot.io.types import TensorInfo
from barefoot.ops import PackedWeight, Part, SignStack, blocks, dispatch, signs

U8 = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]  # bytes of the file done, bytes in all

PIECE_BYTES = 4 << 20  # read at a time: progress is seen, and pages leave the cache soon


def load(
    spec: ModelSpec,
    placement: Placement,
    tensors: Mapping[str, TensorInfo],
    linears: Mapping[str, PackedLinear],
    files: WeightFiles,
    arena: Arena,
    progress: Progress | None = None,
) -> tuple[dict[str, Sum], dict[str, npt.NDArray[np.float32]]]:
    """Matrices and vectors in memory, by barefoot's names. Norms that files store as w - 1 are made w.

    Raises
    ------
    CorruptFile : the file can't be read to its end, or a part contradicts itself.
    """
    total = sum(sum(piece_bytes(r.weight, r.parts)) for r in placement.resident)
    done = 0
    matrices: dict[str, Sum] = {}
    vectors: dict[str, npt.NDArray[np.float32]] = {}
    loader = _Loader(placement, tensors, linears, files, arena)
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
            data = []
            for part in resident.parts:
                data.append(arena.take(f"weights.{weight.group}", part.n_bytes))
                files.read(tensors[part.source].shard, tensors[part.source].offset, data[-1])
                done += part.n_bytes
                if progress is not None:
                    progress(done, total)
            matrix = Sum.of(weight, resident.format, resident.layout)
            matrix.bind(target, resident.parts, data)
            matrices[weight.name] = matrix
    return matrices, vectors


@dataclass(frozen=True)
class Sum:
    """A matrix as products take it: its blocks, and what is added to them. Signed blocks are added all at once."""

    blocks: PackedWeight
    parts: tuple[Part, ...]
    stack: SignStack | None

    @classmethod
    def of(cls, weight: WeightSpec, format_id: str, layout: dispatch.Layout) -> Sum:
        """Not yet bound to memory.

        Raises
        ------
        CorruptFile : signed blocks of different ranks, or of none.
        """
        shape = weight.rows, weight.cols
        signed = [p for p in weight.parts if p.kind == signs.KIND.name]
        ranks = {signs.rank_of(*shape, p.n_bytes) for p in signed}
        if len(ranks) > 1:
            raise CorruptFile(f"{weight.source}: its signed blocks have ranks {sorted(ranks)}, expected one for all")
        others = tuple(Part(p.kind, *shape) for p in weight.parts if p.kind != signs.KIND.name)
        stack = SignStack(*shape, ranks.pop()) if ranks else None
        return cls(PackedWeight(format_id, *shape, layout=layout), others, stack)

    def plus(self, part: Part | None) -> Sum:
        """The sum with one addend more, which is bound already; its other ones are bound together with this sum's."""
        return self if part is None else replace(self, parts=(*self.parts, part))

    def bind(self, data: U8, parts: Sequence[PartSpec], part_data: Sequence[U8]) -> None:
        """Let products read the blocks and ``parts`` from these arrays.

        Raises
        ------
        CorruptFile : they don't describe such a part.
        """
        self.blocks.bind(data)
        others = iter(self.parts)
        signed = []
        for part, each in zip(parts, part_data, strict=True):
            if part.kind == signs.KIND.name:
                signed.append(each)
                continue
            try:
                next(others).bind(each)
            except ValueError as error:
                raise CorruptFile(f"{part.source}: {error}") from None
        if self.stack is not None:
            self.stack.bind(signed)


class _Loader:
    """Fills targets; holds the staging arrays, which go when it goes."""

    def __init__(
        self,
        placement: Placement,
        tensors: Mapping[str, TensorInfo],
        linears: Mapping[str, PackedLinear],
        files: WeightFiles,
        arena: Arena,
    ) -> None:
        self._tensors, self._linears, self._files = tensors, linears, files
        sizes = staging(placement)
        if sizes.stored:
            self._stored = arena.take("staging", sizes.stored)
        if sizes.decoded:
            self._decoded = arena.take("staging", 4 * sizes.decoded).view(np.float32)
        if sizes.encoded:
            self._encoded = arena.take("staging", sizes.encoded)
        if sizes.packed:
            self._packed = arena.take("staging", sizes.packed)

    def fill(self, resident: Resident, target: U8) -> Iterator[int]:
        """Fill ``target``, yielding the bytes of the file after each piece."""
        if resident.staged:
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
        step = tile_rows(resident)
        packed = target.reshape(weight.rows, -1)
        for first, rows in self._packed_tiles(weight, step) if weight.packed_bytes else self._tiles(weight, step):
            n_rows, n_bytes = min(step, weight.rows - first), rows.nbytes
            to = packed[first : first + n_rows]
            if resident.converted:
                encoded = to if resident.layout == "rows" else self._encoded[: to.size].reshape(to.shape)
                rows = self._convert(resident, rows, encoded)
            if resident.layout == "panels":
                ops.pack_panels(resident.format, rows, n_rows, weight.cols, to)
            elif resident.layout == "lut":
                ops.pack_lut(resident.format, rows, n_rows, weight.cols, to)
            elif not resident.converted:
                to[:] = rows.reshape(to.shape)
            yield n_bytes

    def _tiles(self, weight: WeightSpec, step: int) -> Iterator[tuple[int, U8]]:
        """First row and stored bytes of each tile; they are gone with the next one."""
        tensor = self._tensors[weight.source]
        for first in range(0, weight.rows, step):
            offset, n_bytes = byte_range(weight, tensor, first, min(step, weight.rows - first))
            self._files.read(tensor.shard, offset, self._stored[:n_bytes])
            yield first, self._stored[:n_bytes]

    def _packed_tiles(self, weight: WeightSpec, step: int) -> Iterator[tuple[int, U8]]:
        """The same, of a matrix that another program packed: read as a whole, put into blocks tile by tile."""
        linear, raw, at = self._linears[weight.source], {}, 0
        for name, tensor in linear.parts.items():
            raw[name] = self._packed[at : at + tensor.n_bytes]
            self._files.read(tensor.shard, tensor.offset, raw[name])
            at += tensor.n_bytes
        for first in range(0, weight.rows, step):
            n_rows = min(step, weight.rows - first)
            yield first, repacked(linear, raw, weight.row_start + first, n_rows).reshape(-1)

    def _convert(self, resident: Resident, raw: U8, out: U8) -> U8:
        """``out`` (rows, row_bytes), filled with what the stored rows ``raw`` hold."""
        weight, n_rows = resident.weight, len(out)
        tile = self._decoded[: n_rows * weight.cols].reshape(n_rows, weight.cols)
        ids = np.arange(n_rows, dtype=np.int32)
        ops.embed(ids, PackedWeight(weight.format, n_rows, weight.cols, raw), tile)
        ops.encode(resident.format, tile, out)
        return out
