"""Snapshots: a sequence's keys and values in a file, to go on from in another process.

The file is one of safetensors. Its metadata says, as JSON under ``barefoot.kv``, what it was taken of
(:func:`identity`), how many ``tokens`` there are, how many the sequence had at most (``highest``), and how much of a
``cache`` whose layers a policy rules. Tensors are what is there, none of what was only planned: ``rows.LAYER.keys`` and
``rows.LAYER.values``, uint8 (n_kv_heads, positions, row bytes), and ``cache.`` with the arrays of
:meth:`barefoot.kv.storage.Storage.held`. A file is checked against the engine before anything of it is taken, and
against its counters before a byte is read; contents that lie leave an empty sequence and an error, no harm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from barefoot.core import untrusted
from barefoot.core.errors import CorruptFile, Incompatible, InvalidInput
from barefoot.core.model import ModelSpec
from barefoot.engine.config import EngineConfig
from barefoot.engine.kv_memory import KVMemory
from barefoot.engine.sequences import Sequences
from barefoot.io.files import BinaryFile
from barefoot.io.safetensors import SafetensorsFile, read_safetensors, write_safetensors
from barefoot.io.strict_json import parse_object
from barefoot.kv.cache import Cache

KEY = "barefoot.kv"
VERSION = 2
MOST_TOKENS = 1 << 31  # that positions of 4 bytes can number
_TYPES = {"uint8": "u8", "uint16": "u16", "int32": "i32", "float32": "f32", "float16": "f16"}

Array = npt.NDArray[Any]


def identity(
    spec: ModelSpec, config: EngineConfig, vectors: Mapping[str, Array], factors: Mapping[str, Array]
) -> dict[str, Any]:
    """What sequences of two engines have in common: store, chunk, the model's shapes, and its norms by their digest, as
    the ``factors`` of an adapter."""
    shapes = [spec.n_layers, spec.n_kv_heads, spec.head_dim, spec.d_model, spec.vocab_size]
    return {
        "version": VERSION,
        "kv": str(config.kv),
        "chunk": config.chunk,  # by which rings of window layers are sized
        "model": spec.arch,
        "shapes": shapes,
        "norms": _digest(vectors),
        **({"adapter": _digest(factors)} if factors else {}),
    }


def _digest(arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


class Snapshot(NamedTuple):
    """A file that was read as far as its header."""

    file: SafetensorsFile
    header: dict[str, Any]
    n_tokens: int


class Snapshots:
    """Saves and loads the sequences of an engine, whose parts these are; ``caches`` is empty where no policy rules."""

    def __init__(
        self, same: Mapping[str, Any], context: int, sequences: Sequences, kv: KVMemory, caches: Sequence[Cache]
    ) -> None:
        self._same, self._context = dict(same), context
        self._sequences, self._kv, self._caches = sequences, kv, caches

    def save(self, path: Path, sequence: int) -> None:
        n_tokens = self._sequences.length(sequence)
        if not n_tokens:
            raise InvalidInput(f"sequence {sequence} has no tokens to save")
        header: dict[str, Any] = {
            "identity": self._same,
            "tokens": n_tokens,
            "highest": self._sequences.highest(sequence),
        }
        if self._caches:
            header["cache"] = self._caches[sequence].header()
        entries = [(name, _TYPES[a.dtype.name], a.shape, _pieces(a)) for name, a in self._held(sequence).items()]
        write_safetensors(path, entries, {KEY: json.dumps(header)})

    def open(self, path: Path) -> Snapshot:
        """The file, if it can be loaded; errors as of :meth:`barefoot.engine.runner.Engine.load`."""
        file = read_safetensors(path)
        header = self._header(file)
        n_tokens = untrusted.count(header, "tokens", MOST_TOKENS)
        if n_tokens > self._context:
            raise InvalidInput(
                f"{path.name} holds {n_tokens} tokens, more than the context of {self._context}",
                cure=f"use a context of {n_tokens} or more",
            )
        return Snapshot(file, header, n_tokens)

    def load(self, found: Snapshot, sequence: int) -> None:
        """Fill the sequence, which is empty and has memory for what the file holds."""
        header, n_tokens = found.header, found.n_tokens
        if self._caches:
            cache = header.get("cache")
            self._caches[sequence].restore(cache if isinstance(cache, dict) else {})
            if self._caches[sequence].n_tokens != n_tokens:
                raise CorruptFile(f"{found.file.path.name}: {n_tokens} tokens, but its cache is of others")
        highest = untrusted.count(header, "highest", MOST_TOKENS)
        self._sequences.restore(sequence, n_tokens, max(n_tokens, highest))
        _read(found.file, self._held(sequence))
        if self._caches:
            self._caches[sequence].check()

    def _held(self, sequence: int) -> dict[str, Array]:
        """What there is of a sequence, by name: views that can be written."""
        found: dict[str, Array] = {}
        highest = self._sequences.highest(sequence)
        for layer, pair in self._kv.arrays.items():
            for name, array in zip(("keys", "values"), pair, strict=True):
                found[f"rows.{layer}.{name}"] = array[sequence, :, : min(highest, array.shape[2])]
        if self._caches:
            found |= {f"cache.{name}": array for name, array in self._caches[sequence].held().items()}
        return found

    def _header(self, file: SafetensorsFile) -> dict[str, Any]:
        """What the file says of itself, if it was taken of the same model and store."""
        name, text = file.path.name, file.metadata.get(KEY)
        if text is None:
            raise CorruptFile(f"{name} is no snapshot of keys and values")
        header = parse_object(text.encode(), f"{name}: {KEY}")
        taken_of = header.get("identity")
        if taken_of != self._same:
            names = taken_of if isinstance(taken_of, dict) else {}
            differs = [
                each for each in dict.fromkeys((*self._same, "adapter")) if names.get(each) != self._same.get(each)
            ]
            raise Incompatible(
                f"{name} was taken of another {' and '.join(differs)}",
                cure="load it with the model, the adapter, the --kv and the chunk that it was saved with",
            )
        return header


def _read(file: SafetensorsFile, arrays: Mapping[str, Array]) -> None:
    """Fill ``arrays`` from the file's tensors of the same names, which must be these and no others."""
    name, found = file.path.name, {tensor.name: tensor for tensor in file.tensors}
    if set(found) != set(arrays):
        odd = sorted(set(found) ^ set(arrays))
        raise CorruptFile(f"{name} has other tensors than its counters say: {', '.join(odd[:3])}")
    with BinaryFile(file.path) as source:
        for key, array in arrays.items():
            tensor, type_id = found[key], _TYPES[array.dtype.name]
            if (tensor.type, tensor.shape) != (type_id, array.shape):
                raise CorruptFile(
                    f"{name}: {key} is {tensor.type} {list(tensor.shape)}, must be {type_id} {list(array.shape)}"
                )
            offset = tensor.offset
            for piece in _pieces(array):
                source.read_into(offset, piece)
                offset += piece.nbytes


def _pieces(array: Array) -> Iterator[memoryview]:
    """The bytes of an array in order, in parts that are contiguous: none is copied."""
    if array.flags.c_contiguous:
        if array.size:
            yield array.reshape(-1).view(np.uint8).data
        return
    for part in array:
        yield from _pieces(part)
