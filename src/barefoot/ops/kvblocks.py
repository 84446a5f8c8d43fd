"""Blocks of quantized keys, and of values: the codes of many positions of one head together.

KIVI (Liu et al. 2024, arXiv:2402.02750, section 3): a few channels of keys are large at every position, so each channel
gets a scale and a minimum of its own for every ``group`` positions (a multiple of 32). Values have no such channels:
each position gets them for every 32 channels (the last of them fewer). Or they are by channel, too (COMET, Liu et al.
2024, arXiv:2410.12168).

    x = scale * q + minimum,  q in 0 … 2^bits - 1,  scale = f16((maximum - minimum) / (2^bits - 1))

Attention sums keys over channels, and values over positions, so both are stored as matrices of *terms*, which sums go
over, by *lanes*. A block of keys is one matrix, its terms the channels and its lanes the positions. A block of values
by token is 32 positions, and for each 32 channels a matrix: its terms the positions and its lanes the channels. Here
terms have the ranges, which are factors of the queries, or of the weights, then. A matrix of ``bits`` 2, 3, 4 or 8:

* of each term the scale, f16; of each term the minimum, f16;
* for each run of 32 lanes (the last of them shorter), for each 32 terms (the last of them fewer), the codes in words of
  4 bytes: for each *chunk* of terms a word of every lane. The lower half of a word holds terms of the first half of
  these 32, the upper half those as far in the second: terms 0 and 16 in their lowest bits, then 1 and 17 …; fewer terms
  count as if zeros made them whole chunks. A chunk is 4 terms of 8 bits, 8 of 4 bits, 16 of 2 bits; codes of 3 bits are
  their low two bits, as those, and behind them their third ones, a chunk of 32.

So a vector of words, shifted and masked, is two terms of as many lanes, as instructions take them that add the products
of two pairs of 16 bits.

In a block of values by channel lanes have the ranges, which are factors of sums: of each of the head_dim channels the
scale, f16, of each the minimum, and then for each 32 of its ``group`` positions, for each 32 channels (the last of them
fewer), codes as above, their terms the positions.

Bytes: of a block of keys 4 × head_dim + group × (head_dim padded to whole chunks) × bits / 8; of a block of values by
token 128 for each 32 channels and 32 × head_dim × bits / 8, by channel 4 × head_dim + group × head_dim × bits / 8. What
has a range for numbers that are not finite (or overflow f16) gets a NaN scale and zero codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput
from barefoot.core.units import round_up

BITS = (2, 3, 4, 8)
RUN = 32  # lanes, and terms, whose codes lie together; positions of a block of values by token
_PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}  # widths of the parts that codes are stored in, the lowest first

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


def chunk(width: int) -> int:
    """Terms whose codes of ``width`` bits share 4 bytes."""
    return 32 // width


def block_bytes(bits: int, group: int, head_dim: int) -> int:
    """Bytes of the keys of ``group`` positions of one head.

    Raises
    ------
    InvalidInput : other bits than ``BITS``, or a group that is no multiple of 32.
    """
    _check_group(group)
    return _matrix_bytes(bits, head_dim, group)


def value_block_bytes(bits: int, head_dim: int) -> int:
    """Bytes of the values of 32 positions of one head.

    Raises
    ------
    InvalidInput : other bits than ``BITS``.
    """
    return sum(_matrix_bytes(bits, RUN, n) for n in _parts(head_dim))


def channel_block_bytes(bits: int, group: int, head_dim: int) -> int:
    """Bytes of the values of ``group`` positions of one head, by channel.

    Raises
    ------
    InvalidInput : other bits than ``BITS``, or a group that is no multiple of 32.
    """
    _check_group(group)
    return 4 * head_dim + group // RUN * _code_bytes(bits, RUN, head_dim)


def encode(bits: int, keys: F32) -> U8:
    """Keys (..., group, head_dim) to blocks, uint8 (..., block_bytes)."""
    *_, group, head_dim = keys.shape
    out = _encode(bits, keys.swapaxes(-1, -2))
    assert out.shape[-1] == block_bytes(bits, group, head_dim)
    return out


def decode(bits: int, blocks: U8, group: int, head_dim: int) -> F32:
    """Blocks of keys, uint8 (..., block_bytes), to float32 (..., group, head_dim)."""
    n_bytes = block_bytes(bits, group, head_dim)
    if blocks.shape[-1] != n_bytes:
        raise InvalidInput(f"a block of {group} × {head_dim} keys has {n_bytes} bytes, got {blocks.shape[-1]}")
    return np.ascontiguousarray(_decode(bits, blocks, head_dim, group).swapaxes(-1, -2))


def encode_values(bits: int, values: F32) -> U8:
    """Values (..., 32, head_dim) to blocks, uint8 (..., value_block_bytes)."""
    head_dim = values.shape[-1]
    out = np.concatenate([_encode(bits, part) for part in _split(values, _parts(head_dim))], axis=-1)
    assert out.shape[-1] == value_block_bytes(bits, head_dim)
    return out


def decode_values(bits: int, blocks: U8, head_dim: int) -> F32:
    """Blocks of values, uint8 (..., value_block_bytes), to float32 (..., 32, head_dim)."""
    n_bytes, widths = value_block_bytes(bits, head_dim), _parts(head_dim)
    if blocks.shape[-1] != n_bytes:
        raise InvalidInput(f"a block of {RUN} × {head_dim} values has {n_bytes} bytes, got {blocks.shape[-1]}")
    parts = _split(blocks, [_matrix_bytes(bits, RUN, n) for n in widths])
    return np.concatenate([_decode(bits, part, RUN, n) for part, n in zip(parts, widths, strict=True)], axis=-1)


def encode_channels(bits: int, values: F32) -> U8:
    """Values (..., group, head_dim) to blocks by channel, uint8 (..., channel_block_bytes)."""
    *_, group, head_dim = values.shape
    scale, low, codes = _quantize(bits, values.swapaxes(-1, -2))
    runs = np.split(codes.swapaxes(-1, -2), range(RUN, group, RUN), axis=-2)
    packed = [_pack(part, bits) for run in runs for part in _split(run, _parts(head_dim))]
    out = np.concatenate([scale, low, *packed], axis=-1)
    assert out.shape[-1] == channel_block_bytes(bits, group, head_dim)
    return out


def decode_channels(bits: int, blocks: U8, group: int, head_dim: int) -> F32:
    """Blocks of values by channel, uint8 (..., channel_block_bytes), to float32 (..., group, head_dim)."""
    n_bytes = channel_block_bytes(bits, group, head_dim)
    if blocks.shape[-1] != n_bytes:
        raise InvalidInput(f"a block of {group} × {head_dim} values has {n_bytes} bytes, got {blocks.shape[-1]}")
    ranges = np.ascontiguousarray(blocks[..., : 4 * head_dim]).view(np.float16).astype(np.float32)
    codes, at = np.empty((*blocks.shape[:-1], group, head_dim), np.float32), 4 * head_dim
    for position in range(0, group, RUN):
        for channel, n in zip(range(0, head_dim, RUN), _parts(head_dim), strict=True):
            stop = at + _code_bytes(bits, RUN, n)
            part = _unpack(blocks[..., at:stop], bits, RUN, n)
            codes[..., position : position + RUN, channel : channel + n] = part
            at = stop
    scale, low = ranges[..., None, :head_dim], ranges[..., None, head_dim:]
    return np.asarray(scale * codes + low)


def _check_group(group: int) -> None:
    if group <= 0 or group % RUN:
        raise InvalidInput(f"groups of positions must be a multiple of {RUN}, got {group}")


def _matrix_bytes(bits: int, n_terms: int, n_lanes: int) -> int:
    return 4 * n_terms + _code_bytes(bits, n_terms, n_lanes)


def _code_bytes(bits: int, n_terms: int, n_lanes: int) -> int:
    if bits not in BITS:
        raise InvalidInput(f"blocks have codes of {', '.join(map(str, BITS))} bits, got {bits}")
    return 4 * n_lanes * sum(round_up(n_terms, chunk(width)) * width // 32 for width in _PLANES[bits])


def _parts(n: int) -> list[int]:
    """``n`` in 32s, the last of them shorter."""
    return [min(RUN, n - at) for at in range(0, n, RUN)]


def _split(x: npt.NDArray[Any], sizes: list[int]) -> list[npt.NDArray[Any]]:
    return np.split(x, np.cumsum(sizes)[:-1], axis=-1)


def _quantize(bits: int, x: F32) -> tuple[U8, U8, U8]:
    """Scales and minimums along the last axis, as bytes (..., 2 n) of f16, and codes, of numbers (..., n, m)."""
    top = 2**bits - 1
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.asarray(np.isfinite(x).all(axis=-1))
        x = np.where(finite[..., None], x, np.float32(0))
        low16 = x.min(axis=-1).astype(np.float16)
        scale = ((x.max(axis=-1) - x.min(axis=-1)) / np.float32(top)).astype(np.float16)
        finite &= np.isfinite(scale) & np.isfinite(low16)
        scale, low16 = np.where(finite, scale, np.float16(np.nan)), np.where(finite, low16, np.float16(0))
        step = scale.astype(np.float32)
        inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=finite & (step != 0))
        steps = (x - low16.astype(np.float32)[..., None]) * inverse[..., None]
    codes = np.clip(np.rint(np.where(finite[..., None], steps, np.float32(0))), 0, top).astype(np.uint8)
    return scale.view(np.uint8), low16.view(np.uint8), codes


def _encode(bits: int, x: F32) -> U8:
    """Matrices (..., terms, lanes) to bytes."""
    scale, low, codes = _quantize(bits, x)
    *_, n_terms, n_lanes = x.shape
    packed = [
        _pack(part, bits)
        for run in _split(codes, _parts(n_lanes))
        for part in np.split(run, range(RUN, n_terms, RUN), axis=-2)
    ]
    return np.concatenate([scale, low, *packed], axis=-1)


def _decode(bits: int, packed: U8, n_terms: int, n_lanes: int) -> F32:
    """The matrices (..., terms, lanes) of bytes."""
    ranges = np.ascontiguousarray(packed[..., : 4 * n_terms]).view(np.float16).astype(np.float32)
    codes, at = np.empty((*packed.shape[:-1], n_terms, n_lanes), np.float32), 4 * n_terms
    for lane, n in zip(range(0, n_lanes, RUN), _parts(n_lanes), strict=True):
        for term, m in zip(range(0, n_terms, RUN), _parts(n_terms), strict=True):
            stop = at + _code_bytes(bits, m, n)
            codes[..., term : term + m, lane : lane + n] = _unpack(packed[..., at:stop], bits, m, n)
            at = stop
    scale, low = ranges[..., :n_terms, None], ranges[..., n_terms:, None]
    return np.asarray(scale * codes + low)


def _pack(codes: U8, bits: int) -> U8:
    """Codes (..., up to 32 terms, lanes) to bytes."""
    *outer, n_terms, n_lanes = codes.shape
    parts, taken = [], 0
    for width in _PLANES[bits]:
        whole = round_up(n_terms, chunk(width))
        own = np.zeros((*outer, whole, n_lanes), np.uint16)
        own[..., :n_terms, :] = codes >> np.uint8(taken) & np.uint8(2**width - 1)
        fields = own.reshape(*outer, 2, -1, 16 // width, n_lanes)  # half, chunk, field
        halves = (fields << (width * np.arange(16 // width, dtype=np.uint16))[:, None]).sum(axis=-2, dtype=np.uint16)
        words = np.ascontiguousarray(np.moveaxis(halves, -3, -1))  # chunk, lane, half
        parts.append(words.astype("<u2").reshape(*outer, -1).view(np.uint8))
        taken += width
    return np.concatenate(parts, axis=-1)


def _unpack(packed: U8, bits: int, n_terms: int, n_lanes: int) -> U8:
    *outer, _ = packed.shape
    codes, at, taken = np.zeros((*outer, n_terms, n_lanes), np.uint8), 0, 0
    for width in _PLANES[bits]:
        stop = at + 4 * n_lanes * (round_up(n_terms, chunk(width)) // chunk(width))
        words = np.ascontiguousarray(packed[..., at:stop]).view("<u2").reshape(*outer, -1, n_lanes, 2)
        halves = np.moveaxis(words, -1, -3)[..., None, :]  # half, chunk, field, lane
        fields = halves >> (width * np.arange(16 // width, dtype=np.uint16))[:, None] & np.uint16(2**width - 1)
        own = fields.reshape(*outer, -1, n_lanes)[..., :n_terms, :]
        codes |= own.astype(np.uint8) << np.uint8(taken)
        at, taken = stop, taken + width
    return codes
