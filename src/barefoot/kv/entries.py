"""Entries at slots, in any order: their values, positions and what is observed. Where keys lie is a subclass's matter.

An entry that goes leaves its slot to another. Bytes, of n layers with H key heads, S slots and rows of r bytes: n × H ×
S × (r + 4), a position for each; 4 more for each where attention mass is kept, 4 where entries have a bias, 2 for each
part of strikes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core import untrusted
from barefoot.kv.storage import F32, I32, STAGED, U8, U16, Array, Shape, Storage, Take, zeros
from barefoot.kv.stores import KVStore
from barefoot.ops import kvrows

MOVED_ROWS = 256  # entries of a key head that are decoded at a time
MOVED = 8  # bytes of numpy arrays for each of their numbers
NONE = -1  # no slot


class Region:
    """A layer's slots: views (n_kv_heads, slots, …) of the arrays. ``own`` are its rows of the whole ones."""

    def __init__(self, entries: Entries, first: int, n_slots: int) -> None:
        n, self.n_slots = entries.shape.heads.n_kv_heads, n_slots
        row = entries.all_values.shape[1]
        self.own = slice(n * first, n * (first + n_slots))
        self.values = entries.all_values[self.own].reshape(n, n_slots, row)
        self.position = entries.all_positions[self.own].reshape(n, n_slots)
        self.mass = None if entries.all_mass is None else entries.all_mass[self.own].reshape(n, n_slots)
        self.bias = None if entries.all_biases is None else entries.all_biases[self.own].reshape(n, n_slots)
        strikes = entries.all_strikes
        self.strikes = None if strikes is None else strikes[:, self.own].reshape(len(strikes), n, n_slots)
        kept = {name: array for name, array in (("mass", self.mass), ("bias", self.bias)) if array is not None}
        parts = () if self.strikes is None else self.strikes
        #: What is kept of each entry that it doesn't come with, (n_kv_heads, slots), by name.
        self.observed: dict[str, Any] = {**kept, **{f"strikes{i}": part for i, part in enumerate(parts)}}

    @property
    def by_entry(self) -> dict[str, Any]:
        """All arrays, (n_kv_heads, slots, …), by name."""
        return {"values": self.values, "position": self.position, **self.observed}


class Entries(Storage):
    lets_go: ClassVar[bool] = True
    regions: Sequence[Region]

    @staticmethod
    def arrays(shape: Shape, store: KVStore) -> tuple[Array, ...]:
        """Values, positions, and what is kept of each entry, of a sequence."""
        n = shape.n_layers * shape.heads.n_kv_heads * shape.n_slots
        kept = [Array("kv values", n, store.row_bytes(shape.heads.head_dim)), Array("kv positions", n, 4)]
        kept += [Array("kv mass", n, 4)] if shape.mass else []
        kept += [Array("kv biases", n, 4)] if shape.biased else []
        kept += [Array("kv strikes", shape.n_parts * n, 2)] if shape.n_parts else []
        return tuple(kept)

    def __init__(self, shape: Shape, store: KVStore, take: Take) -> None:
        self.shape, self.row_format = shape, store.row_format
        found = {array.name: array for array in Entries.arrays(shape, store)}
        n, row = found["kv values"].count, found["kv values"].n_bytes
        self.all_values: U8 = zeros(take, found["kv values"], (n, row))
        self.all_positions: I32 = zeros(take, found["kv positions"], (n,), np.int32)
        self.all_mass: F32 | None = zeros(take, found["kv mass"], (n,), np.float32) if shape.mass else None
        self.all_biases: F32 | None = zeros(take, found["kv biases"], (n,), np.float32) if shape.biased else None
        parts = shape.n_parts
        self.all_strikes: U16 | None = zeros(take, found["kv strikes"], (parts, n), np.uint16) if parts else None
        self.counts: I32 = np.zeros((shape.n_layers, shape.heads.n_kv_heads), np.int32)
        # Of each layer and key head: a slot below the count that waits for the next entry, where one has just gone.
        self.free: I32 = np.full_like(self.counts, NONE)

    def n(self, layer: int) -> int:
        return int(self.counts[layer, 0])

    def room(self, layer: int) -> int:
        return self.regions[layer].n_slots - self.n(layer) + int(self.free[layer, 0] != NONE)

    def position(self, layer: int) -> I32:
        return self.regions[layer].position[:, : self.n(layer)]

    def mass(self, layer: int) -> F32 | None:
        mass = self.regions[layer].mass
        return None if mass is None else mass[:, : self.n(layer)]

    def strikes(self, layer: int) -> U16 | None:
        strikes = self.regions[layer].strikes
        return None if strikes is None else strikes[:, :, : self.n(layer)]

    def bias(self, layer: int) -> F32 | None:
        bias = self.regions[layer].bias
        return None if bias is None else bias[:, : self.n(layer)]

    def values(self, layer: int, head: int, entries: I32) -> F32:
        return kvrows.decode(self.row_format, self.regions[layer].values[head, entries], self.shape.heads.head_dim)

    def place(self, layer: int, stay: I32, position: I32, keys: U8, values: U8) -> None:
        region = self.regions[layer]
        for head, own in enumerate(stay):
            kept, new = own[own < self.n(layer)], own[own >= self.n(layer)]
            slots = self._gather(layer, head, kept, len(own))
            region.position[head, slots] = position[head, new]
            for kept_of in region.observed.values():
                kept_of[head, slots] = 0
            rows = new - self.n(layer)
            self._place_keys(layer, head, keys[head], rows, slots)
            write_staged(values[head], rows, region.values[head : head + 1], self.row_format, slots)
        self.counts[layer] = stay.shape[1]

    @abstractmethod
    def _place_keys(self, layer: int, head: int, staged: U8, rows: I32, slots: I32) -> None:
        """Have keys ``staged[rows]``, ascending by position, at the slots."""

    @abstractmethod
    def _gather(self, layer: int, head: int, kept: I32, n: int) -> I32:
        """Bring the entries ``kept``, ``n`` at most, below slot ``n``. Return the slots that are left there, in the
        order in which newer entries take them."""

    def append(self, layer: int, k: F32, v: F32, position: int) -> None:
        slots = self._next(layer)
        region = self.regions[layer]
        for head, slot in enumerate(slots.tolist()):
            region.position[head, slot] = position
            for kept_of in region.observed.values():
                kept_of[head, slot] = 0
        self._write_key(layer, k, slots)
        ops.kv_write(v, region.values, self.row_format, slots[:, None])

    def _next(self, layer: int) -> I32:
        """A slot of each key head, (n_kv_heads,), for one more entry."""
        slots = self.free[layer].copy()
        if slots[0] == NONE:
            slots = self.counts[layer].copy()
            self.counts[layer] += 1
        return np.asarray(slots, np.int32)

    @abstractmethod
    def _write_key(self, layer: int, k: F32, slots: I32) -> None:
        """One entry's keys, (1, n_kv_heads × head_dim), at a slot of each key head."""

    def stepped(self, layer: int) -> None:
        self.free[layer] = NONE

    def drop(self, layer: int, gone: I32) -> None:
        if gone.shape[1] > 1:
            self._remove(layer, gone)
        else:
            self.free[layer] = gone[:, 0]

    def rows(self) -> tuple[I32, F32 | None] | None:
        n, n_slots = self.n(0), self.regions[0].n_slots
        if (self.counts != n).any() or any(region.n_slots != n_slots for region in self.regions):
            return None
        size = self.counts.size
        position, mass = self.all_positions[: size * n_slots], self.all_mass
        observed = None if mass is None else mass[: size * n_slots].reshape(size, n_slots)[:, :n]
        return position.reshape(size, n_slots)[:, :n], observed

    def drop_rows(self, gone: I32) -> None:
        self.free[...] = gone.reshape(self.free.shape)

    def close(self) -> None:
        for layer, slots in enumerate(self.free):
            if slots[0] != NONE:
                self._remove(layer, slots[:, None])
        self.free[...] = NONE

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
        self.free[...] = NONE

    def counters(self) -> dict[str, list[int]]:
        self.close()
        return {"n": self.counts[:, 0].tolist()}

    def restore(self, counters: Mapping[str, Any]) -> None:
        slots = [region.n_slots for region in self.regions]
        self.free[...] = NONE
        self.counts[...] = np.array(untrusted.counts(counters, "n", len(slots), slots))[:, None]

    def held(self) -> dict[str, npt.NDArray[Any]]:
        found = {}
        for layer, region in enumerate(self.regions):
            for name, array in region.by_entry.items():
                found[f"{layer}.{name}"] = array[:, : self.n(layer)]
        return found

    def copy(self, other: Storage) -> None:
        assert isinstance(other, Entries)
        for layer, region in enumerate(other.regions):
            own = self.regions[layer].by_entry
            for name, theirs in region.by_entry.items():
                own[name][:, : other.n(layer)] = theirs[:, : other.n(layer)]
        self.counts[...], self.free[...] = other.counts, other.free


def pack(arrays: Iterable[npt.NDArray[Any]], head: int, kept: I32, first: int, last: int) -> I32:
    """Bring a head's entries ``kept`` into the slots from ``first`` to ``last``; return those that are left there."""
    inside = (kept >= first) & (kept < last)
    empty = np.ones(max(0, last - first), bool)
    empty[kept[inside] - first] = False
    free = np.flatnonzero(empty).astype(np.int32) + np.int32(first)
    movers = kept[~inside]
    into, left = free[: len(movers)], free[len(movers) :]
    if len(movers):
        for array in arrays:
            array[head, into] = array[head, movers]
    return left


def write_staged(staged: U8, rows: I32, stored: U8, fmt: str, slots: I32) -> None:
    """Have ``staged[rows]`` of one head at the slots of ``stored``, (1, slots, row bytes)."""
    for start in range(0, len(rows), MOVED_ROWS):
        part = slice(start, start + MOVED_ROWS)
        if fmt == STAGED:
            stored[0, slots[part]] = staged[rows[part]]
        else:
            floats = kvrows.decode(STAGED, staged[rows[part]], staged.shape[-1] // 2)
            ops.kv_write(floats, stored, fmt, np.ascontiguousarray(slots[None, part]))
