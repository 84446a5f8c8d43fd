"""The safetensors reader and writer against the safetensors package, and against files with one field wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from craft import safetensors_file

from barefoot.core.errors import CorruptFile, InvalidInput, SourceNotFound, UnsupportedFormat
from barefoot.io.inventory import Checkpoint
from barefoot.io.safetensors import array_entry, read_safetensors, write_safetensors

ARRAYS = {
    "w": np.arange(12, dtype=np.float32).reshape(3, 4),
    "h": np.array([1.5, -2.0], np.float16),
    "ids": np.array([[1], [-5]], np.int64),
    "scalar": np.array(7, np.uint8),
    "none": np.zeros((0, 3), np.float32),
    "yes": np.array([True, False]),
}


def test_reads_what_the_package_writes(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file(ARRAYS, path, metadata={"format": "np"})
    header = read_safetensors(path)
    raw = path.read_bytes()
    assert header.metadata == {"format": "np"}
    assert {t.name for t in header.tensors} == set(ARRAYS)
    for info in header.tensors:
        assert info.shape == ARRAYS[info.name].shape
        assert raw[info.offset : info.offset + info.n_bytes] == ARRAYS[info.name].tobytes()


def test_the_package_reads_what_we_write(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, [array_entry(name, array) for name, array in ARRAYS.items()], {"by": "barefoot ▁"})
    back = safetensors.numpy.load_file(path)
    assert set(back) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert back[name].dtype == array.dtype
        assert np.array_equal(back[name], array)
    assert read_safetensors(path).metadata == {"by": "barefoot ▁"}


def test_chunks_are_streamed_and_counted(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, [("b", "bf16", (2, 3), (bytes([i] * 4) for i in range(3)))])
    (info,) = read_safetensors(path).tensors
    assert (info.type, info.shape) == ("bf16", (2, 3))
    assert path.read_bytes()[info.offset :] == bytes([0] * 4 + [1] * 4 + [2] * 4)
    with pytest.raises(InvalidInput, match="8 bytes were given, its shape takes 12"):
        write_safetensors(path, [("b", "bf16", (2, 3), [bytes(8)])])
    assert path.read_bytes()[info.offset :][:4] == bytes(4), "a failed write leaves the old file"
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(("type_id", "names"), [("q4_0", ["a"]), ("f32", ["a", "a"])])
def test_writer_refuses(tmp_path: Path, type_id: str, names: list[str]):
    with pytest.raises(InvalidInput):
        write_safetensors(tmp_path / "m", [(name, type_id, (1,), [bytes(4)]) for name in names])
    assert not list(tmp_path.iterdir())


def entry(dtype: object = "F32", shape: object = (2,), begin: object = 0, end: object = 8, **more: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


DATA = bytes(8)
CORRUPT = {
    "empty": b"",
    "short": bytes(7),
    "header length": (1 << 62).to_bytes(8, "little") + b"{}",
    "not JSON": safetensors_file(b"{", DATA),
    "not UTF-8": safetensors_file(b'{"\xff": 1}', DATA),
    "a list": safetensors_file([], b""),
    "deep": safetensors_file(b"[" * 100_000, DATA),
    "NaN": safetensors_file(b'{"a": NaN}', DATA),
    "huge number": safetensors_file(b'{"a": ' + b"9" * 5000 + b"}", DATA),
    "key twice": safetensors_file(b'{"__metadata__": {"a": "1", "a": "2"}}', b""),
    "metadata": safetensors_file({"__metadata__": {"a": 1}}, b""),
    "tensor a text": safetensors_file({"a": "F32"}, DATA),
    "dtype a number": safetensors_file({"a": entry(dtype=3)}, DATA),
    "unknown member": safetensors_file({"a": entry(extra=1)}, DATA),
    "shape negative": safetensors_file({"a": entry(shape=[-2])}, DATA),
    "shape a bool": safetensors_file({"a": entry(shape=[True, 2])}, DATA),
    "shape overflows": safetensors_file({"a": entry(shape=[1 << 62, 1 << 62])}, DATA),
    "extent too short": safetensors_file({"a": entry(end=4)}, DATA),
    "extent backwards": safetensors_file({"a": entry(begin=8, end=0)}, DATA),
    "extent past the end": safetensors_file({"a": entry(begin=8, end=16)}, DATA),
    "extent of three": safetensors_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, DATA),
    "overlap": safetensors_file({"a": entry(), "b": entry()}, DATA),
    "gap": safetensors_file({"a": entry(begin=4, end=12)}, bytes(12)),
    "data left over": safetensors_file({"a": entry()}, bytes(9)),
}


@pytest.mark.parametrize("what", CORRUPT)
def test_corrupt(tmp_path: Path, what: str):
    path = tmp_path / "m.safetensors"
    path.write_bytes(CORRUPT[what])
    with pytest.raises(CorruptFile):
        read_safetensors(path)


def test_unknown_dtype_names_the_known(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_file({"a": entry(dtype="F4")}, DATA))
    with pytest.raises(UnsupportedFormat, match="BF16"):
        read_safetensors(path)


def folder_with_shards(folder: Path, index: dict[str, str]) -> Path:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    safetensors.numpy.save_file({"a": ARRAYS["w"]}, folder / "x-1.safetensors")
    safetensors.numpy.save_file({"b": ARRAYS["h"]}, folder / "x-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def test_shards(tmp_path: Path):
    folder = folder_with_shards(tmp_path, {"a": "x-1.safetensors", "b": "x-2.safetensors"})
    with Checkpoint(folder) as model:
        out = np.empty(model.tensors["b"].n_bytes, np.uint8)
        model.read_into("b", out)
        assert np.array_equal(out.view(np.float16), ARRAYS["h"])
        assert model.config == {"model_type": "llama"}
        assert model.file_bytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("index", "error"),
    [
        ({"a": "../x-1.safetensors"}, CorruptFile),
        ({"a": "/etc/x.safetensors"}, CorruptFile),
        ({"a": "x-1.bin"}, CorruptFile),
        ({"a": "x-3.safetensors"}, SourceNotFound),
        ({"a": "x-2.safetensors"}, CorruptFile),
        ({"a": "x-1.safetensors", "c": "x-1.safetensors"}, CorruptFile),
    ],
)
def test_wrong_index(tmp_path: Path, index: dict[str, str], error: type[Exception]):
    with pytest.raises(error):
        Checkpoint(folder_with_shards(tmp_path, index))
