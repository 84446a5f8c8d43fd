"""Sealed storage: old keys and values in blocks of many positions, quantized for good; the last ones as they came.

The storage of :class:`barefoot.kv.stores.SealingStore`, whose layouts and bytes are stated with its methods. Keys are
sealed R = ``residual`` at a time, and values V = ``n_values_sealed``, while L = ``n_values_left`` of them stay. That is
put off until the next entry needs room, so that 1 to R keys and L + 1 to L + V values wait behind what is sealed, and
all there are before so many have come. Entries keep their order, so what is sealed can't be sent away one by one;
positions are kept where a policy sends some away before they are stored, and count from 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core import untrusted
from barefoot.core.errors import CorruptFile, InvalidInput
from barefoot.kv.storage import F32, I32, STAGED, U8, Array, Part, Shape, Storage, Take, zeros
from barefoot.kv.stores import SealingStore
from barefoot.ops import kvblocks, kvrows

SEALED = 21  # bytes of numpy arrays for each number of the keys that are sealed at a time


def n_blocks(n_slots: int, store: SealingStore) -> tuple[int, int]:
    """Blocks of keys and of values of one head; there is always room for one."""
    of_keys = (n_slots - 1) // store.residual * store.residual // store.group
    return max(1, of_keys), max(1, (n_slots - 1 - store.n_values_left) // store.n_values_sealed)


class Sealed(Storage):
    @staticmethod
    def arrays(shape: Shape, store: SealingStore) -> tuple[Array, ...]:
        """Blocks of keys, keys that wait, blocks of values, values that wait, and positions, of a sequence."""
        heads, n_slots = shape.heads, shape.n_slots
        n, row = shape.n_layers * heads.n_kv_heads, kvrows.row_bytes(STAGED, heads.head_dim)
        n_keys, n_values = n_blocks(n_slots, store)
        return (
            Array("kv blocks of keys", n * n_keys, store.block_bytes(heads.head_dim)),
            Array("kv last keys", n * store.residual, row),
            Array("kv blocks of values", n * n_values, store.value_block_bytes(heads.head_dim)),
            Array("kv last values", n * (store.n_values_left + store.n_values_sealed), row),
            *([Array("kv positions", n * n_slots, 4)] if shape.n_sent else []),
        )

    @staticmethod
    def placing_bytes(shape: Shape, store: SealingStore) -> int:
        heads = shape.heads
        return SEALED * heads.n_kv_heads * store.residual * heads.head_dim

    def __init__(self, shape: Shape, store: SealingStore, take: Take, *, key_dim: int | None = None) -> None:
        """``key_dim``: channels of what is sealed, where that isn't all (``sealed_keys``)."""
        heads, n_layers, n_slots = shape.heads, shape.n_layers, shape.n_slots
        blocks, keys, sealed, values, *positions = Sealed.arrays(shape, store)
        self._store, self._dim, self._key_dim = store, heads.head_dim, key_dim or heads.head_dim
        blocks = replace(blocks, n_bytes=store.block_bytes(self._key_dim))
        each, row = (n_layers, heads.n_kv_heads), kvrows.row_bytes(STAGED, heads.head_dim)
        self._n_slots, self._ring = n_slots, store.n_values_left + store.n_values_sealed
        n_keys, n_values = n_blocks(n_slots, store)
        self._blocks = zeros(take, blocks, (*each, n_keys, blocks.n_bytes))
        self._keys = zeros(take, keys, (*each, store.residual, row))
        self._sealed = zeros(take, sealed, (*each, n_values, sealed.n_bytes))
        self._values = zeros(take, values, (*each, self._ring, row))
        self._positions: I32 | None = zeros(take, positions[0], (*each, n_slots), np.int32) if positions else None
        # Of each layer: entries, and how many of their keys and of their values are sealed.
        self._n, self._n_keys, self._n_values = (np.zeros(n_layers, np.int64) for _ in range(3))
        self._counts: I32 = np.zeros((n_layers, 3, heads.n_kv_heads), np.int32)
        self._segments = [self._three(layer) for layer in range(n_layers)]

    def _three(self, layer: int) -> tuple[ops.Segment, ...]:
        """Both sealed; keys sealed, values not yet; neither."""
        store, channels = self._store, f"c{self._store.bits}"
        parts = (
            (channels, self._blocks, self._key_dim, store.value_format, self._sealed),
            (channels, self._blocks, self._key_dim, STAGED, self._values),
            (STAGED, self._keys, self._dim, STAGED, self._values),
        )
        return tuple(
            ops.Segment(
                key_format, keys[layer], value_format, values[layer],
                key_dim=key_dim, value_dim=self._dim, counts=self._counts[layer, i], group=store.group,
            )
            for i, (key_format, keys, key_dim, value_format, values) in enumerate(parts)
        )  # fmt: skip

    def n(self, layer: int) -> int:
        return int(self._n[layer])

    def room(self, layer: int) -> int:
        return self._n_slots - self.n(layer)

    def position(self, layer: int) -> I32:
        n = self.n(layer)
        if self._positions is None:
            return np.broadcast_to(np.arange(n, dtype=np.int32), (self._keys.shape[1], n))
        return self._positions[layer, :, :n]

    def parts(self, layer: int) -> Sequence[Part]:
        n = self.n(layer)
        n_keys, n_values = int(self._n_keys[layer]), int(self._n_values[layer])
        both, keys, neither = self._segments[layer]
        counts = self._counts[layer]
        counts[0], counts[1], counts[2] = n_values, n_keys - n_values, n - n_keys
        keys.key_start, keys.value_start = n_values, n_values % self._ring
        neither.value_start = n_keys % self._ring
        query = self.query(layer)
        found = zip((both, keys, neither), counts, (query, query, None), strict=True)
        return [Part(*part) for part in found if part[1][0]]

    def query(self, layer: int) -> Callable[[F32], F32] | None:
        """Makes queries what sealed keys are multiplied with."""
        return None

    def sealed_keys(self, layer: int, keys: F32) -> F32:
        """What is sealed of keys, (n_kv_heads, n, head_dim)."""
        return keys

    def place(self, layer: int, stay: I32, position: I32, keys: U8, values: U8) -> None:
        n, heads = self.n(layer), np.arange(len(stay))[:, None]
        assert (stay[:, :n] == np.arange(n)).all()
        new = stay[:, n:]
        if self._positions is not None:
            self._positions[layer, :, n : n + new.shape[1]] = np.take_along_axis(position, new, axis=1)
        done = 0
        while done < new.shape[1]:
            self._make_room(layer)
            n = self.n(layer)
            room = min(self._store.residual - (n - self._n_keys[layer]), self._ring - (n - self._n_values[layer]))
            part = new[:, done : done + room] - stay.shape[1] + new.shape[1]
            at = np.arange(n, n + part.shape[1])
            self._keys[layer][:, at - self._n_keys[layer]] = keys[heads, part]
            self._values[layer][:, at % self._ring] = values[heads, part]
            self._n[layer] += part.shape[1]
            done += part.shape[1]

    def append(self, layer: int, k: F32, v: F32, position: int) -> None:
        """The entry joins the last ones."""
        self._make_room(layer)
        n = self.n(layer)
        last = ((k, self._keys, n - int(self._n_keys[layer])), (v, self._values, n % self._ring))
        for row, stored, slot in last:
            ops.kv_write(row, stored[layer], STAGED, np.full((len(stored[layer]), 1), slot, np.int32))
        if self._positions is not None:
            self._positions[layer, :, n] = position
        self._n[layer] += 1

    def _make_room(self, layer: int) -> None:
        """Quantize what has waited long enough for one more entry to come."""
        store, n = self._store, self.n(layer)
        first = int(self._n_keys[layer])
        if n - first == store.residual:
            rows = kvrows.decode(STAGED, self._keys[layer], self._dim)
            blocks = self.sealed_keys(layer, rows).reshape(len(rows), -1, store.group, self._key_dim)
            at = first // store.group
            self._blocks[layer, :, at : at + blocks.shape[1]] = kvblocks.encode(store.bits, blocks)
            self._n_keys[layer] += store.residual
        first = int(self._n_values[layer])
        if n - first == self._ring:
            there = np.arange(first, first + store.n_values_sealed)
            rows = kvrows.decode(STAGED, self._values[layer][:, there % self._ring], self._dim)
            self._sealed[layer][:, first // store.n_values_sealed] = store.encode_values(rows)
            self._n_values[layer] += store.n_values_sealed

    def trim(self, layer: int, n_tokens: int) -> None:
        """
        Raises
        ------
        InvalidInput : some of what would go is sealed; nothing has changed.
        """
        kept = (self.position(layer) < n_tokens).sum(axis=1)
        if (kept < max(self._n_keys[layer], self._n_values[layer])).any():
            raise InvalidInput(
                f"can't go back to {n_tokens} tokens: later ones are quantized together with earlier ones",
                cure="reset, and prefill the kept tokens again",
            )
        self._n[layer] = kept[0]

    def clear(self) -> None:
        for each in (self._n, self._n_keys, self._n_values):
            each[:] = 0

    def counters(self) -> dict[str, list[int]]:
        return {"n": self._n.tolist(), "keys": self._n_keys.tolist(), "values": self._n_values.tolist()}

    def restore(self, counters: Mapping[str, Any]) -> None:
        n = untrusted.counts(counters, "n", len(self._n), self._n_slots)
        n_keys, n_values = (untrusted.counts(counters, name, len(n), n) for name in ("keys", "values"))
        store = self._store
        for all_of_them, keys, values in zip(n, n_keys, n_values, strict=True):
            whole = keys % store.residual == 0 and values % store.n_values_sealed == 0 and values <= keys
            if not whole or all_of_them - keys > store.residual or all_of_them - values > self._ring:
                raise CorruptFile(f"a snapshot's {all_of_them} entries can't have {keys} and {values} sealed")
        self._n[:], self._n_keys[:], self._n_values[:] = n, n_keys, n_values

    def held(self) -> dict[str, npt.NDArray[Any]]:
        found: dict[str, npt.NDArray[Any]] = {}
        for layer, (n, n_keys, n_values) in enumerate(zip(self._n, self._n_keys, self._n_values, strict=True)):
            found |= {
                f"{layer}.blocks": self._blocks[layer, :, : n_keys // self._store.group],
                f"{layer}.keys": self._keys[layer, :, : n - n_keys],
                f"{layer}.sealed": self._sealed[layer, :, : n_values // self._store.n_values_sealed],
                f"{layer}.values": self._values[layer],
            }
            if self._positions is not None:
                found[f"{layer}.position"] = self._positions[layer, :, :n]
        return found

    def copy(self, other: Storage) -> None:
        assert isinstance(other, Sealed)
        n_keys, n_values, n = (int(each.max()) for each in (other._n_keys, other._n_values, other._n))
        for own, theirs, size in (
            (self._blocks, other._blocks, n_keys // self._store.group),
            (self._sealed, other._sealed, n_values // self._store.n_values_sealed),
            (self._positions, other._positions, n),
            (self._keys, other._keys, self._store.residual),
            (self._values, other._values, self._ring),
        ):
            if own is not None and theirs is not None:
                own[:, :, :size] = theirs[:, :, :size]
        for own, theirs in ((self._n, other._n), (self._n_keys, other._n_keys), (self._n_values, other._n_values)):
            own[:] = theirs
