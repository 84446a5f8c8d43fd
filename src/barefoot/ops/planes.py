"""Bit planes: products of codes of 1 to 8 bits with codes of 1 to 8 bits, by XOR and population count.

Efficient Arbitrary Precision Acceleration for Large Language Models on GPU Tensor Cores (Ma et al. 2024,
arXiv:2409.17870). Every bit of an n-bit code counts as -1 or +1 (*bipolar*), so all pairs of planes are one operation,
with no plane of signs. A code q in 0..2^n - 1 has the value::

    V(q) = sum_i (2 bit_i - 1) 2^i = 2 q - (2^n - 1)                       odd, symmetric, never 0

    sum_k V(w_k) V(x_k) = K (2^nw - 1) (2^nx - 1) - 2 sum_ij 2^(i + j) popcount(plane_i of w XOR plane_j of x)

for K columns. Padding holds 0 in both operands: equal bits drop out of the popcount, and K is the true number. The
product stays below 2^31 for K up to 32,768, the largest group.

**Weights** are ``step * (q - zero) + minimum``, with one f16 step (and f16 minimum) per row and group of columns. As
q = V / 2 + levels / 2, levels = 2^n - 1, that is ``step / 2 * V + offset`` with ``offset = step * (levels / 2 - zero)
+ minimum``: integers, signed or with a minimum, and ternary codes are carried without loss, and their offsets meet the
exact sums of the activations. ``zero = levels / 2`` is bipolar quantization, and has no offset.

**Activations** are rounded per token and group of the weight, mid-rise: ``s = largest magnitude / (2^n - 1)``,
``V = 2 floor(x / (2 s)) + 1``. There is no 0: every x is at most s from its value s V, and x = 0 becomes s. With 1 bit
x keeps its sign alone. Groups whose magnitudes are below 2^-100 count as zero.

**Layout.** Tiles of 16 rows (the last one padded with zeros); a tile is group after group along the columns (the last
one may be short):

======= ============================================================================================================
bytes   content
======= ============================================================================================================
32      the steps of rows 0..15, f16
32      their minimums, f16; only where the format has them
rest    for each word of 32 columns, for each plane, low bits first: 16 numbers of 32 bits, one a row; bit b of a number
        is the plane's bit of column b of the word (0 past the last column)
======= ============================================================================================================

``ceil(rows / 16) * 16 * (ceil(cols / 32) * 4 n + groups * 2 or 4)`` bytes. Example: 2 bits, groups of 64, minimums,
[16, 96]: groups of 2 words and of 1, 16 * (3 * 8 + 2 * 4) = 512 bytes; bit 1 of the code of row 3, column 70 (group 1,
word 0) is bit 6 of the number at byte ``(64 + 2 * 128) + 64 + 64 * 1 + 4 * 3``.

*Differs from the paper*: rows, not words, lie innermost, so that lanes of a register are rows, nothing is summed across
lanes, and any group of whole words has its own scale; activations too have a scale for each group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.units import round_up
from barefoot.ops import blocks
from barefoot.ops.grids import F16_MAX
from barefoot.ops.payload import pack_chunks, unpack_chunks

U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

ROWS = 16  # rows of a tile
WORD = 32  # columns of a word
MAX_BITS = 8
MAX_GROUP = 32768
SMALLEST = np.float32(2.0**-100)  # groups of smaller magnitude count as zero


@dataclass(frozen=True)
class PlaneFormat:
    """Codes of ``bits`` bits (1 to 8), one step per row and ``group`` columns (a multiple of 32, at most 32,768).

    ``zero``: the code, or the point between codes, that stands for 0 where no minimum is added.
    """

    bits: int
    group: int
    zero: float
    has_minimum: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise InvalidInput(f"planes hold codes of 1 to {MAX_BITS} bits, got {self.bits}")
        if not WORD <= self.group <= MAX_GROUP or self.group % WORD:
            raise InvalidInput(
                f"planes have groups of {WORD} to {MAX_GROUP} columns, whole words of {WORD}, got {self.group}",
                cure="the int32 sums of larger groups could overflow: repeat a row's step in several groups",
            )

    @classmethod
    def bipolar(cls, bits: int, group: int) -> PlaneFormat:
        """Symmetric odd integers: w = step / 2 * V."""
        return cls(bits, group, zero=((1 << bits) - 1) / 2)

    @classmethod
    def of_blocks(cls, format_id: str) -> PlaneFormat:
        """That of a block format with one scale per block; Incompatible for others."""
        group = blocks.lookup(format_id).group
        if group is None or not group.is_affine:
            raise Incompatible(
                f"{format_id} has no planes: it needs one scale per block and evenly spaced levels",
                cure="use an int*_g* format",
            )
        return cls(group.bits, blocks.block_elements(format_id), 128 if group.signed else group.zero, group.has_minimum)

    @property
    def levels(self) -> int:
        return (1 << self.bits) - 1

    def n_groups(self, n_cols: int) -> int:
        return -(-n_cols // self.group)

    def n_bytes(self, n_rows: int, n_cols: int) -> int:
        header = 4 if self.has_minimum else 2
        return round_up(n_rows, ROWS) * (-(-n_cols // WORD) * 4 * self.bits + self.n_groups(n_cols) * header)


@dataclass(frozen=True, eq=False)
class PlaneWeight:
    """A matrix [rows, cols] as planes in ``buffer``, uint8 of ``format.n_bytes(rows, cols)``."""

    format: PlaneFormat
    rows: int
    cols: int
    buffer: U8

    def __post_init__(self) -> None:
        needed = self.format.n_bytes(self.rows, self.cols)
        if self.buffer.size != needed:
            raise ValueError(f"planes [{self.rows}, {self.cols}] need {needed} bytes, got {self.buffer.size}")


# --- layout ---------------------------------------------------------------------------------------------------------


def pack(fmt: PlaneFormat, codes: U8, steps: F16, minimums: F16 | None = None) -> PlaneWeight:
    """Codes uint8 (rows, cols), steps and minimums float16 (rows, groups) in this layout."""
    n_rows, n_cols = codes.shape
    assert steps.shape == (n_rows, fmt.n_groups(n_cols))
    assert (minimums is not None) == fmt.has_minimum
    assert codes.max(initial=0) <= fmt.levels
    padded = np.zeros((round_up(n_rows, ROWS), round_up(n_cols, WORD)), np.uint8)
    padded[:n_rows, :n_cols] = codes
    bits = (padded[..., None] >> np.arange(fmt.bits, dtype=np.uint8)) & np.uint8(1)
    bits = bits.reshape(-1, ROWS, padded.shape[1] // WORD, WORD, fmt.bits).transpose(0, 2, 4, 1, 3)
    words = np.packbits(bits, axis=-1, bitorder="little")  # [tile, word, plane, row, byte]
    headers = [_tiled(values) for values in (steps, minimums) if values is not None]
    parts = []
    for g, (start, end) in enumerate(_word_ranges(fmt, n_cols)):
        parts += [header[:, g] for header in headers]
        parts.append(words[:, start:end].reshape(len(words), -1))
    return PlaneWeight(fmt, n_rows, n_cols, np.concatenate(parts, axis=1).reshape(-1))


def unpack(weight: PlaneWeight) -> tuple[U8, F16, F16 | None]:
    """The inverse of ``pack``: codes (rows, cols), steps and minimums (rows, groups)."""
    fmt, n_rows, n_cols = weight.format, weight.rows, weight.cols
    tiles = weight.buffer.reshape(round_up(n_rows, ROWS) // ROWS, -1)
    n_headers = 2 if fmt.has_minimum else 1
    headers, codes, at = [], [], 0
    for start, end in _word_ranges(fmt, n_cols):
        header = tiles[:, at : at + n_headers * 2 * ROWS].reshape(len(tiles), n_headers, ROWS, 2)
        headers.append(np.ascontiguousarray(header).view("<f2")[..., 0])
        at += n_headers * 2 * ROWS
        size = (end - start) * fmt.bits * ROWS * 4
        words = tiles[:, at : at + size].reshape(len(tiles), end - start, fmt.bits, ROWS, 4)
        bits = np.unpackbits(words, axis=-1, bitorder="little")
        planes = bits << np.arange(fmt.bits, dtype=np.uint8).reshape(-1, 1, 1)
        codes.append(np.bitwise_or.reduce(planes, axis=2).transpose(0, 2, 1, 3).reshape(len(tiles) * ROWS, -1))
        at += size
    joined = np.stack(headers, axis=-1).transpose(1, 0, 2, 3).reshape(n_headers, len(tiles) * ROWS, -1)[:, :n_rows]
    return np.concatenate(codes, axis=1)[:n_rows, :n_cols], joined[0], joined[1] if fmt.has_minimum else None


def _tiled(values: F16) -> U8:
    """float16 (rows, groups) as bytes (tiles, groups, 32)."""
    padded = np.zeros((round_up(len(values), ROWS), values.shape[1]), "<f2")
    padded[: len(values)] = values
    by_tile = np.ascontiguousarray(padded.reshape(-1, ROWS, values.shape[1]).transpose(0, 2, 1))
    return by_tile.view(np.uint8)


def _word_ranges(fmt: PlaneFormat, n_cols: int) -> list[tuple[int, int]]:
    """First and last (excluded) word of each group."""
    each = fmt.group // WORD
    return [(g * each, min((g + 1) * each, -(-n_cols // WORD))) for g in range(fmt.n_groups(n_cols))]


# --- weights --------------------------------------------------------------------------------------------------------


def values(codes: U8, bits: int) -> I64:
    """V of every code: odd integers from -(2^bits - 1) to 2^bits - 1."""
    return 2 * codes.astype(np.int64) - ((1 << bits) - 1)


def quantize(weights: F32, bits: int, group: int) -> PlaneWeight:
    """Round ``weights`` float32 (rows, cols) to bipolar codes: w = s V with s = largest magnitude / (2^bits - 1).

    The step 2 s is rounded to f16 before the codes are chosen. InvalidInput for NaN and infinity.
    """
    fmt = PlaneFormat.bipolar(bits, group)
    n_rows, n_cols = weights.shape
    if not np.isfinite(weights).all():
        raise InvalidInput("weights hold NaN or infinity, which planes can't store")
    starts = np.arange(0, n_cols, group)
    largest = np.maximum.reduceat(np.abs(weights), starts, axis=1)
    steps = np.minimum(largest * np.float32(2 / fmt.levels), np.float32(F16_MAX)).astype(np.float16)
    wide = np.repeat(steps.astype(np.float32), group, axis=1)[:, :n_cols]
    ratio = np.divide(weights, wide, out=np.zeros((n_rows, n_cols), np.float32), where=wide != 0)
    codes = np.clip(np.floor(ratio) + np.float32(1 << (bits - 1)), 0, fmt.levels).astype(np.uint8)
    return pack(fmt, codes, steps)


def from_blocks(format_id: str, rows: U8, n_cols: int) -> PlaneWeight:
    """Row-major blocks uint8 (n_rows, row_bytes) as planes, without loss; Incompatible without one scale per block."""
    fmt = PlaneFormat.of_blocks(format_id)
    group = blocks.lookup(format_id).group
    assert group is not None
    blocked = rows.reshape(len(rows), -1, blocks.block_bytes(format_id))
    headers = np.ascontiguousarray(blocked[..., : group.header_bytes]).view("<f2")
    payload = blocked[..., group.header_bytes :].reshape(*blocked.shape[:2], -1, 4 * group.bits)
    codes = unpack_chunks(payload, group.bits).reshape(len(rows), n_cols)
    codes = codes ^ np.uint8(0x80) if group.signed else codes
    return pack(fmt, codes, headers[..., 0], headers[..., 1] if group.has_minimum else None)


def to_blocks(format_id: str, weight: PlaneWeight) -> U8:
    """The inverse of ``from_blocks``: uint8 (n_rows, row_bytes)."""
    group = blocks.lookup(format_id).group
    assert group is not None
    assert PlaneFormat.of_blocks(format_id) == weight.format
    codes, steps, minimums = unpack(weight)
    codes = codes ^ np.uint8(0x80) if group.signed else codes
    payload = pack_chunks(codes.reshape(*steps.shape, -1, WORD), group.bits)
    header = np.stack([steps] if minimums is None else [steps, minimums], axis=-1).astype("<f2").view(np.uint8)
    parts = [header, payload.reshape(*steps.shape, -1)]
    return np.concatenate(parts, axis=-1).reshape(weight.rows, -1)


def decode(weight: PlaneWeight) -> F32:
    """The weights float32 (rows, cols)."""
    codes, steps, minimums = unpack(weight)
    wide = [
        np.repeat(h.astype(np.float32), weight.format.group, axis=1)[:, : weight.cols]
        for h in (steps, minimums)
        if h is not None
    ]
    product = wide[0] * (codes.astype(np.float32) - np.float32(weight.format.zero))
    return product + wide[1] if minimums is not None else product


# --- products -------------------------------------------------------------------------------------------------------


def quantize_activations(x: F32, bits: int, group: int) -> tuple[U8, F32, F32]:
    """Codes uint8 (n_tokens, cols), s and the sums of x, float32 (n_tokens, groups).

    A group that holds NaN or infinity gets s and sum NaN.
    """
    n_cols = x.shape[1]
    levels = np.float32((1 << bits) - 1)
    starts = np.arange(0, n_cols, group)
    finite = np.logical_and.reduceat(np.isfinite(x), starts, axis=1)
    largest = np.maximum.reduceat(np.abs(x), starts, axis=1)
    used = finite & (largest >= SMALLEST)
    inverse = np.divide(np.float32(0.5) * levels, largest, out=np.zeros_like(largest), where=used)
    kept = np.where(np.repeat(used, group, axis=1)[:, :n_cols], x, np.float32(0))
    codes = kept * np.repeat(inverse, group, axis=1)[:, :n_cols] + np.float32(1 << (bits - 1))
    scales = np.where(used, largest / levels, np.float32(0))
    sums = np.add.reduceat(kept, starts, axis=1)
    scales[~finite] = sums[~finite] = np.nan
    return np.floor(codes).astype(np.uint8), scales, sums


def product(x: F32, weight: PlaneWeight, activation_bits: int) -> npt.NDArray[np.float64]:
    """x @ W^T float64 (n_tokens, rows), from codes multiplied as int64."""
    fmt = weight.format
    codes, steps, minimums = unpack(weight)
    x_codes, x_scales, x_sums = quantize_activations(x, activation_bits, fmt.group)
    w, v = values(codes, fmt.bits), values(x_codes, activation_bits)
    offsets = steps.astype(np.float64) * (fmt.levels / 2 - fmt.zero)
    if minimums is not None:
        offsets += minimums
    out = np.zeros((len(x), weight.rows))
    for g in range(fmt.n_groups(weight.cols)):
        columns = slice(g * fmt.group, (g + 1) * fmt.group)
        whole = v[:, columns] @ w[:, columns].T
        out += whole * (0.5 * steps[:, g].astype(np.float64)) * x_scales[:, g, None].astype(np.float64)
        if offsets.any():
            out += x_sums[:, g, None].astype(np.float64) * offsets[:, g]
    return out
