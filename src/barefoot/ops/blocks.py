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

``zero`` stores nothing and means zeros: the format of a matrix that is only the sum of its parts
(``barefoot.ops.parts``).

Blocks of GGUF files are carried exactly as the file has them; those of 32 are described at their decoders, those of
256 in ``barefoot.ops.superblocks``. The arithmetic of ``decode`` is that of the ``gguf`` package's ``dequantize``,
float32, in the same order, so the results are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from barefoot.core.errors import Incompatible, InvalidInput, unknown_name
from barefoot.ops import superblocks
from barefoot.ops.grids import Grid, Ternary, Uniform
from barefoot.ops.payload import F32, U8, f16_at, pack_chunks, unpack_chunks

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
    both None for dense weights and where codes can't be told apart (tq1_0). ``grid`` is what solvers choose codes on.
    """

    name: str
    block_elements: int
    block_bytes: int
    decode_blocks: Callable[[U8], F32]
    encode_blocks: Callable[[F32], U8] | None = None
    group: Group | None = None
    super_block: superblocks.SuperBlock | None = None
    grid: Grid | None = None

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
    if fmt.group is None:
        return (("blocks", fmt.block_bytes),)
    scales = (("scales", 2), ("minimums", 2)) if fmt.group.has_minimum else (("scales", 2),)
    return (("codes", fmt.block_bytes - fmt.group.header_bytes), *scales)


def encode(format_id: str, weights: F32) -> U8:
    """Round ``weights`` (rows, cols) float32 to the nearest codes: uint8 (rows, row_bytes).

    Scales and minimums are rounded to f16 before the codes are chosen, so the codes fit the stored scale. They span the
    range of each group (``Grid.plain``); solvers (``barefoot.weights.solvers``) choose better ones.

    Raises
    ------
    Incompatible : the format is a super-block of GGUF files (carried, never made), or columns don't fill whole blocks.
    InvalidInput : NaN or infinite weights in a quantized format.
    """
    fmt = lookup(format_id)
    n_rows, n_cols = weights.shape
    n_bytes = row_bytes(format_id, n_cols)
    blocks = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1, fmt.block_elements)
    if fmt.encode_blocks is not None:
        return fmt.encode_blocks(blocks).reshape(n_rows, n_bytes)
    if fmt.grid is None:
        raise Incompatible(
            f"{format_id} blocks are carried from GGUF files, not made from weights", cure="use an int*_g* format"
        )
    if not np.isfinite(blocks).all():
        raise not_finite(format_id)
    params = fmt.grid.plain(blocks)
    return pack(format_id, fmt.grid.round(blocks, params).reshape(n_rows, n_cols), params)


def not_finite(format_id: str) -> InvalidInput:
    """What is raised where weights can't be quantized."""
    return InvalidInput(f"weights hold NaN or infinity, which {format_id} can't store", cure="use f32, f16 or bf16")


def pack(format_id: str, codes: U8, params: F32) -> U8:
    """Codes (rows, cols) and the parameters of their groups, float32 (rows × groups, p), as uint8 (rows, row_bytes).

    Parameters must be f16 numbers already, as a grid returns them: they are what codes were chosen for.

    Raises
    ------
    Incompatible : the format has no grid.
    """
    fmt = lookup(format_id)
    if fmt.grid is None or fmt.group is None:
        raise Incompatible(f"{format_id} has no grid to choose codes on", cure="use an int*_g* format")
    numbers = params.reshape(-1, fmt.group.header_bytes // 2).astype(np.float16).view(np.uint8)
    return fmt.group.join(numbers, numbers[:, :0], codes.reshape(-1, fmt.grid.group)).reshape(len(codes), -1)


def decode(format_id: str, rows: U8, n_cols: int) -> F32:
    """The weights float32 (n_rows, n_cols) that ``rows`` uint8 (n_rows, row_bytes) store."""
    fmt = lookup(format_id)
    n_bytes = row_bytes(format_id, n_cols)
    if rows.ndim != 2 or rows.shape[1] != n_bytes:
        raise InvalidInput(f"rows of {n_cols} {format_id} weights have shape (n, {n_bytes}), got {rows.shape}")
    if not n_bytes:
        return np.zeros((len(rows), n_cols), np.float32)
    blocks = np.ascontiguousarray(rows).reshape(-1, fmt.block_bytes)
    return fmt.decode_blocks(blocks).reshape(rows.shape[0], n_cols)


# --- parts that several formats share -------------------------------------------------------------------------------


def _add(fmt: BlockFormat) -> None:
    _FORMATS[fmt.name] = fmt


# --- dense ----------------------------------------------------------------------------------------------------------


def _bf16_encode(weights: F32) -> U8:
    halves = weights.view(np.uint16)
    lower, rounded = halves[:, 0::2], halves[:, 1::2].copy()
    half_way = rounded & 1  # ties to even: an odd number is rounded up from half a unit on, an even one beyond it
    rounded += lower > np.subtract(0x8000, half_way, out=half_way)
    nan = np.isnan(weights)
    if nan.any():
        rounded[nan] = halves[:, 1::2][nan] | 0x40
    return rounded.view(np.uint8)


def _f16_encode(weights: F32) -> U8:
    with np.errstate(over="ignore"):
        return weights.astype(np.float16).view(np.uint8)


_add(BlockFormat("f32", 1, 4, lambda b: b.view(np.float32).copy(), lambda w: w.view(np.uint8)))
_add(BlockFormat("f16", 1, 2, lambda b: f16_at(b, 0), _f16_encode))
_add(BlockFormat("bf16", 1, 2, lambda b: (b.view(np.uint16).astype(np.uint32) << 16).view(np.float32), _bf16_encode))
_add(BlockFormat("zero", 1, 0, lambda b: np.zeros(len(b), np.float32), lambda w: np.empty(0, np.uint8)))


# --- groups with one scale ------------------------------------------------------------------------------------------


def _of_group(name: str, group: Group, grid: Grid) -> BlockFormat:
    """Blocks that are one group of a grid: its parameters as f16, then the codes."""

    def decode_blocks(blocks: U8) -> F32:
        numbers, _, codes = group.split(blocks)
        return grid.values(codes, np.ascontiguousarray(numbers).view(np.float16).astype(np.float32))

    n_bytes = group.header_bytes + grid.group * group.bits // 8
    return BlockFormat(name, grid.group, n_bytes, decode_blocks, group=group, grid=grid)


_add(_of_group("q4_0", Group(4, zero=8), Uniform(4, 32, symmetric=True)))  # d; nibbles; w = d * (q - 8)
_add(_of_group("q4_1", Group(4, has_minimum=True), Uniform(4, 32)))  # d; m; nibbles; w = d * q + m
_add(_of_group("q5_0", Group(5, zero=16), Uniform(5, 32, symmetric=True)))  # d; bits, nibbles; w = d * (q - 16)
_add(_of_group("q5_1", Group(5, has_minimum=True), Uniform(5, 32)))  # d; m; bits, nibbles; w = d * q + m
_add(_of_group("q8_0", Group(8, signed=True), Uniform(8, 32, symmetric=True)))  # d; signed bytes; w = d * q


# --- super-blocks of 256 of GGUF files ------------------------------------------------------------------------------


for _each in (*superblocks.K_QUANTS, superblocks.TQ2_0):
    _add(BlockFormat(_each.name, superblocks.ELEMENTS, _each.n_bytes, _each.decode, super_block=_each))
_add(BlockFormat("tq1_0", superblocks.ELEMENTS, superblocks.TQ1_0_BYTES, superblocks.decode_tq1_0))


# --- own integer groups ---------------------------------------------------------------------------------------------


for _bits in (*INTEGER_BITS, 1):
    for _size in GROUP_SIZES:
        if _bits > 1:
            _symmetric = Group(_bits, zero=1 << (_bits - 1))
            _add(_of_group(f"int{_bits}_g{_size}_sym", _symmetric, Uniform(_bits, _size, symmetric=True)))
        _add(_of_group(f"int{_bits}_g{_size}_asym", Group(_bits, has_minimum=True), Uniform(_bits, _size)))
for _size in GROUP_SIZES:
    _add(_of_group(f"ternary_g{_size}", Group(2, zero=1), Ternary(_size)))
