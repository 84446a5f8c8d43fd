"""Demoting storage: what stays lies in slots, and what goes lies in slots of few bits, for good.

The storage of :mod:`barefoot.kv.stores.mikv`. To a cache its entries are those that a policy may choose among; the
others are attended to, and never looked at otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from barefoot.core import untrusted
from barefoot.core.errors import CorruptFile
from barefoot.kv.entries import MOVED_ROWS
from barefoot.kv.slots import Slots
from barefoot.kv.storage import F32, I32, STAGED, U8, U16, Array, Part, Shape, Storage, Take, check_positions, zeros
from barefoot.kv.stores.mikv import MiKV
from barefoot.ops import kvrows

MOVED = 20  # bytes of numpy arrays for each number of the entries of a key head that are demoted at a time
SENT = 21  # bytes of numpy arrays for each entry of a key head that may stay or go


class Demoting(Storage):
    lets_go: ClassVar[bool] = True

    @staticmethod
    def _of_codes(shape: Shape) -> Shape:
        """There is always room for one."""
        return Shape(shape.heads, shape.n_layers, max(1, shape.n_sent))

    @staticmethod
    def arrays(shape: Shape, store: MiKV) -> tuple[Array, ...]:
        codes = Slots.arrays(Demoting._of_codes(shape), store.codes)
        balance = Array("kv balance", shape.n_layers * shape.heads.n_kv_heads * shape.heads.head_dim, 4)
        return (
            *Slots.arrays(shape, store.inner),
            *(replace(array, name=f"{array.name} of codes") for array in codes),
            *([balance] if store.balance else []),
        )

    @staticmethod
    def placing_bytes(shape: Shape, store: MiKV) -> int:
        heads, n = shape.heads, shape.n_slots + shape.n_sent
        return MOVED * MOVED_ROWS * heads.head_dim + SENT * heads.n_kv_heads * n

    @staticmethod
    def asking_bytes(shape: Shape, store: MiKV, n_tokens: int) -> int:
        return 4 * n_tokens * shape.heads.n_heads * shape.heads.head_dim if store.balance else 0

    def __init__(self, shape: Shape, store: MiKV, take: Take) -> None:
        heads = shape.heads
        self._dim, self._each = heads.head_dim, (heads.n_kv_heads, heads.head_dim)
        self.kept, self.codes = Slots(shape, store.inner, take), Slots(self._of_codes(shape), store.codes, take)
        # Before it is fixed: the largest of the queries.
        self._balance: F32 | None = None
        if store.balance:
            self._balance = zeros(take, self.arrays(shape, store)[-1], (shape.n_layers, *self._each), np.float32)
        self._fixed = np.zeros(shape.n_layers, bool)

    def n(self, layer: int) -> int:
        return self.kept.n(layer)

    def room(self, layer: int) -> int:
        return self.kept.room(layer)

    def position(self, layer: int) -> I32:
        return self.kept.position(layer)

    def mass(self, layer: int) -> F32 | None:
        return self.kept.mass(layer)

    def strikes(self, layer: int) -> U16 | None:
        return self.kept.strikes(layer)

    def parts(self, layer: int) -> Sequence[Part]:
        query = None if self._balance is None else self._query(self._balance[layer])
        codes = (part._replace(query=query, chosen=False) for part in self.codes.parts(layer))
        return [*self.kept.parts(layer), *codes]

    # --- the balance of channels ------------------------------------------------------------------------------------

    @staticmethod
    def _query(balance: F32) -> Callable[[F32], F32]:
        def divided(q: F32) -> F32:
            each = q.reshape(len(q), len(balance), -1, balance.shape[1])
            return (each / balance[:, None]).reshape(q.shape)

        return divided

    def see(self, layer: int, q: F32, n_behind: int) -> None:
        if self._balance is not None and not self._fixed[layer]:
            each = q.reshape(len(q), self._each[0], -1, self._dim)
            largest = np.maximum(each.max(axis=(0, 2)), -each.min(axis=(0, 2)))
            np.maximum(self._balance[layer], largest, out=self._balance[layer])

    def _fix(self, layer: int, keys: U8) -> None:
        """By the queries that were seen, and staged keys (n_kv_heads, n, row bytes)."""
        if self._fixed[layer]:
            return
        self._fixed[layer] = True
        if self._balance is not None:
            largest = np.zeros(self._each, np.float32)
            for start in range(0, keys.shape[1], MOVED_ROWS):
                for head, rows in enumerate(keys[:, start : start + MOVED_ROWS]):
                    floats = kvrows.decode(STAGED, rows, self._dim)
                    np.maximum(largest[head], np.abs(floats, out=floats).max(axis=0), out=largest[head])
            self._balance[layer] = balance(self._balance[layer], largest)

    # --- entries ----------------------------------------------------------------------------------------------------

    def place(self, layer: int, stay: I32, position: I32, keys: U8, values: U8) -> None:
        n = self.n(layer)
        self._fix(layer, keys[:, : position.shape[1] - n])
        for head, own in enumerate(stay):
            goes = np.ones(position.shape[1], bool)
            goes[own] = False
            gone = np.flatnonzero(goes).astype(np.int32)
            self._demote(layer, slice(head, head + 1), gone[None, gone < n])
            for start in range(int((gone < n).sum()), len(gone), MOVED_ROWS):
                part = gone[start : start + MOVED_ROWS]
                k, v = (kvrows.decode(STAGED, rows[head, part - n], self._dim) for rows in (keys, values))
                self._store(layer, slice(head, head + 1), k, v, position[head : head + 1, part])
        self.kept.place(layer, stay, position, keys, values)

    def append(self, layer: int, k: F32, v: F32, position: int) -> None:
        self.kept.append(layer, k, v, position)

    def drop(self, layer: int, gone: I32) -> None:
        self._fix(layer, self.kept.regions[layer].keys[:, :0])  # no prompt has been
        self._demote(layer, slice(None), gone)
        self.kept.drop(layer, gone)

    def _demote(self, layer: int, heads: slice, gone: I32) -> None:
        """Entries (heads, m) of the slots become codes."""
        region = self.kept.regions[layer]
        for start in range(0, gone.shape[1], MOVED_ROWS):
            part = gone[:, start : start + MOVED_ROWS]
            k, v = (
                kvrows.decode(self.kept.row_format, np.take_along_axis(rows[heads], part[..., None], 1), self._dim)
                .swapaxes(0, 1)
                .reshape(part.shape[1], -1)
                for rows in (region.keys, region.values)
            )
            self._store(layer, heads, k, v, np.take_along_axis(region.position[heads], part, axis=1))

    def _store(self, layer: int, heads: slice, keys: F32, values: F32, position: I32) -> None:
        """Keys and values (m, heads × head_dim), of positions (heads, m), become codes."""
        if self._balance is not None:
            keys = keys * self._balance[layer, heads].reshape(-1)
        self.codes.extend(layer, heads, keys, values, position)

    def stepped(self, layer: int) -> None:
        self.kept.stepped(layer)

    def close(self) -> None:
        self.kept.close()

    def trim(self, layer: int, n_tokens: int) -> None:
        self.kept.trim(layer, n_tokens)
        self.codes.trim(layer, n_tokens)

    def clear(self) -> None:
        self.kept.clear()
        self.codes.clear()
        self._fixed[:] = False
        if self._balance is not None:
            self._balance[...] = 0

    def counters(self) -> dict[str, list[int]]:
        codes = self.codes.counters()["n"]
        return {**self.kept.counters(), "codes": codes, "fixed": self._fixed.astype(int).tolist()}

    def restore(self, counters: Mapping[str, Any]) -> None:
        self.kept.restore(counters)
        self.codes.restore({"n": counters.get("codes")})
        self._fixed[:] = untrusted.counts(counters, "fixed", len(self._fixed), 1)
        if (self.codes.counts[:, 0] > 0)[~self._fixed].any():
            raise CorruptFile("codes in a layer whose channels have no balance yet")

    def held(self) -> dict[str, npt.NDArray[Any]]:
        found = self.kept.held() | {f"{name}.codes": array for name, array in self.codes.held().items()}
        return found if self._balance is None else found | {"balance": self._balance}

    def check(self, n_tokens: int) -> None:
        for layer, fixed in enumerate(self._fixed):
            both = np.concatenate([self.position(layer), self.codes.position(layer)], axis=1)
            check_positions(both, n_tokens, f"layer {layer} and its codes")
            if self._balance is not None:
                own = self._balance[layer]
                if not (np.isfinite(own) & ((own > 0) if fixed else (own >= 0))).all():
                    raise CorruptFile(f"channels of layer {layer} have a balance that can't be")

    def copy(self, other: Storage) -> None:
        assert isinstance(other, Demoting)
        self.kept.copy(other.kept)
        self.codes.copy(other.codes)
        self._fixed[:] = other._fixed
        if self._balance is not None and other._balance is not None:
            self._balance[...] = other._balance


def balance(queries: F32, keys: F32) -> F32:
    """Factors of keys, of the largest queries and keys of each channel; 1 where either is zero or not finite."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        found = np.sqrt(queries / keys)
    return np.where(np.isfinite(found) & (found > 0), found, np.float32(1))
