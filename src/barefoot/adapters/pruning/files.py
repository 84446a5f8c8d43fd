"""The units of a pruned copy as a file, beside the adapter that was trained on it and the state of the training.

``pruned.safetensors`` holds for each pruned layer, int32 and ascending, ``layers.I.groups`` (heads of keys that are
left) and ``layers.I.channels``; its metadata, under ``barefoot.pruning``, is JSON: the version of this format, the
pruning as a spec string, and what tells the model that was cut from another::

    {"version": 1, "pruning": "taylor(ratio=0.5)", "model": "…"}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from barefoot.adapters.pruning import I32, Kept, Pruning, Scores, Sizes, sizes_of, stored
from barefoot.core.errors import BarefootError, CorruptFile, Incompatible, SourceNotFound, UnsupportedFormat
from barefoot.core.model import ModelSpec, WeightSpec
from barefoot.core.registry import techniques
from barefoot.core.spec import parse_composition
from barefoot.io.files import BinaryFile
from barefoot.io.safetensors import array_entry, read_safetensors, write_safetensors
from barefoot.io.strict_json import parse_object
from barefoot.io.types import TensorInfo

KEY = "barefoot.pruning"
NAME = "pruned.safetensors"
VERSION = 1
MOST_CHARACTERS = 1000  # of a spec string


@dataclass(frozen=True)
class Given(Pruning):
    """Units that a file has, chosen by ``pruning``."""

    pruning: Pruning = field(kw_only=True)
    units: Mapping[int, Kept] = field(kw_only=True, repr=False, compare=False)

    def __str__(self) -> str:
        return str(self.pruning)

    def kept(self, spec: ModelSpec, sizes: Sizes, seed: int, scores: Callable[[], Scores]) -> dict[int, Kept]:
        return dict(self.units)

    def sizes(self, spec: ModelSpec, layout: Callable[[WeightSpec], str] = stored) -> dict[int, tuple[int, int]]:
        return sizes_of(self.units)


def write_units(folder: Path, pruning: Pruning, units: Mapping[int, Kept], model: str) -> None:
    """Write the units of a copy of ``model``; the file appears whole or not at all."""
    arrays: dict[str, I32] = {}
    for layer, kept in units.items():
        arrays |= {f"layers.{layer}.groups": kept.groups, f"layers.{layer}.channels": kept.channels}
    facts = {"version": VERSION, "pruning": str(pruning), "model": model}
    entries = [array_entry(name, array) for name, array in arrays.items()]
    write_safetensors(folder / NAME, entries, {KEY: json.dumps(facts)})


def read_units(folder: Path, spec: ModelSpec, model: str) -> Given:
    """The units that ``write_units`` wrote.

    Raises
    ------
    SourceNotFound : there are none.
    Incompatible : they are of another model.
    UnsupportedFormat : a version that is not known.
    CorruptFile : no units, or not those of the layers that the pruning cuts; numbers that are none of the model's, or
        not ascending.
    """
    path = folder / NAME
    if not path.is_file():
        raise SourceNotFound(f"{folder} holds no units of a pruned copy: it lacks {NAME}")
    file = read_safetensors(path)
    facts = parse_object(file.metadata.get(KEY, "").encode(), f"{NAME}: {KEY}")
    if facts.get("version") != VERSION:
        raise UnsupportedFormat(f"{NAME}: version {facts.get('version')!r}; {VERSION} is read")
    if facts.get("model") != model:
        raise Incompatible(f"{path} is of another model than {spec.name}", cure="use the model that was pruned")
    pruning, found = _pruning(facts.get("pruning")), {tensor.name: tensor for tensor in file.tensors}
    most = {"groups": spec.n_kv_heads, "channels": spec.d_ff}
    expected = {f"layers.{layer}.{kind}" for layer in pruning.layers(spec) for kind in most}
    if found.keys() != expected:
        odd = sorted(found.keys() ^ expected)[0]
        raise CorruptFile(f"{NAME} {'lacks' if odd in expected else 'has besides'} {odd!r}")
    with BinaryFile(path) as data:
        units = {
            layer: Kept(*(_numbers(data, found[f"layers.{layer}.{kind}"], most[kind]) for kind in most))
            for layer in pruning.layers(spec)
        }
    return Given(pruning.ratio, pruning.first, pruning.last, pruning=pruning, units=units)


def _numbers(data: BinaryFile, tensor: TensorInfo, most: int) -> I32:
    if tensor.type != "i32" or len(tensor.shape) != 1 or not 0 < tensor.shape[0] <= most:
        raise CorruptFile(f"{NAME}: {tensor.name!r} is {tensor.type} {tensor.shape}; i32 (1 to {most},) is expected")
    found = np.empty(tensor.shape, np.int32)
    data.read_into(tensor.offset, found.view(np.uint8).data)
    if found.min() < 0 or found.max() >= most or (np.diff(found) <= 0).any():
        raise CorruptFile(f"{NAME}: {tensor.name!r} must hold ascending numbers below {most}")
    return found


def _pruning(text: object) -> Pruning:
    if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
        raise CorruptFile(f"{NAME} names no pruning")
    try:
        (found,) = parse_composition(text, techniques("adapters.pruning"), "adapters.pruning")
    except (BarefootError, ValueError) as error:
        raise CorruptFile(f"{NAME}: {text!r} is no pruning: {error}") from error
    assert isinstance(found, Pruning)
    return found
