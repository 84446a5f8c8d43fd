"""Weight formats: how a matrix is stored, and its bytes.

A format names a block layout of :mod:`barefoot.ops.blocks`, where each is documented bit by bit; kernels read that
layout directly.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from barefoot.core.errors import InvalidInput
from barefoot.core.ledger import Term
from barefoot.core.technique import Technique

GROUPS = (32, 64, 128)  # weights that share a scale


class WeightFormat(Technique):
    """The role: which block layout a matrix of the model gets.

    Methods take the format that the file stores (an id such as ``"q4_1"``), since a format may carry it as it is.
    """

    @abstractmethod
    def layout(self, stored: str) -> str:
        """The block layout's id for a matrix that the file stores as ``stored``."""

    def terms(self, name: str, rows: int, cols: int, stored: str) -> tuple[Term, ...]:
        """Bytes of a (rows, cols) matrix, by the parts of its blocks (codes, scales, minimums).

        Raises
        ------
        Incompatible : ``cols`` is no multiple of the layout's group.
        """
        from barefoot.ops import blocks

        layout = self.layout(stored)
        n_blocks = rows * blocks.n_blocks(layout, cols)
        return tuple(Term(f"{name} {part}", n_blocks, size) for part, size in blocks.parts(layout))

    def filled(self, stored: str) -> str:
        """A layout whose blocks the columns of a matrix have to fill."""
        return self.layout(stored)

    def linear(self, rows: int, cols: int, stored: str, **settings: Any) -> Any:
        """The PyTorch module that multiplies by such a matrix, without its bytes yet: a ``PackedLinear``, which takes
        the settings."""
        from barefoot.weights.module import PackedLinear

        return PackedLinear(self.layout(stored), cols, rows, **settings)


ROLE = WeightFormat


def check_knob(technique: str, knob: str, got: int, allowed: Sequence[int]) -> None:
    """InvalidInput unless ``got`` is one of ``allowed``."""
    if got not in allowed:
        raise InvalidInput(f"{technique}: {knob} must be one of {', '.join(map(str, allowed))}, got {got}")
