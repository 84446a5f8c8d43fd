"""A model as one GGUF file, piece by piece: weights bit for bit the same, in the order and under the names of GGUF.

Matrices keep their format where GGUF has it, and go into one that holds the same numbers where it hasn't
(:mod:`barefoot.ops.recode`); what no format of GGUF holds is refused. Vectors are f32, as llama.cpp wants them, the
rows of q and k of Llama stand so that rotated pairs are neighbours, and norms of Gemma are 1 + w. In memory is one
piece of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from barefoot.core.errors import Incompatible
from barefoot.core.model import ModelSpec, WeightSpec
from barefoot.engine import rope
from barefoot.engine.rows import U8, Rearranged
from barefoot.engine.specs import architectures, spec_from_gguf
from barefoot.io.gguf_writer import Entry, Value, write_gguf
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer_gguf import gguf_tokenizer
from barefoot.io.types import FILE_TYPES
from barefoot.ops import blocks, recode

QUANTIZATION_VERSION = 2  # of ggml's block formats
Progress = Callable[[int, int, str], None]  # rows done, rows in all, weight


def gguf_formats() -> tuple[str, ...]:
    """The block formats that GGUF files can hold."""
    return tuple(name for name in blocks.names() if name in FILE_TYPES and FILE_TYPES[name].gguf is not None)


@dataclass(frozen=True)
class _Part:
    """A weight of the model, and its place and format in the file."""

    weight: WeightSpec
    target: WeightSpec
    format: str


def export_gguf(
    checkpoint: Checkpoint, spec: ModelSpec, path: Path, progress: Progress | None = None
) -> dict[str, str]:
    """Write ``path`` and return tensor → format of what was written.

    Raises
    ------
    Incompatible : a matrix in a format that none of GGUF holds without loss, or an architecture's feature that GGUF
        can't state; nothing was written.
    UnsupportedFormat : a tokenizer that GGUF files have no name for.
    """
    header = architectures()[spec.arch].to_gguf(spec)
    target = spec_from_gguf(header, spec.name)
    writing = _Writing(Rearranged(checkpoint, spec, target), progress or (lambda done, total, label: None))
    tensors = _tensors(spec, target)
    metadata: dict[str, Value] = {
        **header,
        "general.type": "model",
        "general.name": spec.name,
        "general.quantization_version": QUANTIZATION_VERSION,
        **gguf_tokenizer(checkpoint, spec.vocab_size),
    }
    entries = [writing.entry(name, parts) for name, parts in tensors.items()]
    for name, factors in rope.gguf_factors(spec.layers[0].rope).items():
        entries.append((name, "f32", factors.shape, [factors.data]))
    write_gguf(path, metadata, entries)
    return {name: type_id for name, type_id, _, _ in entries}


def _tensors(spec: ModelSpec, target: ModelSpec) -> dict[str, list[_Part]]:
    """What each tensor of the file is made of, in the order of its rows."""
    places = {w.name: w for w in target.weights}
    tensors: dict[str, list[_Part]] = {}
    for weight in spec.weights:
        chosen = "f32" if weight.group == "norm" else recode.target_for(weight.format, gguf_formats())
        place = places[weight.name]
        tensors.setdefault(place.source, []).append(_Part(weight, place, chosen))
    for name, parts in tensors.items():
        parts.sort(key=lambda part: part.target.row_start)
        formats = sorted({part.format for part in parts})
        if len(formats) > 1:
            raise Incompatible(
                f"GGUF keeps {', '.join(part.weight.name for part in parts)} in one tensor, {name}, and they have "
                f"formats {', '.join(formats)}",
                cure="fit the model again with one format for them",
            )
    return tensors


class _Writing:
    def __init__(self, rearranged: Rearranged, progress: Progress) -> None:
        self.rearranged, self.progress = rearranged, progress
        self.done, self.total = 0, sum(w.rows for w in rearranged.spec.weights)

    def entry(self, name: str, parts: list[_Part]) -> Entry:
        first = parts[0]
        n_rows, cols = sum(part.weight.rows for part in parts), first.weight.cols
        shape = (cols,) if first.weight.group == "norm" else (n_rows, cols)
        return name, first.format, shape, (piece.data for part in parts for piece in self.pieces(part))

    def pieces(self, part: _Part) -> Iterator[U8]:
        """The rows of a weight as the file has them, so many at a time."""
        weight = part.weight
        if weight.group == "norm":
            yield self.rearranged.vector(weight).view(np.uint8)
            self.report(weight, 1)
            return
        for rows in self.rearranged.pieces(weight):
            yield np.ascontiguousarray(recode.recode(part.format, weight.format, rows))
            self.report(weight, len(rows))

    def report(self, weight: WeightSpec, n_rows: int) -> None:
        self.done += n_rows
        self.progress(self.done, self.total, weight.name)
