"""Sparse matrices: the few weights of a matrix that its codes hold badly, in compressed rows (CSR).

SpQR (Dettmers et al. 2023, arXiv:2306.03078, section 4.2): outliers in the order of their rows, and in a row of their
columns; 32 bits each. A matrix of r rows with n entries is r + 1 + n little-endian numbers of 32 bits::

    offsets   r + 1 numbers: row i has the entries offsets[i] .. offsets[i + 1] - 1; the first is 0, the last n
    entries   n numbers: the value, f16, in the high half, and the column in the low half

so 4 (r + 1 + n) bytes, from which n follows. Example: [2, 100] with 0.5 at row 1, column 7: 0, 0, 1, 0x38000007.

A product adds a row's entries one after the other, in float32: it depends neither on threads nor on the number of
tokens, and needs scratch only from 16 tokens on, 16 inputs of float32 a thread.

The values are *added* to what the codes hold, so that the product with both is the sum of two products. (The paper's
files keep the whole weight, beside a code that means about 0.)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.ops import parts
from barefoot.ops.grids import to_f16
from barefoot.ops.scratch import ALIGN

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

MAX_COLS = 1 << 16
TOKENS = 16  # that are multiplied at a time, where there are as many


def n_bytes(n_rows: int, n_entries: int) -> int:
    """Bytes of a matrix of ``n_rows`` with ``n_entries`` in all."""
    return 4 * (n_rows + 1 + n_entries)


def encode(dense: F32, mask: npt.NDArray[np.bool_]) -> U8:
    """The entries of ``dense`` (rows, cols) where ``mask``, rounded to f16: uint8 (n_bytes,).

    Raises
    ------
    Incompatible : more than 65,536 columns.
    """
    n_rows, n_cols = dense.shape
    if n_cols > MAX_COLS:
        raise Incompatible(f"sparse matrices have at most {MAX_COLS} columns, got {n_cols}", cure="use no outliers")
    rows, columns = np.nonzero(mask)
    words = np.empty(n_rows + 1 + len(rows), "<u4")
    words[: n_rows + 1] = np.searchsorted(rows, np.arange(n_rows + 1))
    values = to_f16(dense[rows, columns]).astype(np.float16).view(np.uint16)
    words[n_rows + 1 :] = values.astype(np.uint32) << np.uint32(16) | columns.astype(np.uint32)
    return words.view(np.uint8)


def decode(n_rows: int, n_cols: int, data: U8) -> F32:
    """The matrix, float32 (n_rows, n_cols), zero where it has no entry.

    Raises
    ------
    InvalidInput : ``data`` is none, as :func:`flaw` says.
    """
    wrong = flaw(n_rows, n_cols, data)
    if wrong:
        raise InvalidInput(f"sparse matrix [{n_rows}, {n_cols}]: {wrong}")
    offsets, columns, values = _taken_apart(n_rows, data)
    dense = np.zeros((n_rows, n_cols), np.float32)
    dense[np.repeat(np.arange(n_rows), np.diff(offsets)), columns] = values
    return dense


def flaw(n_rows: int, n_cols: int, data: U8) -> str | None:
    """What is wrong with ``data`` as a matrix [n_rows, n_cols]; None: nothing, all that it points at is there."""
    if data.size % 4 or data.size < n_bytes(n_rows, 0):
        return "not a whole number of offsets and entries"
    offsets, columns, values = _taken_apart(n_rows, data)
    if offsets[0] != 0 or offsets[-1] != len(columns):
        return "offsets don't reach from 0 to the entries' end"
    if (np.diff(offsets) < 0).any():
        return "offsets fall"
    if (columns >= n_cols).any():
        return "a column beyond the last"
    rising = np.diff(columns, prepend=-1) > 0
    rising[offsets[:-1][offsets[:-1] < len(columns)]] = True  # the first of a row
    if not rising.all():
        return "columns of a row that don't rise"
    return None if np.isfinite(values).all() else "NaN or infinity"


def _taken_apart(n_rows: int, data: U8) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], F32]:
    """Offsets, columns and values."""
    words = np.ascontiguousarray(data).reshape(-1).view("<u4")
    offsets, entries = words[: n_rows + 1], words[n_rows + 1 :]
    values = (entries >> np.uint32(16)).astype(np.uint16).view(np.float16).astype(np.float32)
    return offsets.astype(np.int64), (entries & np.uint32(0xFFFF)).astype(np.int64), values


def _scratch_bytes(n_tokens: int, n_rows: int, n_cols: int, size: int, n_threads: int) -> int:
    return 0 if n_tokens < TOKENS else ALIGN + n_threads * TOKENS * n_cols * 4


KIND = parts.add(parts.PartKind("csr", decode, flaw, _scratch_bytes))
