"""GGUF files written by barefoot, read by the gguf package."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from barefoot.core.errors import CorruptFile, InvalidInput
from barefoot.io.files import BinaryFile
from barefoot.io.gguf import read_gguf
from barefoot.io.gguf_writer import ALIGNMENT, Texts, read_value, write_gguf

METADATA = {
    "general.architecture": "llama",
    "small": 7,
    "negative": -7,
    "large": 1 << 40,
    "half": 0.5,
    "yes": True,
    "text": "grüße ▁",
    "texts": Texts.of(["one", "", "drei▁", "x" * 70_000]),
    "floats": np.array([0.5, -1.5], np.float32),
    "counts": np.array([3, 4, 5], np.int32),
    "flags": np.array([True, False, True]),
}


def entries(rng):
    q8 = gguf.quants.quantize(rng.standard_normal((3, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    floats = rng.standard_normal((6, 5)).astype(np.float32)
    return [
        ("a", "f32", (6, 5), (row.data for row in floats)),
        ("b", "q8_0", (3, 64), [q8[:1].tobytes(), q8[1:].tobytes()]),
        ("c", "f16", (7,), [np.arange(7, dtype=np.float16)]),
    ], {"a": floats, "b": q8, "c": np.arange(7, dtype=np.float16)}


def test_the_gguf_package_reads_what_was_written(tmp_path: Path):
    path = tmp_path / "made.gguf"
    written, expected = entries(np.random.default_rng(1))
    write_gguf(path, METADATA, written)
    reader = gguf.GGUFReader(path)
    assert {t.name: t.tensor_type.name for t in reader.tensors} == {"a": "F32", "b": "Q8_0", "c": "F16"}
    for tensor in reader.tensors:
        assert np.array_equal(tensor.data, expected[tensor.name])
    types = {key: reader.fields[key].types[0].name for key in METADATA}
    assert types["small"] == "UINT32"
    assert types["negative"] == "INT32"
    assert types["large"] == "UINT64"
    assert types["half"] == "FLOAT32"
    assert types["yes"] == "BOOL"
    assert reader.fields["texts"].contents() == ["one", "", "drei▁", "x" * 70_000]
    assert reader.fields["flags"].contents() == [True, False, True]
    assert reader.fields["counts"].contents() == [3, 4, 5]
    assert reader.fields["text"].contents() == "grüße ▁"
    assert path.stat().st_size == read_gguf(path).data_offset + sum(
        -(-n // ALIGNMENT) * ALIGNMENT for n in (120, 204, 14)
    )


def test_metadata_survives_being_read_and_written_again(tmp_path: Path):
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    write_gguf(first, METADATA, [])
    with BinaryFile(first) as file:
        write_gguf(second, {k: read_value(file, v) for k, v in read_gguf(first).metadata.items() if k != "flags"}, [])
    write_gguf(first, {k: v for k, v in METADATA.items() if k != "flags"}, [])
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("entry", "error", "says"),
    [
        (("a", "int4_g64_sym", (1, 64), []), InvalidInput, "int4_g64_sym"),
        (("a", "q4_0", (1, 33), []), CorruptFile, "33"),
        (("a", "f32", (2, 2), [bytes(12)]), InvalidInput, "12 bytes were given, its shape takes 16"),
    ],
)
def test_what_gguf_can_not_hold_leaves_no_file(tmp_path: Path, entry, error, says):
    path = tmp_path / "made.gguf"
    with pytest.raises(error, match=says):
        write_gguf(path, {}, [entry])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path):
    path = tmp_path / "made.gguf"
    write_gguf(path, {"n": 1}, [])
    before = path.read_bytes()

    def broken():
        yield bytes(8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(path, {"n": 2}, [("a", "f32", (4,), broken())])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_values_that_gguf_does_not_have(tmp_path: Path):
    for value in (float("nan"), None, np.zeros((2, 2), np.float32), np.zeros(2, np.complex64)):
        with pytest.raises(InvalidInput, match="'key'"):
            write_gguf(tmp_path / "x.gguf", {"key": value}, [])
    with pytest.raises(InvalidInput, match="twice"):
        write_gguf(tmp_path / "x.gguf", {}, [("a", "f32", (1,), [bytes(4)])] * 2)
