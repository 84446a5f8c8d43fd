"""GGUF files (version 3, little-endian), written one piece at a time.

Layout: magic, version, counts; the metadata pairs; a description of each tensor; then, each on a multiple of the
alignment, the data. All sizes follow from types and shapes, so the header is written before any data is read, and no
tensor needs to be whole in memory. :mod:`barefoot.io.gguf` reads the format.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput
from barefoot.core.units import round_up
from barefoot.io.files import BinaryFile, atomic_writer
from barefoot.io.gguf import ARRAY, MAGIC, SCALARS, STRING, GGUFArray, read_numbers, read_strings
from barefoot.io.types import FILE_TYPES, stored_bytes

VERSION = 3
ALIGNMENT = 32

_CODES = {name: code for code, (name, _) in SCALARS.items()}


@dataclass(frozen=True)
class Texts:
    """An array of strings as bytes: text ``i`` is ``blob[offsets[i] : offsets[i + 1]]``, UTF-8."""

    blob: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.uint32]

    @classmethod
    def of(cls, texts: Iterable[str | bytes]) -> Texts:
        raw = [text.encode() if isinstance(text, str) else text for text in texts]
        offsets = np.zeros(len(raw) + 1, np.uint32)
        np.cumsum([len(each) for each in raw], out=offsets[1:], dtype=np.uint32)
        return cls(np.frombuffer(b"".join(raw), np.uint8), offsets)


#: A whole number becomes u32 (i32 below 0, u64 above), a fraction f32, an array of numbers one of its own type.
Value = bool | int | float | str | Texts | npt.NDArray[Any]
Entry = tuple[str, str, tuple[int, ...], Iterable[Any]]  # name, type, shape (numpy order), parts of the data in order


def read_value(file: BinaryFile, value: Any) -> Value:
    """A value of a GGUF file's metadata with its array read, to be written again.

    Raises
    ------
    UnsupportedFormat : an array of arrays.
    """
    if not isinstance(value, GGUFArray):
        return value  # type: ignore[no-any-return]
    return Texts(*read_strings(file, value)) if value.element == "string" else read_numbers(file, value)


def write_gguf(path: str | os.PathLike[str], metadata: Mapping[str, Value], tensors: Sequence[Entry]) -> None:
    """Write a file; it appears whole or not at all.

    Raises
    ------
    InvalidInput : a type that GGUF does not have, a name twice, or parts that do not add up to the shape.
    CorruptFile : rows that are not whole blocks.
    """
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _text(key) + _value(key, value)
    sizes: dict[str, int] = {}
    position = 0
    for name, type_id, shape, _ in tensors:
        known = FILE_TYPES.get(type_id)
        if known is None or known.gguf is None:
            names = ", ".join(t.id for t in FILE_TYPES.values() if t.gguf is not None)
            raise InvalidInput(f"tensor {name!r}: GGUF has no type {type_id!r}; it has {names}")
        if name in sizes:
            raise InvalidInput(f"tensor {name!r} occurs twice")
        axes = tuple(reversed(shape))
        header += _text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, known.gguf, position)
        sizes[name] = stored_bytes(known, shape, name)
        position += round_up(sizes[name], ALIGNMENT)
    with atomic_writer(Path(path)) as file:
        file.write(header.ljust(round_up(len(header), ALIGNMENT), b"\0"))
        for name, _, _, parts in tensors:
            written = sum(file.write(memoryview(part).cast("B")) for part in parts)
            if written != sizes[name]:
                raise InvalidInput(f"tensor {name!r}: {written} bytes were given, its shape takes {sizes[name]}")
            file.write(bytes(-written % ALIGNMENT))


def _text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, Texts):
        blob, ends = value.blob.tobytes(), value.offsets.tolist()
        texts = (_text(blob[a:b]) for a, b in itertools.pairwise(ends))
        return struct.pack("<IIQ", ARRAY, STRING, len(ends) - 1) + b"".join(texts)
    if isinstance(value, np.ndarray):
        code = next((c for c, (_, form) in SCALARS.items() if np.dtype(form) == value.dtype), None)
        if value.dtype == np.bool_:
            code = _CODES["bool"]
        if code is None or value.ndim != 1:
            raise InvalidInput(f"metadata {key!r}: GGUF has no array of {value.dtype} with {value.ndim} axes")
        return struct.pack("<IIQ", ARRAY, code, len(value)) + np.ascontiguousarray(value).tobytes()
    if isinstance(value, bool):
        name = "bool"
    elif isinstance(value, int):
        name = "i32" if value < 0 else "u32" if value < 1 << 32 else "u64"
    elif isinstance(value, float) and math.isfinite(value):
        name = "f32"
    else:
        raise InvalidInput(f"metadata {key!r}: GGUF has no value like {value!r}")
    return struct.pack("<I", _CODES[name]) + struct.pack(SCALARS[_CODES[name]][1], value)
