"""Q-BERT: groups of output neurons, bits by curvature, fine-tuned while rounded.

Q-BERT: Hessian Based Ultra Low Precision Quantization of BERT (Shen et al. 2019, arXiv:1909.05840).

1. *Groups* (section 3.2, figure 4): a matrix is cut into ``n_groups`` runs of consecutive output rows, so that the runs
   lie inside attention heads, each with the asymmetric uniform grid between its own extremes. One scale multiplies a
   whole dot product.
2. *Mixed precision* (section 3.1): every encoder layer gets one of a few widths, by its sensitivity Ω
   (:mod:`barefoot.weights.curvature`) at a trained minimum.
3. *Fine-tuning*: the masters stay in float32 and are rounded in every forward pass, with ranges of the moment; the
   gradient passes straight through. Embeddings are rounded to 8 bits, inputs of matrices to 8 bits, dynamically.

**Stored** (``bits`` b of a layer, G groups): codes as a stream of bits, row after row, then per group an f16 scale and
a 1-byte zero point::

    ceil(rows cols b / 8) + 3 G

*Differs from the paper*: the width of a layer is found by a knapsack over Ω ‖W - Q_b(W)‖² under a budget in bytes, of
which its two-level rule by rank of Ω is the special case of layers with equal errors; grids hold 0 exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import CorruptFile, InvalidInput
from barefoot.weights import bitstream
from barefoot.weights.affine import Affine
from barefoot.weights.allocate import Option, allocate
from barefoot.weights.arrays import Array
from barefoot.weights.granularity import Block, count_groups, from_groups, to_groups
from barefoot.weights.ranges import extremes

if TYPE_CHECKING:
    from torch import nn

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class QBert:
    """``widths`` : the bits among which layers choose. ``n_groups`` : per matrix, at most one for each output row."""

    widths: tuple[int, ...] = (2, 3)
    n_groups: int = 128
    embedding_bits: int = 8
    activation_bits: int = 8

    def __post_init__(self) -> None:
        if not self.widths or self.n_groups < 1:
            raise InvalidInput(f"at least one width and one group are needed, got {self.widths} and {self.n_groups}")
        for bits in (*self.widths, self.embedding_bits, self.activation_bits):
            Affine(bits)

    def block(self, rows: int) -> Block:
        """Consecutive output rows that share a range."""
        return -(-rows // self.n_groups), None

    def n_bytes(self, shape: tuple[int, int], bits: int) -> int:
        """Bytes of a stored matrix (rows, cols)."""
        rows, cols = shape
        n = count_groups(shape, self.block(rows))
        return bitstream.n_bytes(rows * cols, bits) + n * Affine(bits).group_bytes

    def rounded(self, weight: Array, bits: int) -> Array:
        """What a matrix (rows, cols) becomes: the extremes of each group are its range."""
        block = self.block(weight.shape[0])
        groups = to_groups(weight, block)
        return from_groups(Affine(bits).rounded(groups, *extremes(groups)), tuple(weight.shape), block)


@dataclass(frozen=True)
class Stored:
    """A matrix as bytes: ``codes`` a stream of bits, ``scales`` float16 (G,), ``zeros`` uint8 (G,)."""

    shape: tuple[int, int]
    bits: int
    block: Block
    codes: U8
    scales: npt.NDArray[np.float16]
    zeros: U8

    @property
    def n_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes

    def weights(self) -> F32:
        """float32 (rows, cols).

        Raises
        ------
        CorruptFile : the parts don't have the sizes that the shape asks for.
        """
        n = count_groups(self.shape, self.block)
        if self.scales.shape != (n,) or self.zeros.shape != (n,):
            raise CorruptFile(f"{n} groups have as many scales and zero points, got {len(self.scales)}")
        codes = bitstream.unpack(self.codes, self.bits, self.shape[0] * self.shape[1]).reshape(self.shape)
        groups = to_groups(codes.astype(np.float32), self.block)
        scales, zeros = self.scales.astype(np.float32)[:, None], self.zeros.astype(np.float32)[:, None]
        weights: F32 = from_groups(Affine(self.bits).dequantize(groups, scales, zeros), self.shape, self.block)
        return weights


def store(knobs: QBert, weight: F32, bits: int) -> Stored:
    """The bytes of a matrix (rows, cols); ``weights()`` of them is ``knobs.rounded(weight, bits)``."""
    shape = (weight.shape[0], weight.shape[1])
    block, grid = knobs.block(shape[0]), Affine(bits)
    groups = to_groups(weight, block)
    scale, zero = grid.parameters(*extremes(groups))
    codes = from_groups(grid.quantize(groups, scale, zero), shape, block)
    return Stored(
        shape,
        bits,
        block,
        bitstream.pack(codes.astype(np.uint16), bits),
        scale[:, 0].astype(np.float16),
        zero[:, 0].astype(np.uint8),
    )


def choose_widths(
    knobs: QBert, layers: Mapping[str, Sequence[Array]], weighting: Mapping[str, float], budget_bytes: int
) -> dict[str, int]:
    """Bits of each layer, so that Σ weighting × ‖W - Q(W)‖² is least within ``budget_bytes``.

    ``layers`` : the matrices of each. ``weighting`` : Ω of each, or anything else that is to be compared with it.

    Raises
    ------
    OverBudget : not even the smallest widths fit.
    """
    items = {
        name: [
            Option(
                sum(knobs.n_bytes(tuple(w.shape), bits) for w in weights),
                weighting[name] * sum(float(((w - knobs.rounded(w, bits)) ** 2).sum()) for w in weights),
                str(bits),
            )
            for bits in knobs.widths
        ]
        for name, weights in layers.items()
    }
    return {name: int(option.name) for name, option in allocate(items, budget_bytes).items()}


@contextmanager
def rounding(knobs: QBert, modules: Mapping[nn.Module, int]) -> Iterator[None]:
    """While this lasts, the ``weight`` of each module is rounded to its bits, and the inputs of linear ones too.

    Gradients reach the float32 masters straight through, so any training loop fine-tunes them. Afterwards the modules
    hold their masters again, for ``store``. Optimizers must be made inside, where the masters are the parameters.
    """
    from torch import nn

    from barefoot.weights.training.modules import replaced

    class Rounded(nn.Module):
        def __init__(self, bits: int) -> None:
            super().__init__()
            self.bits = bits

        def forward(self, weight: Any) -> Any:
            return straight_through(weight, knobs.rounded(weight.detach(), self.bits))

    linear = (module for module in modules if isinstance(module, nn.Linear))
    with replaced(
        {module: Rounded(bits) for module, bits in modules.items()},
        dict.fromkeys(linear, partial(rounded_inputs, knobs)),
    ):
        yield


def rounded_inputs(knobs: QBert, x: Any) -> Any:
    """Activations of any shape on one grid between their extremes."""
    flat = x.detach().float().reshape(1, -1)
    rounded = Affine(knobs.activation_bits).rounded(flat, *extremes(flat))
    return straight_through(x, rounded.reshape(x.shape).to(x.dtype))


def straight_through(x: Any, rounded: Any) -> Any:
    """``rounded``, with the gradient of ``x``."""
    return x + (rounded - x).detach()
