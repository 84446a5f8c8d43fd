"""Slots: entries at rows of any format, in any order; one that goes leaves its slot to another.

Bytes, of n layers with H key heads, S slots and rows of r bytes: n × H × S × (2 r + 4), a position for each; 4 more for
each where attention mass is kept, 4 where entries have a bias, 2 for each part of strikes. A layer's slots are one
region of the arrays, so that layers can share them unequally.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core import untrusted
from barefoot.kv.storage import F32, I32, STAGED, U8, U16, Array, Part, Shape, Storage, Take, zeros
from barefoot.kv.stores import KVStore
from barefoot.ops import kvrows

MOVED_ROWS = 256  # entries of a key head that are decoded at a time
MOVED = 8  # bytes of numpy arrays for each of their numbers
NONE = -1  # no slot


class Region:
    """A layer's slots: views (n_kv_heads, slots, …) of the arrays."""

    def __init__(self, storage: Slots, first: int, n_slots: int) -> None:
        n, self.n_slots = storage.shape.heads.n_kv_heads, n_slots
        own, row = slice(n * first, n * (first + n_slots)), storage.all_keys.shape[1]
        self.keys = storage.all_keys[own].reshape(n, n_slots, row)
        self.values = storage.all_values[own].reshape(n, n_slots, row)
        self.position = storage.all_positions[own].reshape(n, n_slots)
        self.mass = None if storage.all_mass is None else storage.all_mass[own].reshape(n, n_slots)
        self.bias = None if storage.all_biases is None else storage.all_biases[own].reshape(n, n_slots)
        strikes = storage.all_strikes
        self.strikes = None if strikes is None else strikes[:, own].reshape(len(strikes), n, n_slots)

    @property
    def by_entry(self) -> list[U8 | I32 | F32 | U16]:
        """All arrays, (n_kv_heads, slots, …)."""
        kept = [a for a in (self.mass, self.bias) if a is not None]
        return [self.keys, self.values, self.position, *kept, *([] if self.strikes is None else self.strikes)]


class Slots(Storage):
    lets_go: ClassVar[bool] = True

    @staticmethod
    def arrays(shape: Shape, store: KVStore) -> tuple[Array, ...]:
        """Keys, values, positions, and what is kept of each entry, of a sequence."""
        n = shape.n_layers * shape.heads.n_kv_heads * shape.n_slots
        row = store.row_bytes(shape.heads.head_dim)
        kept = [Array("kv keys", n, row), Array("kv values", n, row), Array("kv positions", n, 4)]
        kept += [Array("kv mass", n, 4)] if shape.mass else []
        kept += [Array("kv biases", n, 4)] if shape.biased else []
        kept += [Array("kv strikes", shape.n_parts * n, 2)] if shape.n_parts else []
        return tuple(kept)

    @staticmethod
    def placing_bytes(shape: Shape, store: KVStore) -> int:
        return MOVED * MOVED_ROWS * shape.heads.head_dim

    def __init__(self, shape: Shape, store: KVStore, take: Take) -> None:
        self.shape, self.row_format = shape, store.row_format
        row = store.row_bytes(shape.heads.head_dim)
        found = {array.name: array for array in self.arrays(shape, store)}
        n = found["kv positions"].count
        self.all_keys: U8 = zeros(take, found["kv keys"], (n, row))
        self.all_values: U8 = zeros(take, found["kv values"], (n, row))
        self.all_positions: I32 = zeros(take, found["kv positions"], (n,), np.int32)
        self.all_mass: F32 | None = zeros(take, found["kv mass"], (n,), np.float32) if shape.mass else None
        self.all_biases: F32 | None = zeros(take, found["kv biases"], (n,), np.float32) if shape.biased else None
        parts = shape.n_parts
        self.all_strikes: U16 | None = zeros(take, found["kv strikes"], (parts, n), np.uint16) if parts else None
        self.counts: I32 = np.zeros((shape.n_layers, shape.heads.n_kv_heads), np.int32)
        # Of each layer and key head: a slot below the count that waits for the next entry, where one has just gone.
        self.free: I32 = np.full_like(self.counts, NONE)
        self.regions = self._regions([shape.n_slots] * shape.n_layers)
        self._parts: dict[int, list[Part]] = {}

    def _regions(self, n_slots: Sequence[int]) -> list[Region]:
        first = [0, *np.cumsum(n_slots).tolist()]
        return [Region(self, at, n) for at, n in zip(first, n_slots, strict=False)]

    def resize(self, n_slots: Sequence[int]) -> None:
        there = [region.n_slots for region in self.regions]
        if list(n_slots) == there:
            return
        self.close()
        n = [self.n(layer) for layer in range(len(there))]
        assert all(each <= room for each, room in zip(n, n_slots, strict=True))
        assert sum(n_slots) <= self.shape.n_layers * self.shape.n_slots
        # To the left without gaps, the first ones first; then to the right, the last ones first: none is overwritten.
        for sizes, turn in ((n, 1), (n_slots, -1)):
            regions = self._regions(sizes)
            for layer in range(len(n))[::turn]:
                for into, own in zip(regions[layer].by_entry, self.regions[layer].by_entry, strict=True):
                    for head in range(len(own))[::turn]:
                        for start in range(0, n[layer], MOVED_ROWS)[::turn]:
                            part = slice(start, min(start + MOVED_ROWS, n[layer]))
                            into[head, part] = own[head, part]
            self.regions = regions
        self._parts = {}

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

    def parts(self, layer: int) -> Sequence[Part]:
        if not self.n(layer):
            return []
        if layer not in self._parts:
            self._parts[layer] = self._parts_of(layer)
        parts = self._parts[layer]
        if len(parts) > 1:
            first, rest = (part.counts for part in parts)
            first[:] = min(self.n(layer), self.shape.n_anchored)
            rest[:] = self.counts[layer] - first
        return [part for part in parts if part.counts[0]]

    def _parts_of(self, layer: int) -> list[Part]:
        """One of all entries; or one of the anchored ones, which keep the first slots, and one of the others."""
        region, fmt, dim = self.regions[layer], self.row_format, self.shape.heads.head_dim
        anchored, own = self.shape.n_anchored, self.counts[layer]
        parts = []
        for counts in (np.zeros_like(own), np.zeros_like(own)) if anchored else (own,):
            segment = ops.Segment(
                fmt, region.keys, fmt, region.values, key_dim=dim, value_dim=dim, counts=counts, bias=region.bias
            )
            parts.append(Part(segment, counts))
        parts[-1].segment.key_start = parts[-1].segment.value_start = anchored
        return parts

    def keys(self, layer: int, head: int) -> F32:
        rows = self.regions[layer].keys[head, : self.n(layer)]
        return kvrows.decode(self.row_format, rows, self.shape.heads.head_dim)

    def values(self, layer: int, head: int, entries: I32) -> F32:
        return kvrows.decode(self.row_format, self.regions[layer].values[head, entries], self.shape.heads.head_dim)

    def rewrite(self, layer: int, head: int, entries: I32, keys: F32, values: F32) -> None:
        region = self.regions[layer]
        for rows, stored in ((keys, region.keys), (values, region.values)):
            ops.kv_write(rows, stored[head : head + 1], self.row_format, np.ascontiguousarray(entries[None], np.int32))

    def place(self, layer: int, stay: I32, position: I32, keys: U8, values: U8) -> None:
        region = self.regions[layer]
        for head, own in enumerate(stay):
            kept, new = own[own < self.n(layer)], own[own >= self.n(layer)]
            slots = self._gather(layer, head, kept, len(own))
            region.position[head, slots] = position[head, new]
            for kept_of in (region.mass, region.bias):
                if kept_of is not None:
                    kept_of[head, slots] = 0
            for rows, stored in ((keys, region.keys), (values, region.values)):
                self._write(rows[head], new - self.n(layer), stored[head : head + 1], slots)
        self.counts[layer] = stay.shape[1]

    def _write(self, staged: U8, rows: I32, stored: U8, slots: I32) -> None:
        for start in range(0, len(rows), MOVED_ROWS):
            part = slice(start, start + MOVED_ROWS)
            if self.row_format == STAGED:
                stored[0, slots[part]] = staged[rows[part]]
            else:
                floats = kvrows.decode(STAGED, staged[rows[part]], staged.shape[-1] // 2)
                ops.kv_write(floats, stored, self.row_format, np.ascontiguousarray(slots[None, part]))

    def _gather(self, layer: int, head: int, kept: I32, n: int) -> I32:
        """Bring the entries ``kept`` below slot ``n``, which are no more than that, and return the slots left there."""
        free = np.setdiff1d(np.arange(n, dtype=np.int32), kept)
        movers = kept[kept >= n]
        into, left = free[: len(movers)], free[len(movers) :]
        if len(movers):
            for array in self.regions[layer].by_entry:
                array[head, into] = array[head, movers]
        return left

    def append(self, layer: int, k: F32, v: F32, position: int) -> None:
        region = self.regions[layer]
        slots = self.free[layer]
        if slots[0] == NONE:
            slots = self.counts[layer].copy()
            self.counts[layer] += 1
        heads = np.arange(len(slots))
        region.position[heads, slots] = position
        for kept_of in region.by_entry[3:]:
            kept_of[heads, slots] = 0
        for row, stored in ((k, region.keys), (v, region.values)):
            ops.kv_write(row, stored, self.row_format, slots[:, None])

    def stepped(self, layer: int) -> None:
        self.free[layer] = NONE

    def drop(self, layer: int, gone: I32) -> None:
        if gone.shape[1] > 1:
            self._remove(layer, gone)
        else:
            self.free[layer] = gone[:, 0]

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
            for name, array in zip(self._names, region.by_entry, strict=True):
                found[f"{layer}.{name}"] = array[:, : self.n(layer)]
        return found

    @property
    def _names(self) -> list[str]:
        """Of a region's arrays."""
        kept = [name for name, there in (("mass", self.all_mass), ("bias", self.all_biases)) if there is not None]
        return ["keys", "values", "position", *kept, *(f"strikes{i}" for i in range(self.shape.n_parts))]

    def copy(self, other: Storage) -> None:
        assert isinstance(other, Slots)
        self.clear()
        self.resize([region.n_slots for region in other.regions])
        for layer, region in enumerate(other.regions):
            for into, theirs in zip(self.regions[layer].by_entry, region.by_entry, strict=True):
                into[:, : other.n(layer)] = theirs[:, : other.n(layer)]
        self.counts[...], self.free[...] = other.counts, other.free
