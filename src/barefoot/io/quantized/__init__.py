"""Checkpoints that other programs quantized: one module for each ``quant_method``, found because it lies here.

Such a checkpoint keeps a matrix as several tensors, of codes, scales and zeros, in an order of its own. A module states
``METHODS`` (values of ``quant_method`` in config.json) and gives ``linears(settings, tensors, read)``, which checks
names, types and sizes and returns the matrices as :class:`PackedLinear` by the name of the dense weight. All mean

    w[r, c] = scale[r, g] × (code[r, c] − zero[r, g])        g: the group of column c

and are the engine's to put into its blocks (:mod:`barefoot.engine.repacking`).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import CorruptFile, UnsupportedFormat
from barefoot.io.types import TensorInfo

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
Read = Callable[[TensorInfo], U8]  # all bytes of a small tensor
Raw = Mapping[str, U8]  # the bytes of each part of a matrix

GROUP_SIZES = (128, 64, 32)  # of blocks that a larger group is cut into, largest first
FLOATS = ("f16", "bf16", "f32")


@dataclass(frozen=True)
class Tile:
    """Rows of a matrix: ``codes`` uint8 (n, cols); ``scales`` float32 and ``zeros`` uint8, both (n, groups)."""

    codes: U8
    scales: F32
    zeros: U8


@dataclass(frozen=True)
class PackedLinear(ABC):
    """A matrix kept as several tensors.

    Attributes
    ----------
    name : that of the dense weight, ``….weight``.
    shape : (rows, cols) of it.
    bits : of a code. group : columns that share a scale.
    symmetric : every zero is 2^(bits - 1); :meth:`checked` holds the file to it.
    in_order : groups are consecutive columns. If not, ``group_of_column`` says which column belongs where, and no
        block format can hold the matrix: it becomes f16.
    parts : the tensors by what they are.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group: int
    symmetric: bool
    in_order: bool
    parts: Mapping[str, TensorInfo]

    @property
    def type(self) -> str:
        """The block format that takes the matrix."""
        if not self.in_order:
            return "f16"
        size = next(size for size in GROUP_SIZES if self.group % size == 0)
        return f"int{self.bits}_g{size}_{'sym' if self.symmetric else 'asym'}"

    @property
    def n_bytes(self) -> int:
        """Of all parts."""
        return sum(part.n_bytes for part in self.parts.values())

    @abstractmethod
    def tile(self, raw: Raw, first: int, n_rows: int) -> Tile:
        """Rows of the matrix from the bytes of its parts. ``first`` is a multiple of 32, so is ``n_rows`` or the rows
        end with it."""

    def group_of_column(self, raw: Raw) -> npt.NDArray[np.int64]:
        """(cols,); counted from 0.

        Raises
        ------
        CorruptFile : a group that has no scale, or another order than the checkpoint's settings promise.
        """
        usual = np.arange(self.shape[1]) // self.group
        if "g_idx" not in raw:
            return usual
        found = raw["g_idx"].view("<i4").astype(np.int64)
        if found.min() < 0 or found.max() >= self.shape[1] // self.group:
            raise CorruptFile(f"{self.name}: columns of groups {found.min()} to {found.max()}")
        if self.in_order and not np.array_equal(found, usual):
            raise CorruptFile(f"{self.name}: groups are not consecutive columns, as the settings promise (desc_act)")
        return found

    def checked(self, tile: Tile) -> Tile:
        """The tile, if its numbers are what the settings promise.

        Raises
        ------
        CorruptFile : NaN or infinite scales; zeros that are not in the middle in a symmetric matrix.
        """
        if not np.isfinite(tile.scales).all():
            raise CorruptFile(f"{self.name}: scales that are NaN or infinite")
        if self.symmetric and (tile.zeros != 1 << (self.bits - 1)).any():
            raise CorruptFile(f"{self.name}: zeros other than {1 << (self.bits - 1)} in a symmetric matrix")
        return tile


@functools.cache
def methods() -> MappingProxyType[str, ModuleType]:
    """``quant_method`` → module."""
    modules = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    return MappingProxyType({method: module for module in modules for method in module.METHODS})


def linears(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read) -> dict[str, PackedLinear]:
    """The packed matrices of a checkpoint by the names of their dense weights; none if its config states no method
    that is known here.

    Raises
    ------
    CorruptFile : tensors are missing, or contradict the settings.
    UnsupportedFormat : a variant that is not read.
    """
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") not in methods():
        return {}
    found: dict[str, PackedLinear] = methods()[settings["quant_method"]].linears(settings, tensors, read)
    if not found:
        raise CorruptFile(f"the config says {settings['quant_method']}, and no tensor is packed so")
    return found


# --- what the layouts share -----------------------------------------------------------------------------------------


def stems(tensors: Mapping[str, TensorInfo], suffix: str) -> list[str]:
    """The names that have a tensor with that suffix, without it."""
    return [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]


def part(tensors: Mapping[str, TensorInfo], name: str, types: tuple[str, ...], shape: tuple[int, ...]) -> TensorInfo:
    """The tensor ``name``, held to one of ``types`` and to ``shape``."""
    if name not in tensors:
        raise CorruptFile(f"the checkpoint lacks the tensor {name!r}")
    tensor = tensors[name]
    if tensor.type not in types or tensor.shape != shape:
        expected = f"{' or '.join(types)} of shape {shape}"
        raise CorruptFile(f"tensor {name!r} is {tensor.type} of shape {tensor.shape}, its settings imply {expected}")
    return tensor


def matrix(tensors: Mapping[str, TensorInfo], name: str) -> tuple[int, int]:
    """The shape of a tensor of two axes, neither of length 0."""
    shape = tensors[name].shape
    if len(shape) != 2 or 0 in shape:
        raise CorruptFile(f"tensor {name!r} has shape {shape}; a matrix is expected")
    return shape[0], shape[1]


def count(settings: Mapping[str, Any], key: str, known: tuple[int, ...]) -> int:
    """A number of the settings that must be one of ``known``."""
    value = settings.get(key)
    if type(value) is not int or value not in known:
        what = f"{settings.get('quant_method')}: {key} must be one of {', '.join(map(str, known))}, got {value!r}"
        raise UnsupportedFormat(what)
    return value


def group_size(settings: Mapping[str, Any], stated: Any, name: str, cols: int) -> int:
    """Columns of a group: ``stated``, or all of them for -1 and None.

    Raises
    ------
    UnsupportedFormat : groups that blocks of 32, 64 or 128 don't fill, or that don't fill a row.
    """
    size = cols if stated in (-1, None) else stated
    if type(size) is not int or size <= 0 or cols % size or size % GROUP_SIZES[-1]:
        raise UnsupportedFormat(
            f"{settings.get('quant_method')}: {name!r} has {cols} columns in groups of {stated!r}; groups must divide "
            f"them and be multiples of {GROUP_SIZES[-1]}"
        )
    return size


def floats(raw: U8, type_id: str) -> F32:
    """Stored f16, bf16 or f32 numbers, uint8 (..., bytes of one), as float32 (...)."""
    numbers = np.ascontiguousarray(raw).view({"bf16": "<u2", "f16": "<f2", "f32": "<f4"}[type_id])[..., 0]
    if type_id == "bf16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32)


def unpack(words: U8, bits: int) -> U8:
    """Codes that lie one after the other in the bytes of little-endian words, low bits first: (n, bytes) to (n, codes).

    Example: the code 1 of 3 bits are bits 3 to 5 of byte 0.
    """
    if bits == 8:
        return words
    if bits == 3:
        each = np.unpackbits(words, axis=1, bitorder="little").reshape(len(words), -1, 3)
        codes: U8 = each[..., 0] | (each[..., 1] << np.uint8(1)) | (each[..., 2] << np.uint8(2))
        return codes
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    fields: U8 = (words[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return fields.reshape(len(words), -1)
