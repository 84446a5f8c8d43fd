"""Where a cache's entries lie: what the two storages share.

Entries of a layer are numbered from 0 on, the same number for all its key heads. A storage gives them to attention as
segments, in that order, takes new ones, and states its arrays before it has any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.ledger import Term

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
Take = Callable[[int], U8]

STAGED = "f16"  # rows of entries that have not been stored yet


@dataclass(frozen=True)
class Heads:
    """Of each layer: sizes, the factor of scores and their cap (0 for none)."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    softcap: float = 0.0


@dataclass(frozen=True)
class Array:
    """An array of a storage: ``count`` parts of ``n_bytes``."""

    name: str
    count: int
    n_bytes: int

    @property
    def bytes(self) -> int:
        return self.count * self.n_bytes

    @property
    def term(self) -> Term:
        return Term(self.name, self.count, self.n_bytes)


class Storage(ABC):
    """The entries of all layers of one sequence."""

    @abstractmethod
    def n(self, layer: int) -> int:
        """Entries of each key head."""

    @abstractmethod
    def position(self, layer: int) -> I32:
        """Positions of the entries, (n_kv_heads, n)."""

    @abstractmethod
    def segments(self, layer: int) -> Sequence[tuple[ops.Segment, I32]]:
        """All entries, in order, and how many each key head has of each segment."""

    @abstractmethod
    def place(self, layer: int, stay: I32, position: I32, keys: U8, values: U8) -> None:
        """Of ``n`` entries and those staged behind them, keep ``stay``, (n_kv_heads, kept).

        position : int32 (n_kv_heads, n and staged). keys, values : staged rows, uint8 (n_kv_heads, staged, row bytes).
        """

    @abstractmethod
    def append(self, layer: int, k: F32, v: F32, position: int) -> None:
        """One more entry: k, v float32 (1, n_kv_heads × head_dim)."""

    @abstractmethod
    def trim(self, layer: int, n_tokens: int) -> None:
        """Only keep positions below ``n_tokens``."""

    @abstractmethod
    def clear(self) -> None:
        """No entries."""

    @abstractmethod
    def copy(self, other: Storage) -> None:
        """Have the entries of another storage of the same layout, in place of one's own."""


def zeros(take: Take, array: Array, shape: Sequence[int], dtype: npt.DTypeLike = np.uint8) -> Any:
    """The array, of that dtype, in memory of its own."""
    whole = take(array.bytes).view(dtype).reshape(shape)
    assert whole.nbytes == array.bytes
    return whole
