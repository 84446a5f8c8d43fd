"""Weight formats: how a row of numbers is stored as bytes. The single source of their sizes.

A matrix ``[rows, cols]`` is stored row by row; a row is a sequence of blocks along ``cols``. Every quantized format
means ``w = scale * (code - zero) + offset`` with one scale (and offset) per group of 16 or more elements. All numbers
of more than one byte are little-endian; "bits 2k..2k+1 of byte j" counts from the least significant bit. Codes lie in
chunks of 32, as nibbles, pairs and bits: ``barefoot.ops.payload``.

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

Blocks of GGUF files are carried exactly as the file has them; those of 32 are described at their decoders, those of
256 in ``barefoot.ops.superblocks``. The arithmetic of ``decode`` is that of the ``gguf`` package's ``dequantize``,
float32, in the same order, so the results are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import Incompatible, InvalidInput, unknown_name
from barefoot.ops import superblocks
from barefoot.ops.payload import F32, U8, f16_at, nibbles, pack_chunks, scaled, unpack_chunks

F16_MAX = 65504.0
GROUP_SIZES = (32, 64, 128)
INTEGER_BITS = (8, 4, 3, 2)


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

    @property
    def numbers_bytes(self) -> int:
        return self.header_bytes

    @property
    def scales_bytes(self) -> int:
        return 0

    def split(self, blocks: U8) -> tuple[U8, U8, U8]:
        """``blocks`` uint8 (n, bytes) as the bytes of their f16 numbers, of no sub-scales, and codes (n, elements).

        Signed codes come as q + 128.
        """
        payload = blocks[:, self.header_bytes :].reshape(len(blocks), -1, 4 * self.bits)
        codes = unpack_chunks(payload, self.bits).reshape(len(blocks), -1)
        return blocks[:, : self.header_bytes], blocks[:, :0], codes ^ np.uint8(0x80 if self.signed else 0)

    def join(self, numbers: U8, scales: U8, codes: U8) -> U8:
        """The inverse of ``split``."""
        chunks = (codes ^ np.uint8(0x80 if self.signed else 0)).reshape(len(codes), -1, 32)
        return np.concatenate([numbers, scales, pack_chunks(chunks, self.bits).reshape(len(codes), -1)], axis=1)


@dataclass(frozen=True)
class BlockFormat:
    """One way of storing a row. ``decode_blocks``: uint8 (n, block_bytes) → float32 (n, block_elements).

    ``group`` describes the blocks that have a single scale before their codes, ``super_block`` those of 256 weights;
    both None for dense weights and where codes can't be told apart (tq1_0).
    """

    name: str
    block_elements: int
    block_bytes: int
    decode_blocks: Callable[[U8], F32]
    encode_blocks: Callable[[F32], U8] | None = None
    group: Group | None = None
    super_block: superblocks.SuperBlock | None = None

    @property
    def anatomy(self) -> Group | superblocks.SuperBlock | None:
        """What takes blocks apart, into scales and codes, and puts them together again."""
        return self.group or self.super_block


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
_FORMATS["f16"] = BlockFormat("f16", 1, 2, lambda b: f16_at(b, 0), _f16_encode)
_FORMATS["bf16"] = BlockFormat(
    "bf16", 1, 2, lambda b: (b.view(np.uint16).astype(np.uint32) << 16).view(np.float32), _bf16_encode
)


# --- GGUF blocks of 32 ----------------------------------------------------------------------------------------------


@_register("q4_0", 32, 18, Group(4, zero=8))
def _q4_0(blocks: U8) -> F32:
    """0-1 d; 2-17 nibbles; w = d * (q - 8)."""
    return scaled(nibbles(blocks[:, 2:]).astype(np.int8) - 8, f16_at(blocks, 0))


@_register("q4_1", 32, 20, Group(4, has_minimum=True))
def _q4_1(blocks: U8) -> F32:
    """0-1 d; 2-3 m; 4-19 nibbles; w = d * q + m."""
    return scaled(nibbles(blocks[:, 4:]), f16_at(blocks, 0), f16_at(blocks, 2))


@_register("q5_0", 32, 22, Group(5, zero=16))
def _q5_0(blocks: U8) -> F32:
    """0-1 d; 2-5 bits (the fifth bit); 6-21 nibbles; w = d * (q - 16)."""
    codes = unpack_chunks(blocks[:, 2:], 5)
    return scaled(codes.astype(np.int8) - 16, f16_at(blocks, 0))


@_register("q5_1", 32, 24, Group(5, has_minimum=True))
def _q5_1(blocks: U8) -> F32:
    """0-1 d; 2-3 m; 4-7 bits (the fifth bit); 8-23 nibbles; w = d * q + m."""
    return scaled(unpack_chunks(blocks[:, 4:], 5), f16_at(blocks, 0), f16_at(blocks, 2))


@_register("q8_0", 32, 34, Group(8, signed=True))
def _q8_0(blocks: U8) -> F32:
    """0-1 d; 2-33 signed bytes; w = d * q."""
    return scaled(blocks[:, 2:].view(np.int8), f16_at(blocks, 0))


# --- GGUF super-blocks of 256 ---------------------------------------------------------------------------------------


for _each in (*superblocks.K_QUANTS, superblocks.TQ2_0):
    _FORMATS[_each.name] = BlockFormat(_each.name, superblocks.ELEMENTS, _each.n_bytes, _each.decode, super_block=_each)
_register("tq1_0", superblocks.ELEMENTS, superblocks.TQ1_0_BYTES)(superblocks.decode_tq1_0)


# --- own integer groups ---------------------------------------------------------------------------------------------


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
            return scaled(codes.astype(np.int16) - half, f16_at(blocks, 0))
        return scaled(codes, f16_at(blocks, 0), f16_at(blocks, 2))

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
        return scaled(codes.astype(np.int8) - 1, f16_at(blocks, 0))

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
