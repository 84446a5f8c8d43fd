"""The space of quantizers: every axis a field, every combination of them a quantizer with stated bytes.

A Survey of Quantization Methods for Efficient Neural Network Inference (Gholami et al. 2021, arXiv:2103.13630), section
III: levels (III.A, III.F), symmetry (III.B), calibration of the range (III.C), granularity (III.E). Other methods of
this family are points of it, with learned levels, ranges or roundings; *static* or *dynamic* (III.D) is which array the
range is calibrated on.

**Stored** for a matrix (rows, cols) with G groups: a stream of codes, an f16 scale for each group, for uniform
asymmetric levels a 1-byte zero point for each, and for clusters one table of f16 levels::

    ceil(rows cols bits / 8) + G (2 or 3) + (2 · 2^bits for clusters)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import CorruptFile, InvalidInput
from barefoot.weights import bitstream, levels, ranges
from barefoot.weights.affine import SCALE_BYTES, Affine, Symmetry, stored_scale
from barefoot.weights.codebooks.clusters import clusters
from barefoot.weights.granularity import Block, count_groups, from_groups, to_groups

Levels = Literal["uniform", "powers", "sums", "clusters"]
Calibration = Literal["extremes", "percentile", "error", "entropy"]
F32 = npt.NDArray[np.float32]
LEVEL_BYTES = 2


@dataclass(frozen=True)
class Quantizer:
    """One point of the space.

    ``levels`` : uniform; powers of two; sums of powers; clusters of the matrix itself. All but uniform ones span
    as much below 0 as above. ``symmetry`` : of uniform levels. ``block`` : elements with a common scale.
    ``calibration`` : of each group's range; ``percent`` for percentiles.
    """

    bits: int = 8
    levels: Levels = "uniform"
    symmetry: Symmetry = "asymmetric"
    block: Block = (1, None)
    calibration: Calibration = "extremes"
    percent: float = 99.9

    def __post_init__(self) -> None:
        for got, allowed in ((self.levels, Levels), (self.calibration, Calibration)):
            if got not in get_args(allowed):
                raise InvalidInput(f"{got!r} is not one of {', '.join(get_args(allowed))}")
        if self.levels != "uniform" and self.symmetry == "asymmetric":
            raise InvalidInput(f"levels that are {self.levels} lie symmetrically about 0", cure="say symmetry='full'")
        Affine(self.bits, self.symmetry)
        if self.levels in ("powers", "sums"):
            self.table()

    def table(self) -> F32:
        """The levels that powers and sums have for any matrix."""
        return levels.powers(self.bits) if self.levels == "powers" else levels.sums(self.bits, 1 + (self.bits > 4))

    def n_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a stored matrix (rows, cols)."""
        group_bytes = Affine(self.bits, self.symmetry).group_bytes if self.levels == "uniform" else SCALE_BYTES
        table_bytes = LEVEL_BYTES << self.bits if self.levels == "clusters" else 0
        codes_bytes = bitstream.n_bytes(shape[0] * shape[1], self.bits)
        return codes_bytes + count_groups(shape, self.block) * group_bytes + table_bytes

    def ranges(self, groups: F32) -> tuple[F32, F32]:
        """The calibrated range of each group, (n,) each."""
        if self.calibration == "percentile":
            return ranges.percentile(groups, self.percent)
        if self.calibration == "error":
            return ranges.least_error(groups, Affine(self.bits, self.symmetry))
        return ranges.entropy(groups, self.bits) if self.calibration == "entropy" else ranges.extremes(groups)

    def encode(self, matrix: F32) -> Encoded:
        """The bytes of a matrix (rows, cols) float32."""
        shape = (matrix.shape[0], matrix.shape[1])
        groups = to_groups(matrix, self.block)
        low, high = self.ranges(groups)
        zeros = table = None
        if self.levels == "uniform":
            grid = Affine(self.bits, self.symmetry)
            scales, zero = grid.parameters(low, high)
            codes = grid.quantize(groups, scales, zero)
            zeros = zero[:, 0].astype(np.uint8) if self.symmetry == "asymmetric" else None
        else:
            scales = stored_scale(np.maximum(-low, high))[:, None]
            scaled = np.clip(groups / scales, -1, 1)
            if self.levels == "clusters":
                table = clusters(scaled, 1 << self.bits).astype(np.float16)
            codes = levels.nearest(scaled, self.table() if table is None else table.astype(np.float32))
        flat = from_groups(codes, shape, self.block).astype(np.uint16)
        return Encoded(self, shape, bitstream.pack(flat, self.bits), scales[:, 0].astype(np.float16), zeros, table)


@dataclass(frozen=True)
class Encoded:
    """A matrix as bytes: a stream of codes, ``scales`` float16 (G,), ``zeros`` uint8 (G,), ``table`` float16."""

    quantizer: Quantizer
    shape: tuple[int, int]
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    zeros: npt.NDArray[np.uint8] | None
    table: npt.NDArray[np.float16] | None

    @property
    def n_bytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scales, self.zeros, self.table) if part is not None)

    def decode(self) -> F32:
        """float32 (rows, cols).

        Raises
        ------
        CorruptFile : the parts don't have the sizes that the shape asks for, or a code has no level.
        """
        q = self.quantizer
        if self.n_bytes != q.n_bytes(self.shape):
            raise CorruptFile(f"a matrix {self.shape} of {q} takes {q.n_bytes(self.shape)} bytes, got {self.n_bytes}")
        codes = bitstream.unpack(self.codes, q.bits, self.shape[0] * self.shape[1]).reshape(self.shape)
        groups, scales = to_groups(codes, q.block), self.scales.astype(np.float32)[:, None]
        if q.levels == "uniform":
            zeros = np.float32(1 << (q.bits - 1)) if self.zeros is None else self.zeros.astype(np.float32)[:, None]
            values = Affine(q.bits, q.symmetry).dequantize(groups.astype(np.float32), scales, zeros)
        else:
            table = q.table() if self.table is None else self.table.astype(np.float32)
            if groups.max() >= len(table):
                raise CorruptFile(f"code {groups.max()} of {len(table)} levels")
            values = scales * table[groups]
        matrix: F32 = from_groups(values, self.shape, q.block)
        return matrix
