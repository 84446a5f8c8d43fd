"""KV stores: how the keys and values of past positions are kept, and their bytes.

A store keeps, for each layer, keys and values as rows of one head each: (n_kv_heads, capacity, row_bytes). Position p
lies in slot p mod capacity, so that a window layer is a ring. One whose entries are no such rows says where they lie
(``storage``); one that changes how another keeps some of them wraps that (``think > q8``).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.ledger import Term
from barefoot.core.model import ModelSpec
from barefoot.core.spec import format_composition
from barefoot.core.technique import Technique
from barefoot.ops import kvblocks, kvrows

if TYPE_CHECKING:
    from barefoot.kv.storage import F32, U8, Storage


class KVStore(Technique):
    """The role: the type of the rows. ``row_format`` is the kernels' id for it."""

    rows: ClassVar[bool] = True  # whether an entry is a row of keys and a row of values
    forgets: ClassVar[bool] = True  # whether what a policy sends away is gone

    @property
    @abstractmethod
    def row_format(self) -> str: ...

    @property
    def sorts_keys(self) -> bool:
        """Whether channels of keys are to come in the order of their sizes (:mod:`barefoot.engine.key_order`)."""
        return False

    @abstractmethod
    def row_parts(self, head_dim: int) -> tuple[tuple[str, int, int], ...]:
        """The parts of one head's row of one position: (name, count, bytes each)."""

    def storage(self) -> type[Storage]:
        """Where entries lie that don't lie by position: a policy rules them, or they are no rows."""
        from barefoot.kv.slots import Slots

        return Slots

    def groups(self, n_layers: int) -> tuple[range, ...]:
        """The layers in order, those together that keep the same entries: a policy chooses once for them."""
        return tuple(range(layer, layer + 1) for layer in range(n_layers))

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of one head's keys (or values) of one position."""
        return sum(count * size for _, count, size in self.row_parts(head_dim))

    def bits_per_number(self, head_dim: int) -> float:
        """Stored bits a number, of positions that have been there for some time."""
        return 8 * self.row_bytes(head_dim) / head_dim

    def slots(self, spec: ModelSpec, layer: int, context: int, chunk: int) -> int:
        """Rows of a key head that a layer has room for."""
        return spec.kv_positions(layer, context, chunk)

    def longest(self, spec: ModelSpec) -> int:
        """The largest context of a sequence."""
        return spec.context_length

    def most_seen(self, n: int) -> int:
        """Entries of a key head that attention meets behind ``n`` positions, in a layer that sees all of them."""
        return n

    def layer_bytes(self, spec: ModelSpec, layer: int, context: int, chunk: int) -> int:
        """Keys and values of one layer of a sequence."""
        if not self.rows:
            return self._unruled().layer_bytes(spec, layer, context, chunk)
        return 2 * spec.n_kv_heads * self.slots(spec, layer, context, chunk) * self.row_bytes(spec.head_dim)

    def terms(self, spec: ModelSpec, context: int, chunk: int) -> tuple[Term, ...]:
        """Bytes of all layers' keys and values for ``context`` positions, prefilled ``chunk`` at a time."""
        if not self.rows:
            return self._unruled().terms(spec, context, chunk)
        slots = sum(self.slots(spec, layer, context, chunk) for layer in range(spec.n_layers))
        rows = 2 * slots * spec.n_kv_heads
        return tuple(Term(f"kv {name}", rows * count, size) for name, count, size in self.row_parts(spec.head_dim))

    def _unruled(self) -> KVStore:
        from barefoot.kv.ruled import Ruled

        return Ruled(None, self)

    @property
    def chain(self) -> tuple[KVStore, ...]:
        """The store, and what it wraps."""
        return (self,)


@dataclass(frozen=True)
class Wrapper(KVStore):
    """A store that changes how ``inner`` keeps some entries; layers with a window are ``inner``'s alone."""

    rows: ClassVar[bool] = False

    inner: KVStore

    @classmethod
    def knobs(cls) -> dict[str, Any]:
        return {name: default for name, default in super().knobs().items() if name != "inner"}

    @property
    def chain(self) -> tuple[KVStore, ...]:
        return (self, *self.inner.chain)

    def __str__(self) -> str:
        return format_composition(self.chain)

    @property
    def row_format(self) -> str:
        return self.inner.row_format

    @property
    def sorts_keys(self) -> bool:
        return self.inner.sorts_keys

    def row_parts(self, head_dim: int) -> tuple[tuple[str, int, int], ...]:
        return self.inner.row_parts(head_dim)


@dataclass(frozen=True)
class SealingStore(KVStore):
    """A store that quantizes old entries for good, many positions at a time; the last ones wait as they came, in f16.

    Keys go into blocks by channel of ``group`` positions, ``residual`` at a time, and values ``n_values_sealed`` at a
    time, as far as more than ``n_values_left`` stay: what has waited goes when the next entry needs its room.
    """

    rows: ClassVar[bool] = False

    bits: int
    group: int

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise InvalidInput(f"{self.name}: bits must be 2, 3 or 4, got {self.bits}")
        if self.group <= 0 or self.group % kvblocks.RUN:
            raise InvalidInput(f"{self.name}: group must be a multiple of {kvblocks.RUN}, got {self.group}")

    def storage(self) -> type[Storage]:
        from barefoot.kv.sealed import Sealed

        return Sealed

    @property
    def row_format(self) -> str:
        """Of layers with a window, which keep no more than that, and of what is not quantized yet."""
        return "f16"

    def row_parts(self, head_dim: int) -> tuple[tuple[str, int, int], ...]:
        return (("values", head_dim, 2),)

    def bits_per_number(self, head_dim: int) -> float:
        of_keys = self.block_bytes(head_dim) / self.group
        return 4 * (of_keys + self.value_block_bytes(head_dim) / self.n_values_sealed) / head_dim

    def block_bytes(self, head_dim: int) -> int:
        """Keys of ``group`` positions of one head."""
        return kvblocks.block_bytes(self.bits, self.group, head_dim)

    @property
    @abstractmethod
    def residual(self) -> int: ...

    @property
    @abstractmethod
    def n_values_sealed(self) -> int: ...

    @property
    @abstractmethod
    def n_values_left(self) -> int: ...

    @property
    @abstractmethod
    def value_format(self) -> str:
        """The kernels' name of blocks of values."""

    @abstractmethod
    def value_block_bytes(self, head_dim: int) -> int:
        """Values of ``n_values_sealed`` positions of one head."""

    @abstractmethod
    def encode_values(self, values: F32) -> U8:
        """Values (..., n_values_sealed, head_dim) to blocks."""

    @abstractmethod
    def decode_values(self, blocks: U8, head_dim: int) -> F32: ...


def whole_rows(store: KVStore, row_format: str, head_dim: int) -> None:
    """Refuse a head_dim that the store's rows of this format don't have.

    Raises
    ------
    Incompatible : with what it must be a multiple of.
    """
    whole = kvrows.whole(row_format)
    if head_dim % whole:
        raise Incompatible(f"{store} needs a head_dim in multiples of {whole}, got {head_dim}")


ROLE = KVStore
