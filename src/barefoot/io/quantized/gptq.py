"""GPTQ checkpoints (Frantar et al. 2022, arXiv:2210.17323), as AutoGPTQ and GPTQModel write them.

For a matrix of ``rows`` outputs and ``cols`` inputs, with codes of b = 2, 3, 4 or 8 bits:

======= ========================== ===================================================================================
qweight i32 (cols × b / 32, rows)  column after column of the matrix in the bits of each word's column, low bits first;
                                   codes of 3 bits go on from one word to the next
scales  f16 (groups, rows)
qzeros  i32 (groups, rows × b/32)  row after row in the bits of the words, low bits first
g_idx   i32 (cols)                 the group of each column; may be missing where they are in order
======= ========================== ===================================================================================

Zeros: ``checkpoint_format`` "gptq" (version 1, also when it is not stated) stores each zero less 1, modulo 2^b;
"gptq_v2" as it is.
With ``desc_act`` the groups were chosen in the order of the Hessian's diagonal, and g_idx scatters them over columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from barefoot.core.errors import CorruptFile, UnsupportedFormat
from barefoot.io import quantized
from barefoot.io.quantized import FLOATS, PackedLinear, Raw, Read, Tile
from barefoot.io.types import TensorInfo

METHODS = ("gptq",)
BITS = (2, 3, 4, 8)
ZERO_LESS = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True)
class _Linear(PackedLinear):
    zero_less: int  # what stored zeros lack

    def tile(self, raw: Raw, first: int, n_rows: int) -> Tile:
        rows, cols = self.shape
        n_groups = cols // self.group
        words = raw["qweight"].view("<u4").reshape(-1, rows)[:, first : first + n_rows]
        codes = quantized.unpack(np.ascontiguousarray(words.T).view(np.uint8), self.bits)
        scales = raw["scales"].reshape(n_groups, rows, -1)[:, first : first + n_rows].swapaxes(0, 1)
        packed = raw["qzeros"].reshape(n_groups, -1)[:, first * self.bits // 8 : (first + n_rows) * self.bits // 8]
        zeros = quantized.unpack(np.ascontiguousarray(packed), self.bits) + np.uint8(self.zero_less)
        zeros &= np.uint8((1 << self.bits) - 1)
        floats = quantized.floats(scales, self.parts["scales"].type)
        return self.checked(Tile(codes, floats, np.ascontiguousarray(zeros.T)))


def linears(settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read) -> dict[str, PackedLinear]:
    bits = quantized.count(settings, "bits", BITS)
    layout = settings.get("checkpoint_format") or "gptq"
    if layout not in ZERO_LESS:
        raise UnsupportedFormat(f"gptq: checkpoint_format {layout!r} is not read; known: {', '.join(ZERO_LESS)}")
    found: dict[str, PackedLinear] = {}
    for stem in quantized.stems(tensors, ".qweight"):
        n_words, rows = quantized.matrix(tensors, f"{stem}.qweight")
        cols = n_words * 32 // bits
        if n_words * 32 % bits or rows * bits % 32:
            raise CorruptFile(f"{stem}.qweight: {n_words} × {rows} words don't hold whole rows of {bits}-bit codes")
        group = quantized.group_size(settings, settings.get("group_size"), stem, cols)
        n_groups = cols // group
        parts = {
            "qweight": quantized.part(tensors, f"{stem}.qweight", ("i32",), (n_words, rows)),
            "scales": quantized.part(tensors, f"{stem}.scales", FLOATS, (n_groups, rows)),
            "qzeros": quantized.part(tensors, f"{stem}.qzeros", ("i32",), (n_groups, rows * bits // 32)),
        }
        if f"{stem}.g_idx" in tensors:
            parts["g_idx"] = quantized.part(tensors, f"{stem}.g_idx", ("i32",), (cols,))
        in_order = True
        if settings.get("desc_act") and "g_idx" in parts:
            given = read(parts["g_idx"]).view("<i4")
            in_order = bool(np.array_equal(given, np.arange(cols) // group))
        name = f"{stem}.weight"
        symmetric = bool(settings.get("sym"))
        found[name] = _Linear(name, (rows, cols), bits, group, symmetric, in_order, parts, ZERO_LESS[layout])
    return found
