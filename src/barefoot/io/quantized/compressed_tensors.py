"""compressed-tensors checkpoints (LLM Compressor, vLLM) in the format ``pack-quantized``: integer groups of weights.

For a matrix of ``rows`` outputs and ``cols`` inputs, with codes of b = 2, 3, 4 or 8 bits:

================= ========================= ==========================================================================
weight_packed     i32 (rows, cols × b / 32) codes one after the other, low bits first, each its value + 2^(b-1)
weight_scale      float (rows, groups)
weight_zero_point i32 (rows × b/32, groups) zeros of consecutive rows in a word, + 2^(b-1); or i8 (rows, groups) as they
                                            are; missing where symmetric
weight_g_idx      i32 (cols)                the group of each column; missing where they are in order
weight_shape      int (2)                   rows and cols
================= ========================= ==========================================================================

The settings give each matrix its bits and groups in ``config_groups``, by its name or by the name of its class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from barefoot.core.errors import CorruptFile, UnsupportedFormat
from barefoot.io import quantized
from barefoot.io.quantized import FLOATS, U8, PackedLinear, Raw, Read, Tile
from barefoot.io.types import TensorInfo

METHODS = ("compressed-tensors",)
BITS = (2, 3, 4, 8)
FORMAT = "pack-quantized"


@dataclass(frozen=True)
class _Linear(PackedLinear):
    def tile(self, raw: Raw, first: int, n_rows: int) -> Tile:
        rows, cols = self.shape
        n_groups = cols // self.group
        part = slice(first, first + n_rows)
        codes = quantized.unpack(raw["weight_packed"].reshape(rows, -1)[part], self.bits)
        scales = raw["weight_scale"].reshape(rows, n_groups, -1)[part]
        floats = quantized.floats(scales, self.parts["weight_scale"].type)
        return self.checked(Tile(codes, floats, self._zeros(raw, n_groups, first, n_rows)))

    def _zeros(self, raw: Raw, n_groups: int, first: int, n_rows: int) -> U8:
        middle = np.uint8(1 << (self.bits - 1))
        if "weight_zero_point" not in raw:
            return np.full((n_rows, n_groups), middle, np.uint8)
        zeros = raw["weight_zero_point"]
        if self.parts["weight_zero_point"].type == "i8":
            return zeros.reshape(-1, n_groups)[first : first + n_rows] + middle
        words = zeros.view("<u4").reshape(-1, n_groups)[first * self.bits // 32 : (first + n_rows) * self.bits // 32]
        return np.ascontiguousarray(quantized.unpack(np.ascontiguousarray(words.T).view(np.uint8), self.bits).T)


def linears(settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read) -> dict[str, PackedLinear]:
    schemes = _schemes(settings)
    found: dict[str, PackedLinear] = {}
    for stem in quantized.stems(tensors, ".weight_packed"):
        weights = _scheme_of(stem, schemes)
        bits = quantized.count(weights, "num_bits", BITS)
        symmetric = bool(weights.get("symmetric", True))
        rows, n_words = quantized.matrix(tensors, f"{stem}.weight_packed")
        cols = n_words * 32 // bits
        if n_words * 32 % bits:
            raise CorruptFile(f"{stem}.weight_packed: {n_words} words don't hold whole {bits}-bit codes")
        shape_name = f"{stem}.weight_shape"
        shape = quantized.part(tensors, shape_name, ("i64", "i32"), (2,))
        stated = read(shape).view("<i8" if shape.type == "i64" else "<i4").tolist()
        if stated != [rows, cols]:
            raise CorruptFile(f"{shape_name} says {stated}, the codes have ({rows}, {cols})")
        stated_group = weights.get("group_size") if weights.get("strategy") == "group" else None
        group = quantized.group_size(weights, stated_group, stem, cols)
        parts = {
            "weight_packed": quantized.part(tensors, f"{stem}.weight_packed", ("i32",), (rows, n_words)),
            "weight_scale": quantized.part(tensors, f"{stem}.weight_scale", FLOATS, (rows, cols // group)),
        }
        if not symmetric:
            parts["weight_zero_point"] = _zero_part(tensors, f"{stem}.weight_zero_point", rows, cols // group, bits)
        in_order = True
        if f"{stem}.weight_g_idx" in tensors:
            parts["g_idx"] = quantized.part(tensors, f"{stem}.weight_g_idx", ("i32",), (cols,))
            in_order = bool(np.array_equal(read(parts["g_idx"]).view("<i4"), np.arange(cols) // group))
        name = f"{stem}.weight"
        found[name] = _Linear(name, (rows, cols), bits, group, symmetric, in_order, parts)
    return found


def _zero_part(tensors: Mapping[str, TensorInfo], name: str, rows: int, n_groups: int, bits: int) -> TensorInfo:
    if name in tensors and tensors[name].type == "i8":
        return quantized.part(tensors, name, ("i8",), (rows, n_groups))
    if rows * bits % 32:
        raise UnsupportedFormat(f"{METHODS[0]}: zeros of {rows} rows don't fill words of {bits}-bit codes")
    return quantized.part(tensors, name, ("i32",), (rows * bits // 32, n_groups))


def _schemes(settings: Mapping[str, Any]) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """(targets, what the settings say of their weights) of each group of matrices."""
    if settings.get("format") != FORMAT:
        raise UnsupportedFormat(f"{METHODS[0]}: format {settings.get('format')!r} is not read; known: {FORMAT}")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CorruptFile(f"{METHODS[0]}: config_groups must name groups of matrices")
    found = []
    for name, group in groups.items():
        weights, targets = (group.get("weights"), group.get("targets")) if isinstance(group, dict) else (None, None)
        if not isinstance(weights, dict) or not isinstance(targets, list) or not all(map(_is_text, targets)):
            raise CorruptFile(f"{METHODS[0]}: the group {name!r} must have weights and targets")
        if weights.get("type") != "int" or weights.get("strategy") not in ("group", "channel"):
            got = f"{weights.get('type')} by {weights.get('strategy')}"
            raise UnsupportedFormat(f"{METHODS[0]}: weights of {got} are not read; known: int by group or channel")
        found.append((tuple(targets), {"quant_method": METHODS[0], **weights}))
    if len(found) > 1 and any(t.startswith("re:") for targets, _ in found for t in targets):
        raise UnsupportedFormat(f"{METHODS[0]}: several groups of matrices, chosen by patterns, are not read")
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _scheme_of(stem: str, schemes: list[tuple[tuple[str, ...], dict[str, Any]]]) -> dict[str, Any]:
    """The scheme of a matrix: the only one, the one that names it, or the one for all linear layers."""
    if len(schemes) == 1:
        return schemes[0][1]
    for wanted in (stem, "Linear"):
        for targets, weights in schemes:
            if wanted in targets:
                return weights
    raise CorruptFile(f"{METHODS[0]}: no group of matrices names {stem!r}, which is packed")
