"""A folder for adapters that PEFT has no format for: what it is as JSON, and its arrays as safetensors.

``barefoot_adapter.json`` holds the version of this format, the adapter as a spec string, the model that it was trained
on, and that one's shape::

    {"version": 1, "adapter": "qst(r=8)", "base": "smollm2", "model": {"arch": …, "d_model": …, "n_layers": …}}

``barefoot_adapter.safetensors`` holds each of the adapter's factors, float32 (rows, cols), by its name. Both take their
names only when they are whole, and the JSON is away while the arrays change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from barefoot.adapters import Adapter
from barefoot.core.errors import (
    BarefootError,
    CorruptFile,
    Incompatible,
    InvalidInput,
    SourceNotFound,
    UnsupportedFormat,
)
from barefoot.core.model import ModelSpec
from barefoot.core.registry import techniques
from barefoot.core.spec import parse_composition
from barefoot.io.files import BinaryFile, atomic_writer
from barefoot.io.safetensors import array_entry, read_safetensors, write_safetensors
from barefoot.io.strict_json import read_object

F32 = npt.NDArray[np.float32]
CONFIG, TENSORS = "barefoot_adapter.json", "barefoot_adapter.safetensors"
VERSION = 1
MOST_CHARACTERS = 1000  # of a spec string


def _shape(spec: ModelSpec) -> dict[str, str | int]:
    return {"arch": spec.arch, "d_model": spec.d_model, "n_layers": spec.n_layers}


def write_arrays(
    folder: str | Path, adapter: Adapter, spec: ModelSpec, arrays: Mapping[str, F32], *, base: str | None = None
) -> None:
    """Write an adapter's arrays, by the names of its factors; where others are, they are replaced.

    Raises
    ------
    InvalidInput : arrays that are not the adapter's, or not finite.
    """
    path = Path(folder)
    expected = {f.name: (f.rows, f.cols) for f in adapter.factors(spec)}
    if {name: array.shape for name, array in arrays.items()} != expected:
        raise InvalidInput(f"the arrays are not those of {adapter} for {spec.name}")
    odd = next((name for name, array in arrays.items() if not np.isfinite(array).all()), None)
    if odd is not None:
        raise InvalidInput(f"{odd} holds NaN or infinity")
    facts = {"version": VERSION, "adapter": str(adapter), "base": base, "model": _shape(spec)}
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).unlink(missing_ok=True)  # without which the tensors, old or new, are no adapter
    write_safetensors(path / TENSORS, [array_entry(name, array) for name, array in arrays.items()], {})
    with atomic_writer(path / CONFIG) as file:
        file.write((json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())


def read_arrays(folder: str | Path, spec: ModelSpec) -> tuple[Adapter, dict[str, F32]]:
    """An adapter and its arrays, for a model.

    Raises
    ------
    SourceNotFound : there is none.
    Incompatible : it is another model's.
    UnsupportedFormat : a version that is not known.
    CorruptFile : an adapter that is none, arrays that are missing, of another shape or type, too many, or not finite.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file() or not (path / TENSORS).is_file():
        raise SourceNotFound(f"{path} is no adapter: it lacks {TENSORS if (path / CONFIG).is_file() else CONFIG}")
    facts = read_object(path / CONFIG)
    if facts.get("version") != VERSION:
        raise UnsupportedFormat(f"{CONFIG}: version {facts.get('version')!r}; {VERSION} is read")
    adapter = _adapter(facts.get("adapter"))
    if facts.get("model") != _shape(spec):
        raise Incompatible(
            f"{path} is of a model {facts.get('model')}, {spec.name} is {_shape(spec)}",
            cure="use the model that it was trained on",
        )
    expected = {f.name: (f.rows, f.cols) for f in adapter.factors(spec)}
    found = {tensor.name: tensor for tensor in read_safetensors(path / TENSORS).tensors}
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())[0]
        raise CorruptFile(f"{TENSORS} {'lacks' if odd in expected else 'has besides'} {odd!r}")
    arrays = {}
    with BinaryFile(path / TENSORS) as file:
        for name, shape in expected.items():
            tensor = found[name]
            if tensor.type != "f32" or tuple(tensor.shape) != shape:
                raise CorruptFile(f"{TENSORS}: {name!r} is {tensor.type} {tensor.shape}; f32 {shape} is expected")
            arrays[name] = np.empty(shape, np.float32)
            file.read_into(tensor.offset, arrays[name].reshape(-1).view(np.uint8).data)
            if not np.isfinite(arrays[name]).all():
                raise CorruptFile(f"{TENSORS}: {name!r} holds NaN or infinity")
    return adapter, arrays


def _adapter(text: object) -> Adapter:
    if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
        raise CorruptFile(f"{CONFIG} names no adapter")
    try:
        (found,) = parse_composition(text, techniques("adapters"), "adapters")
    except (BarefootError, ValueError) as error:
        raise CorruptFile(f"{CONFIG}: {text!r} is no adapter: {error}") from error
    assert isinstance(found, Adapter)
    return found
