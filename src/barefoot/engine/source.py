"""The weights that a fit starts from, as they are stored and as floats."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import Incompatible
from barefoot.core.model import ModelSpec
from barefoot.engine.rows import decode as decode_blocks
from barefoot.engine.rows import read_rows
from barefoot.io.inventory import Checkpoint
from barefoot.ops import parts
from barefoot.weights.structures import Matrix

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


class Source:
    """The weights that a fit starts from, by barefoot's names."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        self._checkpoint = checkpoint
        self.key = source_key(checkpoint)
        self.weights = {w.name: w for w in spec.weights}
        summed = next((w.name for w in spec.weights if w.parts), None)
        if summed is not None:
            raise Incompatible(
                f"{summed} is a sum of parts already, which can't be fitted again", cure="fit the model that it was"
            )

    def stored(self, name: str, first: int = 0, n_rows: int | None = None) -> U8:
        """Rows of a weight as its file stores them, uint8 (n_rows, row_bytes)."""
        return read_rows(self._checkpoint, self.weights[name], first, n_rows)

    def floats(
        self, name: str, first: int = 0, n_rows: int | None = None, order: npt.NDArray[np.int64] | None = None
    ) -> F32:
        """Rows of a weight, float32 (n_rows, cols); with ``order`` all of them, arranged so."""
        weight = self.weights[name]
        rows = self.stored(name, first, n_rows)
        return decode(Matrix(weight.format, rows if order is None else rows[order]), weight.cols)


def decode(matrix: Matrix, cols: int) -> F32:
    """What is stored, float32 (n, cols), by the kernels."""
    n = len(matrix.rows)
    out = decode_blocks(matrix.format, matrix.rows, cols)
    for kind, data in matrix.parts.values():
        out += parts.lookup(kind).decode(n, cols, data)
    return out


def factors(spec: ModelSpec, vectors: Mapping[str, U8]) -> dict[str, F32]:
    """Vectors as a pass takes them: norms are what they multiply by, though some files store that less one."""
    shift = np.float32(spec.norm_plus_one)
    floats = {role: rows.view(np.float32).reshape(-1) for role, rows in vectors.items()}
    return {role: v + shift if role.endswith("norm") else v for role, v in floats.items()}


def products(x: F32, weights: Iterable[F32]) -> list[F32]:
    return [x @ weight.T for weight in weights]


def source_key(checkpoint: Checkpoint) -> str:
    """Tells one checkpoint from another, without reading its weights."""
    tensors = sorted((t.name, t.type, t.shape, t.offset, t.shard) for t in checkpoint.tensors.values())
    return hashlib.sha256(repr((checkpoint.path.name, checkpoint.file_bytes, tensors)).encode()).hexdigest()
