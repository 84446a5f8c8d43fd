"""Writing a model folder that transformers and barefoot read: safetensors by layer, packed matrices among them.

Tensors get the names and the row order of Hugging Face's layout, whatever the source was: GGUF files of Llama keep the
rows of q and k in another order, and norms of Gemma as 1 + w. One file holds one layer, so that a fit that is
interrupted has lost one layer at most; the index and config.json come last and make the folder a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import Incompatible
from barefoot.core.model import ModelSpec, WeightSpec
from barefoot.engine.decoder import OWN_METHOD
from barefoot.engine.rows import halves_order_of
from barefoot.engine.specs import architectures, spec_from_config
from barefoot.io.files import BinaryFile, atomic_writer
from barefoot.io.inventory import Checkpoint
from barefoot.io.packed import VERSION, describe
from barefoot.io.safetensors import INDEX_NAME, read_safetensors, write_safetensors
from barefoot.io.tokenizer_export import export_tokenizer
from barefoot.io.tokenizer_files import read_gguf_tokenizer
from barefoot.ops import blocks
from barefoot.weights.structures import Matrix

U8 = npt.NDArray[np.uint8]

#: Beside the weights in a Hugging Face folder; all that a model needs, nothing that could be run.
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


def config_of(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Any]:
    """The config.json of a folder for this model: the source's own, or what its header amounts to."""
    if checkpoint.kind == "safetensors":
        return {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return dict(architectures()[spec.arch].to_hf(spec))


@dataclass(frozen=True)
class Pieces:
    """A matrix of a block format, uint8 ``shape`` (n_rows, row_bytes), whose rows come a few at a time."""

    format: str
    shape: tuple[int, int]
    pieces: Iterable[U8]

    def together(self) -> Matrix:
        rows, done = np.empty(self.shape, np.uint8), 0
        for piece in self.pieces:
            rows[done : done + len(piece)] = piece
            done += len(piece)
        return Matrix(self.format, rows)


class ModelFolder:
    """A model being written.

    Parameters
    ----------
    path : the folder, made if need be.
    checkpoint, spec : the model that is the source.

    Attributes
    ----------
    target : the model as this folder will describe it; its weights are those of ``arranged``.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        self.path, self._checkpoint, self._spec = path, checkpoint, spec
        self._config = config_of(checkpoint, spec)
        self.target = spec_from_config(self._config, spec.name)
        self._targets = {w.name: w for w in self.target.weights}
        self._norm_shift = np.float32(self.target.norm_plus_one) - np.float32(spec.norm_plus_one)
        path.mkdir(parents=True, exist_ok=True)

    @property
    def n_shards(self) -> int:
        """The embedding's file, one for each layer, and one for the last norm and the head."""
        return self._spec.n_layers + 2

    def shard_of(self, weight: WeightSpec) -> int:
        """The number of the file that holds a weight."""
        if weight.layer is not None:
            return weight.layer + 1
        return 0 if weight.name == "embed" else self.n_shards - 1

    def shard(self, number: int) -> Path:
        return self.path / f"model-{number + 1:05}-of-{self.n_shards:05}.safetensors"

    def write(self, number: int, weights: Mapping[str, Matrix | Pieces]) -> None:
        """Write one file whole; ``weights`` by barefoot's names, arranged matrices and f32 vectors.

        Raises
        ------
        Incompatible : weights that the layout keeps in one tensor have different formats.
        """
        groups: dict[str, list[tuple[WeightSpec, Matrix | Pieces]]] = {}
        for name, matrix in weights.items():
            target = self._targets[name]
            groups.setdefault(target.source, []).append((target, matrix))
        entries: list[tuple[str, str, tuple[int, ...], Iterable[Any]]] = []
        packed: dict[str, tuple[str, int]] = {}
        added: dict[str, tuple[str, int, int]] = {}
        for tensor, together in groups.items():
            together.sort(key=lambda each: each[0].row_start)
            formats = {matrix.format for _, matrix in together}
            if len(formats) > 1 or (len(together) > 1 and any(_parts_of(matrix) for _, matrix in together)):
                raise Incompatible(
                    f"{tensor} holds {', '.join(w.name for w, _ in together)} together, which have formats "
                    f"{', '.join(sorted(formats))}",
                    cure="give them one format of blocks",
                )
            entries.append(self._entry(tensor, together, packed))
            weight, matrix = together[0]
            for label, (kind, data) in sorted(_parts_of(matrix).items()):
                added[f"{tensor}+{label}"] = (kind, weight.rows, weight.cols)
                entries.append((f"{tensor}+{label}", "u8", (data.size,), [data.data]))
        sizes = {f: (blocks.block_elements(f), blocks.block_bytes(f)) for f, _ in packed.values()}
        metadata = describe(packed, sizes, added) if packed else {"format": "pt"}
        write_safetensors(self.shard(number), entries, metadata)

    def rows(self, name: str, rows: Iterable[int]) -> U8:
        """Rows of a matrix of a file that is written, uint8 (n, row_bytes)."""
        target = self._targets[name]
        path = self.shard(self.shard_of(target))
        (tensor,) = (each for each in read_safetensors(path).tensors if each.name == target.source)
        with BinaryFile(path) as file:
            read = [file.read_at(tensor.offset + int(row) * tensor.row_bytes, tensor.row_bytes) for row in rows]
        return np.frombuffer(b"".join(read), np.uint8).reshape(-1, tensor.row_bytes)

    def _entry(
        self, tensor: str, together: list[tuple[WeightSpec, Matrix | Pieces]], packed: dict[str, tuple[str, int]]
    ) -> tuple[str, str, tuple[int, ...], Iterable[Any]]:
        weight, layout = together[0][0], together[0][1].format
        shapes = [m.shape if isinstance(m, Pieces) else m.rows.shape for _, m in together]
        chunks = (np.ascontiguousarray(piece).data for _, matrix in together for piece in _pieces_of(matrix))
        n_rows = sum(rows for rows, _ in shapes)
        if blocks.block_elements(layout) == 1 and layout != "zero":
            shape = (weight.cols,) if weight.group == "norm" else (n_rows, weight.cols)
            return tensor, layout, shape, chunks
        packed[tensor] = (layout, weight.cols)
        return tensor, "u8", (n_rows, shapes[0][1]), chunks

    def arranged(self, name: str, rows: U8) -> U8:
        """All rows of a weight of the source, uint8 (n_rows, bytes), as Hugging Face's layout has them."""
        order = self.row_order(name)
        if name.endswith("_bias"):
            each = rows.reshape(-1, 4)
            return (each if order is None else each[order]).reshape(rows.shape)
        if name.endswith("norm") and self._norm_shift:
            return (rows.view(np.float32) - self._norm_shift).view(np.uint8)
        return rows if order is None else rows[order]

    def row_order(self, name: str) -> npt.NDArray[np.int64] | None:
        """For each row of a weight as Hugging Face has it, its row in the source; None where they are the same."""
        return halves_order_of(self._spec, self._targets[name])

    def finish(self, record: Mapping[str, Any], *, packed: bool = True) -> None:
        """Write the tokenizer, the record of the fit (``barefoot.json``), the index and, last, config.json.

        A folder that is not ``packed`` says nothing of quantization, and any program reads it.
        """
        self.write_tokenizer()
        write_json(self.path / "barefoot.json", {"version": VERSION, **record})
        self.write_index({w.source: self.shard(self.shard_of(w)).name for w in self._targets.values()} | self._parts())
        quantization = {"quantization_config": {"quant_method": OWN_METHOD, "version": VERSION}}
        write_json(self.path / "config.json", self._config | (quantization if packed else {}))

    def write_index(self, files: Mapping[str, str]) -> None:
        """Say which file holds each tensor."""
        total = sum(self.shard(number).stat().st_size for number in range(self.n_shards))
        write_json(self.path / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(files)})

    def _parts(self) -> dict[str, str]:
        """The files of all parts, by tensor."""
        found: dict[str, str] = {}
        for number in range(self.n_shards):
            path = self.shard(number)
            found |= {t.name: path.name for t in read_safetensors(path).tensors if "+" in t.name}
        return found

    def write_tokenizer(self) -> None:
        """The files beside the weights that say what tokens are."""
        if self._checkpoint.kind == "gguf":
            template = self._checkpoint.config.get("tokenizer.chat_template")
            parts = read_gguf_tokenizer(self._checkpoint)
            export_tokenizer(parts, template if isinstance(template, str) else None, self.path)
            return
        for name in CARRIED:
            source = self._checkpoint.path / name
            if source.is_file():
                with atomic_writer(self.path / name) as file:
                    file.write(source.read_bytes())


def _pieces_of(matrix: Matrix | Pieces) -> Iterable[U8]:
    if isinstance(matrix, Pieces):
        return matrix.pieces
    return [matrix.rows] if matrix.rows.size else []


def _parts_of(matrix: Matrix | Pieces) -> Mapping[str, tuple[str, U8]]:
    return {} if isinstance(matrix, Pieces) else matrix.parts


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """An object as a file that appears whole or not at all."""
    with atomic_writer(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
