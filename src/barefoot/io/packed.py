"""Packed matrices in safetensors: what ``barefoot fit`` writes into a Hugging Face folder.

A matrix in a block format is a U8 tensor (rows, bytes of a row). What it means stands in the file's ``__metadata__``,
under the key ``barefoot``, as JSON::

    {"version": 1,
     "formats": {"int4_g32_asym": [32, 20], …},          weights and bytes of a block
     "matrices": {"model.layers.0.mlp.up_proj.weight": ["int4_g32_asym", 576], …},     format and columns
     "parts": {"model.layers.0.mlp.up_proj.weight+outliers": ["csr", 1536, 576], …}}   kind, rows and columns

so the file says itself how many bytes each matrix must have. Block layouts are those of ``barefoot.ops.blocks``; the
version changes when any of them does. Parts are added to the matrix whose name stands before the plus sign
(:mod:`barefoot.ops.parts`); each is a U8 tensor of one axis, of as many bytes as it needs. The format ``"zero"`` is of
matrices that are nothing but their parts: it takes 0 bytes, and its tensor has the shape (rows, 0).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from barefoot.core.errors import CorruptFile, UnsupportedFormat
from barefoot.io.strict_json import parse_object
from barefoot.io.types import TensorInfo

KEY = "barefoot"
VERSION = 1
MAX_BYTES = 1 << 20  # of the description; a file's header is bounded by its own size besides

Block = tuple[int, int]  # weights, bytes


def describe(
    matrices: Mapping[str, tuple[str, int]],
    blocks: Mapping[str, Block],
    parts: Mapping[str, tuple[str, int, int]] | None = None,
) -> dict[str, str]:
    """``__metadata__`` of a file. ``matrices``: tensor name → (format, columns); ``blocks`` of these formats;
    ``parts``: tensor name → (kind, rows, columns)."""
    content = {"version": VERSION, "formats": {name: list(blocks[name]) for name in sorted(blocks)}}
    content["matrices"] = {name: list(matrix) for name, matrix in matrices.items()}
    content["parts"] = {name: list(part) for name, part in (parts or {}).items()}
    return {"format": "pt", KEY: json.dumps(content, separators=(",", ":"))}


def interpret(file: str, metadata: Mapping[str, str], tensors: tuple[TensorInfo, ...]) -> tuple[TensorInfo, ...]:
    """The tensors of a file, those that ``metadata`` describes as matrices in their block formats.

    Raises
    ------
    CorruptFile : a description that contradicts itself or the tensors.
    UnsupportedFormat : a version that is not known.
    """
    text = metadata.get(KEY)
    if text is None:
        return tensors
    if len(text) > MAX_BYTES:
        raise CorruptFile(f"{file}: the description of packed matrices has {len(text)} bytes, at most {MAX_BYTES}")
    content = parse_object(text.encode(), f"{file}: {KEY}")
    if content.get("version") != VERSION:
        raise UnsupportedFormat(
            f"{file}: packed matrices of version {content.get('version')!r}, known: {VERSION}",
            cure="use the release of barefoot that wrote the file, or fit the model again",
        )
    formats, matrices, parts = (_object(file, content, key) for key in ("formats", "matrices", "parts"))
    missing = sorted({*matrices, *parts} - {t.name for t in tensors})
    if missing:
        raise CorruptFile(f"{file}: describes matrices that it does not hold: {', '.join(missing[:3])}")

    def meant(tensor: TensorInfo) -> TensorInfo:
        if tensor.name in parts:
            return _part(file, tensor, parts[tensor.name])
        return _packed(file, tensor, formats, matrices[tensor.name]) if tensor.name in matrices else tensor

    return tuple(map(meant, tensors))


def _object(file: str, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    if not isinstance(value, dict):
        raise CorruptFile(f"{file}: {KEY} must have {key}, by name")
    return value


def _part(file: str, tensor: TensorInfo, part: Any) -> TensorInfo:
    match part:
        case [str(kind), rows, cols] if _is_count(rows) and _is_count(cols):
            if tensor.type != "u8" or len(tensor.shape) != 1 or "+" not in tensor.name:
                raise CorruptFile(f"{file}: {tensor.name!r}, {tensor.type} {tensor.shape}, can't be a part of a matrix")
            return replace(tensor, type=kind, shape=(rows, cols))
    raise CorruptFile(f"{file}: {tensor.name!r} must be described by a kind, rows and columns, got {part!r}")


def _packed(file: str, tensor: TensorInfo, formats: Mapping[str, Any], matrix: Any) -> TensorInfo:
    if not isinstance(matrix, list) or len(matrix) != 2 or not isinstance(matrix[0], str) or not _is_count(matrix[1]):
        raise CorruptFile(f"{file}: {tensor.name!r} must be described by a format and columns, got {matrix!r}")
    name, cols = matrix
    block = formats.get(name)
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not _is_count(block[0])
        or not (block[1] == 0 or _is_count(block[1]))
    ):
        raise CorruptFile(f"{file}: format {name!r} must have the weights and bytes of a block, got {block!r}")
    n_weights, n_bytes = block
    if tensor.type != "u8" or len(tensor.shape) != 2 or cols % n_weights:
        raise CorruptFile(f"{file}: {tensor.name!r}, {tensor.type} {tensor.shape}, can't be {cols} columns of {name}")
    if tensor.shape[1] * n_weights != cols * n_bytes:
        raise CorruptFile(
            f"{file}: rows of {tensor.name!r} have {tensor.shape[1]} bytes, {cols} columns of {name} take "
            f"{cols // n_weights * n_bytes}"
        )
    return replace(tensor, type=name, shape=(tensor.shape[0], cols))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 40
