"""One view of a model's weights, whatever the container: names, shapes, types, and bounded reads of their rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import CorruptFile, InvalidInput, SourceNotFound, UnsupportedFormat, unknown_name
from barefoot.io.files import BinaryFile
from barefoot.io.gguf import read_gguf
from barefoot.io.packed import interpret
from barefoot.io.quantized import PackedLinear, linears
from barefoot.io.safetensors import INDEX_NAME, read_index, read_safetensors
from barefoot.io.strict_json import read_object
from barefoot.io.types import TensorInfo


class Checkpoint:
    """A GGUF file, or a Hugging Face folder of config.json and safetensors, opened for reading.

    Attributes
    ----------
    kind : the container.
    path : the GGUF file, or the folder.
    paths : the files that hold weights; ``TensorInfo.shard`` indexes them.
    config : GGUF metadata (arrays as :class:`~barefoot.io.gguf.GGUFArray`), or config.json as it is.
    tensors : by the name that the file gives them.
    linears : the matrices that another program quantized into several tensors each, by the dense weight's name.
    file_bytes : bytes of all files that hold weights.

    Only headers are read at opening. Reads are safe from several threads.
    """

    kind: Literal["gguf", "safetensors"]
    path: Path
    paths: tuple[Path, ...]
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    linears: Mapping[str, PackedLinear]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.is_dir() and not _has_safetensors(self.path):
            self.path = _only_gguf(self.path)
        if self.path.is_dir():
            self._open_folder()
        elif self.path.suffix == ".safetensors" and (self.path.parent / "config.json").is_file():
            self.path = self.path.parent
            self._open_folder()
        elif self.path.is_file():
            self._open_gguf()
        else:
            raise SourceNotFound(f"no file or folder {self.path}")
        self._files = [BinaryFile(p) for p in self.paths]
        self.file_bytes = sum(file.n_bytes for file in self._files)
        try:
            self.linears = linears(self.config, self.tensors, self._read) if self.kind == "safetensors" else {}
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _open_gguf(self) -> None:
        header = read_gguf(self.path)
        if header.metadata.get("split.count", 1) != 1:
            raise UnsupportedFormat(
                f"{self.path.name} is one part of {header.metadata['split.count']}",
                cure="join the parts with: llama-gguf-split --merge FIRST_PART OUTPUT",
            )
        self.kind, self.paths, self.config = "gguf", (self.path,), header.metadata
        self.tensors = {t.name: t for t in header.tensors}

    def _open_folder(self) -> None:
        folder = self.path
        if not (folder / "config.json").is_file():
            raise SourceNotFound(f"{folder} has no config.json")
        self.kind, self.config = "safetensors", read_object(folder / "config.json")
        if (folder / INDEX_NAME).is_file():
            index = read_index(folder)
            self.paths = tuple(folder / name for name in sorted(set(index.values())))
        else:
            index = None
            self.paths = tuple(sorted(folder.glob("*.safetensors")))
            if (folder / "model.safetensors") in self.paths:
                self.paths = (folder / "model.safetensors",)
            if len(self.paths) != 1:
                raise InvalidInput(f"{folder} has {len(self.paths)} safetensors files and no {INDEX_NAME}")
        tensors: dict[str, TensorInfo] = {}
        for shard, path in enumerate(self.paths):
            file = read_safetensors(path, shard=shard)
            for tensor in interpret(path.name, file.metadata, file.tensors):
                if index is not None and index.get(tensor.name) != path.name:
                    raise CorruptFile(f"{path.name} holds {tensor.name!r}, which {INDEX_NAME} places elsewhere")
                tensors[tensor.name] = tensor
        if index is not None and len(tensors) != len(index):
            missing = sorted(set(index) - set(tensors))
            raise CorruptFile(f"{INDEX_NAME} names tensors that no file holds: {', '.join(missing[:3])}")
        self.tensors = tensors

    def tensor(self, name: str) -> TensorInfo:
        """The tensor of that name, or InvalidInput with the nearest ones."""
        if name not in self.tensors:
            raise unknown_name("tensor", name, self.tensors)
        return self.tensors[name]

    def _read(self, tensor: TensorInfo) -> npt.NDArray[np.uint8]:
        raw = np.empty(tensor.n_bytes, np.uint8)
        self.read_into(tensor.name, raw)
        return raw

    def read_into(self, name: str, out: np.ndarray, row_start: int = 0, n_rows: int | None = None) -> None:
        """Read rows of a tensor, as stored, into ``out``: contiguous uint8 of ``n_rows * row_bytes`` bytes.

        Rows run along all axes but the last; ``n_rows`` None means all from ``row_start``. Nothing is allocated.
        """
        info = self.tensor(name)
        n_rows = info.n_rows - row_start if n_rows is None else n_rows
        if row_start < 0 or n_rows < 0 or row_start + n_rows > info.n_rows:
            raise InvalidInput(f"rows {row_start} to {row_start + n_rows} of tensor {name!r} with {info.n_rows} rows")
        n_bytes = n_rows * info.row_bytes
        if out.dtype != np.uint8 or not out.flags.c_contiguous or out.nbytes != n_bytes:
            raise InvalidInput(
                f"tensor {name!r}: expected {n_bytes} contiguous uint8, got {out.nbytes} bytes of {out.dtype}"
            )
        self._files[info.shard].read_into(info.offset + row_start * info.row_bytes, out.reshape(-1).data)


def _has_safetensors(folder: Path) -> bool:
    return (folder / INDEX_NAME).is_file() or next(folder.glob("*.safetensors"), None) is not None


def _only_gguf(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        raise InvalidInput(f"{folder} has {len(found)} GGUF files: {names}", cure="name one of them")
    if next(folder.glob("*.bin"), None) or next(folder.glob("*.pt*"), None):
        raise UnsupportedFormat(
            f"{folder} holds pickled weights only; safetensors and GGUF are read",
            cure="convert the model to safetensors: a pickle can run code when it is opened",
        )
    raise SourceNotFound(f"{folder} has neither safetensors nor GGUF files")
