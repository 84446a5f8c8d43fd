"""Sealed storage: old keys by channel and old values by token, quantized for good; the last ones as they came.

The storage of :mod:`barefoot.kv.stores.kivi`, whose layouts and bytes are stated there. With R = ``residual``, of n
entries the keys below n_k = n - n mod R are sealed, and the values below n_v, the multiple of 32 with R to R + 31 of
them above it (0 below R + 32). Entries keep their order, so what is sealed can't be sent away one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.kv.storage import F32, I32, STAGED, U8, Array, Heads, Storage, Take, zeros
from barefoot.kv.stores.kivi import Kivi
from barefoot.ops import kvblocks, kvrows

VALUES = kvblocks.RUN  # that are sealed at a time


def arrays(heads: Heads, n_layers: int, n_slots: int, store: Kivi) -> tuple[Array, ...]:
    """Blocks of keys, keys that wait, blocks of values, values that wait, and positions, of a sequence."""
    n, row = n_layers * heads.n_kv_heads, kvrows.row_bytes(STAGED, heads.head_dim)
    return (
        Array("kv blocks of keys", n * n_blocks(n_slots, store), store.block_bytes(heads.head_dim)),
        Array("kv last keys", n * store.residual, row),
        Array("kv blocks of values", n * n_value_blocks(n_slots), store.value_block_bytes(heads.head_dim)),
        Array("kv last values", n * (store.residual + VALUES), row),
        Array("kv positions", n * n_slots, 4),
    )


def n_blocks(n_slots: int, store: Kivi) -> int:
    """Blocks of keys of one head; there is always room for one."""
    return max(1, n_slots // store.residual * store.residual // store.group)


def n_value_blocks(n_slots: int) -> int:
    return -(-n_slots // VALUES)


class Sealed(Storage):
    def __init__(self, heads: Heads, n_layers: int, n_slots: int, store: Kivi, take: Take) -> None:
        blocks, keys, sealed, values, positions = arrays(heads, n_layers, n_slots, store)
        self._store, self._dim = store, heads.head_dim
        each, row = (n_layers, heads.n_kv_heads), kvrows.row_bytes(STAGED, heads.head_dim)
        self._ring = store.residual + VALUES
        self._blocks = zeros(take, blocks, (*each, n_blocks(n_slots, store), blocks.n_bytes))
        self._keys = zeros(take, keys, (*each, store.residual, row))
        self._sealed = zeros(take, sealed, (*each, n_value_blocks(n_slots), sealed.n_bytes))
        self._values = zeros(take, values, (*each, self._ring, row))
        self._positions: I32 = zeros(take, positions, (*each, n_slots), np.int32)
        # Of each layer: entries, and how many of their keys and of their values are sealed.
        self._n, self._n_keys, self._n_values = (np.zeros(n_layers, np.int64) for _ in range(3))
        self._counts: I32 = np.zeros((n_layers, 3, heads.n_kv_heads), np.int32)
        self._segments = [self._three(layer) for layer in range(n_layers)]

    def _three(self, layer: int) -> tuple[ops.Segment, ...]:
        """Both sealed; keys sealed, values not yet; neither."""
        store, channels = self._store, f"c{self._store.bits}"
        parts = (
            (channels, self._blocks, f"t{store.bits}", self._sealed),
            (channels, self._blocks, STAGED, self._values),
            (STAGED, self._keys, STAGED, self._values),
        )
        return tuple(
            ops.Segment(
                key_format, keys[layer], value_format, values[layer],
                key_dim=self._dim, value_dim=self._dim, counts=self._counts[layer, i], group=store.group,
            )
            for i, (key_format, keys, value_format, values) in enumerate(parts)
        )  # fmt: skip

    def n(self, layer: int) -> int:
        return int(self._n[layer])

    def position(self, layer: int) -> I32:
        return self._positions[layer, :, : self.n(layer)]

    def segments(self, layer: int) -> Sequence[tuple[ops.Segment, I32]]:
        n = self.n(layer)
        n_keys, n_values = int(self._n_keys[layer]), int(self._n_values[layer])
        both, keys, neither = self._segments[layer]
        counts = self._counts[layer]
        counts[0], counts[1], counts[2] = n_values, n_keys - n_values, n - n_keys
        keys.key_start, keys.value_start = n_values, n_values % self._ring
        neither.value_start = n_keys % self._ring
        return [(s, c) for s, c in zip((both, keys, neither), counts, strict=True) if c[0]]

    def place(self, layer: int, stay: I32, position: I32, keys: U8, values: U8) -> None:
        n, heads = self.n(layer), np.arange(len(stay))[:, None]
        assert (stay[:, :n] == np.arange(n)).all()
        new = stay[:, n:]
        self._positions[layer, :, n : n + new.shape[1]] = np.take_along_axis(position, new, axis=1)
        done = 0
        while done < new.shape[1]:
            n = self.n(layer)
            room = min(self._store.residual - (n - self._n_keys[layer]), self._ring - (n - self._n_values[layer]))
            part = new[:, done : done + room] - stay.shape[1] + new.shape[1]
            at = np.arange(n, n + part.shape[1])
            self._keys[layer][:, at - self._n_keys[layer]] = keys[heads, part]
            self._values[layer][:, at % self._ring] = values[heads, part]
            self._n[layer] += part.shape[1]
            self.seal(layer)
            done += part.shape[1]

    def append(self, layer: int, k: F32, v: F32, position: int) -> None:
        """The entry joins the last ones; ``seal`` follows when attention has seen it."""
        n = self.n(layer)
        last = ((k, self._keys, n - int(self._n_keys[layer])), (v, self._values, n % self._ring))
        for row, stored, slot in last:
            ops.kv_write(row, stored[layer], STAGED, np.full((len(stored[layer]), 1), slot, np.int32))
        self._positions[layer, :, n] = position
        self._n[layer] += 1

    def seal(self, layer: int) -> None:
        """Quantize what has waited long enough."""
        store, n = self._store, self.n(layer)
        first = int(self._n_keys[layer])
        if n - first == store.residual:
            rows = kvrows.decode(STAGED, self._keys[layer], self._dim)
            blocks = rows.reshape(len(rows), -1, store.group, self._dim)
            at = first // store.group
            self._blocks[layer, :, at : at + blocks.shape[1]] = kvblocks.encode(store.bits, blocks)
            self._n_keys[layer] += store.residual
        first = int(self._n_values[layer])
        if n - first == self._ring:
            there = np.arange(first, first + VALUES)
            rows = kvrows.decode(STAGED, self._values[layer][:, there % self._ring], self._dim)
            self._sealed[layer][:, first // VALUES] = kvblocks.encode_values(store.bits, rows)
            self._n_values[layer] += VALUES

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

    def copy(self, other: Storage) -> None:
        assert isinstance(other, Sealed)
        n_keys, n_values, n = (int(each.max()) for each in (other._n_keys, other._n_values, other._n))
        for own, theirs, size in (
            (self._blocks, other._blocks, n_keys // self._store.group),
            (self._sealed, other._sealed, n_values // VALUES),
            (self._positions, other._positions, n),
            (self._keys, other._keys, self._store.residual),
            (self._values, other._values, self._ring),
        ):
            own[:, :, :size] = theirs[:, :, :size]
        for own, theirs in ((self._n, other._n), (self._n_keys, other._n_keys), (self._n_values, other._n_values)):
            own[:] = theirs
