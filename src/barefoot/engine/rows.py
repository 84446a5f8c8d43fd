"""Rows of a weight as barefoot's blocks, whatever the file keeps them as."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.model import WeightSpec
from barefoot.io.inventory import Checkpoint
from barefoot.ops import PackedWeight, blocks

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


def read_rows(checkpoint: Checkpoint, weight: WeightSpec, first: int = 0, n_rows: int | None = None) -> U8:
    """Rows of a weight in its stored format, uint8 (n_rows, row_bytes); all from ``first`` on without ``n_rows``."""
    n_rows = weight.rows - first if n_rows is None else n_rows
    rows = np.empty((n_rows, blocks.row_bytes(weight.format, weight.cols)), np.uint8)
    checkpoint.read_into(weight.source, rows, weight.row_start + first, n_rows)
    return rows


def decode(format_id: str, rows: U8, cols: int) -> F32:
    """Stored rows as float32 (n, cols), by the kernels."""
    out = np.empty((len(rows), cols), np.float32)
    packed = PackedWeight(format_id, len(rows), cols, np.ascontiguousarray(rows).reshape(-1))
    ops.embed(np.arange(len(rows), dtype=np.int32), packed, out)
    return out
