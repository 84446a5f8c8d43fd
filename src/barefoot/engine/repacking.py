"""Matrices that other programs quantized, in barefoot's blocks: codes and scales as they are.

Such a matrix means w = scale × (code − zero). Blocks hold the same code and the scale as f16:

* symmetric: every zero is 2^(bits - 1), and so is the block's. Exact where the scale is an f16 number.
* asymmetric: w = scale × code + minimum, where the minimum is −scale × zero rounded to f16: off by at most half a unit
  in its last place, zero × 2^-11 of a step, where the code's own rounding is half a step.
* scattered groups (act-order): f16, rounded from scale × (code − zero), as the kernels compute it that run such files.

Scales of bf16 are f16 numbers from 2^-17 to 2^15; what f16 can't reach is refused. A group larger than a block repeats
its scale.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import UnsupportedFormat
from barefoot.core.units import round_up
from barefoot.io.quantized import PackedLinear, Raw, Tile
from barefoot.ops import blocks
from barefoot.ops.grids import F16_MAX, to_f16

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

REPACKED_ROWS = 32  # whose codes share words in every layout


def repacked(linear: PackedLinear, raw: Raw, first: int, n_rows: int) -> U8:
    """Rows of a matrix in blocks of ``linear.type``, uint8 (n_rows, row_bytes), from the bytes of its parts.

    Raises
    ------
    CorruptFile : numbers that contradict the checkpoint's settings.
    UnsupportedFormat : scales beyond those of f16.
    """
    start = first - first % REPACKED_ROWS
    stop = min(round_up(first + n_rows, REPACKED_ROWS), linear.shape[0])
    tile = linear.tile(raw, start, stop - start)
    wanted = slice(first - start, first - start + n_rows)
    tile = Tile(tile.codes[wanted], tile.scales[wanted], tile.zeros[wanted])
    highest = float(np.abs(tile.scales).max())
    if highest > F16_MAX:
        raise UnsupportedFormat(f"{linear.name}: scales up to {highest:g}, beyond those of f16")
    groups = linear.group_of_column(raw)
    if not linear.in_order:
        steps = tile.codes.astype(np.float32)
        steps -= tile.zeros[:, groups]
        steps *= tile.scales[:, groups]
        return blocks.encode("f16", steps)
    scales = to_f16(tile.scales)
    params = [scales] if linear.symmetric else [scales, to_f16(-scales * tile.zeros)]
    repeats = linear.group // blocks.block_elements(linear.type)
    each: F32 = np.repeat(np.stack(params, axis=-1), repeats, axis=1)
    return blocks.pack(linear.type, tile.codes, each)
