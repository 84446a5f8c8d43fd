"""safetensors: headers read without trusting them, shards found through their index, and a streaming writer.

Layout: 8 bytes little-endian header length, the header (a JSON object: tensor name to dtype, shape and the tensor's
extent in the data), the data. The extents must cover the data exactly, without gap or overlap.

Memory while reading is bounded by twice the file's size plus 1 MiB: the header's punctuation is counted before it is
parsed, since each object, list, key and number follows one mark.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from barefoot.core.errors import CorruptFile, InvalidInput, SourceNotFound, UnsupportedFormat
from barefoot.io.files import HEADER_ALLOWANCE_BYTES, BinaryFile, atomic_writer
from barefoot.io.strict_json import parse_object, read_object
from barefoot.io.types import FILE_TYPES, TensorInfo, refuse_overlap

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
INDEX_NAME = "model.safetensors.index.json"
MARK_BYTES = 128  # resident cost of what follows one of the marks { [ , :
_BY_DTYPE = {t.safetensors: t for t in FILE_TYPES.values() if t.safetensors is not None}
_NUMPY = {"f32": "<f4", "f16": "<f2", "f64": "<f8", "i8": "i1", "i16": "<i2", "i32": "<i4", "i64": "<i8"} | {
    "u8": "u1",
    "u16": "<u2",
    "u32": "<u4",
    "u64": "<u8",
    "bool": "?",
}


@dataclass(frozen=True)
class SafetensorsFile:
    """What the header says; ``metadata`` is the file's own text-to-text map."""

    path: Path
    n_bytes: int
    data_offset: int
    metadata: Mapping[str, str]
    tensors: tuple[TensorInfo, ...]


def read_safetensors(path: str | os.PathLike[str], *, shard: int = 0) -> SafetensorsFile:
    """Read the header of one safetensors file; ``shard`` is stamped on its tensors.

    Raises
    ------
    CorruptFile : a length, extent, shape or name contradicts the file or itself.
    UnsupportedFormat : a dtype that is not known.
    SourceNotFound : the file can't be opened.
    """
    with BinaryFile(path) as file:
        name = file.path.name
        n_header = int.from_bytes(file.read_at(0, 8), "little")
        if n_header > min(MAX_HEADER_BYTES, file.n_bytes - 8):
            raise CorruptFile(f"{name}: header of {n_header} bytes in a file of {file.n_bytes}")
        raw = file.read_at(8, n_header)
        text_bytes = (3 if raw.isascii() else 9) * n_header  # the bytes, the text, the texts cut from it
        n_marks = sum(raw.count(mark) for mark in b"{[,:")
        if text_bytes + n_marks * MARK_BYTES > 2 * file.n_bytes + HEADER_ALLOWANCE_BYTES:
            raise CorruptFile(
                f"{name}: a header of {n_marks} values would take more than twice the file's {file.n_bytes} bytes"
            )
        header = parse_object(raw, f"{name}: header")
        del raw
        n_bytes = file.n_bytes
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptFile(f"{name}: __metadata__ must map texts to texts")
    start = 8 + n_header
    tensors = tuple(_tensor(name, key, value, start, n_bytes, shard) for key, value in header.items())
    refuse_overlap(tensors)
    if sum(t.n_bytes for t in tensors) != n_bytes - start:
        raise CorruptFile(f"{name}: tensors of {sum(t.n_bytes for t in tensors)} bytes, data of {n_bytes - start}")
    return SafetensorsFile(Path(path), n_bytes, start, metadata, tensors)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _tensor(file: str, name: str, value: Any, start: int, n_bytes: int, shard: int) -> TensorInfo:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CorruptFile(f"{file}: tensor {name!r} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, extent = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        raise CorruptFile(f"{file}: tensor {name!r}: dtype must be a text, got {dtype!r}")
    if dtype not in _BY_DTYPE:
        raise UnsupportedFormat(f"{file}: tensor {name!r} has dtype {dtype!r}; known: {', '.join(sorted(_BY_DTYPE))}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise CorruptFile(f"{file}: tensor {name!r}: shape must be counts, got {shape!r}")
    if not isinstance(extent, list) or len(extent) != 2 or not all(map(_is_count, extent)):
        raise CorruptFile(f"{file}: tensor {name!r}: data_offsets must be two counts, got {extent!r}")
    begin, end = extent
    expected = math.prod(shape) * _BY_DTYPE[dtype].n_bytes
    if end - begin != expected:
        raise CorruptFile(f"{file}: tensor {name!r}: {dtype} {shape} takes {expected} bytes, its extent {end - begin}")
    if start + end > n_bytes:
        raise CorruptFile(f"{file}: tensor {name!r} ends at byte {start + end}, the file at {n_bytes}")
    return TensorInfo(name, _BY_DTYPE[dtype].id, tuple(shape), start + begin, expected, shard)


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name to file name, from ``model.safetensors.index.json``.

    Raises
    ------
    CorruptFile : not such an index, or a file name that leaves the folder.
    SourceNotFound : a file that the index names is not there.
    """
    weight_map = read_object(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CorruptFile(f"{INDEX_NAME}: weight_map must map tensor names to file names")
    for file in sorted(set(weight_map.values())):
        if file in ("", ".", "..") or any(c in file for c in "/\\:\0") or not file.endswith(".safetensors"):
            raise CorruptFile(f"{INDEX_NAME}: {file!r} is not the name of a safetensors file in the same folder")
        if not (folder / file).is_file():
            raise SourceNotFound(f"{INDEX_NAME} names {file}, which is not in {folder}")
    return weight_map


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[str, str, tuple[int, ...], Iterable[Any]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as ``(name, type, shape, chunks)``: ``chunks`` yields bytes-like parts of the data in order, one
    at a time, so that a tensor never needs to be whole in memory. The file appears whole or not at all.

    Raises
    ------
    InvalidInput : a type that safetensors does not have, a name twice, or chunks that do not add up to the shape.
    """
    listed = list(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, type_id, shape, _ in listed:
        known = FILE_TYPES.get(type_id)
        if known is None or known.safetensors is None:
            raise InvalidInput(
                f"safetensors has no type {type_id!r}; it has {', '.join(t.id for t in _BY_DTYPE.values())}"
            )
        if name in header or name == "__metadata__":
            raise InvalidInput(f"tensor {name!r} occurs twice")
        end = position + math.prod(shape) * known.n_bytes
        header[name] = {"dtype": known.safetensors, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with atomic_writer(Path(path)) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, _, _, chunks in listed:
            written = sum(file.write(memoryview(chunk).cast("B")) for chunk in chunks)
            begin, end = header[name]["data_offsets"]
            if written != end - begin:
                raise InvalidInput(f"tensor {name!r}: {written} bytes were given, its shape takes {end - begin}")


def array_entry(name: str, array: np.ndarray) -> tuple[str, str, tuple[int, ...], tuple[memoryview, ...]]:
    """A whole numpy array as an entry for :func:`write_safetensors`; f8 and bf16 have no numpy type."""
    type_id = next((t for t, form in _NUMPY.items() if np.dtype(form) == array.dtype), None)
    if type_id is None:
        raise InvalidInput(f"tensor {name!r}: no safetensors type for numpy {array.dtype}")
    flat = np.ascontiguousarray(array)
    return name, type_id, array.shape, (flat.reshape(-1).view(np.uint8).data,)
