"""Merging: an adapter made part of a model, as a folder that needs no adapter.

Matrices of a dense type become W + scale × B A, rounded to that type; what rounding loses is measured against what the
adapter adds, since small changes beside large weights are what 8 bits of a bfloat16 lose first. Packed matrices are not
rounded anew: they keep their blocks, and the factors become a part of them (:mod:`barefoot.ops.lowrank`), so that the
sum is the same numbers as beside the model. In memory is one piece of one matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from barefoot.adapters.files import AdapterFile, Pair
from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.model import ModelSpec, WeightSpec
from barefoot.engine.adapter_files import matched, split
from barefoot.engine.beside import OWNER
from barefoot.engine.rows import PIECE_BYTES, U8, decode, read_rows
from barefoot.engine.saving import ModelFolder, Pieces
from barefoot.engine.stacks import RECORD
from barefoot.io.files import BinaryFile
from barefoot.io.inventory import Checkpoint
from barefoot.io.strict_json import read_object
from barefoot.ops import blocks, lowrank
from barefoot.weights.structures import Matrix

Progress = Callable[[int, int, str], None]  # files done, files in all, the first weight of the next


@dataclass
class Merged:
    """What was written: the format of each matrix; of those of a dense type, the norm of what rounding lost over the
    norm of what the adapter added; and the names of those whose factors stand beside their blocks."""

    formats: dict[str, str] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)


def merge(
    checkpoint: Checkpoint, spec: ModelSpec, file: AdapterFile, path: Path, progress: Progress | None = None
) -> Merged:
    """Write the model with the adapter into the folder ``path``.

    Raises
    ------
    InvalidInput : ``path`` is the model's own folder.
    Incompatible : the adapter is of another model; packed matrices that the folder keeps in one tensor, which can't
        have parts; or a sum beyond the numbers of its type, which is found while it is written.
    """
    return _Merging(checkpoint, spec, file, path).run(progress or (lambda done, total, label: None))


def is_dense(weight: WeightSpec) -> bool:
    """Whether each number is stored by itself, and nothing is added to them."""
    return blocks.block_elements(weight.format) == 1 and not weight.parts


class _Merging:
    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, file: AdapterFile, path: Path) -> None:
        if path.resolve() == checkpoint.path.resolve():
            raise InvalidInput(f"{path} is the model itself, which is read while the other is written")
        self.checkpoint, self.spec, self.file = checkpoint, spec, file
        self.of = {weight.name: (fused, module) for fused, module in matched(spec, file) for weight in fused.weights}
        for weight in spec.weights:
            fused = self.of[weight.name][0] if weight.name in self.of else None
            if fused is not None and len(fused.weights) > 1 and not is_dense(weight):
                raise Incompatible(
                    f"{fused.name} holds {', '.join(w.name for w in fused.weights)} together, packed, and can have "
                    f"nothing beside it",
                    cure="let the adapter stand beside the model: barefoot run MODEL --adapter DIR",
                )
            if any(part.label == OWNER for part in weight.parts) and weight.name in self.of:
                raise Incompatible(
                    f"{weight.name} has an adapter in it already", cure="merge into the model without it"
                )
        self.folder = ModelFolder(path, checkpoint, spec)
        self.merged = Merged()

    def run(self, progress: Progress) -> Merged:
        shards: list[list[WeightSpec]] = [[] for _ in range(self.folder.n_shards)]
        for weight in self.spec.weights:
            shards[self.folder.shard_of(weight)].append(weight)
        for number, weights in enumerate(shards):
            progress(number, len(shards), weights[0].name)
            pairs: dict[str, Pair] = {}
            for weight in weights:
                if weight.name in self.of and weight.name not in pairs:
                    fused, module = self.of[weight.name]
                    pairs |= split(self.spec, fused, self.file.pair(module))
            self.folder.write(number, {w.name: self._matrix(w, pairs.get(w.name)) for w in weights})
            for weight in weights:
                self.merged.formats[weight.name] = "f32" if weight.group == "norm" else weight.format
        record = self.checkpoint.path / RECORD
        before = read_object(record) if record.is_file() else {}
        packed = not all(is_dense(weight) for weight in self.spec.weights)
        self.folder.finish({**before, "merged": len(self.of)}, packed=packed)
        return self.merged

    def _matrix(self, weight: WeightSpec, pair: Pair | None) -> Matrix | Pieces:
        if weight.group == "norm":
            values = decode(weight.format, read_rows(self.checkpoint, weight), weight.cols)
            return Matrix("f32", self.folder.arranged(weight.name, values.view(np.uint8)))
        into = pair if is_dense(weight) else None
        shape = weight.rows, blocks.row_bytes(weight.format, weight.cols)
        found = Pieces(weight.format, shape, self._pieces(weight, into))
        if not weight.parts and (pair is None or into is not None):
            return found
        parts = {part.label: (part.kind, self._part(part.source)) for part in weight.parts}
        if pair is not None:
            order, kind = self.folder.row_order(weight.name), self.of[weight.name][1].type
            b = pair.b if order is None else pair.b[order]
            parts[OWNER] = (lowrank.kind(kind), lowrank.encode(kind, pair.a, b, pair.scale))
            self.merged.beside.append(weight.name)
        return Matrix(weight.format, found.together().rows, parts)

    def _part(self, source: str) -> U8:
        tensor = self.checkpoint.tensors[source]
        with BinaryFile(self.checkpoint.paths[tensor.shard]) as file:
            return np.frombuffer(file.read_at(tensor.offset, tensor.n_bytes), np.uint8)

    def _pieces(self, weight: WeightSpec, pair: Pair | None) -> Iterator[U8]:
        """Rows as they will be stored, some whole heads at a time where heads have another order."""
        order = self.folder.row_order(weight.name)
        unit = 1 if order is None else self.spec.head_dim
        step = max(1, PIECE_BYTES // (max(1, blocks.row_bytes(weight.format, weight.cols)) * unit)) * unit
        lost = added = 0.0
        for start in range(0, weight.rows, step):
            n = min(step, weight.rows - start)
            rows = read_rows(self.checkpoint, weight, start, n)
            if pair is not None:
                change = np.float32(pair.scale) * (pair.b[start : start + n] @ pair.a)
                exact = decode(weight.format, rows, weight.cols) + change
                rows = blocks.encode(weight.format, exact)
                left = decode(weight.format, rows, weight.cols) - exact
                if not np.isfinite(left).all():
                    raise Incompatible(
                        f"{weight.name} with its adapter is beyond the numbers of {weight.format}",
                        cure="let the adapter stand beside the model: barefoot run MODEL --adapter DIR",
                    )
                lost += float(np.vdot(left, left))
                added += float(np.vdot(change, change))
            yield rows if order is None else rows[order[start : start + n] - start]
        if pair is not None:
            self.merged.lost[weight.name] = (lost / added) ** 0.5 if added else 0.0


def summary(merged: Merged) -> Mapping[str, float | int]:
    """In how many matrices it is, beside how many it stands, and the most that rounding lost of any."""
    return {"into": len(merged.lost), "beside": len(merged.beside), "lost": max(merged.lost.values(), default=0.0)}
