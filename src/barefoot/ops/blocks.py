"""Weight formats: how a row of numbers is stored as bytes. The single source of their sizes.

A matrix ``[rows, cols]`` is stored row by row; a row is a sequence of blocks along ``cols``. Every quantized format
means ``w = scale * (code - zero) + offset`` with one scale (and offset) per group of 16 or more elements. All numbers
of more than one byte are little-endian; "bits 2k..2k+1 of byte j" counts from the least significant bit.

Three kinds of payload carry the codes of 32 consecutive elements (a *chunk*):

* nibbles, 16 bytes: the low half of byte j is element j, the high half is element 16 + j;
* pairs, 8 bytes: bits 2k..2k+1 of byte j are element 8k + j (k = 0..3, j = 0..7);
* bits, 4 bytes: bit i of the 32-bit number is element i.

Own integer groups, ``int{8,4,3,2}_g{32,64,128}_{sym,asym}`` and ``int1_g{32,64,128}_asym``: a block is one group of 32,
64 or 128 elements:

====== ========================================================================================
bytes  content
====== ========================================================================================
0-1    scale, f16
2-3    minimum, f16; only in ``asym``
rest   one chunk after the other. int8: 32 bytes, byte j is element j. int4: nibbles. int2: pairs.
       int3: pairs (the low two bits of each code), then bits (the high bit): 12 bytes. int1: bits.
====== ========================================================================================

``asym``: w = scale * q + minimum; ``sym``: w = scale * (q - 2^(b-1)); q in 0..2^b - 1. Example: ``int4_g32_asym``
stores 32 weights in 4 + 16 = 20 bytes, 5 bits a weight; its first code is ``row[4] & 15``, the 17th ``row[4] >> 4``.

``ternary_g{32,64,128}``: scale, f16; then pairs; w = scale * (q - 1), q in 0..2. Two bits are stored where
log2(3) = 1.58 would do: the planes of two bits are what the products read. With g128, 2.125 bits a weight.

Blocks of GGUF files (q4_0 .. q6_k) are carried exactly as the file has them; each is described at its decoder. The
arithmetic of ``decode`` is that of the ``gguf`` package's ``dequantize``, float32, in the same order, so the results
are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import Incompatible, InvalidInput, unknown_name

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

F16_MAX = 65504.0
GROUP_SIZES = (32, 64, 128)
INTEGER_BITS = (8, 4, 3, 2)
SHIFTS_OF_2 = np.array([[0], [2], [4], [6]], np.uint8)


@dataclass(frozen=True)
class Group:
    """Blocks that are one group: an f16 scale, an f16 minimum in some, and chunks of codes after this header."""

    bits: int
    has_minimum: bool = False
    signed: bool = False  # 8-bit codes stored as two's complement: code 0 is the byte 0x80
    zero: int = 0  # the code that stands for 0 where there is no minimum

    @property
    def header_bytes(self) -> int:
        return 4 if self.has_minimum else 2


@dataclass(frozen=True)
class BlockFormat:
    """One way of storing a row. ``decode_blocks``: uint8 (n, block_bytes) → float32 (n, block_elements).

    ``group`` describes the blocks that have a single scale; None for dense weights and super-blocks.
    """

    name: str
    block_elements: int
    block_bytes: int
    decode_blocks: Callable[[U8], F32]
    encode_blocks: Callable[[F32], U8] | None = None
    group: Group | None = None


_FORMATS: dict[str, BlockFormat] = {}


def names() -> tuple[str, ...]:
    """Every format id: dense, then GGUF blocks, then integer groups."""
    return tuple(_FORMATS)


def lookup(format_id: str) -> BlockFormat:
    """The format of that id; InvalidInput with the nearest names if there is none."""
    try:
        return _FORMATS[format_id]
    except KeyError:
        raise unknown_name("weight format", format_id, _FORMATS) from None


def block_elements(format_id: str) -> int:
    """Weights in one block; the columns of a matrix must be a multiple of it."""
    return lookup(format_id).block_elements


def block_bytes(format_id: str) -> int:
    """Bytes of one block, header included."""
    return lookup(format_id).block_bytes


def bits_per_weight(format_id: str) -> float:
    """Stored bits a weight, scales included."""
    fmt = lookup(format_id)
    return 8 * fmt.block_bytes / fmt.block_elements


def row_bytes(format_id: str, n_cols: int) -> int:
    """Bytes of one row of ``n_cols`` weights.

    Raises
    ------
    Incompatible : ``n_cols`` is not a multiple of the block; the message names the group sizes that divide it.
    """
    fmt = lookup(format_id)
    if n_cols % fmt.block_elements:
        fitting = [str(g) for g in GROUP_SIZES if n_cols % g == 0]
        raise Incompatible(
            f"{format_id} stores blocks of {fmt.block_elements} columns, and {n_cols} columns are not a multiple",
            cure=f"use a format with groups of {' or '.join(fitting)}" if fitting else "use f32, f16 or bf16",
        )
    return n_cols // fmt.block_elements * fmt.block_bytes


def n_blocks(format_id: str, n_cols: int) -> int:
    """Blocks in one row of ``n_cols`` weights; Incompatible as for ``row_bytes``."""
    return row_bytes(format_id, n_cols) // block_bytes(format_id)


def parts(format_id: str) -> tuple[tuple[str, int], ...]:
    """What a block is made of, (name, bytes) each: the terms in which the ledger counts it."""
    fmt = lookup(format_id)
    if fmt.block_elements == 1:
        return (("values", fmt.block_bytes),)
    if fmt.encode_blocks is None or fmt.group is None:
        return (("blocks", fmt.block_bytes),)
    scales = (("scales", 2), ("minimums", 2)) if fmt.group.has_minimum else (("scales", 2),)
    return (("codes", fmt.block_bytes - fmt.group.header_bytes), *scales)


def encode(format_id: str, weights: F32) -> U8:
    """Round ``weights`` (rows, cols) float32 to the nearest codes: uint8 (rows, row_bytes).

    Scales and minimums are rounded to f16 before the codes are chosen, so the codes fit the stored scale. ``sym`` puts
    the element of largest magnitude on the code 0 (its scale may be negative).

    Raises
    ------
    Incompatible : the format is a GGUF block (carried, never made here), or the columns don't fill whole blocks.
    InvalidInput : NaN or infinite weights in a quantized format.
    """
    fmt = lookup(format_id)
    n_rows, n_cols = weights.shape
    n_bytes = row_bytes(format_id, n_cols)
    if fmt.encode_blocks is None:
        raise Incompatible(
            f"{format_id} blocks are carried from GGUF files, not made from weights", cure="use an int*_g* format"
        )
    blocks = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1, fmt.block_elements)
    if fmt.block_elements > 1 and not np.isfinite(blocks).all():
        raise InvalidInput(f"weights hold NaN or infinity, which {format_id} can't store", cure="use f32, f16 or bf16")
    return fmt.encode_blocks(blocks).reshape(n_rows, n_bytes)


def decode(format_id: str, rows: U8, n_cols: int) -> F32:
    """The weights float32 (n_rows, n_cols) that ``rows`` uint8 (n_rows, row_bytes) store."""
    fmt = lookup(format_id)
    n_bytes = row_bytes(format_id, n_cols)
    if rows.ndim != 2 or rows.shape[1] != n_bytes:
        raise InvalidInput(f"rows of {n_cols} {format_id} weights have shape (n, {n_bytes}), got {rows.shape}")
    blocks = np.ascontiguousarray(rows).reshape(-1, fmt.block_bytes)
    return fmt.decode_blocks(blocks).reshape(rows.shape[0], n_cols)


# --- parts that several formats share -------------------------------------------------------------------------------


def _register(
    name: str, elements: int, n_bytes: int, group: Group | None = None
) -> Callable[[Callable[[U8], F32]], Callable[[U8], F32]]:
    def add(decode_blocks: Callable[[U8], F32]) -> Callable[[U8], F32]:
        _FORMATS[name] = BlockFormat(name, elements, n_bytes, decode_blocks, group=group)
        return decode_blocks

    return add


def _f16(blocks: U8, at: int) -> F32:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(payload: U8) -> U8:
    return np.concatenate([payload & 15, payload >> 4], axis=-1)


def _bits(payload: U8) -> U8:
    return np.unpackbits(np.ascontiguousarray(payload), axis=-1, bitorder="little")


def _fields(payload: U8, per_chunk: int, width: int, n_fields: int) -> U8:
    """Bit fields of ``width`` bits that lie in the same ``per_chunk`` bytes, field after field: (n, chunks, 32)."""
    shifts = np.arange(0, width * n_fields, width, dtype=np.uint8).reshape(1, 1, n_fields, 1)
    codes = (payload.reshape(len(payload), -1, 1, per_chunk) >> shifts) & np.uint8((1 << width) - 1)
    return codes.reshape(len(payload), -1, 32)


def _scaled(codes: npt.NDArray[np.generic], scales: F32, offsets: F32 | None = None) -> F32:
    """scale * code (+ offset), one scale per group; ``codes`` (n, elements), ``scales`` (n, groups)."""
    grouped = codes.reshape(*scales.shape, -1).astype(np.float32)
    weights = scales[..., None] * grouped
    if offsets is not None:
        weights += offsets[..., None]
    return weights.reshape(len(codes), -1)


# --- dense ----------------------------------------------------------------------------------------------------------


def _bf16_encode(weights: F32) -> U8:
    bits = weights.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(weights), quiet_nan, rounded).astype(np.uint16).view(np.uint8)


def _f16_encode(weights: F32) -> U8:
    with np.errstate(over="ignore"):
        return weights.astype(np.float16).view(np.uint8)


_FORMATS["f32"] = BlockFormat("f32", 1, 4, lambda b: b.view(np.float32).copy(), lambda w: w.view(np.uint8))
_FORMATS["f16"] = BlockFormat("f16", 1, 2, lambda b: _f16(b, 0), _f16_encode)
_FORMATS["bf16"] = BlockFormat(
    "bf16", 1, 2, lambda b: (b.view(np.uint16).astype(np.uint32) << 16).view(np.float32), _bf16_encode
)


# --- GGUF blocks of 32 ----------------------------------------------------------------------------------------------


@_register("q4_0", 32, 18, Group(4, zero=8))
def _q4_0(blocks: U8) -> F32:
    """0-1 d; 2-17 nibbles; w = d * (q - 8)."""
    return _scaled(_nibbles(blocks[:, 2:]).astype(np.int8) - 8, _f16(blocks, 0))


@_register("q4_1", 32, 20, Group(4, has_minimum=True))
def _q4_1(blocks: U8) -> F32:
    """0-1 d; 2-3 m; 4-19 nibbles; w = d * q + m."""
    return _scaled(_nibbles(blocks[:, 4:]), _f16(blocks, 0), _f16(blocks, 2))


@_register("q5_0", 32, 22, Group(5, zero=16))
def _q5_0(blocks: U8) -> F32:
    """0-1 d; 2-5 bits (the fifth bit); 6-21 nibbles; w = d * (q - 16)."""
    codes = unpack_chunks(blocks[:, 2:], 5)
    return _scaled(codes.astype(np.int8) - 16, _f16(blocks, 0))


@_register("q5_1", 32, 24, Group(5, has_minimum=True))
def _q5_1(blocks: U8) -> F32:
    """0-1 d; 2-3 m; 4-7 bits (the fifth bit); 8-23 nibbles; w = d * q + m."""
    return _scaled(unpack_chunks(blocks[:, 4:], 5), _f16(blocks, 0), _f16(blocks, 2))


@_register("q8_0", 32, 34, Group(8, signed=True))
def _q8_0(blocks: U8) -> F32:
    """0-1 d; 2-33 signed bytes; w = d * q."""
    return _scaled(blocks[:, 2:].view(np.int8), _f16(blocks, 0))


# --- GGUF super-blocks of 256: eight chunks of 32 -------------------------------------------------------------------


def _six_bit_pairs(packed: U8) -> tuple[F32, F32]:
    """Eight 6-bit scales and eight 6-bit minimums in 12 bytes.

    Bytes 0-3 and 4-7 hold scales 0-3 and minimums 0-3 in their low six bits; bytes 8-11 hold the low four bits of
    scales 4-7 (low half) and of minimums 4-7 (high half), whose two high bits are the top bits of bytes 0-3 and 4-7.
    """
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=1)
    minimums = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=1)
    return scales.astype(np.float32), minimums.astype(np.float32)


@_register("q2_k", 256, 84)
def _q2_k(blocks: U8) -> F32:
    """0-15 scale (low half) and minimum (high half) of each 16; 16-79 codes; 80-81 d; 82-83 dmin.

    Chunk c takes bits 2(c % 4).. of the 32 code bytes of its half c // 4. w = d * scale * q - dmin * minimum.
    """
    scales, d, dmin = blocks[:, :16], _f16(blocks, 80), _f16(blocks, 82)
    codes = _fields(blocks[:, 16:80], 32, 2, 4)
    return _scaled(
        codes.reshape(-1, 256), d * (scales & 15).astype(np.float32), -(dmin * (scales >> 4).astype(np.float32))
    )


@_register("q3_k", 256, 110)
def _q3_k(blocks: U8) -> F32:
    """0-31 high bits; 32-95 low two bits (as q2_k); 96-107 scales of each 16; 108-109 d.

    w = d * (scale - 32) * (q - 4). The high bit of chunk c is bit c of the 32 bytes 0-31. Scale j: low half of byte j
    (j < 8) or high half of byte j - 8, and two high bits at bit 2(j // 4) of byte 8 + j % 4.
    """
    packed = blocks[:, 96:108]
    high = (packed[:, None, 8:] >> SHIFTS_OF_2) & 3
    scales = _nibbles(packed[:, :8]) | (high.reshape(-1, 16) << 4)
    codes = _fields(blocks[:, 32:96], 32, 2, 4) | (_fields(blocks[:, :32], 32, 1, 8) << 2)
    return _scaled(
        codes.reshape(-1, 256).astype(np.int8) - 4, _f16(blocks, 108) * (scales.astype(np.int8) - 32).astype(np.float32)
    )


@_register("q4_k", 256, 144)
def _q4_k(blocks: U8) -> F32:
    """0-1 d; 2-3 dmin; 4-15 six-bit scales and minimums of each 32; 16-143 codes; w = d * scale * q - dmin * minimum.

    Chunks 2i and 2i + 1 are the low and high halves of code bytes 32i .. 32i + 31.
    """
    scales, minimums = _six_bit_pairs(blocks[:, 4:16])
    codes = _fields(blocks[:, 16:], 32, 4, 2)
    return _scaled(codes.reshape(-1, 256), _f16(blocks, 0) * scales, -(_f16(blocks, 2) * minimums))


@_register("q5_k", 256, 176)
def _q5_k(blocks: U8) -> F32:
    """As q4_k, with bytes 16-47 before the codes: bit c of byte 16 + j is the fifth bit of element j of chunk c."""
    scales, minimums = _six_bit_pairs(blocks[:, 4:16])
    codes = _fields(blocks[:, 48:], 32, 4, 2) | (_fields(blocks[:, 16:48], 32, 1, 8) << 4)
    return _scaled(codes.reshape(-1, 256), _f16(blocks, 0) * scales, -(_f16(blocks, 2) * minimums))


@_register("q6_k", 256, 210)
def _q6_k(blocks: U8) -> F32:
    """0-127 low four bits; 128-191 high two bits; 192-207 signed scales of each 16; 208-209 d.

    w = d * scale * (q - 32). Half h = c // 4, j = c % 4: chunk c takes half j // 2 of low bytes 64h + 32(j % 2) ..
    64h + 32(j % 2) + 31, and bits 2j.. of high bytes 32h .. 32h + 31.
    """
    low = _fields(blocks[:, :128], 64, 4, 2)
    high = _fields(blocks[:, 128:192], 32, 2, 4)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    codes = (low | (high << 4)).reshape(-1, 256).astype(np.int8) - 32
    return _scaled(codes, _f16(blocks, 208) * scales)


# --- own integer groups ---------------------------------------------------------------------------------------------


def pack_chunks(codes: U8, bits: int) -> U8:
    """Codes (..., 32) of 1, 2, 3, 4, 5 or 8 bits to payload bytes (..., 4 * bits)."""
    if bits == 8:
        return codes
    if bits == 5:
        return np.concatenate(
            [np.packbits(codes >> 4, axis=-1, bitorder="little"), pack_chunks(codes & np.uint8(15), 4)], axis=-1
        )
    if bits == 4:
        return codes[..., :16] | (codes[..., 16:] << np.uint8(4))
    if bits == 1:
        return np.packbits(codes, axis=-1, bitorder="little")
    fields = (codes & 3).reshape(*codes.shape[:-1], 4, 8)
    pairs: U8 = np.bitwise_or.reduce(fields << SHIFTS_OF_2, axis=-2)
    if bits == 2:
        return pairs
    return np.concatenate([pairs, np.packbits(codes >> 2, axis=-1, bitorder="little")], axis=-1)


def unpack_chunks(payload: U8, bits: int) -> U8:
    """The inverse of ``pack_chunks``."""
    if bits == 8:
        return payload
    if bits == 5:
        return _nibbles(payload[..., 4:]) | (_bits(payload[..., :4]) << np.uint8(4))
    if bits == 4:
        return _nibbles(payload)
    if bits == 1:
        return _bits(payload)
    fields = (payload[..., None, :8] >> SHIFTS_OF_2) & np.uint8(3)
    codes = fields.reshape(*payload.shape[:-1], 32)
    return codes if bits == 2 else codes | (_bits(payload[..., 8:]) << np.uint8(2))


def _to_f16(values: F32) -> npt.NDArray[np.float16]:
    return np.clip(values, -F16_MAX, F16_MAX).astype(np.float16)


def _two_means(weights: F32) -> tuple[F32, F32]:
    """The means of the lower and the upper part of each row, split half-way between them (Lloyd's iteration)."""
    low, high = weights.min(axis=1), weights.max(axis=1)
    for _ in range(8):
        upper = weights > ((low + high) / 2)[:, None]
        n_upper = upper.sum(axis=1)
        total_upper = weights.sum(axis=1, where=upper)
        total_lower = weights.sum(axis=1, where=~upper)
        high = np.where(n_upper > 0, total_upper / np.maximum(n_upper, 1), high).astype(np.float32)
        low = (total_lower / np.maximum(weights.shape[1] - n_upper, 1)).astype(np.float32)
    return low, high


def _integer_group(bits: int, group: int, symmetric: bool) -> BlockFormat:
    levels, half = (1 << bits) - 1, 1 << (bits - 1)
    stored = Group(bits, has_minimum=not symmetric, zero=half if symmetric else 0)
    header = stored.header_bytes
    n_bytes = header + group * bits // 8

    def decode_blocks(blocks: U8) -> F32:
        payload = blocks[:, header:].reshape(len(blocks), group // 32, -1)
        codes = unpack_chunks(payload, bits).reshape(len(blocks), group)
        if symmetric:
            return _scaled(codes.astype(np.int16) - half, _f16(blocks, 0))
        return _scaled(codes, _f16(blocks, 0), _f16(blocks, 2))

    def encode_blocks(weights: F32) -> U8:
        if symmetric:
            extreme = np.take_along_axis(weights, np.abs(weights).argmax(axis=1, keepdims=True), axis=1)
            headers = [_to_f16(extreme / np.float32(-half))]
            shifted, zero = weights, half
        else:
            low, high = _two_means(weights) if bits == 1 else (weights.min(axis=1), weights.max(axis=1))
            minimum = _to_f16(low[:, None])
            shifted, zero = weights - minimum.astype(np.float32), 0
            headers = [_to_f16((high[:, None] - minimum.astype(np.float32)) / np.float32(levels)), minimum]
        step = headers[0].astype(np.float32)
        ratio = np.divide(shifted, step, out=np.zeros_like(shifted), where=step != 0)
        codes = np.clip(np.rint(ratio) + zero, 0, levels).astype(np.uint8)
        payload = pack_chunks(codes.reshape(len(weights), group // 32, 32), bits)
        return np.concatenate([*(h.view(np.uint8) for h in headers), payload.reshape(len(weights), -1)], axis=1)

    name = f"int{bits}_g{group}_{'sym' if symmetric else 'asym'}"
    return BlockFormat(name, group, n_bytes, decode_blocks, encode_blocks, stored)


for _bits_each in INTEGER_BITS:
    for _group in GROUP_SIZES:
        for _symmetric in (True, False):
            _format = _integer_group(_bits_each, _group, _symmetric)
            _FORMATS[_format.name] = _format
for _group in GROUP_SIZES:
    _format = _integer_group(1, _group, False)
    _FORMATS[_format.name] = _format


# --- ternary groups -------------------------------------------------------------------------------------------------


def _ternary_group(group: int) -> BlockFormat:
    def decode_blocks(blocks: U8) -> F32:
        codes = unpack_chunks(blocks[:, 2:].reshape(len(blocks), group // 32, -1), 2).reshape(len(blocks), group)
        return _scaled(codes.astype(np.int8) - 1, _f16(blocks, 0))

    def encode_blocks(weights: F32) -> U8:
        magnitude = np.abs(weights)
        kept = magnitude > np.float32(0.7) * magnitude.mean(axis=1, keepdims=True)
        scale = _to_f16(
            magnitude.sum(axis=1, keepdims=True, where=kept) / np.maximum(kept.sum(axis=1, keepdims=True), 1)
        )
        codes = (1 + np.sign(weights) * kept).astype(np.uint8)
        payload = pack_chunks(codes.reshape(len(weights), group // 32, 32), 2).reshape(len(weights), -1)
        return np.concatenate([scale.view(np.uint8), payload], axis=1)

    stored = Group(2, zero=1)
    return BlockFormat(f"ternary_g{group}", group, 2 + group // 4, decode_blocks, encode_blocks, stored)


for _group in GROUP_SIZES:
    _format = _ternary_group(_group)
    _FORMATS[_format.name] = _format
