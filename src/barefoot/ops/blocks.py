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

Formats whose levels are not uniform, w = scale * level[code] with the levels of ``barefoot.ops.levels``, have the same
blocks as ``sym``: a scale, f16, then chunks of codes. int5: bits, then nibbles; int6: nibbles, then pairs; int7:
nibbles, pairs, bits.

* ``nf4_g{32,64,128}``: codes 0..15 in ascending order of their levels.
* ``e{e}m{m}_g{32,64,128}``, minifloats of 3 to 8 bits: a code is sign, exponent and mantissa, from the highest bit.
* ``bitmod{3,4}_g{32,64,128}``: the codes of e2m0 and e2m1, but the code of negative zero (4 of 3 bits, 8 of 4) stands
  for a special value: the one inside the range of the others if the last bit of the scale is 0, the one beyond it if
  that bit is 1. The scale may be negative, so that the special value lies on the other side.

Block floating point, ``bfp{3,4,6,8}_g{32,64,128}``: byte 0 is the exponent e, then chunks of codes; the scale is the
float32 number whose exponent field is e, 2^(e - 127) (0: the scale is 0; 255, infinity, is never made), and
w = scale * (q - 2^(b-1)), q in 0..2^b - 1.

``bilevel{2,3,4}``: 64 weights whose four scales and zero points have few bits too: ``barefoot.ops.bilevel``.

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
from barefoot.ops import bilevel, levels, superblocks
from barefoot.ops.bilevel import Bilevel, BilevelGrid
from barefoot.ops.grids import Grid, Shifted, Special, Table, Ternary, Uniform
from barefoot.ops.payload import F32, U8, f16_at, pack_chunks, unpack_chunks

GROUP_SIZES = (32, 64, 128)
INTEGER_BITS = (8, 4, 3, 2)
MANTISSA_BITS = (8, 6, 4, 3)


@dataclass(frozen=True)
class Group:
    """Blocks that are one group: a scale and in some a minimum, f16, then chunks of codes."""

    bits: int
    has_minimum: bool = False
    signed: bool = False  # 8-bit codes stored as two's complement: code 0 is the byte 0x80
    zero: int = 0  # the code that stands for 0 where there is no minimum
    indexed: bool = False  # codes are indices of a table of levels
    shifted: bool = False  # the scale is the byte of a power of two's exponent

    @property
    def is_affine(self) -> bool:
        """Whether w = scale * (code - zero) + minimum with f16 numbers, as look-ups and planes need it."""
        return not (self.indexed or self.shifted)

    @property
    def scale_bytes(self) -> int:
        return 1 if self.shifted else 2

    @property
    def header_bytes(self) -> int:
        return self.scale_bytes * (2 if self.has_minimum else 1)

    @property
    def numbers_bytes(self) -> int:
        return self.header_bytes

    @property
    def scales_bytes(self) -> int:
        return 0

    def read_numbers(self, stored: U8) -> F32:
        """The numbers of a header (n, header_bytes), float32 (n, 1 or 2)."""
        if self.shifted:
            return (stored.astype(np.uint32) << 23).view(np.float32)
        return np.ascontiguousarray(stored).view(np.float16).astype(np.float32)

    def write_numbers(self, numbers: F32) -> U8:
        """The inverse of ``read_numbers``, for numbers that can be stored."""
        if self.shifted:
            return (np.ascontiguousarray(numbers, np.float32).view(np.uint32) >> 23).astype(np.uint8)
        return np.ascontiguousarray(numbers.astype(np.float16)).view(np.uint8)

    def read_params(self, numbers: U8, scales: U8) -> F32:
        """What a grid stores, float32 (n, k), from what ``split`` returns."""
        return self.read_numbers(numbers)

    def write_params(self, stored: F32) -> tuple[U8, U8]:
        """The inverse of ``read_params``."""
        numbers = self.write_numbers(stored)
        return numbers, numbers[:, :0]

    def split(self, blocks: U8) -> tuple[U8, U8, U8]:
        """``blocks`` uint8 (n, bytes) as the bytes of their numbers, of no sub-scales, and codes (n, elements).

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

    ``group`` describes the blocks that have a single scale before their codes, ``super_block`` those whose scales have
    scales; both None for dense weights and where codes can't be told apart (tq1_0). ``grid`` is what solvers choose
    codes on. ``in_float``: products are taken in float32, as with dense weights, whatever the activations.
    """

    name: str
    block_elements: int
    block_bytes: int
    decode_blocks: Callable[[U8], F32]
    encode_blocks: Callable[[F32], U8] | None = None
    group: Group | None = None
    super_block: superblocks.SuperBlock | Bilevel | None = None
    grid: Grid | None = None
    in_float: bool = False

    @property
    def anatomy(self) -> Group | superblocks.SuperBlock | Bilevel | None:
        """What takes blocks apart, into scales and codes, and puts them together again; None without integer codes."""
        return None if self.in_float else self.group or self.super_block


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
    row_bytes(format_id, n_cols)
    return n_cols // block_elements(format_id)


def parts(format_id: str) -> tuple[tuple[str, int], ...]:
    """What a block is made of, (name, bytes) each: the terms in which the ledger counts it."""
    fmt = lookup(format_id)
    if fmt.block_elements == 1:
        return (("values", fmt.block_bytes),)
    if fmt.group is None:
        return (("blocks", fmt.block_bytes),)
    scale_bytes = fmt.group.scale_bytes
    scales = (("scales", scale_bytes), *((("minimums", scale_bytes),) if fmt.group.has_minimum else ()))
    return (("codes", fmt.block_bytes - fmt.group.header_bytes), *scales)


def encode(format_id: str, weights: F32) -> U8:
    """Round ``weights`` (rows, cols) float32 to the nearest codes: uint8 (rows, row_bytes).

    Scales and minimums are rounded to what is stored before the codes are chosen, so the codes fit them. They span the
    range of each group (``Grid.plain``); solvers (``barefoot.weights.solvers``) choose better ones.

    Raises
    ------
    Incompatible : the format is carried from GGUF files, never made, or columns don't fill whole blocks.
    InvalidInput : NaN or infinite weights in a quantized format.
    """
    fmt = lookup(format_id)
    n_rows, n_cols = weights.shape
    n_bytes = row_bytes(format_id, n_cols)
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    grid = None if fmt.encode_blocks else _chosen_on(fmt)
    if fmt.block_elements > 1 and not np.isfinite(weights).all():
        raise not_finite(format_id)
    if fmt.encode_blocks is not None:
        return fmt.encode_blocks(weights.reshape(-1, fmt.block_elements)).reshape(n_rows, n_bytes)
    assert grid is not None
    groups = weights.reshape(-1, grid.group)
    params = grid.plain(groups)
    stored = grid.store(params.reshape(-1, grid.block // grid.group, params.shape[1]))
    codes = grid.round(groups, grid.expand(stored).reshape(params.shape))
    return pack(format_id, codes.reshape(n_rows, n_cols), stored)


def _chosen_on(fmt: BlockFormat) -> Grid:
    if fmt.grid is None:
        raise Incompatible(
            f"{fmt.name} blocks are carried from GGUF files, not made from weights", cure="use an int*_g* format"
        )
    return fmt.grid


def not_finite(format_id: str) -> InvalidInput:
    """What is raised where weights can't be quantized."""
    return InvalidInput(f"weights hold NaN or infinity, which {format_id} can't store", cure="use f32, f16 or bf16")


def pack(format_id: str, codes: U8, params: F32) -> U8:
    """Codes (rows, cols) and what their grid stores of their parameters, as many rows of k, as uint8 (rows, row_bytes).

    Parameters must be numbers that the format stores, as its grid returns them: they are what codes were chosen for.

    Raises
    ------
    Incompatible : the format has no grid.
    """
    fmt = lookup(format_id)
    anatomy, grid = fmt.group or fmt.super_block, _chosen_on(fmt)
    assert anatomy is not None
    of_blocks = codes.reshape(-1, grid.block)
    numbers, scales = anatomy.write_params(params.reshape(len(of_blocks), -1))
    return anatomy.join(numbers, scales, of_blocks).reshape(len(codes), -1)


def unpack(format_id: str, rows: U8) -> tuple[U8, F32]:
    """Codes (rows, cols) and stored parameters (rows, blocks, k) of uint8 (rows, row_bytes): the inverse of ``pack``.

    Raises
    ------
    Incompatible : the format has no grid.
    """
    fmt = lookup(format_id)
    _chosen_on(fmt)
    anatomy = fmt.group or fmt.super_block
    assert anatomy is not None
    numbers, scales, codes = anatomy.split(np.ascontiguousarray(rows).reshape(-1, fmt.block_bytes))
    params = anatomy.read_params(numbers, scales)
    return codes.reshape(len(rows), -1), params.reshape(len(rows), -1, params.shape[1])


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


def _bf16_decode(blocks: U8) -> F32:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


_add(BlockFormat("f32", 1, 4, lambda b: b.view(np.float32).copy(), lambda w: w.view(np.uint8), in_float=True))
_add(BlockFormat("f16", 1, 2, lambda b: f16_at(b, 0), _f16_encode, in_float=True))
_add(BlockFormat("bf16", 1, 2, _bf16_decode, _bf16_encode, in_float=True))
_add(BlockFormat("zero", 1, 0, lambda b: np.zeros(len(b), np.float32), lambda w: np.empty(0, np.uint8), in_float=True))


# --- groups with one scale ------------------------------------------------------------------------------------------


def _of_group(name: str, group: Group, grid: Grid, in_float: bool = False) -> BlockFormat:
    """Blocks that are one group of a grid: its parameters, then the codes."""

    def decode_blocks(blocks: U8) -> F32:
        numbers, _, codes = group.split(blocks)
        return grid.values(codes, group.read_numbers(numbers))

    n_bytes = group.header_bytes + grid.group * group.bits // 8
    return BlockFormat(name, grid.group, n_bytes, decode_blocks, group=group, grid=grid, in_float=in_float)


_add(_of_group("q4_0", Group(4, zero=8), Uniform(4, 32, symmetric=True)))  # d; nibbles; w = d * (q - 8)
_add(_of_group("q4_1", Group(4, has_minimum=True), Uniform(4, 32)))  # d; m; nibbles; w = d * q + m
_add(_of_group("q5_0", Group(5, zero=16), Uniform(5, 32, symmetric=True)))  # d; bits, nibbles; w = d * (q - 16)
_add(_of_group("q5_1", Group(5, has_minimum=True), Uniform(5, 32)))  # d; m; bits, nibbles; w = d * q + m
_add(_of_group("q8_0", Group(8, signed=True), Uniform(8, 32, symmetric=True)))  # d; signed bytes; w = d * q


# --- super-blocks of 256 of GGUF files ------------------------------------------------------------------------------


for _each in (*superblocks.K_QUANTS, superblocks.TQ2_0):
    _nested = superblocks.GRIDS.get(_each.name)
    _add(BlockFormat(_each.name, superblocks.ELEMENTS, _each.n_bytes, _each.decode, super_block=_each, grid=_nested))
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


# --- own groups that are not uniform --------------------------------------------------------------------------------


for _size in GROUP_SIZES:
    _add(_of_group(f"nf4_g{_size}", Group(4, indexed=True), Table(levels.nf4_table(), _size)))
for _exponent, _mantissa in levels.SPLITS:
    _table = levels.minifloat_table(_exponent, _mantissa)
    for _size in GROUP_SIZES:
        _group = Group(1 + _exponent + _mantissa, indexed=True)
        _grid, _in_float = Table(_table, _size), not levels.are_integers(_table)
        _add(_of_group(f"e{_exponent}m{_mantissa}_g{_size}", _group, _grid, _in_float))
for _bits, _split in levels.BITMOD.items():
    for _size in GROUP_SIZES:
        _special = Special(levels.minifloat_table(*_split), levels.BITMOD_SPECIALS[_bits], _size)
        _add(_of_group(f"bitmod{_bits}_g{_size}", Group(_bits, indexed=True), _special))
for _bits in MANTISSA_BITS:
    for _size in GROUP_SIZES:
        _group = Group(_bits, zero=1 << (_bits - 1), shifted=True)
        _add(_of_group(f"bfp{_bits}_g{_size}", _group, Shifted(_bits, _size)))


# --- groups whose scales have scales --------------------------------------------------------------------------------


for _two in bilevel.FORMATS:
    _add(
        BlockFormat(
            _two.name,
            bilevel.ELEMENTS,
            _two.n_bytes,
            _two.decode,
            _two.encode,
            super_block=_two,
            grid=BilevelGrid(_two),
        )
    )
