"""Structures: matrices that are sums, of coarse blocks and of what makes up for them.

A structure decides by itself how a matrix becomes blocks and parts (``barefoot.ops.parts``), since it divides the
matrix among them; what is no sum is a format (:mod:`barefoot.weights.formats`) with a solver.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from barefoot.core.technique import Technique
from barefoot.weights.solvers import Inputs, Knowledge

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Matrix:
    """A weight as it is stored: ``rows`` uint8 (n_rows, row_bytes) of a block format, ``"zero"`` where there are none,
    and what is added to them, (kind, data uint8 (n_bytes,)) by label."""

    format: str
    rows: U8
    parts: Mapping[str, tuple[str, U8]] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        return self.rows.nbytes + sum(data.nbytes for _, data in self.parts.values())


@dataclass(frozen=True)
class Stored:
    """The bytes of a matrix: of its blocks of a format, and (kind, bytes) of its parts by label."""

    format: str
    block_bytes: int
    parts: Mapping[str, tuple[str, int]]

    @property
    def n_bytes(self) -> int:
        return self.block_bytes + sum(size for _, size in self.parts.values())


class Structure(Technique):
    """The role. ``wants`` says what calibration must measure; without it, a fit needs no text at all."""

    wants: ClassVar[Knowledge] = "nothing"

    @abstractmethod
    def solve(self, weight: F32, inputs: Inputs | None) -> Matrix:
        """How ``weight`` float32 (rows, cols) is stored. ``inputs`` is what ``wants`` asks for; None only for
        ``"nothing"``.

        Raises
        ------
        Incompatible : a shape that the structure can't have.
        """

    @abstractmethod
    def most(self, rows: int, cols: int) -> Stored:
        """What a matrix (rows, cols) takes at most; Incompatible as :meth:`solve`."""

    @abstractmethod
    def workspace_bytes(self, rows: int, cols: int) -> int:
        """What :meth:`solve` allocates at most at a time, beside the weight, its inputs and what it returns."""


ROLE = Structure
