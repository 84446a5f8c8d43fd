"""One view over both containers, and reads of rows."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy
from craft import gguf_file, pair

from barefoot.core.errors import InvalidInput, SourceNotFound, UnsupportedFormat
from barefoot.io.inventory import Checkpoint


def test_rows_of_a_gguf_tensor(small_gguf: Path):
    expected = {t.name: t.data.reshape(-1).view(np.uint8) for t in gguf.GGUFReader(small_gguf).tensors}
    with Checkpoint(small_gguf) as model:
        assert (model.kind, model.paths) == ("gguf", (small_gguf,))
        assert model.config["general.architecture"] == "llama"
        for name, info in model.tensors.items():
            out = np.empty(info.n_bytes, np.uint8)
            model.read_into(name, out)
            assert np.array_equal(out, expected[name])
        info = model.tensors["c.weight"]
        assert (info.n_rows, info.row_bytes) == (3, 68)
        rows = np.empty(2 * 68, np.uint8)
        model.read_into("c.weight", rows, 1, 2)
        assert np.array_equal(rows, expected["c.weight"][68:])


def test_reads_are_checked(small_gguf: Path):
    with Checkpoint(small_gguf) as model:
        row = np.empty(68, np.uint8)
        with pytest.raises(InvalidInput, match="3 rows"):
            model.read_into("c.weight", row, 3, 1)
        with pytest.raises(InvalidInput, match="expected 136"):
            model.read_into("c.weight", row, 1, 2)
        with pytest.raises(InvalidInput, match=r"did you mean|known"):
            model.read_into("c.weigth", row)


def test_folder_of_one_file(tmp_path: Path):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    safetensors.numpy.save_file({"w": array}, tmp_path / "model.safetensors")
    with pytest.raises(SourceNotFound, match=r"config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    with Checkpoint(tmp_path / "model.safetensors") as model:
        assert model.path == tmp_path
        assert (model.tensors["w"].n_rows, model.tensors["w"].row_bytes) == (6, 16)
        rows = np.empty(3 * 16, np.uint8)
        model.read_into("w", rows, 2, 3)
        assert np.array_equal(rows.view(np.float32).reshape(3, 4), array.reshape(6, 4)[2:5])


def test_folders_that_do_not_say_which(tmp_path: Path, small_gguf: Path):
    with pytest.raises(SourceNotFound):
        Checkpoint(tmp_path / "nothing")
    with pytest.raises(SourceNotFound, match="neither"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UnsupportedFormat) as caught:
        Checkpoint(tmp_path)
    assert "safetensors" in (caught.value.cure or "")
    (tmp_path / "one.gguf").write_bytes(small_gguf.read_bytes())
    with Checkpoint(tmp_path) as model:
        assert model.path.name == "one.gguf"
    (tmp_path / "two.gguf").write_bytes(b"")
    with pytest.raises(InvalidInput, match=r"one\.gguf, two\.gguf"):
        Checkpoint(tmp_path)


def test_parts_of_a_split_model_are_refused(tmp_path: Path):
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(gguf_file([pair("split.count", 2, b"\2\0")], [], b""))
    with pytest.raises(UnsupportedFormat) as caught:
        Checkpoint(path)
    assert "merge" in (caught.value.cure or "")
