"""The GGUF reader against the gguf package, and against files with one field wrong."""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest
from craft import gguf_file, pair, tensor, text

from barefoot.core.errors import CorruptFile, SourceNotFound, UnsupportedFormat
from barefoot.io.files import BinaryFile
from barefoot.io.gguf import GGUFArray, read_gguf, read_numbers, read_strings
from barefoot.io.types import FILE_TYPES


def test_type_sizes_are_those_of_the_gguf_package():
    ours = {t.gguf: (t.id, t.n_elements, t.n_bytes) for t in FILE_TYPES.values() if t.gguf is not None}
    theirs = {int(t): (t.name.lower(), *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType if int(t) in ours}
    assert ours == theirs
    assert {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "tq1_0", "tq2_0"} <= set(
        FILE_TYPES
    )


def test_header_equals_the_gguf_packages(small_gguf: Path):
    ours, theirs = read_gguf(small_gguf), gguf.GGUFReader(small_gguf)
    assert [(t.name, t.type, t.shape, t.offset, t.n_bytes) for t in ours.tensors] == [
        (t.name, t.tensor_type.name.lower(), tuple(int(n) for n in reversed(t.shape)), t.data_offset, t.n_bytes)
        for t in theirs.tensors
    ]
    for key, value in ours.metadata.items():
        expected = theirs.get_field(key).contents()
        if isinstance(value, GGUFArray):
            assert value.count == len(expected)
        else:
            assert value == expected
            assert type(value) is type(expected)
    assert set(ours.metadata) == {k for k in theirs.fields if not k.startswith("GGUF.")}


def test_arrays_are_read_on_demand(small_gguf: Path):
    header = read_gguf(small_gguf)
    with BinaryFile(small_gguf) as file:
        assert read_numbers(file, header.metadata["floats"]).tolist() == [0.5, 1.5, -2.0]
        blob, offsets = read_strings(file, header.metadata["strings"])
    words = [blob[a:b].tobytes().decode() for a, b in pairwise(offsets)]
    assert words == ["one", "", "drei▁", "x" * 300_000]
    assert header.metadata["strings"].text_bytes == len("".join(words).encode()) == blob.nbytes


U32, F32 = 4, 6
GOOD_TENSOR = tensor("a", (32, 2), 2, 0)  # Q4_0, two blocks: 36 bytes
DATA = bytes(64)


@pytest.mark.parametrize("version", [2, 3])
def test_crafted_file_reads(tmp_path: Path, version: int):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_file([pair("k", U32, struct.pack("<I", 7))], [GOOD_TENSOR], DATA, version=version))
    header = read_gguf(path)
    (info,) = header.tensors
    assert (header.version, header.metadata["k"], info.shape, info.n_bytes) == (version, 7, (2, 32), 36)
    assert info.offset % 32 == 0
    assert info.offset + 64 == path.stat().st_size


def nested(depth: int) -> bytes:
    return struct.pack("<IQ", 9, 1) * (depth - 1) + struct.pack("<IQI", U32, 1, 5)


CORRUPT = {
    "magic": gguf_file([], [], b"", magic=b"GGML"),
    "empty": b"",
    "truncated": gguf_file([], [GOOD_TENSOR], DATA)[:20],
    "key length": gguf_file([struct.pack("<Q", 1 << 60) + b"k"], [], DATA),
    "key not UTF-8": gguf_file([pair("k", U32, bytes(4)).replace(b"k", b"\xff")], [], DATA),
    "key twice": gguf_file([pair("k", U32, bytes(4))] * 2, [], DATA),
    "bool of 2": gguf_file([pair("k", 7, b"\2")], [], DATA),
    "array count": gguf_file([pair("k", 9, struct.pack("<IQ", F32, 1 << 62))], [], DATA),
    "string array count": gguf_file([pair("k", 9, struct.pack("<IQ", 8, 1 << 40))], [], DATA),
    "string in array": gguf_file([pair("k", 9, struct.pack("<IQQ", 8, 1, 1 << 63))], [], DATA),
    "nested count": gguf_file([pair("k", 9, struct.pack("<IQ", 9, 1 << 40))], [], DATA),
    "number of pairs": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 50) + bytes(64),
    "number of tensors": b"GGUF" + struct.pack("<IQQ", 3, 1 << 50, 0) + bytes(64),
    "alignment 0": gguf_file([pair("general.alignment", U32, bytes(4))], [], DATA),
    "alignment 48": gguf_file([pair("general.alignment", U32, struct.pack("<I", 48))], [], DATA),
    "alignment a text": gguf_file([pair("general.alignment", 8, text("32"))], [], DATA),
    "five axes": gguf_file([], [tensor("a", (32, 1, 1, 1, 1), 2, 0)], DATA),
    "axis 0": gguf_file([], [tensor("a", (32, 0), 2, 0)], DATA),
    "product overflows": gguf_file([], [tensor("a", (1 << 32, 1 << 32), 0, 0)], DATA),
    "part of a block": gguf_file([], [tensor("a", (33,), 2, 0)], DATA),
    "past the end": gguf_file([], [tensor("a", (32, 4), 2, 0)], DATA),
    "offset past the end": gguf_file([], [tensor("a", (32, 1), 2, 1 << 63)], DATA),
    "offset unaligned": gguf_file([], [tensor("a", (32, 1), 2, 8)], DATA),
    "overlap": gguf_file([], [GOOD_TENSOR, tensor("b", (32, 1), 2, 32)], DATA),
    "tensor twice": gguf_file([], [GOOD_TENSOR, tensor("a", (32, 1), 2, 64)], DATA + DATA),
}
UNSUPPORTED = {
    "version 1": gguf_file([], [], DATA, version=1),
    "version 4": gguf_file([], [], DATA, version=4),
    "big-endian": gguf_file([], [], DATA, version=3 << 24),
    "value type": gguf_file([pair("k", 99, bytes(4))], [], DATA),
    "array type": gguf_file([pair("k", 9, struct.pack("<IQ", 99, 1))], [], DATA),
    "tensor type": gguf_file([], [tensor("a", (32, 1), 16, 0)], DATA),
    "nesting": gguf_file([pair("k", 9, nested(5))], [], DATA),
}


@pytest.mark.parametrize("what", CORRUPT)
def test_corrupt(tmp_path: Path, what: str):
    path = tmp_path / "m.gguf"
    path.write_bytes(CORRUPT[what])
    with pytest.raises(CorruptFile):
        read_gguf(path)


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_unsupported_says_what_is_known(tmp_path: Path, what: str):
    path = tmp_path / "m.gguf"
    path.write_bytes(UNSUPPORTED[what])
    with pytest.raises(UnsupportedFormat) as caught:
        read_gguf(path)
    expected = {"tensor type": "q4_k", "value type": "string", "array type": "string", "big-endian": "little-endian"}
    assert expected.get(what, "4" if what == "nesting" else "2, 3") in str(caught.value)


def test_allowed_nesting_is_walked(tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_file([pair("k", 9, nested(4)), pair("after", U32, struct.pack("<I", 3))], [], DATA))
    header = read_gguf(path)
    assert header.metadata["after"] == 3
    assert header.metadata["k"].element == "array"


def test_missing_file(tmp_path: Path):
    with pytest.raises(SourceNotFound):
        read_gguf(tmp_path / "none.gguf")


def test_real_header(smollm2: Path):
    header, theirs = read_gguf(smollm2), gguf.GGUFReader(smollm2)
    assert {(t.name, t.type, t.offset, t.n_bytes) for t in header.tensors} == {
        (t.name, t.tensor_type.name.lower(), t.data_offset, t.n_bytes) for t in theirs.tensors
    }
    tokens = theirs.get_field("tokenizer.ggml.tokens").contents()
    with BinaryFile(smollm2) as file:
        blob, offsets = read_strings(file, header.metadata["tokenizer.ggml.tokens"])
    assert blob.tobytes() == "".join(tokens).encode()
    assert np.diff(offsets).tolist() == [len(t.encode()) for t in tokens]


def test_strings_of_every_length_across_the_windows_they_are_read_in(tmp_path: Path):
    """Lengths around one byte's range, and around a window's 65,536 bytes, short ones between them."""
    rng = np.random.default_rng(3)
    lengths = [
        *rng.integers(1, 40, 3000),
        0,
        1,
        255,
        256,
        257,
        1,
        65_527,
        65_528,
        65_529,
        2,
        65_536,
        0,
        *range(240, 270),
    ]
    words = ["".join(chr(97 + (n + i) % 26) for i in range(n)) for n in map(int, lengths)]
    writer = gguf.GGUFWriter(tmp_path / "words.gguf", "llama")
    writer.add_array("strings", words)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    header = read_gguf(tmp_path / "words.gguf")
    with BinaryFile(tmp_path / "words.gguf") as file:
        blob, offsets = read_strings(file, header.metadata["strings"])
    raw = blob.tobytes()
    assert [raw[a:b].decode() for a, b in pairwise(offsets.tolist())] == words
