"""Where a cache's entries lie: what all storages share.

Entries of a layer are numbered from 0 on, the same number for all its key heads. A storage gives them to attention in
parts, in that order, takes new ones, and states its arrays before it has any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.errors import CorruptFile
from barefoot.core.ledger import Term

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
U16 = npt.NDArray[np.uint16]
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


@dataclass(frozen=True)
class Shape:
    """What a storage is to hold: ``n_slots`` entries of each key head, in a layer of mean size.

    ``mass``, ``biased`` and ``n_parts`` of strikes: what is kept of each entry besides its position. ``n_anchored``: so
    many of the first entries are a part of their own, and never go. ``n_sent``: the most entries of a key head that a
    policy sends away.
    """

    heads: Heads
    n_layers: int
    n_slots: int
    mass: bool = False
    biased: bool = False
    n_parts: int = 0
    n_anchored: int = 0
    n_sent: int = 0


class Part(NamedTuple):
    """Some of a layer's entries.

    Attributes
    ----------
    counts : int32 (n_kv_heads,), how many each key head has of them.
    query : makes queries, float32 (n, n_heads × head_dim), what these keys are multiplied with; None for themselves.
    chosen : whether the policy chooses among them, so that what is observed of them counts; else they come last.
    """

    segment: ops.Segment
    counts: I32
    query: Callable[[F32], F32] | None = None
    chosen: bool = True


class Storage(ABC):
    """The entries of all layers of one sequence."""

    lets_go: ClassVar[bool] = False  # whether an entry that has been placed can go
    merges: ClassVar[bool] = False  # whether an entry can be rewritten
    resizes: ClassVar[bool] = False  # whether layers can have unequal room
    anchors: ClassVar[bool] = False  # whether the first entries can be a part of their own

    @staticmethod
    @abstractmethod
    def arrays(shape: Shape, store: Any) -> tuple[Array, ...]:
        """Of a sequence."""

    @staticmethod
    @abstractmethod
    def placing_bytes(shape: Shape, store: Any) -> int:
        """Of arrays that come and go while entries are placed."""

    @staticmethod
    def asking_bytes(shape: Shape, store: Any, n_tokens: int) -> int:
        """Of arrays that come and go while ``n_tokens`` are seen, and attend."""
        return 0

    @abstractmethod
    def __init__(self, shape: Shape, store: Any, take: Take) -> None: ...

    @abstractmethod
    def n(self, layer: int) -> int:
        """Entries of each key head."""

    @abstractmethod
    def room(self, layer: int) -> int:
        """Entries of each key head that there is room for besides."""

    @abstractmethod
    def position(self, layer: int) -> I32:
        """Positions of the entries, (n_kv_heads, n)."""

    def mass(self, layer: int) -> F32 | None:
        """Attention mass of the entries, (n_kv_heads, n), where it is kept: it can be written."""
        return None

    def strikes(self, layer: int) -> U16 | None:
        """Strikes of the entries, (n_parts, n_kv_heads, n), where they are counted: they can be written."""
        return None

    def bias(self, layer: int) -> F32 | None:
        """Biases of the entries, (n_kv_heads, n), where they have any: they can be written."""
        return None

    @abstractmethod
    def parts(self, layer: int) -> Sequence[Part]:
        """All entries, in order, and behind them those that no policy chooses among."""

    def keys(self, layer: int, head: int) -> F32:
        """Keys of a head's entries, (n, head_dim)."""
        raise NotImplementedError

    def values(self, layer: int, head: int, entries: I32) -> F32:
        """Values of some entries of a head, (m, head_dim)."""
        raise NotImplementedError

    def rewrite(self, layer: int, head: int, entries: I32, keys: F32, values: F32) -> None:
        """Let some entries of a head have these keys and values, (m, head_dim)."""
        raise NotImplementedError

    def see(self, layer: int, q: F32, n_behind: int) -> None:
        """Queries of a prompt, float32 (n, n_heads × head_dim), which goes on for ``n_behind`` tokens."""
        return

    @abstractmethod
    def place(self, layer: int, stay: I32, position: I32, keys: U8, values: U8) -> None:
        """Of ``n`` entries and those staged behind them, keep ``stay``, (n_kv_heads, kept).

        layer : the last of those that keep the same entries. position : int32 (n_kv_heads, n and staged). keys, values
        : staged rows, uint8 (layers × n_kv_heads, staged, row bytes), of these layers one after the other.
        """

    @abstractmethod
    def append(self, layer: int, k: F32, v: F32, position: int) -> None:
        """One more entry: k, v float32 (1, n_kv_heads × head_dim)."""

    def drop(self, layer: int, gone: I32) -> None:
        """Let entries ``gone`` of a layer go, (n_kv_heads, m)."""
        raise NotImplementedError

    def rows(self) -> tuple[I32, F32 | None] | None:
        """Positions and mass of all layers' key heads, (n_layers × n_kv_heads, n), one layer behind the other.

        None where layers have different numbers of entries, or the arrays lie otherwise.
        """
        return None

    def drop_rows(self, gone: I32) -> None:
        """Of ``rows`` let one entry of each go, (n_layers × n_kv_heads,)."""
        raise NotImplementedError

    def resize(self, n_slots: Sequence[int]) -> None:
        """Have room for so many entries in each layer, in all no more than there was for."""
        raise NotImplementedError

    def stepped(self, layer: int) -> None:
        """A decoded token has passed the layer, the last of those that keep the same entries."""
        return

    def close(self) -> None:
        """Have no entry among the ``n`` that has gone already."""
        return

    @abstractmethod
    def trim(self, layer: int, n_tokens: int) -> None:
        """Only keep positions below ``n_tokens``."""

    @abstractmethod
    def clear(self) -> None:
        """No entries."""

    @abstractmethod
    def counters(self) -> dict[str, list[int]]:
        """How much there is: what :meth:`restore` needs for :meth:`held` to be of the same shapes."""

    @abstractmethod
    def restore(self, counters: Mapping[str, Any]) -> None:
        """Have as much as ``counters`` say, of any content.

        Raises
        ------
        CorruptFile : it isn't possible.
        """

    @abstractmethod
    def held(self) -> dict[str, npt.NDArray[Any]]:
        """All that is there, by name: views whose last axes are contiguous, and which can be written."""

    def check(self, n_tokens: int) -> None:
        """Refuse contents that were filled in and can't be, of a sequence of ``n_tokens``; positions of entries that a
        policy may choose among are looked at elsewhere.

        Raises
        ------
        CorruptFile : so it is.
        """
        return

    @abstractmethod
    def copy(self, other: Storage) -> None:
        """Have the entries of another storage of the same shape, in place of one's own."""


def zeros(take: Take, array: Array, shape: Sequence[int], dtype: npt.DTypeLike = np.uint8) -> Any:
    """The array, of that dtype, in memory of its own."""
    whole = take(array.bytes).view(dtype).reshape(shape)
    assert whole.nbytes == array.bytes
    return whole


def check_positions(position: I32, n_tokens: int, where: str) -> None:
    """Refuse positions (n_kv_heads, n) that are not different ones below ``n_tokens``.

    Raises
    ------
    CorruptFile : so it is.
    """
    ordered = np.sort(position, axis=1)
    inside = ordered.size == 0 or (ordered[:, 0].min() >= 0 and ordered[:, -1].max() < n_tokens)
    if not inside or (np.diff(ordered, axis=1) == 0).any():
        raise CorruptFile(f"positions of {where} are not different ones below {n_tokens}")
