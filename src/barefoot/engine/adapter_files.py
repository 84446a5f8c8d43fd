"""Adapters' files and the model's matrices: which module is which, and in which order its rows stand.

PEFT names modules as transformers does. That may keep several matrices in one module (Phi-3's qkv_proj): they share A,
and B has the rows of one after the other. Written, such a module is given the A of each below one another and each B in
columns of its own, so that it computes the same; only where all have one A already is it as it was read. GGUF files of
Llama keep the rows of q and k in another order than transformers, and so B's rows over such a file go over into it, and
back when they are written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from barefoot.adapters.files import AdapterFile, Module, Pair, write_adapter
from barefoot.core.errors import Incompatible
from barefoot.core.model import ModelSpec, WeightSpec
from barefoot.engine.rows import halves_order_of
from barefoot.engine.specs import architectures, spec_from_config

F32 = npt.NDArray[np.float32]

# What may stand before a layer of the language model; in models of several modalities other layers end alike.
_LAYER = re.compile(r"(?:model\.|model\.language_model\.|language_model\.model\.)?(layers\.\d+\..+)")


@dataclass(frozen=True)
class Fused:
    """A module of transformers and the matrices of the model that its rows are, in their order."""

    name: str
    weights: tuple[WeightSpec, ...]

    @property
    def rows(self) -> int:
        return sum(weight.rows for weight in self.weights)


def modules(spec: ModelSpec) -> dict[str, Fused]:
    """All that can have an adapter, by name: the matrices of the layers."""
    own = {weight.name: weight for weight in spec.weights}
    theirs = spec_from_config(architectures()[spec.arch].to_hf(spec), spec.name)
    found: dict[str, list[WeightSpec]] = {}
    for weight in theirs.weights:
        if weight.layer is not None and weight.group != "norm":
            found.setdefault(weight.source.removesuffix(".weight"), []).append(weight)
    result = {}
    for name, weights in found.items():
        weights.sort(key=lambda weight: weight.row_start)
        result[name] = Fused(name, tuple(own[weight.name] for weight in weights))
    return result


def matched(spec: ModelSpec, file: AdapterFile) -> tuple[tuple[Fused, Module], ...]:
    """The model's modules that the file has factors of, in the model's order.

    Raises
    ------
    Incompatible : factors of a module that the model lacks, or of another shape; or of one twice.
    """
    known = modules(spec)
    named = {_tail(name): name for name in known}
    found: dict[str, Module] = {}
    for module in file.modules:
        name = named.get(_tail(module.name) or "")
        if name is None or name in found:
            why = "has no such matrix in a layer" if name is None else "has it under another name already"
            raise Incompatible(
                f"{file.path} has factors of {module.name}, and {spec.name} ({spec.arch}) {why}",
                cure=f"use the model that it was trained on{f': {file.base}' if file.base else ''}",
            )
        fused, cols = known[name], known[name].weights[0].cols
        if (module.b.shape[0], module.a.shape[1]) != (fused.rows, cols):
            raise Incompatible(
                f"{file.path}: factors of {module.name} are of a matrix ({module.b.shape[0]}, {module.a.shape[1]}), in "
                f"{spec.name} it is ({fused.rows}, {cols})",
                cure=f"use the model that it was trained on{f': {file.base}' if file.base else ''}",
            )
        found[name] = module
    return tuple((known[name], found[name]) for name in known if name in found)


def _tail(name: str) -> str | None:
    """The name from ``layers.`` on; None where it is no layer of the language model."""
    match = _LAYER.fullmatch(name)
    return match[1] if match else None


def split(spec: ModelSpec, fused: Fused, pair: Pair) -> dict[str, Pair]:
    """A module's pair as pairs of its matrices, by name, rows in the model's order."""
    found, first = {}, 0
    for weight in fused.weights:
        b, first = pair.b[first : first + weight.rows], first + weight.rows
        order = halves_order_of(spec, weight)
        found[weight.name] = Pair(pair.a, b if order is None else b[np.argsort(order)], pair.scale)
    return found


def load_adapter(spec: ModelSpec, file: AdapterFile) -> dict[str, Pair]:
    """All pairs of a file, by the model's names of matrices; those of one module share A.

    Raises
    ------
    Incompatible : as :func:`matched`.
    CorruptFile : numbers that can't be read, or are not finite.
    """
    found: dict[str, Pair] = {}
    for fused, module in matched(spec, file):
        found |= split(spec, fused, file.pair(module))
    return found


def save_adapter(
    folder: str | Path, spec: ModelSpec, pairs: Mapping[str, Pair], *, base: str | None = None, type_id: str = "f32"
) -> None:
    """Write pairs, by the model's names of matrices, as a folder that PEFT reads.

    Raises
    ------
    Incompatible : a name of no matrix of the layers, or a shape that is not the matrix's.
    InvalidInput : as :func:`barefoot.adapters.files.write_adapter`.
    """
    known = modules(spec)
    weights = {weight.name: weight for fused in known.values() for weight in fused.weights}
    for name, pair in pairs.items():
        shape = (weights[name].rows, weights[name].cols) if name in weights else None
        if (len(pair.b), pair.a.shape[1]) != shape or pair.b.shape[1] != pair.rank:
            raise Incompatible(f"{name}: factors {pair.a.shape} and {pair.b.shape} of a matrix {shape}")
    joined = {name: _joined(spec, fused, pairs) for name, fused in known.items()}
    theirs = {name: pair for name, pair in joined.items() if pair is not None}
    leaves = {name.rpartition(".")[2] for name in theirs}
    whole = all(name in theirs for name in known if name.rpartition(".")[2] in leaves)
    write_adapter(folder, theirs, base=base, targets=sorted(leaves) if whole else (), type_id=type_id)


def _joined(spec: ModelSpec, fused: Fused, pairs: Mapping[str, Pair]) -> Pair | None:
    """The pair of a module from those of its matrices; None where none has one."""
    present = [pairs[weight.name] for weight in fused.weights if weight.name in pairs]
    if not present:
        return None
    first = max(present, key=lambda pair: abs(pair.scale))
    shared = len(present) == len(fused.weights) and all(
        pair.scale == first.scale and np.array_equal(pair.a, first.a) for pair in present
    )
    columns = [0] * len(present) if shared else np.cumsum([0, *(pair.rank for pair in present)]).tolist()
    a = first.a if shared else np.concatenate([pair.a for pair in present])
    b, row, at = np.zeros((fused.rows, len(a)), np.float32), 0, iter(columns)
    for weight in fused.weights:
        if weight.name in pairs:
            pair, column, order = pairs[weight.name], next(at), halves_order_of(spec, weight)
            rows = pair.b if order is None else pair.b[order]
            ratio = 1.0 if pair.scale == first.scale else pair.scale / first.scale
            b[row : row + weight.rows, column : column + pair.rank] = rows * np.float32(ratio)
        row += weight.rows
    return Pair(a, b, first.scale)
