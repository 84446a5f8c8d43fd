"""The dithered reference: quantized weights plus uniform noise of half a step either way.

A file that is itself 4-bit makes its own grid look lossless. With noise of ± half a quantization step on every weight
(independent, fixed seed) the reference has no grid, and formats are compared fairly. The step of each weight is read
off its own block: flipping the lowest bit of a code moves the weight by exactly one step.
"""

from __future__ import annotations

import numpy as np

from barefoot.core.errors import unknown_name
from barefoot.ops import blocks
from barefoot.ops.payload import F32, U8

_LOWEST_BITS: dict[str, tuple[int, int, int]] = {
    # format: (first byte of a block's codes, end, mask of the lowest bit of each code)
    "q4_0": (2, 18, 0x11),
    "q4_1": (4, 20, 0x11),
    "q5_0": (6, 22, 0x11),
    "q5_1": (8, 24, 0x11),
    "q8_0": (2, 34, 0x01),
    "q2_k": (16, 80, 0x55),
    "q3_k": (32, 96, 0x55),
    "q4_k": (16, 144, 0x11),
    "q5_k": (48, 176, 0x11),
    "q6_k": (0, 128, 0x11),
    "tq2_0": (0, 64, 0x55),
}


def steps(format_id: str, rows: U8, n_cols: int) -> F32:
    """The quantization step at each weight, float32 (n_rows, n_cols), from uint8 (n_rows, row_bytes)."""
    if format_id not in _LOWEST_BITS:
        raise unknown_name("quantized file format", format_id, _LOWEST_BITS)
    start, end, mask = _LOWEST_BITS[format_id]
    flipped = rows.copy().reshape(-1, blocks.block_bytes(format_id))
    flipped[:, start:end] ^= mask
    there = blocks.decode(format_id, flipped.reshape(rows.shape), n_cols)
    step: F32 = np.abs(there - blocks.decode(format_id, rows, n_cols))
    return step


def dither(format_id: str, rows: U8, n_cols: int, rng: np.random.Generator) -> F32:
    """The weights that ``rows`` store, each moved by uniform noise of at most half a step; floats come as they are."""
    weights = blocks.decode(format_id, rows, n_cols)
    if format_id not in _LOWEST_BITS:
        return weights
    noise = rng.random(weights.shape, dtype=np.float32) - np.float32(0.5)
    return weights + noise * steps(format_id, rows, n_cols)
