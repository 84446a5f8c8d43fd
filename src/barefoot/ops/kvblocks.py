"""Blocks of keys quantized by channel: the keys of ``group`` neighbouring positions of one head, head_dim channels.

KIVI (Liu et al. 2024, arXiv:2402.02750, section 3): a few channels of keys are large at every position, so each channel
gets a scale and a minimum of its own for every ``group`` positions (a multiple of 32):

    x = scale[c] * q + minimum[c],  q in 0 … 2^bits - 1,  scale = f16((maximum - minimum) / (2^bits - 1))

A block of ``bits`` 2, 3, 4 or 8:

* head_dim × f16 scales, then head_dim × f16 minimums;
* for each run of 32 positions the codes in words of 4 bytes: for each *chunk* of channels 32 words, one a position.
  Byte i of a word holds the codes of channels i, 4 + i, 8 + i … of its chunk, the first in the lowest bits: 4 channels
  of 8 bits, 8 of 4 bits, 16 of 2 bits. Codes of 3 bits are their low two bits as chunks of 16 channels, then their
  third ones as chunks of 32 channels. A last chunk that is not full has zeros. So a vector of words, shifted and
  masked, is 4 channels of as many positions, as instructions for products of bytes take them.

Bytes of a block: 4 × head_dim + group × (head_dim padded to whole chunks) × bits / 8. A channel that holds NaN or
infinity (or overflows f16) gets a NaN scale and zero codes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput
from barefoot.core.units import round_up

BITS = (2, 3, 4, 8)
RUN = 32  # positions whose codes lie together
_PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}  # widths of the parts that codes are stored in, the lowest first

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


def chunk(width: int) -> int:
    """Channels whose codes of ``width`` bits share 4 bytes."""
    return 32 // width


def block_bytes(bits: int, group: int, head_dim: int) -> int:
    """Bytes of ``group`` positions of one head.

    Raises
    ------
    InvalidInput : other bits than ``BITS``, or a group that is no multiple of 32.
    """
    if bits not in BITS:
        raise InvalidInput(f"keys by channel have {', '.join(map(str, BITS))} bits, got {bits}")
    if group <= 0 or group % RUN:
        raise InvalidInput(f"groups of positions must be a multiple of {RUN}, got {group}")
    codes = sum(round_up(head_dim, chunk(width)) * width // 8 for width in _PLANES[bits])
    return 4 * head_dim + group * codes


def encode(bits: int, keys: F32) -> U8:
    """Keys (..., group, head_dim) to blocks, uint8 (..., block_bytes)."""
    *outer, group, head_dim = keys.shape
    n_bytes = block_bytes(bits, group, head_dim)
    top = 2**bits - 1
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.asarray(np.isfinite(keys).all(axis=-2))
        x = np.where(finite[..., None, :], keys, np.float32(0))
        low16 = x.min(axis=-2).astype(np.float16)
        scale = ((x.max(axis=-2) - x.min(axis=-2)) / np.float32(top)).astype(np.float16)
        finite &= np.isfinite(scale) & np.isfinite(low16)
        scale, low16 = np.where(finite, scale, np.float16(np.nan)), np.where(finite, low16, np.float16(0))
        step = scale.astype(np.float32)
        inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=finite & (step != 0))
        steps = (x - low16.astype(np.float32)[..., None, :]) * inverse[..., None, :]
    codes = np.clip(np.rint(np.where(finite[..., None, :], steps, np.float32(0))), 0, top).astype(np.uint8)
    runs = codes.reshape(*outer, group // RUN, RUN, head_dim)
    parts, shift = [], 0
    for width in _PLANES[bits]:
        parts.append(_pack(runs >> np.uint8(shift) & np.uint8(2**width - 1), width))
        shift += width
    packed = np.concatenate(parts, axis=-1).reshape(*outer, -1)
    out = np.concatenate([scale.view(np.uint8), low16.view(np.uint8), packed], axis=-1)
    assert out.shape[-1] == n_bytes
    return out


def _pack(codes: U8, width: int) -> U8:
    """Codes (..., 32, head_dim) of ``width`` bits to bytes (..., n)."""
    *outer, run, head_dim = codes.shape
    n_chunks = -(-head_dim // chunk(width))
    padded = np.zeros((*outer, run, n_chunks * chunk(width)), np.uint8)
    padded[..., :head_dim] = codes
    words = padded.reshape(*outer, run, n_chunks, 8 // width, 4)
    out = np.zeros((*outer, run, n_chunks, 4), np.uint8)
    for i in range(8 // width):
        out |= words[..., i, :] << np.uint8(width * i)
    return np.ascontiguousarray(np.moveaxis(out, -2, -3)).reshape(*outer, -1)


def decode(bits: int, blocks: U8, group: int, head_dim: int) -> F32:
    """Blocks, uint8 (..., block_bytes), to float32 (..., group, head_dim)."""
    n_bytes = block_bytes(bits, group, head_dim)
    if blocks.shape[-1] != n_bytes:
        raise InvalidInput(f"a block of {group} × {head_dim} keys has {n_bytes} bytes, got {blocks.shape[-1]}")
    outer = blocks.shape[:-1]
    ranges = np.ascontiguousarray(blocks[..., : 4 * head_dim]).view(np.float16).astype(np.float32)
    packed = blocks[..., 4 * head_dim :].reshape(*outer, group // RUN, -1)
    codes = np.zeros((*outer, group // RUN, RUN, head_dim), np.uint8)
    at, shift = 0, 0
    for width in _PLANES[bits]:
        stop = at + RUN * round_up(head_dim, chunk(width)) * width // 8
        codes |= _unpack(packed[..., at:stop], width, head_dim) << np.uint8(shift)
        at, shift = stop, shift + width
    whole = codes.reshape(*outer, group, head_dim).astype(np.float32)
    scale, low = ranges[..., None, :head_dim], ranges[..., None, head_dim:]
    return np.asarray(scale * whole + low)


def _unpack(packed: U8, width: int, head_dim: int) -> U8:
    *outer, _ = packed.shape
    words = np.moveaxis(packed.reshape(*outer, -1, RUN, 4), -3, -2)  # (..., 32, chunks, 4)
    mask = np.uint8(2**width - 1)
    fields = np.stack([words >> np.uint8(shift) & mask for shift in range(0, 8, width)], axis=-2)
    return np.ascontiguousarray(fields).reshape(*outer, RUN, -1)[..., :head_dim]
