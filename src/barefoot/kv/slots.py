"""Slots: entries at rows of any format, in any order; one that goes leaves its slot to another.

Bytes, of n layers with H key heads, S slots and rows of r bytes: n × H × S × (2 r + 4), a position for each; 4 more for
each where attention mass is kept, or 2 for each part of its strikes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.kv.storage import F32, I32, STAGED, U8, Array, Heads, Storage, Take, zeros
from barefoot.kv.stores import KVStore
from barefoot.ops import kvrows

U16 = npt.NDArray[np.uint16]

MOVED_ROWS = 256  # entries of a key head that are decoded at a time


def arrays(heads: Heads, n_layers: int, n_slots: int, store: KVStore, *, mass: bool, n_parts: int) -> tuple[Array, ...]:
    """Keys, values, positions, mass, and strikes in so many parts, of a sequence."""
    n = n_layers * heads.n_kv_heads * n_slots
    row = store.row_bytes(heads.head_dim)
    kept = (Array("kv keys", n, row), Array("kv values", n, row), Array("kv positions", n, 4))
    observed = (Array("kv mass", n, 4),) if mass else (Array("kv strikes", n_parts * n, 2),) if n_parts else ()
    return (*kept, *observed)


class Slots(Storage):
    def __init__(
        self, heads: Heads, n_layers: int, n_slots: int, store: KVStore, take: Take, *, mass: bool, n_parts: int
    ) -> None:
        keys, values, positions, *observed = arrays(heads, n_layers, n_slots, store, mass=mass, n_parts=n_parts)
        self._format, row = store.row_format, store.row_bytes(heads.head_dim)
        each = (n_layers, heads.n_kv_heads, n_slots)
        self._keys = zeros(take, keys, (*each, row))
        self._values = zeros(take, values, (*each, row))
        self.positions: I32 = zeros(take, positions, each, np.int32)
        self.mass: F32 | None = zeros(take, observed[0], each, np.float32) if mass else None
        self.strikes: U16 | None = zeros(take, observed[0], (n_parts, *each), np.uint16) if n_parts else None
        self.counts: I32 = np.zeros((n_layers, heads.n_kv_heads), np.int32)
        # (n_layers, n_kv_heads): slots below the counts that wait for the next entry, where one has just gone.
        self.free: I32 | None = None
        dim, fmt = heads.head_dim, self._format
        self._segments = [
            ops.Segment(fmt, k, fmt, v, key_dim=dim, value_dim=dim, counts=n)
            for k, v, n in zip(self._keys, self._values, self.counts, strict=True)
        ]

    def n(self, layer: int) -> int:
        return int(self.counts[layer, 0])

    def position(self, layer: int) -> I32:
        return self.positions[layer, :, : self.n(layer)]

    def segments(self, layer: int) -> Sequence[tuple[ops.Segment, I32]]:
        return [(self._segments[layer], self.counts[layer])] if self.n(layer) else []

    def place(self, layer: int, stay: I32, position: I32, keys: U8, values: U8) -> None:
        for head, own in enumerate(stay):
            kept, new = own[own < self.n(layer)], own[own >= self.n(layer)]
            slots = self._gather(layer, head, kept, len(own))
            self.positions[layer, head, slots] = position[head, new]
            if self.mass is not None:
                self.mass[layer, head, slots] = 0
            for rows, stored in ((keys, self._keys), (values, self._values)):
                self._write(rows[head], new - self.n(layer), stored[layer, head : head + 1], slots)
        self.counts[layer] = stay.shape[1]

    def _write(self, staged: U8, rows: I32, stored: U8, slots: I32) -> None:
        for start in range(0, len(rows), MOVED_ROWS):
            part = slice(start, start + MOVED_ROWS)
            if self._format == STAGED:
                stored[0, slots[part]] = staged[rows[part]]
            else:
                floats = kvrows.decode(STAGED, staged[rows[part]], staged.shape[-1] // 2)
                ops.kv_write(floats, stored, self._format, np.ascontiguousarray(slots[None, part]))

    def _gather(self, layer: int, head: int, kept: I32, n: int) -> I32:
        """Bring the entries ``kept`` below slot ``n``, which are no more than that, and return the slots left there."""
        free = np.setdiff1d(np.arange(n, dtype=np.int32), kept)
        movers = kept[kept >= n]
        into, left = free[: len(movers)], free[len(movers) :]
        if len(movers):
            for array in (self._keys, self._values, self.positions, self.mass):
                if array is not None:
                    array[layer, head, into] = array[layer, head, movers]
            if self.strikes is not None:
                self.strikes[:, layer, head, into] = self.strikes[:, layer, head, movers]
        return left

    def append(self, layer: int, k: F32, v: F32, position: int) -> None:
        if self.free is None:
            slots = self.counts[layer].copy()
            self.counts[layer] += 1
        else:
            slots = self.free[layer]
        heads = np.arange(len(slots))
        self.positions[layer, heads, slots] = position
        if self.mass is not None:
            self.mass[layer, heads, slots] = 0
        if self.strikes is not None:
            self.strikes[:, layer, heads, slots] = 0
        for row, stored in ((k, self._keys), (v, self._values)):
            ops.kv_write(row, stored[layer], self._format, slots[:, None])

    def drop(self, layer: int, gone: I32) -> None:
        """Let entries ``gone`` of a layer go, (n_kv_heads, m): the same number of all layers, one after the other."""
        if gone.shape[1] > 1:
            self._remove(layer, gone)
            return
        if self.free is None:
            self.free = np.empty_like(self.counts)
        self.free[layer] = gone[:, 0]

    def close(self) -> None:
        """Have no slot wait for an entry."""
        if self.free is not None:
            for layer, gone in enumerate(self.free):
                self._remove(layer, gone[:, None])
            self.free = None

    def _remove(self, layer: int, gone: I32) -> None:
        for head, own in enumerate(gone):
            kept = np.delete(np.arange(self.n(layer), dtype=np.int32), own)
            self._gather(layer, head, kept, len(kept))
        self.counts[layer] -= gone.shape[1]

    def trim(self, layer: int, n_tokens: int) -> None:
        for head, position in enumerate(self.position(layer)):
            kept = np.flatnonzero(position < n_tokens).astype(np.int32)
            self._gather(layer, head, kept, len(kept))
            self.counts[layer, head] = len(kept)

    def clear(self) -> None:
        self.counts[...] = 0
        self.free = None

    def copy(self, other: Storage) -> None:
        assert isinstance(other, Slots)
        n = int(other.counts.max(initial=0))
        arrays = (self._keys, other._keys), (self._values, other._values), (self.positions, other.positions)
        for own, theirs in (*arrays, *(((self.mass, other.mass),) if self.mass is not None else ())):
            own[:, :, :n] = theirs[:, :, :n]
        if self.strikes is not None and other.strikes is not None:
            self.strikes[..., :n] = other.strikes[..., :n]
        self.counts[...] = other.counts
        self.free = None if other.free is None else other.free.copy()
