"""Slots: entries whose keys and values are rows of any format, see :mod:`barefoot.kv.entries`.

Bytes besides those: a row of keys for each slot. A layer's slots are one region of the arrays, so that layers can share
them unequally.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from barefoot import ops
from barefoot.kv.entries import MOVED, MOVED_ROWS, Entries, Region, pack, write_staged
from barefoot.kv.storage import F32, I32, U8, Array, Part, Shape, Storage, Take, zeros
from barefoot.kv.stores import KVStore
from barefoot.ops import kvrows


class Rows(Region):
    def __init__(self, storage: Slots, first: int, n_slots: int) -> None:
        super().__init__(storage, first, n_slots)
        self.keys = storage.all_keys[self.own].reshape(self.values.shape)

    @property
    def by_entry(self) -> dict[str, Any]:
        return {"keys": self.keys, **super().by_entry}


class Slots(Entries):
    merges: ClassVar[bool] = True
    anchors: ClassVar[bool] = True
    resizes: ClassVar[bool] = True
    regions: list[Rows]

    @staticmethod
    def arrays(shape: Shape, store: KVStore) -> tuple[Array, ...]:
        n, row = shape.n_layers * shape.heads.n_kv_heads * shape.n_slots, store.row_bytes(shape.heads.head_dim)
        return (Array("kv keys", n, row), *Entries.arrays(shape, store))

    @staticmethod
    def placing_bytes(shape: Shape, store: KVStore) -> int:
        return MOVED * MOVED_ROWS * shape.heads.head_dim

    def __init__(self, shape: Shape, store: KVStore, take: Take) -> None:
        keys = self.arrays(shape, store)[0]
        self.all_keys: U8 = zeros(take, keys, (keys.count, keys.n_bytes))
        super().__init__(shape, store, take)
        self.regions = self._regions([shape.n_slots] * shape.n_layers)
        self._parts: dict[int, list[Part]] = {}

    def _regions(self, n_slots: Sequence[int]) -> list[Rows]:
        first = [0, *np.cumsum(n_slots).tolist()]
        return [Rows(self, at, n) for at, n in zip(first, n_slots, strict=False)]

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
                for name, own in self.regions[layer].by_entry.items():
                    into = regions[layer].by_entry[name]
                    for head in range(len(own))[::turn]:
                        for start in range(0, n[layer], MOVED_ROWS)[::turn]:
                            part = slice(start, min(start + MOVED_ROWS, n[layer]))
                            into[head, part] = own[head, part]
            self.regions = regions
        self._parts = {}

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

    def rewrite(self, layer: int, head: int, entries: I32, keys: F32, values: F32) -> None:
        region = self.regions[layer]
        for rows, stored in ((keys, region.keys), (values, region.values)):
            ops.kv_write(rows, stored[head : head + 1], self.row_format, np.ascontiguousarray(entries[None], np.int32))

    def extend(self, layer: int, heads: slice, k: F32, v: F32, position: I32) -> None:
        """More entries of some key heads: k, v (n, heads × head_dim), position (heads, n)."""
        region, n = self.regions[layer], position.shape[1]
        slots = np.asarray(self.counts[layer, heads][:, None] + np.arange(n), np.int32)
        np.put_along_axis(region.position[heads], slots, position, axis=1)
        for rows, stored in ((k, region.keys), (v, region.values)):
            ops.kv_write(rows, stored[heads], self.row_format, slots)
        self.counts[layer, heads] += n

    def _place_keys(self, layer: int, head: int, staged: U8, rows: I32, slots: I32) -> None:
        write_staged(staged, rows, self.regions[layer].keys[head : head + 1], self.row_format, slots)

    def _gather(self, layer: int, head: int, kept: I32, n: int) -> I32:
        return pack(self.regions[layer].by_entry.values(), head, kept, 0, n)

    def _write_key(self, layer: int, k: F32, slots: I32) -> None:
        ops.kv_write(k, self.regions[layer].keys, self.row_format, slots[:, None])

    def copy(self, other: Storage) -> None:
        assert isinstance(other, Slots)
        self.clear()
        self.resize([region.n_slots for region in other.regions])
        super().copy(other)
