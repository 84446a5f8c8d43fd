"""bitstack — a matrix as a stack of one-bit residual blocks, of which as many are loaded as fit.

BitStack: Any-Size Compression of Large Language Models in Variable Memory Environments (Wang et al. 2024,
arXiv:2410.23918). With s_j = sqrt(mean of x_j²) of each input and R = W diag(s), repeat ``blocks`` times (section 3.2):

    S = sign(R)          -1 or +1 for each weight, +1 for 0
    |R| ≈ U V            the best approximation of rank k
    R ← R - S * (U V)    what the next block makes up for

Magnitudes have a large component of rank one, signed weights don't: of a Gaussian matrix one block of rank 1 keeps
1 - (1 - 2 / π) = 64 % of the energy for little more than a bit a weight, where an SVD of as many bytes keeps 15 %. The
matrix is the sum of its blocks (:mod:`barefoot.ops.signs` has the layout), any first few of them an approximation.
Which blocks of which matrices come first is another matter: :mod:`barefoot.evals.sorting`.

*Bytes* of a block [rows, cols]: rows cols / 8 + 2 k (rows + cols), for whole panels and quads. With
k = min(rank, rows cols / (64 (rows + cols))), at least 1, factors take at most a quarter of a bit a weight: the paper's
rank of 16 is meant for matrices 4,096 wide, and would cost 0.9 bits at 576 by 576.

**Stretching.** What a block leaves is |R| less its mean, roughly: the bulk shrinks each time, the tail hardly does. Of
a Gaussian matrix 1, 2, 3, 4, 5 and 8 blocks leave 0.363, 0.131, 0.059, 0.033, 0.023 and 0.013 of the energy, though the
last ones cost as many bits as the first. So a block takes ``stretch`` times U V, a step closer to the tail: with 1.2
they leave 0.389, 0.129, 0.049, 0.019, 0.009 and 0.003. ``stretch=1`` is the paper's.

*Differs from the paper*: the stretching. 1/s is part of V (V ← V diag(1/s)), which costs nothing and needs no norm or
matrix before to fold it into. Residuals are taken from the factors as f16 stores them, so later blocks undo their
rounding. The rank follows the shape. ``scale=False`` leaves the inputs out, as the paper's ablation does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.ops import signs
from barefoot.weights.solvers import Inputs, Knowledge
from barefoot.weights.structures import Matrix, Stored, Structure

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

MOST_BLOCKS = 99  # labels have two digits
FACTOR_WEIGHTS = 64  # weights beside each number of U and V: a quarter of a bit for 16
LEAST_SCALE = np.float32(1e-3)  # of the largest
OVERSAMPLING = 8
ROUNDS = 4
SEED = 22


@dataclass(frozen=True)
class BitStack(Structure, name="bitstack", papers=(22,), status="stable"):
    blocks: int = 16
    rank: int = 16
    scale: bool = True
    stretch: float = 1.2

    def __post_init__(self) -> None:
        if not 1 <= self.blocks <= MOST_BLOCKS or not 1 <= self.rank <= signs.MAX_RANK:
            raise InvalidInput(
                f"bitstack: expected 1 to {MOST_BLOCKS} blocks and a rank of 1 to {signs.MAX_RANK}, got {self}"
            )
        if not 1 <= self.stretch < 2:
            raise InvalidInput(f"bitstack: stretch must be at least 1 and below 2, got {self.stretch}")

    @property
    def wants(self) -> Knowledge:  # type: ignore[override]
        return "squares" if self.scale else "nothing"

    def most(self, rows: int, cols: int) -> Stored:
        size = signs.block_bytes(rows, cols, rank_for(rows, cols, self.rank))
        return Stored("zero", 0, {_label(i): (signs.KIND.name, size) for i in range(1, self.blocks + 1)})

    def workspace_bytes(self, rows: int, cols: int) -> int:
        """What is left of the weight, a block's signs and magnitudes; and a few times the vectors of its factors."""
        return 9 * rows * cols + 5 * 4 * (rank_for(rows, cols, self.rank) + OVERSAMPLING) * (rows + cols)

    def solve(self, weight: F32, inputs: Inputs | None) -> Matrix:
        if not np.isfinite(weight).all():
            raise Incompatible("a matrix that holds NaN or infinity has no stack")
        scales = np.ones(weight.shape[1], np.float32)
        if self.scale:
            assert inputs is not None
            scales = channel_scales(inputs.squares)
        rank = rank_for(len(weight), weight.shape[1], self.rank)
        blocks = decompose(weight, scales, self.blocks, rank, self.stretch)
        parts = {_label(i): (signs.KIND.name, block) for i, block in enumerate(blocks, 1)}
        return Matrix("zero", np.empty((len(weight), 0), np.uint8), parts)


def _label(block: int) -> str:
    """Of the part that a block is, counted from 1."""
    return f"{block:02}"


def rank_for(rows: int, cols: int, most: int) -> int:
    """A matrix's rank: factors take a quarter of a bit a weight at most, unless a rank of 1 takes more."""
    return max(1, min(most, rows * cols // (FACTOR_WEIGHTS * (rows + cols))))


def channel_scales(squares: F32) -> F32:
    """s of the inputs' mean squares, (cols,): root mean squares, at least a thousandth of the largest, by geometric
    mean 1."""
    rms = np.sqrt(squares)
    largest = rms.max(initial=0)
    if not largest > 0:
        return np.ones_like(rms)
    rms = np.maximum(rms / largest, LEAST_SCALE)
    scales: F32 = (rms / np.exp(np.log(rms).mean())).astype(np.float32)
    return scales


def decompose(weight: F32, scales: F32, n_blocks: int, rank: int, stretch: float = 1.0) -> Iterator[U8]:
    """The blocks of ``weight`` float32 (rows, cols), each of what the ones before left of it."""
    rest = weight * scales
    for _ in range(n_blocks):
        negative = rest < 0
        u, v = truncated(np.abs(rest), rank)
        u16, v16 = as_halves(u * np.float32(stretch), v / scales)
        part = u16.astype(np.float32) @ v16.astype(np.float32)
        part *= scales
        np.negative(part, out=part, where=negative)
        rest -= part
        del part
        yield signs.pack(negative, u16, v16)


def truncated(a: F32, rank: int) -> tuple[F32, F32]:
    """u (rows, rank) and v (rank, cols) with u v the best approximation of ``a`` of that rank, nearly.

    Subspace iteration from ones (the first singular vectors of magnitudes have one sign) and random vectors of a fixed
    seed. What an exact SVD would save is below 0.5 % of the error on magnitudes of Gaussian matrices, whose spectrum
    behind the first value is flat, and less where it falls.
    """
    n = min(rank + OVERSAMPLING, *a.shape)
    x = np.random.default_rng(SEED).standard_normal((a.shape[1], n), np.float32)
    x[:, 0] = 1
    for _ in range(ROUNDS):
        x = np.linalg.qr(a.T @ np.linalg.qr(a @ x)[0])[0]
    basis = np.linalg.qr(a @ x)[0]
    left, values, right = np.linalg.svd(basis.T @ a, full_matrices=False)
    roots = np.sqrt(values[:rank])
    u, v = np.zeros((len(a), rank), np.float32), np.zeros((rank, a.shape[1]), np.float32)
    u[:, : len(roots)], v[: len(roots)] = (basis @ left[:, :rank]) * roots, roots[:, None] * right[:rank]
    return u, v


def as_halves(u: F32, v: F32) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """u and v as f16, balanced by a power of two so that neither leaves its range."""
    largest = np.abs(u).max(initial=0), np.abs(v).max(initial=0)
    shift = np.float32(1)
    if min(largest) > 0:
        shift = np.float32(2.0) ** np.rint(np.log2(largest[1] / largest[0]) / 2)
    return (u * shift).astype(np.float16), (v / shift).astype(np.float16)
