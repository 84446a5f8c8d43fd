"""Blocks of signs and low rank: a matrix as a sum of terms whose signs are bits and whose magnitudes are of low rank.

BitStack: Any-Size Compression of Large Language Models in Variable Memory Environments (Wang et al. 2024,
arXiv:2410.23918), section 3.2. A block of rank k holds a matrix [rows, cols] of the form::

    W = S * (U V)          S: -1 or +1;  U: [rows, k];  V: [k, cols]

and a stack of blocks stands for their sum. Where U V comes from an absolute value decomposition it is an approximation
of ``|W|``, and a block takes about a bit a weight.

**Layout** of a block, with P = ceil(rows / 16) panels of 16 rows and Q = ceil(cols / 4) quads of columns:

========== ===========================================================================================================
bytes      content
========== ===========================================================================================================
32 k P     U as f16: for each panel, for each rank, 16 rows (0 for rows past the last)
2 k cols   V as f16: for each rank, its columns
8 P Q      signs: for each panel, for each quad, 64 bits; bit ``4 r + c`` (bit ``b % 8`` of byte ``b // 8``) is 1 where
           row r of the panel has a minus in column c of the quad (0 past the last row and column)
========== ===========================================================================================================

``k (32 P + 2 cols) + 8 P Q`` bytes: ``rows cols / 8 + 2 k (rows + cols)`` for whole panels and quads. The rank follows
from the bytes. Example: [32, 64] of rank 3: U takes 192 bytes, V 384, the signs of row 17, columns 8 to 11 are bits 4
to 7 of the number at byte ``576 + 8 * (1 * 16 + 2)``.

**Products**. A row's output is ``sum_k U_rk sum_c S_rc (V_kc x_c)``. Up to 6 tokens of ``activations="int8"``: the
products ``V_kc x_c``, which all rows share, are rounded to int8, with one scale per block, rank and 128 columns, and
their signed sums are exact integers; a token gives the same alone and among others. More tokens, and "float32": weights
are decoded to float32, summed over the blocks and multiplied in float32, on ``amx`` from 24 tokens of int8 on in
bfloat16 (where the columns are whole groups of 32). A token that holds NaN or infinity gets no finite output.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import CorruptFile
from barefoot.ops import parts
from barefoot.ops.scratch import SIGN_GROUP as GROUP
from barefoot.ops.scratch import sign_scratch_bytes

U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

ROWS = 16  # of a panel
QUAD = 4  # columns whose signs lie together
MAX_RANK = 64
SMALLEST = np.float32(2.0**-100)  # groups of smaller magnitude count as zero


class SignStack:
    """A matrix [rows, cols] as the sum of the blocks of rank ``rank`` that it is bound to.

    ``bind(buffers)`` replaces them: at least one uint8 array of exactly ``block_bytes`` bytes each, of any alignment,
    kept alive. Programs use what is bound when they run.
    """

    __slots__ = ("buffers", "cols", "rank", "rows")

    def __init__(self, rows: int, cols: int, rank: int, buffers: Sequence[U8] = ()) -> None:
        if rows < 1 or cols < 1 or not 1 <= rank <= MAX_RANK:
            raise ValueError(f"a stack needs rows and columns and a rank of 1 to {MAX_RANK}, got {rows, cols, rank}")
        self.rows, self.cols, self.rank = rows, cols, rank
        self.buffers: tuple[U8, ...] = ()
        if buffers:
            self.bind(buffers)

    @property
    def block_bytes(self) -> int:
        return block_bytes(self.rows, self.cols, self.rank)

    def bind(self, buffers: Sequence[U8]) -> None:
        sizes = [b.size if b.dtype == np.uint8 and b.flags.c_contiguous else None for b in buffers]
        if not buffers or any(size != self.block_bytes for size in sizes):
            raise ValueError(
                f"a stack [{self.rows}, {self.cols}] of rank {self.rank} needs blocks of {self.block_bytes} contiguous "
                f"uint8, got {sizes}"
            )
        self.buffers = tuple(buffers)


# --- layout ---------------------------------------------------------------------------------------------------------


def block_bytes(rows: int, cols: int, rank: int) -> int:
    """Bytes of a block [rows, cols]."""
    panels, quads = -(-rows // ROWS), -(-cols // QUAD)
    return rank * (2 * ROWS * panels + 2 * cols) + 8 * panels * quads


def rank_of(rows: int, cols: int, n_bytes: int) -> int:
    """The rank of a block [rows, cols] of so many bytes.

    Raises
    ------
    CorruptFile : no rank of 1 to 64 has so many.
    """
    none, each = block_bytes(rows, cols, 0), block_bytes(rows, cols, 1) - block_bytes(rows, cols, 0)
    rank, rest = divmod(n_bytes - none, each)
    if rest or not 1 <= rank <= MAX_RANK:
        raise CorruptFile(
            f"{n_bytes} bytes can't be signs and factors of {rows} rows and {cols} columns: expected {none} and, for "
            f"each of 1 to {MAX_RANK} ranks, {each}"
        )
    return rank


def pack(negative: Bools, u: F16, v: F16) -> U8:
    """The block with a minus where ``negative`` (rows, cols) says so, of factors u (rows, k) and v (k, cols)."""
    rows, cols = negative.shape
    rank = len(v)
    panels, quads = -(-rows // ROWS), -(-cols // QUAD)
    padded = np.zeros((panels * ROWS, quads * QUAD), np.bool_)
    padded[:rows, :cols] = negative
    bits = padded.reshape(panels, ROWS, quads, QUAD).transpose(0, 2, 1, 3).reshape(panels, quads, ROWS * QUAD)
    tall = np.zeros((panels * ROWS, rank), "<f2")
    tall[:rows] = u
    by_panel = np.ascontiguousarray(tall.reshape(panels, ROWS, rank).transpose(0, 2, 1))
    parts = (
        by_panel.view(np.uint8),
        np.ascontiguousarray(v, "<f2").view(np.uint8),
        np.packbits(bits, axis=-1, bitorder="little"),
    )
    return np.concatenate([part.reshape(-1) for part in parts])


def unpack(rows: int, cols: int, block: U8) -> tuple[Bools, F16, F16]:
    """The inverse of ``pack``; CorruptFile for a wrong number of bytes."""
    u, v = factors(rows, cols, block)
    panels, quads = -(-rows // ROWS), -(-cols // QUAD)
    signs = np.ascontiguousarray(block).reshape(-1)[-8 * panels * quads :]
    bits = np.unpackbits(signs.reshape(panels, quads, 8), axis=-1, bitorder="little")
    by_row = bits.reshape(panels, quads, ROWS, QUAD).transpose(0, 2, 1, 3).reshape(panels * ROWS, quads * QUAD)
    return by_row[:rows, :cols].astype(np.bool_), u, v


def factors(rows: int, cols: int, block: U8) -> tuple[F16, F16]:
    """U (rows, k) and V (k, cols) of a block; CorruptFile for a wrong number of bytes."""
    rank, panels = rank_of(rows, cols, block.size), -(-rows // ROWS)
    u_bytes, v_bytes = 2 * panels * ROWS * rank, 2 * rank * cols
    flat = np.ascontiguousarray(block).reshape(-1)
    u = flat[:u_bytes].view("<f2").reshape(panels, rank, ROWS).transpose(0, 2, 1).reshape(-1, rank)[:rows]
    return u, flat[u_bytes : u_bytes + v_bytes].view("<f2").reshape(rank, cols)


def decode(rows: int, cols: int, block: U8) -> F32:
    """The weights float32 (rows, cols) of one block."""
    negative, u, v = unpack(rows, cols, block)
    weights: F32 = u.astype(np.float32) @ v.astype(np.float32)
    return np.negative(weights, out=weights, where=negative)


def _flaw(rows: int, cols: int, block: U8) -> str | None:
    try:
        rank_of(rows, cols, block.size)
    except CorruptFile as error:
        return str(error)
    return None


def _scratch_bytes(n_tokens: int, rows: int, cols: int, size: int, n_threads: int) -> int:
    """Of the largest rank: a part's own stands in its bytes."""
    return sign_scratch_bytes(n_tokens, cols, MAX_RANK, 1, "float32", n_threads=n_threads)


#: A block by itself is a part, whose products are those of "float32".
KIND = parts.add(parts.PartKind("signs", decode, _flaw, _scratch_bytes))


# --- products -------------------------------------------------------------------------------------------------------


def round_products(x: F32, v: F16) -> npt.NDArray[np.float64]:
    """v * x rounded to int8 codes times their scales, float64 (n_tokens, k, cols).

    Codes are rint(z * (127 / largest)), to the nearest even, of z = v * x in float32. A group that holds NaN or
    infinity becomes NaN.
    """
    cols = x.shape[1]
    with np.errstate(invalid="ignore", over="ignore"):
        z = v.astype(np.float32)[None] * x[:, None]
    padded = np.zeros((*z.shape[:2], -(-cols // GROUP) * GROUP), np.float32)
    padded[..., :cols] = z
    grouped = padded.reshape(*z.shape[:2], -1, GROUP)
    finite = np.isfinite(grouped).all(axis=-1, keepdims=True)
    grouped = np.where(finite, grouped, np.float32(0))
    largest = np.abs(grouped).max(axis=-1, keepdims=True)
    used = largest >= SMALLEST
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=used)
    scale = np.where(finite, np.where(used, largest / np.float32(127), np.float32(0)), np.float32(np.nan))
    rounded: npt.NDArray[np.float64] = np.rint(grouped * inverse).astype(np.float64) * scale
    return rounded.reshape(padded.shape)[..., :cols]


def product(x: F32, stack: SignStack, *, rounds: bool) -> npt.NDArray[np.float64]:
    """x @ W^T float64 (n_tokens, rows); ``rounds``: as a few tokens of int8 have it."""
    out: npt.NDArray[np.float64] = np.zeros((len(x), stack.rows))
    with np.errstate(invalid="ignore", over="ignore"):
        for block in stack.buffers:
            negative, u, v = unpack(stack.rows, stack.cols, block)
            wide = u.astype(np.float64)
            if not rounds:
                magnitude = wide @ v.astype(np.float64)
                out += x.astype(np.float64) @ np.where(negative, -magnitude, magnitude).T
                continue
            signs = np.where(negative, -1.0, 1.0)
            out += np.einsum("tkr,rk->tr", round_products(x, v) @ signs.T, wide)
    return out
