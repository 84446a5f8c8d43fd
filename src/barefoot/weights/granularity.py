"""Which elements share a range: blocks of a matrix, as rows of an array of groups.

Every granularity of the survey (Gholami et al. 2021, arXiv:2103.13630, section III.E) is a block (rows, cols), where
None is the whole axis:

    (None, None)  layer-wise                      (1, None)  a channel; a token, for activations
    (6, None)     6 output channels: Q-BERT's groups, or a head for 6 = head_dim
    (1, 64)       sub-channel groups along the inputs, as of the formats that the engine runs

Blocks at the lower and right edge may be smaller. They are filled by repeating their last row or column, which moves
neither a minimum nor a maximum.
"""

from __future__ import annotations

from barefoot.core.errors import InvalidInput
from barefoot.weights.arrays import Array, namespace

Block = tuple[int | None, int | None]


def block_of(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """``block`` in numbers, for a matrix of that shape.

    Raises
    ------
    InvalidInput : the matrix or the block is empty.
    """
    rows, cols = (axis if size is None else min(size, axis) for axis, size in zip(shape, block, strict=True))
    if rows < 1 or cols < 1:
        raise InvalidInput(f"groups of {block[0]} by {block[1]} in a matrix {shape[0]} by {shape[1]} are empty")
    return rows, cols


def count_groups(shape: tuple[int, int], block: Block) -> int:
    rows, cols = block_of(shape, block)
    return -(-shape[0] // rows) * -(-shape[1] // cols)


def to_groups(matrix: Array, block: Block) -> Array:
    """A matrix (M, N) as groups (groups, rows × cols), blocks from left to right, then downwards."""
    m, n = matrix.shape
    rows, cols = block_of((m, n), block)
    filled = _filled(_filled(matrix, 0, -m % rows), 1, -n % cols)
    tiles = filled.reshape(filled.shape[0] // rows, rows, filled.shape[1] // cols, cols)
    return namespace(matrix).swapaxes(tiles, 1, 2).reshape(-1, rows * cols)


def from_groups(groups: Array, shape: tuple[int, int], block: Block) -> Array:
    """The inverse of ``to_groups``."""
    m, n = shape
    rows, cols = block_of(shape, block)
    tiles = groups.reshape(-(-m // rows), -(-n // cols), rows, cols)
    return namespace(groups).swapaxes(tiles, 1, 2).reshape(-(-m // rows) * rows, -1)[:m, :n]


def _filled(matrix: Array, axis: int, n_missing: int) -> Array:
    if not n_missing:
        return matrix
    xp = namespace(matrix)
    last = matrix[-1:] if axis == 0 else matrix[:, -1:]
    shape = (n_missing, matrix.shape[1]) if axis == 0 else (matrix.shape[0], n_missing)
    return xp.concatenate([matrix, xp.broadcast_to(last, shape)], axis=axis)
