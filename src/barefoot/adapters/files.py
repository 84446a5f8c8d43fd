"""PEFT's folder for LoRA: ``adapter_config.json`` beside ``adapter_model.safetensors``, read without trusting it.

For each module of the model that has an adapter, such as ``model.layers.0.self_attn.q_proj``, there are two tensors,
float32, float16 or bfloat16::

    base_model.model.{module}.lora_A.weight    (r, inputs)
    base_model.model.{module}.lora_B.weight    (outputs, r)

which add scale × (x Aᵀ) Bᵀ to its product, scale = lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``. A
module whose name ends in a key of ``rank_pattern`` or ``alpha_pattern`` has an r or lora_alpha of its own; the first
such key counts. Keys can be regular expressions for PEFT; here they are names, in which a dot may be escaped.

What else such a folder can say (DoRA, biases, whole modules beside it, embeddings, starts that change the base) means
another computation: it is refused, by name, and so is every setting that is not known, unless it is off. Names of
modules are the model's affair (:mod:`barefoot.engine.adapter_files`).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot.adapters import folders
from barefoot.core.errors import CorruptFile, InvalidInput, SourceNotFound, UnsupportedFormat
from barefoot.io.files import BinaryFile, atomic_writer
from barefoot.io.safetensors import read_safetensors, write_safetensors
from barefoot.io.strict_json import read_object
from barefoot.io.types import TensorInfo
from barefoot.ops import blocks

F32 = npt.NDArray[np.float32]

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TYPES = ("f32", "f16", "bf16")
MOST_ALPHA = 1e30
MOST_PATTERNS = 1 << 14  # more than any model has matrices

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")

# Settings that say what is computed, and are read here.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
# Settings that only say how it was trained, or where; tensors say which modules have an adapter.
_OF_TRAINING = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision"),
    *("runtime_config", "task_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("eva_config", "megatron_core", "qalora_group_size"),
}
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # that leave the base as it is


@dataclass(frozen=True)
class Pair:
    """What is added to the product of a matrix (outputs, inputs): ``scale`` × (x Aᵀ) Bᵀ.

    ``a`` float32 (rank, inputs), ``b`` float32 (outputs, rank).
    """

    a: F32
    b: F32
    scale: float

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class Module:
    """One module's pair in a file: ``a`` (rank, inputs) and ``b`` (outputs, rank) of one type, and their scale."""

    name: str
    rank: int
    scale: float
    a: TensorInfo
    b: TensorInfo

    @property
    def type(self) -> str:
        return self.a.type


@dataclass(frozen=True)
class AdapterFile:
    """A folder, read as far as its headers. ``base`` is what it says that it was trained on."""

    path: Path
    base: str | None
    modules: tuple[Module, ...]

    @property
    def tensors_path(self) -> Path:
        return self.path / TENSORS

    def pair(self, module: Module) -> Pair:
        """Read a module's numbers.

        Raises
        ------
        CorruptFile : the file has become shorter, or holds NaN or infinity.
        """
        with BinaryFile(self.tensors_path) as file:
            a, b = (self._numbers(file, tensor) for tensor in (module.a, module.b))
        return Pair(a, b, module.scale)

    def _numbers(self, file: BinaryFile, tensor: TensorInfo) -> F32:
        raw = np.empty((tensor.n_rows, tensor.row_bytes), np.uint8)
        file.read_into(tensor.offset, raw.reshape(-1).data)
        found = blocks.decode(tensor.type, raw, tensor.shape[1])
        if not np.isfinite(found).all():
            raise CorruptFile(f"{TENSORS}: {tensor.name!r} holds NaN or infinity")
        return found


def read_adapter(folder: str | Path) -> AdapterFile:
    """Read the headers of a folder.

    Raises
    ------
    SourceNotFound : it has no such files.
    UnsupportedFormat : it says something that is not LoRA as above, by name.
    CorruptFile : it contradicts itself.
    """
    path = Path(folder)
    if (path / folders.CONFIG).is_file():
        raise UnsupportedFormat(
            f"{path} holds an adapter that stands beside no matrix, but reads the hidden states behind all layers: the "
            "engine doesn't run it, and there is nothing to merge",
            cure="decode with barefoot.train.driver.two_caches, or tune another adapter, such as lora",
        )
    if not (path / CONFIG).is_file() or not (path / TENSORS).is_file():
        raise SourceNotFound(
            f"{path} is no adapter: it lacks {CONFIG if not (path / CONFIG).is_file() else TENSORS}",
            cure="save it as safetensors: a pickle can run code when it is opened"
            if (path / PICKLE).is_file()
            else None,
        )
    config = read_object(path / CONFIG)
    _check(config)
    tensors: dict[str, dict[str, TensorInfo]] = {}
    others = []
    for tensor in read_safetensors(path / TENSORS).tensors:
        match = _KEY.fullmatch(tensor.name)
        if match is None:
            others.append(tensor.name)
        else:
            tensors.setdefault(match[1], {})[match[2]] = tensor
    if others:
        raise UnsupportedFormat(
            f"{TENSORS} holds {len(others)} tensors that are no factors of LoRA: {', '.join(sorted(others)[:3])}"
        )
    if not tensors:
        raise CorruptFile(f"{TENSORS} holds no factors")
    base = config.get("base_model_name_or_path")
    modules = tuple(_module(name, found, config) for name, found in tensors.items())
    return AdapterFile(path, base if isinstance(base, str) else None, modules)


def _check(config: Mapping[str, Any]) -> None:
    """Refuse what is not plain LoRA."""
    kind, bias, start = config.get("peft_type"), config.get("bias", "none"), config.get("init_lora_weights")
    if kind != "LORA":
        raise UnsupportedFormat(f"{CONFIG}: peft_type is {kind!r}; LORA is read")
    if bias != "none":
        raise UnsupportedFormat(f"{CONFIG}: bias is {bias!r}: biases of its own are not read")
    if start not in _STARTS:
        raise UnsupportedFormat(
            f"{CONFIG}: init_lora_weights is {start!r}, which changes the model that the adapter stands beside",
            cure="save it anew with PEFT's path_initial_model_for_weight_conversion, which makes it plain LoRA",
        )
    on = sorted(key for key, value in config.items() if value and key not in _READ | _OF_TRAINING)
    if on:
        raise UnsupportedFormat(f"{CONFIG} sets {', '.join(on[:4])}, which is not read", cure="merge it with PEFT")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or len(patterns) > MOST_PATTERNS:
            raise CorruptFile(f"{CONFIG}: {key} must map at most {MOST_PATTERNS} names to numbers")
        odd = next((pattern for pattern in patterns if not _PATTERN.fullmatch(pattern)), None)
        if odd is not None:
            raise UnsupportedFormat(f"{CONFIG}: {key} has the key {odd[:80]!r}; names of modules are read")


def _module(name: str, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Module:
    if set(tensors) != {"A", "B"}:
        raise CorruptFile(f"{TENSORS}: {name} has lora_{next(iter(tensors))}, and not the other factor")
    a, b = tensors["A"], tensors["B"]
    for tensor in (a, b):
        if tensor.type not in TYPES:
            raise UnsupportedFormat(f"{TENSORS}: {tensor.name!r} is stored as {tensor.type}; read: {', '.join(TYPES)}")
        if len(tensor.shape) != 2 or not all(tensor.shape):
            raise CorruptFile(f"{TENSORS}: {tensor.name!r} has the shape {tensor.shape}; a matrix is expected")
    if a.type != b.type:
        raise UnsupportedFormat(f"{TENSORS}: the factors of {name} are {a.type} and {b.type}; one type is read")
    rank = _of_module(config, "rank_pattern", "r", name)
    if type(rank) is not int or rank != a.shape[0] or rank != b.shape[1]:
        raise CorruptFile(f"{name}: {CONFIG} states r {rank!r}, its factors are {a.shape} and {b.shape}")
    alpha = _of_module(config, "alpha_pattern", "lora_alpha", name)
    if type(alpha) not in (int, float) or not abs(alpha) < MOST_ALPHA:
        raise CorruptFile(f"{CONFIG}: lora_alpha of {name} must be a number, got {alpha!r}")
    return Module(name, rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), a, b)


def _of_module(config: Mapping[str, Any], patterns: str, otherwise: str, name: str) -> Any:
    """As PEFT chooses: the first pattern that the name ends in, at a dot, else what holds for all."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return config.get(otherwise)


def write_adapter(
    folder: str | Path,
    pairs: Mapping[str, Pair],
    *,
    base: str | None = None,
    targets: Sequence[str] = (),
    type_id: str = "f32",
) -> None:
    """Write modules' pairs as a folder that PEFT reads; where another one is, it is replaced, and never mixed with it.

    Parameters
    ----------
    pairs : by the module's name in the model that PEFT wraps.
    base : the model's name or path, for PEFT to find it.
    targets : names that those of just these modules end in; the whole names when it is empty.
    type_id : f32, f16 or bf16.

    Raises
    ------
    InvalidInput : no pairs, or numbers that are not finite once they are rounded.
    """
    if not pairs:
        raise InvalidInput("an adapter needs at least one module")
    path, config = Path(folder), _config(pairs, base, targets or sorted(pairs))
    text = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    entries = []
    for name, pair in pairs.items():
        for letter, factor in (("A", pair.a), ("B", pair.b)):
            raw = blocks.encode(type_id, factor)
            if not np.isfinite(blocks.decode(type_id, raw, factor.shape[1])).all():
                raise InvalidInput(f"{name}: lora_{letter} holds NaN, infinity, or numbers beyond those of {type_id}")
            entries.append((f"base_model.model.{name}.lora_{letter}.weight", type_id, factor.shape, [raw.data]))
    if (path / CONFIG).is_file() and (path / CONFIG).read_bytes() != text:
        (path / CONFIG).unlink()  # without which the tensors, old or new, are no adapter
    write_safetensors(path / TENSORS, entries, {"format": "pt"})
    with atomic_writer(path / CONFIG) as file:
        file.write(text)


def _config(pairs: Mapping[str, Pair], base: str | None, targets: Sequence[str]) -> dict[str, Any]:
    """The settings: what most modules have, and the names of those that have another rank or scale."""
    ranks = {name: pair.rank for name, pair in pairs.items()}
    alphas = {name: pair.scale * pair.rank for name, pair in pairs.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {name: each for name, each in alphas.items() if each != alpha},
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
