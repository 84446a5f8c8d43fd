"""GGUF headers (versions 2 and 3, little-endian), read without trusting them.

Layout: magic, version, counts of tensors and metadata pairs; the pairs; per tensor name, axes (fastest first), type
and offset; padding to the alignment; the data. Each length is compared with what is left of the file before it is
used. Scalars and short texts are read at once; arrays stay in the file, as a :class:`GGUFArray` that says where: the
vocabulary of a small model is larger than its layers.

Memory while reading is bounded by twice the file's size plus 1 MiB: the counts are charged before they are walked, at
what one Python object for each costs.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from barefoot.core.errors import CorruptFile, UnsupportedFormat
from barefoot.core.units import round_up
from barefoot.io.files import HEADER_ALLOWANCE_BYTES, BinaryFile
from barefoot.io.types import FILE_TYPES, FileType, TensorInfo, refuse_overlap, stored_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_AXES = 4
MAX_NESTING = 4  # arrays of arrays; no known file nests at all
MAX_NAME_BYTES = 65535
PAIR_BYTES, TENSOR_BYTES = 512, 1024  # resident cost of one pair, of one tensor, with its dictionary entries

STRING, ARRAY = 8, 9
SCALARS: dict[int, tuple[str, str]] = {
    0: ("u8", "<B"),
    1: ("i8", "<b"),
    2: ("u16", "<H"),
    3: ("i16", "<h"),
    4: ("u32", "<I"),
    5: ("i32", "<i"),
    6: ("f32", "<f"),
    7: ("bool", "<B"),
    10: ("u64", "<Q"),
    11: ("i64", "<q"),
    12: ("f64", "<d"),
}
_BY_CODE: dict[int, FileType] = {t.gguf: t for t in FILE_TYPES.values() if t.gguf is not None}
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class GGUFArray:
    """An array left in the file: ``count`` elements of type ``element`` ("f32", "string", "array", …) in the
    ``n_bytes`` bytes from ``offset``. Elements of strings are an 8-byte length and that many bytes."""

    element: str
    count: int
    offset: int
    n_bytes: int

    @property
    def text_bytes(self) -> int:
        """Bytes of an array of strings without their lengths."""
        return self.n_bytes - 8 * self.count


@dataclass(frozen=True)
class GGUFFile:
    """What the header says. ``metadata`` values are int, float, bool, str or :class:`GGUFArray`."""

    path: Path
    n_bytes: int
    version: int
    alignment: int
    data_offset: int
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]


class _Reader:
    """A cursor over the file that charges memory before it is taken."""

    def __init__(self, file: BinaryFile) -> None:
        self.file = file
        self.position = 0
        self._start = 0
        self._window = bytearray()
        self._left = 2 * file.n_bytes + HEADER_ALLOWANCE_BYTES

    def charge(self, n_bytes: int, what: str) -> None:
        self._left -= n_bytes
        if self._left < 0:
            raise CorruptFile(
                f"{self.file.path.name}: {what} would take more than twice the file's {self.file.n_bytes} bytes"
            )

    def skip(self, n_bytes: int, what: str) -> None:
        if n_bytes > self.file.n_bytes - self.position:
            raise CorruptFile(
                f"{self.file.path.name}: {what} at byte {self.position} needs {n_bytes} bytes, "
                f"{self.file.n_bytes - self.position} are left"
            )
        self.position += n_bytes

    def bytes(self, n_bytes: int, what: str) -> bytearray:
        start = self.position
        self.skip(n_bytes, what)
        if start < self._start or self.position > self._start + len(self._window):
            if n_bytes > 4096:
                return self.file.read_at(start, n_bytes)
            self._start, self._window = start, self.file.window(start)
        return self._window[start - self._start : self.position - self._start]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.bytes(struct.calcsize(form), what))[0]

    def text(self, what: str, limit: int | None = None) -> str:
        n_bytes = self.number("<Q", f"length of {what}")
        if limit is not None and n_bytes > limit:
            raise CorruptFile(f"{self.file.path.name}: {what} has {n_bytes} bytes, at most {limit} are allowed")
        raw = self.bytes(n_bytes, what)
        self.charge((2 if raw.isascii() else 5) * n_bytes, what)  # the bytes and the text made of them
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptFile(f"{self.file.path.name}: {what} is not UTF-8 text: {error.reason}") from None

    def array(self, key: str, depth: int = 1) -> GGUFArray:
        what = f"array {key!r}"
        code = self.number("<I", f"element type of {what}")
        count = self.number("<Q", f"count of {what}")
        start = self.position
        if code in SCALARS:
            name, form = SCALARS[code]
            self.skip(count * struct.calcsize(form), what)
            return GGUFArray(name, count, start, self.position - start)
        if code not in (STRING, ARRAY):
            raise self.unknown_value_type(code, what)
        smallest = 8 if code == STRING else 12
        if count * smallest > self.file.n_bytes - start:
            raise CorruptFile(f"{self.file.path.name}: {what} of {count} elements does not fit into the file")
        if code == STRING:
            self._skip_strings(count, what)
            return GGUFArray("string", count, start, self.position - start)
        if depth == MAX_NESTING:
            raise UnsupportedFormat(f"{self.file.path.name}: {what} nests deeper than {MAX_NESTING} arrays")
        for _ in range(count):
            self.array(key, depth + 1)
        return GGUFArray("array", count, start, self.position - start)

    def _skip_strings(self, count: int, what: str) -> None:
        # The loop that decides how fast a header is read: 262,144 rounds for a large vocabulary.
        unpack = _U64.unpack_from
        while count:
            window = self.file.window(self.position)
            last, at = len(window) - 8, 0
            while count and at <= last:
                at += 8 + unpack(window, at)[0]
                count -= 1
            self.skip(at or 8, what)  # nothing read: fewer than 8 bytes are left, and skip says so

    def unknown_value_type(self, code: int, what: str) -> UnsupportedFormat:
        known = ", ".join(sorted(name for name, _ in SCALARS.values()))
        return UnsupportedFormat(f"{self.file.path.name}: {what} has value type {code}; known: {known}, string, array")


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Read the header of a GGUF file.

    Raises
    ------
    CorruptFile : a count, length, offset or name contradicts the file or itself.
    UnsupportedFormat : big-endian, an unknown version, value type or tensor type, or arrays nested too deep.
    SourceNotFound : the file can't be opened.
    """
    with BinaryFile(path) as file:
        return _read(_Reader(file))


def _read(reader: _Reader) -> GGUFFile:
    file = reader.file
    name = file.path.name
    magic = bytes(reader.bytes(4, "magic"))
    if magic != MAGIC:
        raise CorruptFile(f"{name}: not a GGUF file: starts with {magic!r}, expected {MAGIC!r}")
    version = reader.number("<I", "version")
    if version not in VERSIONS:
        if struct.unpack(">I", struct.pack("<I", version))[0] in VERSIONS:
            raise UnsupportedFormat(f"{name}: big-endian GGUF; only little-endian files are read")
        raise UnsupportedFormat(f"{name}: GGUF version {version}; known: {', '.join(map(str, VERSIONS))}")
    n_tensors = reader.number("<Q", "number of tensors")
    n_pairs = reader.number("<Q", "number of metadata pairs")
    reader.charge(n_tensors * TENSOR_BYTES, f"a header of {n_tensors} tensors")
    reader.charge(n_pairs * PAIR_BYTES, f"a header of {n_pairs} metadata pairs")

    metadata: dict[str, Any] = {}
    for _ in range(n_pairs):
        key = reader.text("metadata key", MAX_NAME_BYTES)
        if key in metadata:
            raise CorruptFile(f"{name}: metadata key {key!r} occurs twice")
        metadata[key] = _value(reader, key)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CorruptFile(f"{name}: alignment must be a power of two, got {alignment!r}")

    described = [_tensor(reader) for _ in range(n_tensors)]
    data_offset = round_up(reader.position, alignment)
    tensors: dict[str, TensorInfo] = {}
    for info in described:
        if info.name in tensors:
            raise CorruptFile(f"{name}: tensor {info.name!r} occurs twice")
        if info.offset % alignment:
            raise CorruptFile(f"{name}: tensor {info.name!r} is at {info.offset}, not a multiple of {alignment}")
        offset = data_offset + info.offset
        if offset + info.n_bytes > file.n_bytes:
            raise CorruptFile(
                f"{name}: tensor {info.name!r} ends at byte {offset + info.n_bytes}, the file at {file.n_bytes}"
            )
        tensors[info.name] = TensorInfo(info.name, info.type, info.shape, offset, info.n_bytes)
    placed = tuple(tensors.values())
    refuse_overlap(placed)
    return GGUFFile(file.path, file.n_bytes, version, alignment, data_offset, metadata, placed)


def _value(reader: _Reader, key: str) -> Any:
    what = f"metadata {key!r}"
    code = reader.number("<I", f"type of {what}")
    if code == STRING:
        return reader.text(what)
    if code == ARRAY:
        return reader.array(key)
    if code not in SCALARS:
        raise reader.unknown_value_type(code, what)
    name, form = SCALARS[code]
    value = reader.number(form, what)
    if name == "bool":
        if value > 1:
            raise CorruptFile(f"{reader.file.path.name}: {what} is a bool of value {value}")
        return bool(value)
    return value


def _tensor(reader: _Reader) -> TensorInfo:
    """One tensor's description; its offset is still relative to the data."""
    file_name = reader.file.path.name
    name = reader.text("tensor name", MAX_NAME_BYTES)
    n_axes = reader.number("<I", f"axes of tensor {name!r}")
    if n_axes > MAX_AXES:
        raise CorruptFile(f"{file_name}: tensor {name!r} has {n_axes} axes, at most {MAX_AXES} are allowed")
    axes = tuple(reader.number("<Q", f"shape of tensor {name!r}") for _ in range(n_axes))
    code = reader.number("<I", f"type of tensor {name!r}")
    offset = reader.number("<Q", f"offset of tensor {name!r}")
    if 0 in axes:
        raise CorruptFile(f"{file_name}: tensor {name!r} has an axis of length 0: {axes}")
    if code not in _BY_CODE:
        known = ", ".join(t.id for t in _BY_CODE.values())
        raise UnsupportedFormat(f"{file_name}: tensor {name!r} has type {code}; known: {known}")
    shape = tuple(reversed(axes))
    return TensorInfo(name, _BY_CODE[code].id, shape, offset, stored_bytes(_BY_CODE[code], shape, name))


def _short_strings(window: bytes, most: int) -> tuple[np.ndarray, int]:
    """Where strings begin, each with its length in 8 bytes, up to the first of 256 bytes or more; and where they end.

    Only the lowest byte of a length is looked at in the loop, which a vocabulary passes 100,000 times.
    """
    starts: list[int] = []
    at, last = 0, len(window) - 8
    while at <= last and len(starts) < most:
        starts.append(at)
        at += 8 + window[at]
    found = np.array(starts, np.int64)
    if starts and at > len(window):  # the last one goes on behind the window
        found, at = found[:-1], starts[-1]
    long = np.frombuffer(window, np.uint8)[found[:, None] + np.arange(1, 8)].any(axis=1)
    if long.any():
        first = int(long.argmax())
        found, at = found[:first], int(found[first])
    return found, at


def read_strings(file: BinaryFile, array: GGUFArray) -> tuple[np.ndarray, np.ndarray]:
    """An array of strings as bytes: ``(blob (text_bytes,) uint8, offsets (count + 1,) uint32)``.

    Raises
    ------
    UnsupportedFormat : not an array of strings, or 4 GiB of text and more.
    """
    if array.element != "string" or array.text_bytes >= 1 << 32:
        raise UnsupportedFormat(f"{file.path.name}: expected an array of strings below 4 GiB, got {array}")
    blob = np.empty(array.text_bytes, np.uint8)
    lengths = np.empty(array.count, np.uint32)
    position, i, filled = array.offset, 0, 0
    while i < array.count:
        window = bytes(file.window(position, 1 << 16))
        starts, at = _short_strings(window, array.count - i)
        if len(starts):
            data = np.frombuffer(window, np.uint8)
            is_text = np.ones(at, bool)
            is_text[(starts[:, None] + np.arange(8)).reshape(-1)] = False
            text, sizes = data[:at][is_text], data[starts]
        else:  # one string of 256 bytes or more
            (n,) = _U64.unpack_from(window, 0)
            text, sizes, at = np.frombuffer(file.read_at(position + 8, n), np.uint8), np.array([n]), 8 + n
        blob[filled : filled + len(text)] = text
        lengths[i : i + len(sizes)] = sizes
        filled, i, position = filled + len(text), i + len(sizes), position + at
    offsets = np.zeros(array.count + 1, np.uint32)
    np.cumsum(lengths, out=offsets[1:])
    return blob, offsets


def read_numbers(file: BinaryFile, array: GGUFArray) -> np.ndarray:
    """An array of numbers as a numpy array of its own type, ``(count,)``."""
    forms = dict(SCALARS.values())
    if array.element not in forms:
        raise UnsupportedFormat(f"{file.path.name}: expected an array of numbers, got {array}")
    return np.frombuffer(file.read_at(array.offset, array.n_bytes), np.dtype(forms[array.element]))
