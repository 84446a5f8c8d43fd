"""AWQ checkpoints (Lin et al. 2023, arXiv:2306.00978), in AutoAWQ's ``gemm`` layout.

For a matrix of ``rows`` outputs and ``cols`` inputs, with codes of 4 bits:

======= ====================== =======================================================================================
qweight i32 (cols, rows / 8)   eight rows of the matrix in a word: bits 4i .. 4i + 3 are row ``ORDER[i]`` of the eight
scales  f16 (groups, rows)
qzeros  i32 (groups, rows / 8) in the same order
======= ====================== =======================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from barefoot.core.errors import UnsupportedFormat
from barefoot.io import quantized
from barefoot.io.quantized import FLOATS, U8, PackedLinear, Raw, Read, Tile
from barefoot.io.types import TensorInfo

METHODS = ("awq",)
BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACE = np.argsort(ORDER)  # of each row of eight, the place of its code in the word


@dataclass(frozen=True)
class _Linear(PackedLinear):
    def tile(self, raw: Raw, first: int, n_rows: int) -> Tile:
        rows, cols = self.shape
        n_groups = cols // self.group
        scales = raw["scales"].reshape(n_groups, rows, -1)[:, first : first + n_rows].swapaxes(0, 1)
        return self.checked(
            Tile(
                self._codes(raw["qweight"].reshape(cols, -1), first, n_rows),
                quantized.floats(scales, self.parts["scales"].type),
                self._codes(raw["qzeros"].reshape(n_groups, -1), first, n_rows),
            )
        )

    def _codes(self, words: U8, first: int, n_rows: int) -> U8:
        """Rows of the codes in words uint8 (n, rows / 2): (n_rows, n)."""
        some = np.ascontiguousarray(words[:, first // 2 : (first + n_rows) // 2])
        codes = quantized.unpack(some, BITS).reshape(len(some), -1, 8)[..., _PLACE]
        return np.ascontiguousarray(codes.reshape(len(some), n_rows).T)


def linears(settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Read) -> dict[str, PackedLinear]:
    quantized.count(settings, "bits", (BITS,))
    if str(settings.get("version", "gemm")).lower() != "gemm":
        raise UnsupportedFormat(f"awq: version {settings['version']!r} is not read; known: gemm")
    if not settings.get("zero_point", True):
        raise UnsupportedFormat("awq: checkpoints without zeros are not read")
    found: dict[str, PackedLinear] = {}
    for stem in quantized.stems(tensors, ".qweight"):
        cols, n_words = quantized.matrix(tensors, f"{stem}.qweight")
        group = quantized.group_size(settings, settings.get("group_size"), stem, cols)
        parts = {
            "qweight": quantized.part(tensors, f"{stem}.qweight", ("i32",), (cols, n_words)),
            "scales": quantized.part(tensors, f"{stem}.scales", FLOATS, (cols // group, 8 * n_words)),
            "qzeros": quantized.part(tensors, f"{stem}.qzeros", ("i32",), (cols // group, n_words)),
        }
        name = f"{stem}.weight"
        found[name] = _Linear(name, (8 * n_words, cols), BITS, group, False, True, parts)
    return found
