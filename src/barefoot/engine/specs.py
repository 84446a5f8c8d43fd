"""From a checkpoint's header, or a config alone, to a :class:`~barefoot.core.model.ModelSpec`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np

from barefoot.core.errors import UnsupportedFormat
from barefoot.core.model import ModelSpec
from barefoot.engine import arch
from barefoot.engine.stacks import stacked
from barefoot.io.files import BinaryFile
from barefoot.io.gguf import GGUFArray, read_numbers
from barefoot.io.inventory import Checkpoint

# Divisors of rope frequencies, see _with_rope_factors.
_READ_ELSEWHERE = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
_SMALL_ARRAY = 4096  # elements; per-layer lists of a header, not its vocabulary


@functools.cache
def architectures() -> MappingProxyType[str, ModuleType]:
    """Name → module of every architecture, by the files of :mod:`barefoot.engine.arch`."""
    names = sorted(module.name for module in pkgutil.iter_modules(arch.__path__))
    return MappingProxyType({name: importlib.import_module(f"{arch.__name__}.{name}") for name in names})


def _find(attribute: str, wanted: object) -> ModuleType:
    known: dict[str, ModuleType] = {}
    for module in architectures().values():
        known |= dict.fromkeys(getattr(module, attribute), module)
    if not isinstance(wanted, str) or wanted not in known:
        raise UnsupportedFormat(f"architecture {wanted!r} is not supported; known: {', '.join(sorted(known))}")
    return known[wanted]


def spec_from_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """The spec of a Hugging Face config.json alone; weights are taken to be stored in the config's dtype.

    Raises
    ------
    UnsupportedFormat : no architecture file reads this ``model_type``.
    CorruptFile : the config lacks a number, or contradicts itself.
    """
    spec: ModelSpec = _find("HF_TYPES", config.get("model_type")).from_hf(config, None)
    return replace(spec, name=name)


def spec_from_gguf(metadata: Mapping[str, Any], name: str) -> ModelSpec:
    """The spec of GGUF metadata alone, and the names and places of the tensors that such a file has.

    Raises
    ------
    UnsupportedFormat, CorruptFile : as for a config.json.
    """
    spec: ModelSpec = _find("GGUF_ARCHS", metadata.get("general.architecture")).from_gguf(metadata, None)
    return replace(spec, name=name)


def model_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The spec of a checkpoint, its weights with their sources. Reads headers, and for some GGUF files rope factors.

    Raises
    ------
    UnsupportedFormat : an unknown architecture, variant or stored type; or GGUF tensors that nothing would use.
    CorruptFile : tensors are missing, or contradict the header.
    """
    spec: ModelSpec
    if checkpoint.kind == "safetensors":
        tensors = {**checkpoint.tensors, **checkpoint.linears}
        spec = _find("HF_TYPES", checkpoint.config.get("model_type")).from_hf(checkpoint.config, tensors)
        _refuse_biases(checkpoint, spec)
        return stacked(replace(spec, name=checkpoint.path.name), checkpoint)
    metadata = _with_small_arrays(checkpoint)
    spec = _find("GGUF_ARCHS", metadata.get("general.architecture")).from_gguf(metadata, checkpoint.tensors)
    unread = sorted(set(checkpoint.tensors) - {w.source for w in spec.weights} - _READ_ELSEWHERE)
    if unread:
        named = ", ".join(unread[:4]) + (f" and {len(unread) - 4} more" if len(unread) > 4 else "")
        raise UnsupportedFormat(f"{checkpoint.path.name} holds tensors that {spec.arch} does not use: {named}")
    return _with_rope_factors(replace(spec, name=checkpoint.path.stem), checkpoint)


def _refuse_biases(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Programs that quantize add biases to layers that had none. Zeros are nothing; others can't be left out."""
    used = {weight.source for weight in spec.weights}
    for name in checkpoint.linears:
        bias = f"{name.removesuffix('weight')}bias"
        if bias in checkpoint.tensors and bias not in used:
            raw = np.empty(checkpoint.tensors[bias].n_bytes, np.uint8)
            checkpoint.read_into(bias, raw)
            if raw.any():
                raise UnsupportedFormat(f"{checkpoint.path.name} holds {bias!r}, which {spec.arch} does not use")


def _with_small_arrays(checkpoint: Checkpoint) -> dict[str, Any]:
    """The metadata with the architecture's short lists of numbers read from the file."""
    metadata = dict(checkpoint.config)
    prefix = f"{metadata.get('general.architecture')}."
    wanted = {
        key: value
        for key, value in metadata.items()
        if key.startswith(prefix) and isinstance(value, GGUFArray) and value.count <= _SMALL_ARRAY
        if value.element not in ("string", "array")
    }
    if wanted:
        with BinaryFile(checkpoint.path) as file:
            metadata |= {key: read_numbers(file, value).tolist() for key, value in wanted.items()}
    return metadata


def _with_rope_factors(spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """GGUF keeps the divisors of rope frequencies as tensors: one list (Llama 3), or one long and one short (Phi-3)."""

    def factors(name: str) -> tuple[float, ...]:
        if checkpoint.tensors[name].type != "f32":
            raise UnsupportedFormat(f"tensor {name!r} is stored as {checkpoint.tensors[name].type}, expected f32")
        raw = np.empty(checkpoint.tensors[name].n_bytes, np.uint8)
        checkpoint.read_into(name, raw)
        return tuple(raw.view(np.float32).tolist())

    if "rope_freqs.weight" in checkpoint.tensors:
        short = long = factors("rope_freqs.weight")
    elif "rope_factors_long.weight" in checkpoint.tensors and "rope_factors_short.weight" in checkpoint.tensors:
        short, long = factors("rope_factors_short.weight"), factors("rope_factors_long.weight")
    else:
        return spec
    layers = tuple(
        replace(layer, rope=replace(layer.rope, scaling="longrope", short_factors=short, long_factors=long))
        for layer in spec.layers
    )
    return replace(spec, layers=layers)
