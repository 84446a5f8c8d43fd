"""Sparse matrices: the few weights of a matrix that its codes hold badly, in compressed rows (CSR).

SpQR (Dettmers et al. 2023, arXiv:2306.03078, section 4.2): outliers in the order of their rows, and in a row of their
columns; 32 bits each. A matrix of r rows with n entries is r + 1 + n little-endian numbers of 32 bits::

    offsets   r + 1 numbers: row i has the entries offsets[i] .. offsets[i + 1] - 1; the first is 0, the last n
    entries   n numbers: the value, f16, in the high half, and the column in the low half

so 4 (r + 1 + n) bytes, from which n follows. Example: [2, 100] with 0.5 at row 1, column 7: 0, 0, 1, 0x38000007.

The values are *added* to what the codes hold, so that the product with both is the sum of two products. (The paper's
files keep the whole weight, beside a code that means about 0.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import CorruptFile, Incompatible
from barefoot.ops.grids import to_f16

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

MAX_COLS = 1 << 16
MAX_ENTRIES = (1 << 32) - 1


def n_bytes(n_rows: int, n_entries: int) -> int:
    """Bytes of a matrix of ``n_rows`` with ``n_entries`` in all."""
    return 4 * (n_rows + 1 + n_entries)


@dataclass(frozen=True, eq=False)
class Csr:
    """A matrix [rows, cols] in ``buffer``, contiguous uint8 of any alignment, looked through when it is made.

    Raises
    ------
    CorruptFile : as :func:`check`.
    """

    rows: int
    cols: int
    buffer: U8

    def __post_init__(self) -> None:
        check(self.rows, self.cols, self.buffer)

    @property
    def n_entries(self) -> int:
        return self.buffer.size // 4 - self.rows - 1


def check(n_rows: int, n_cols: int, data: U8) -> None:
    """Refuse what is not a matrix [n_rows, n_cols].

    Raises
    ------
    CorruptFile : sizes that don't fit, offsets that fall or end elsewhere, columns beyond the last or not rising within
        a row, values that are not finite.
    """
    if n_cols > MAX_COLS:
        raise CorruptFile(f"a sparse matrix has at most {MAX_COLS} columns, got {n_cols}")
    if data.size < n_bytes(n_rows, 0) or data.size % 4:
        raise CorruptFile(
            f"a sparse matrix of {n_rows} rows has {n_bytes(n_rows, 0)} bytes and 4 an entry, got {data.size}"
        )
    offsets, columns, values = _parts(n_rows, data)
    n_entries = len(columns)
    if offsets[0] != 0 or offsets[-1] != n_entries or (offsets[1:] < offsets[:-1]).any():
        raise CorruptFile(f"the offsets of a sparse matrix must rise from 0 to its {n_entries} entries")
    if n_entries and int(columns.max()) >= n_cols:
        raise CorruptFile(f"an entry of a sparse matrix lies in column {columns.max()} of {n_cols}")
    rising = columns[1:] > columns[:-1]
    starts = offsets[1:-1].astype(np.int64)  # of rows but the first; where the column may fall
    rising[starts[(starts > 0) & (starts < n_entries)] - 1] = True
    if not rising.all():
        raise CorruptFile("the columns of a sparse matrix must rise within each row")
    if not np.isfinite(values).all():
        raise CorruptFile("a sparse matrix holds NaN or infinity")


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
    assert len(rows) <= MAX_ENTRIES
    words = np.empty(n_rows + 1 + len(rows), "<u4")
    words[: n_rows + 1] = np.searchsorted(rows, np.arange(n_rows + 1))
    values = to_f16(dense[rows, columns]).astype(np.float16).view(np.uint16)
    words[n_rows + 1 :] = values.astype(np.uint32) << np.uint32(16) | columns.astype(np.uint32)
    return words.view(np.uint8)


def decode(n_rows: int, n_cols: int, data: U8) -> F32:
    """The matrix, float32 (n_rows, n_cols), zero where it has no entry.

    Raises
    ------
    CorruptFile : as :func:`check`.
    """
    check(n_rows, n_cols, data)
    offsets, columns, values = _parts(n_rows, data)
    dense = np.zeros((n_rows, n_cols), np.float32)
    rows = np.repeat(np.arange(n_rows), np.diff(offsets.astype(np.int64)))
    dense[rows, columns] = values
    return dense


def product(x: F32, weight: Csr) -> F32:
    """x @ S^T, float32 (n_tokens, rows): each row's entries added in order, as the kernels do, bit for bit."""
    offsets, columns, values = _parts(weight.rows, weight.buffer)
    counts = np.diff(offsets.astype(np.int64))
    sums = np.zeros((len(x), weight.rows), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for i in range(int(counts.max(initial=0))):  # entry i of the rows that have as many
            rows = np.flatnonzero(counts > i)
            at = offsets[rows] + np.uint32(i)
            sums[:, rows] += values[at] * x[:, columns[at]]
    return sums


def _parts(n_rows: int, data: U8) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint16], F32]:
    """Offsets, columns and values."""
    words = np.ascontiguousarray(data).reshape(-1).view("<u4")
    offsets, entries = words[: n_rows + 1], words[n_rows + 1 :]
    values = (entries >> np.uint32(16)).astype(np.uint16).view(np.float16).astype(np.float32)
    return offsets, (entries & np.uint32(0xFFFF)).astype(np.uint16), values
