"""A model as a compressed-tensors checkpoint (format ``pack-quantized``), which transformers and vLLM load.

Symmetric integer groups of 4 and 8 bits go over as they are, and what such a format holds without loss with them
(:mod:`barefoot.ops.recode`); others are refused, since the layout has whole zeros where barefoot's blocks have f16
minimums. Scales stay f16; loaders multiply in it, and so mean each weight rounded to f16. The embedding, which these
programs keep dense, becomes f16 if it is quantized here. Layout: :mod:`barefoot.io.quantized.compressed_tensors`. One
file holds one layer; in memory is one piece of one tensor.

Matrices of several formats become several ``config_groups``. vLLM, and transformers' compressed modules, look each
matrix up; transformers 5.23 with ``dequantize=True`` takes the first scheme for all, and fails on a mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from barefoot.core.errors import Incompatible
from barefoot.core.model import ModelSpec, WeightSpec
from barefoot.engine.rows import U8, Rearranged, decode
from barefoot.engine.saving import ModelFolder, config_of, write_json
from barefoot.engine.specs import spec_from_config
from barefoot.io.inventory import Checkpoint
from barefoot.io.quantized.compressed_tensors import FORMAT, METHODS
from barefoot.io.safetensors import write_safetensors
from barefoot.ops import blocks, recode

Entry = tuple[str, str, tuple[int, ...], Iterable[Any]]
Progress = Callable[[int, int, str], None]  # files done, files in all, the first weight of the next

TARGETS = tuple(f"int{bits}_g{size}_sym" for bits in (4, 8) for size in blocks.GROUP_SIZES)


def export_compressed(
    checkpoint: Checkpoint, spec: ModelSpec, path: Path, progress: Progress | None = None
) -> dict[str, str]:
    """Write the folder ``path`` and return tensor → format of what was written.

    Raises
    ------
    Incompatible : a matrix in a format that is held by none of these layouts; nothing was written.
    """
    config = config_of(checkpoint, spec)
    target = spec_from_config(config, spec.name)
    rearranged = Rearranged(checkpoint, spec, target)
    chosen = {w.name: _chosen(w) for w in spec.weights}
    folder = ModelFolder(path, checkpoint, spec)
    places = {w.name: w for w in target.weights}
    shards: list[dict[str, list[WeightSpec]]] = [{} for _ in range(folder.n_shards)]
    for weight in spec.weights:
        shards[folder.shard_of(weight)].setdefault(places[weight.name].source, []).append(weight)
    formats: dict[str, str] = {}
    index: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        if progress is not None:
            progress(number, len(shards), next(iter(tensors)))
        entries: list[Entry] = []
        for name, weights in tensors.items():
            weights.sort(key=lambda w: places[w.name].row_start)
            formats[name] = _common(name, weights, chosen)
            entries += _entries(name, weights, formats[name], rearranged)
        write_safetensors(folder.shard(number), entries, {"format": "pt"})
        index |= {name: folder.shard(number).name for name, *_ in entries}
    folder.write_tokenizer()
    folder.write_index(index)
    if config.get("torch_dtype", config.get("dtype")) == "float32":
        config["torch_dtype"] = "float16"
        config.pop("dtype", None)
    if any(format_id in TARGETS for format_id in formats.values()):
        config["quantization_config"] = settings(formats)
    write_json(path / "config.json", config)
    return formats


def _chosen(weight: WeightSpec) -> str:
    """The format that a weight gets."""
    if blocks.block_elements(weight.format) == 1:
        return weight.format
    return "f16" if weight.group == "embed" else recode.target_for(weight.format, TARGETS)


def _common(name: str, weights: list[WeightSpec], chosen: dict[str, str]) -> str:
    formats = sorted({chosen[w.name] for w in weights})
    if len(formats) > 1:
        raise Incompatible(
            f"{name} holds {', '.join(w.name for w in weights)} together, which have formats {', '.join(formats)}",
            cure="fit the model again with one format for them",
        )
    return formats[0]


def settings(formats: dict[str, str]) -> dict[str, Any]:
    """``quantization_config`` for tensors of these formats."""
    modules: dict[str, list[str]] = {}
    for name, format_id in formats.items():
        modules.setdefault(format_id, []).append(name.removesuffix(".weight"))
    packed = {format_id: names for format_id, names in modules.items() if format_id in TARGETS}
    groups = {
        f"group_{i}": {"targets": names, "weights": _scheme(format_id), "input_activations": None}
        for i, (format_id, names) in enumerate(packed.items())
    }
    return {
        "quant_method": METHODS[0],
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [] if any("lm_head" in names for names in packed.values()) else ["lm_head"],
    }


def _scheme(format_id: str) -> dict[str, Any]:
    group = blocks.lookup(format_id).group
    assert group is not None
    return {
        "num_bits": group.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": blocks.block_elements(format_id),
        "dynamic": False,
    }


def _entries(name: str, weights: list[WeightSpec], format_id: str, rearranged: Rearranged) -> list[Entry]:
    first = weights[0]
    if first.group == "norm":
        return [(name, "f32", (first.cols,), (rearranged.vector(w).data for w in weights))]
    n_rows, cols = sum(w.rows for w in weights), first.cols

    def pieces() -> Iterator[tuple[str, U8]]:
        return ((w.format, rows) for w in weights for rows in rearranged.pieces(w))

    if format_id not in TARGETS:
        return [(name, format_id, (n_rows, cols), (_dense(format_id, f, rows, cols) for f, rows in pieces()))]
    bits, group = _scheme(format_id)["num_bits"], blocks.block_elements(format_id)

    def recoded() -> Iterator[U8]:
        return (recode.recode(format_id, f, rows) for f, rows in pieces())

    stem = name.removesuffix("weight")
    return [
        (f"{stem}weight_packed", "i32", (n_rows, cols * bits // 32), (words(format_id, rows) for rows in recoded())),
        (f"{stem}weight_scale", "f16", (n_rows, cols // group), (scales(format_id, rows) for rows in recoded())),
        (f"{stem}weight_shape", "i64", (2,), [np.array([n_rows, cols], "<i8").data]),
    ]


def _dense(format_id: str, stored: str, rows: U8, cols: int) -> U8:
    return np.ascontiguousarray(rows if stored == format_id else blocks.encode(format_id, decode(stored, rows, cols)))


def words(format_id: str, rows: U8) -> U8:
    """The codes of rows, one after the other in the bytes of little-endian words: uint8 (n, cols × bits / 8)."""
    _, _, codes = _split(format_id, rows)
    if blocks.lookup(format_id).group.bits == 8:  # type: ignore[union-attr]
        return codes
    return codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))


def scales(format_id: str, rows: U8) -> U8:
    """The f16 scales of rows: uint8 (n, 2 × groups)."""
    return np.ascontiguousarray(_split(format_id, rows)[0])


def _split(format_id: str, rows: U8) -> tuple[U8, U8, U8]:
    """Scales, nothing, and codes of rows, each (n, bytes)."""
    group = blocks.lookup(format_id).group
    assert group is not None
    numbers, none, codes = group.split(rows.reshape(-1, blocks.block_bytes(format_id)))
    return numbers.reshape(len(rows), -1), none, codes.reshape(len(rows), -1)
