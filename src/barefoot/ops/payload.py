"""Codes of few bits in bytes: the parts of which all weight formats are made.

Three kinds of payload carry the codes of 32 consecutive elements (a *chunk*):

* nibbles, 16 bytes: the low half of byte j is element j, the high half is element 16 + j;
* pairs, 8 bytes: bits 2k..2k+1 of byte j are element 8k + j (k = 0..3, j = 0..7);
* bits, 4 bytes: bit i of the 32-bit number is element i.

Codes of 8, 4, 2 and 1 bits are bytes, nibbles, pairs and bits; of 3 bits: pairs (the low two bits), then bits (the high
one); of 5 bits: bits (the high one), then nibbles; of 6 and 7 bits: nibbles (the low four bits), pairs (the next two)
and, of 7, bits (the high one). The super-blocks of GGUF files spread their codes in *fields*
instead: fields of the same few bytes, one after the other, belong to consecutive runs of elements.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

_SHIFTS_OF_2 = np.array([[0], [2], [4], [6]], np.uint8)


def pack_chunks(codes: U8, bits: int) -> U8:
    """Codes (..., 32) of 1 to 8 bits to payload bytes (..., 4 * bits)."""
    if bits == 8:
        return codes
    if bits in (6, 7):
        return np.concatenate(
            [pack_chunks(codes & np.uint8(15), 4), pack_chunks(codes >> np.uint8(4), bits - 4)], axis=-1
        )
    if bits == 5:
        return np.concatenate(
            [np.packbits(codes >> 4, axis=-1, bitorder="little"), pack_chunks(codes & np.uint8(15), 4)], axis=-1
        )
    if bits == 4:
        return codes[..., :16] | (codes[..., 16:] << np.uint8(4))
    if bits == 1:
        return np.packbits(codes, axis=-1, bitorder="little")
    fields = (codes & 3).reshape(*codes.shape[:-1], 4, 8)
    pairs: U8 = np.bitwise_or.reduce(fields << _SHIFTS_OF_2, axis=-2)
    if bits == 2:
        return pairs
    return np.concatenate([pairs, np.packbits(codes >> 2, axis=-1, bitorder="little")], axis=-1)


def unpack_chunks(payload: U8, bits: int) -> U8:
    """The inverse of ``pack_chunks``."""
    if bits == 8:
        return payload
    if bits in (6, 7):
        return nibbles(payload[..., :16]) | (unpack_chunks(payload[..., 16:], bits - 4) << np.uint8(4))
    if bits == 5:
        return nibbles(payload[..., 4:]) | (_bits(payload[..., :4]) << np.uint8(4))
    if bits == 4:
        return nibbles(payload)
    if bits == 1:
        return _bits(payload)
    fields = (payload[..., None, :8] >> _SHIFTS_OF_2) & np.uint8(3)
    codes = fields.reshape(*payload.shape[:-1], 32)
    return codes if bits == 2 else codes | (_bits(payload[..., 8:]) << np.uint8(2))


def nibbles(payload: U8) -> U8:
    """Low halves of (..., n) bytes, then their high halves: (..., 2 n)."""
    return np.concatenate([payload & np.uint8(15), payload >> np.uint8(4)], axis=-1)


def unpack_fields(payload: U8, n_shared: int, width: int) -> U8:
    """Fields of ``width`` bits, which lie in the same ``n_shared`` bytes one after the other: (n, elements)."""
    fields = (payload.reshape(len(payload), -1, 1, n_shared) >> _field_shifts(width)) & np.uint8((1 << width) - 1)
    return fields.reshape(len(payload), -1)


def pack_fields(codes: U8, n_shared: int, width: int) -> U8:
    """The inverse of ``unpack_fields``; higher bits of the codes are left out."""
    fields = (codes & np.uint8((1 << width) - 1)).reshape(len(codes), -1, 8 // width, n_shared)
    packed: U8 = np.bitwise_or.reduce(fields << _field_shifts(width), axis=2)
    return packed.reshape(len(codes), -1)


def f16_at(blocks: U8, at: int) -> F32:
    """The f16 numbers at byte ``at`` of each block, float32 (n, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def scaled(codes: npt.NDArray[np.generic], scales: F32, offsets: F32 | None = None) -> F32:
    """scale * code (+ offset), one scale per group; ``codes`` (n, elements), ``scales`` (n, groups)."""
    grouped = codes.reshape(*scales.shape, -1).astype(np.float32)
    weights = scales[..., None] * grouped
    if offsets is not None:
        weights += offsets[..., None]
    return weights.reshape(len(codes), -1)


def _bits(payload: U8) -> U8:
    return np.unpackbits(np.ascontiguousarray(payload), axis=-1, bitorder="little")


def _field_shifts(width: int) -> U8:
    return np.arange(0, 8, width, dtype=np.uint8).reshape(-1, 1)
