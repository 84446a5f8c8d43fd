"""Thin storage: the newest keys whole, all others without the channels that :mod:`barefoot.kv.stores.think` drops.

Of a layer's slots the first R hold entries with whole keys, in half precision, and the others entries with thin ones.
Every whole entry is newer than every thin one, and there are R of them if there are so many at all. So a new entry
takes the slot of the eldest whole one, which becomes thin in the slot that is left; and what is newest of the thin ones
gets zeros for the channels that it lost where a whole one has gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.errors import CorruptFile
from barefoot.kv.channels import Channels, sum_of_squares
from barefoot.kv.entries import MOVED_ROWS, Entries, Region, pack
from barefoot.kv.sealed import Sealed
from barefoot.kv.storage import F32, I32, STAGED, U8, Array, Part, Shape, Storage, Take, zeros
from barefoot.kv.stores import SealingStore
from barefoot.kv.stores.think import Think
from barefoot.ops import kvrows

MOVED = 12  # bytes of numpy arrays for each number of the keys that become thin at a time
SIDES = 16  # and for each entry of a key head, to say which side it is on


class TwoWidths(Region):
    def __init__(self, storage: Thin, layer: int) -> None:
        super().__init__(storage, layer * storage.shape.n_slots, storage.shape.n_slots)
        self.whole, self.thin = storage.whole[layer], storage.thin[layer]
        fmt, dim, counts = storage.row_format, storage.shape.heads.head_dim, storage.of_widths[layer]
        widths = [(STAGED, self.whole, dim), (fmt, self.thin, storage.channels.kept.shape[2])]
        self.segments = [
            ops.Segment(key_format, keys, fmt, self.values, key_dim=width, value_dim=dim, counts=own)
            for (key_format, keys, width), own in zip(widths, counts, strict=True)
            if keys.shape[1]
        ]
        for segment in self.segments[1:]:
            segment.value_start = self.whole.shape[1]


class Thin(Entries):
    """Over a store of rows."""

    regions: list[TwoWidths]

    @staticmethod
    def arrays(shape: Shape, store: Think) -> tuple[Array, ...]:  # type: ignore[override]
        n, dim = shape.n_layers * shape.heads.n_kv_heads, shape.heads.head_dim
        recent = min(store.recent, shape.n_slots)
        return (
            Array("kv last keys", n * recent, kvrows.row_bytes(STAGED, dim)),
            Array("kv thin keys", n * (shape.n_slots - recent), store.inner.row_bytes(store.n_kept(dim))),
            *Entries.arrays(shape, store.inner),
            *Channels.arrays(shape, store),
        )

    @staticmethod
    def placing_bytes(shape: Shape, store: Think) -> int:
        return MOVED * MOVED_ROWS * shape.heads.head_dim + SIDES * shape.n_slots

    @staticmethod
    def asking_bytes(shape: Shape, store: Think, n_tokens: int) -> int:
        return Channels.asking_bytes(shape, store, n_tokens)

    def __init__(self, shape: Shape, store: Think, take: Take) -> None:
        super().__init__(shape, store.inner, take)
        whole, thin, *_ = self.arrays(shape, store)
        each = (shape.n_layers, shape.heads.n_kv_heads)
        self._recent, dim = min(store.recent, shape.n_slots), shape.heads.head_dim
        self.whole: U8 = zeros(take, whole, (*each, self._recent, whole.n_bytes))
        self.thin: U8 = zeros(take, thin, (*each, shape.n_slots - self._recent, thin.n_bytes))
        self.channels = Channels(shape, store, take)
        self._dim, self._thin_dim = dim, store.n_kept(dim)
        self.of_widths: I32 = np.zeros((shape.n_layers, 2, shape.heads.n_kv_heads), np.int32)
        self.regions = [TwoWidths(self, layer) for layer in range(shape.n_layers)]

    def parts(self, layer: int) -> Sequence[Part]:
        n, counts = self.n(layer), self.of_widths[layer]
        counts[0], counts[1] = min(n, self._recent), max(0, n - self._recent)
        queries = (None, self.channels.query(layer))
        found = zip(self.regions[layer].segments, counts, queries, strict=False)
        return [Part(segment, own, query) for segment, own, query in found if own[0]]

    def see(self, layer: int, q: F32, n_behind: int) -> None:
        self.channels.see(layer, q, n_behind)

    def place(self, layer: int, stay: I32, position: I32, keys: U8, values: U8) -> None:
        if stay.shape[1] > self._recent and not self.channels.has(layer):  # so that none is thin yet
            self.channels.choose(layer, _squares(stay, self.whole[layer], keys, self.n(layer)))
        self.channels.passed(layer)
        super().place(layer, stay, position, keys, values)

    def _place_keys(self, layer: int, head: int, staged: U8, rows: I32, slots: I32) -> None:
        for start in range(0, len(rows), MOVED_ROWS):
            part = slice(start, start + MOVED_ROWS)
            is_thin = slots[part] >= self._recent
            whole = ~is_thin
            self.whole[layer, head, slots[part][whole]] = staged[rows[part][whole]]
            if is_thin.any():
                self._write_thin(
                    layer, slice(head, head + 1), staged[None, rows[part][is_thin]], slots[part][is_thin][None]
                )

    def _write_thin(self, layer: int, heads: slice, whole: U8, slots: I32) -> None:
        """Keys in half precision, (heads, m, row bytes), at slots (heads, m)."""
        kept = self.channels.kept[layer, heads].astype(np.int64)
        thin = np.take_along_axis(kvrows.decode(STAGED, whole, self._dim), kept[:, None], axis=2)
        rows = np.ascontiguousarray(thin.swapaxes(0, 1)).reshape(whole.shape[1], -1)
        at = np.ascontiguousarray(slots - self._recent, np.int32)
        ops.kv_write(rows, self.thin[layer, heads], self.row_format, at)

    def _write_key(self, layer: int, k: F32, slots: I32) -> None:
        ops.kv_write(k, self.whole[layer], STAGED, slots[:, None])

    def _next(self, layer: int) -> I32:
        slots = super()._next(layer)
        thin = np.flatnonzero(slots >= self._recent)
        if len(thin):
            if not self.channels.has(layer):
                whole = kvrows.decode(STAGED, self.whole[layer], self._dim)
                self.channels.choose(layer, sum_of_squares(whole))
            eldest = self.regions[layer].position[:, : self._recent].argmin(axis=1).astype(np.int32)
            all_heads = len(thin) == len(slots)
            for heads in [slice(None)] if all_heads else [slice(h, h + 1) for h in thin]:
                self._lower(layer, heads, eldest[heads, None], slots[heads, None])
            slots[thin] = eldest[thin]
        return slots

    def _gather(self, layer: int, head: int, kept: I32, n: int) -> I32:
        region, recent = self.regions[layer], self._recent
        n_whole = min(n, recent)
        n_thin = len(kept) - max(0, n_whole - (n - len(kept)))  # of those that are kept; what comes is newer
        ordered = kept[np.argsort(region.position[head, kept])]
        thin, whole = ordered[:n_thin], ordered[n_thin:]
        lowered, lifted = thin[thin < recent], whole[whole >= recent]
        assert not (len(lowered) and len(lifted))
        one, every = slice(head, head + 1), [region.whole, *region.by_entry.values()]
        # First where the entries that change sides go: packing the other side overwrites them.
        if len(lowered):
            free = self._pack_thin(layer, head, thin[thin >= recent], n)
            self._lower(layer, one, lowered[None], free[None, : len(lowered)])
            return np.concatenate([free[len(lowered) :], pack(every, head, whole, 0, n_whole)])
        free = pack(every, head, whole[whole < recent], 0, n_whole)
        self._lift(layer, head, lifted, free[: len(lifted)])
        return np.concatenate([self._pack_thin(layer, head, thin, n), free[len(lifted) :]])

    def _pack_thin(self, layer: int, head: int, kept: I32, n: int) -> I32:
        region, recent = self.regions[layer], self._recent
        pack([region.thin], head, kept - recent, 0, n - recent)
        return pack(region.by_entry.values(), head, kept, recent, n)

    def _lower(self, layer: int, heads: slice, whole: I32, into: I32) -> None:
        """Take channels from entries, (heads, m): they go to other slots."""
        for start in range(0, whole.shape[1], MOVED_ROWS):
            part = slice(start, start + MOVED_ROWS)
            rows = np.take_along_axis(self.whole[layer, heads], whole[:, part, None], axis=1)
            self._write_thin(layer, heads, rows, into[:, part])
        self._move(layer, heads, whole, into)

    def _lift(self, layer: int, head: int, thin: I32, into: I32) -> None:
        """Give entries of a head whole keys, with zeros for what they lost."""
        for start in range(0, len(thin), MOVED_ROWS):
            part = slice(start, start + MOVED_ROWS)
            rows = self.thin[layer, head, thin[part] - self._recent]
            keys = np.zeros((len(rows), self._dim), np.float32)
            keys[:, self.channels.kept[layer, head]] = kvrows.decode(self.row_format, rows, self._thin_dim)
            self.whole[layer, head, into[part]] = kvrows.encode(STAGED, keys)
        self._move(layer, slice(head, head + 1), thin[None], into[None])

    def _move(self, layer: int, heads: slice, entries: I32, into: I32) -> None:
        rows = np.arange(self.shape.heads.n_kv_heads)[heads, None]
        for array in self.regions[layer].by_entry.values():
            array[rows, into] = array[rows, entries]

    def counters(self) -> dict[str, list[int]]:
        return {**super().counters(), **self.channels.counters()}

    def restore(self, counters: Mapping[str, Any]) -> None:
        super().restore(counters)
        self.channels.restore(counters, (self.counts[:, 0] > self._recent).tolist())

    def held(self) -> dict[str, npt.NDArray[Any]]:
        found = {**super().held(), **self.channels.held()}
        for layer in range(len(self.regions)):
            n_whole = min(self.n(layer), self._recent)
            found[f"{layer}.whole"] = self.whole[layer, :, :n_whole]
            found[f"{layer}.thin"] = self.thin[layer, :, : self.n(layer) - n_whole]
        return found

    def check(self, n_tokens: int) -> None:
        self.channels.check()
        for layer in range(len(self.regions)):
            whole, thin = np.split(self.position(layer), [min(self.n(layer), self._recent)], axis=1)
            if thin.size and (whole.min(axis=1) < thin.max(axis=1)).any():
                raise CorruptFile(f"whole keys of layer {layer} are not the newest")

    def clear(self) -> None:
        super().clear()
        self.channels.clear()

    def copy(self, other: Storage) -> None:
        assert isinstance(other, Thin)
        super().copy(other)
        n_thin = max(0, int(other.counts.max()) - self._recent)
        self.whole[...] = other.whole
        self.thin[:, :, :n_thin] = other.thin[:, :, :n_thin]
        self.channels.copy(other.channels)


class ThinSealed(Sealed):
    """Over a store that seals: what is sealed is thin."""

    @staticmethod
    def arrays(shape: Shape, store: Think) -> tuple[Array, ...]:  # type: ignore[override]
        assert isinstance(store.inner, SealingStore)
        blocks, *others = Sealed.arrays(shape, store.inner)
        thin = replace(blocks, n_bytes=store.inner.block_bytes(store.n_kept(shape.heads.head_dim)))
        return (thin, *others, *Channels.arrays(shape, store))

    @staticmethod
    def placing_bytes(shape: Shape, store: Think) -> int:  # type: ignore[override]
        assert isinstance(store.inner, SealingStore)
        return Sealed.placing_bytes(shape, store.inner)

    @staticmethod
    def asking_bytes(shape: Shape, store: Think, n_tokens: int) -> int:
        return Channels.asking_bytes(shape, store, n_tokens)

    def __init__(self, shape: Shape, store: Think, take: Take) -> None:
        assert isinstance(store.inner, SealingStore)
        super().__init__(shape, store.inner, take, key_dim=store.n_kept(shape.heads.head_dim))
        self.channels = Channels(shape, store, take)

    def see(self, layer: int, q: F32, n_behind: int) -> None:
        self.channels.see(layer, q, n_behind)

    def query(self, layer: int) -> Callable[[F32], F32]:
        return self.channels.query(layer)

    def place(self, layer: int, stay: I32, position: I32, keys: U8, values: U8) -> None:
        if stay.shape[1] > self._store.residual and not self.channels.has(layer):
            waiting, n = self._keys[layer], self.n(layer)
            self.channels.choose(layer, _squares(stay, waiting, keys, n))
        self.channels.passed(layer)
        super().place(layer, stay, position, keys, values)

    def sealed_keys(self, layer: int, keys: F32) -> F32:
        if not self.channels.has(layer):
            self.channels.choose(layer, sum_of_squares(keys))
        return np.take_along_axis(keys, self.channels.kept[layer].astype(np.int64)[:, None], axis=2)

    def counters(self) -> dict[str, list[int]]:
        return {**super().counters(), **self.channels.counters()}

    def restore(self, counters: Mapping[str, Any]) -> None:
        super().restore(counters)
        self.channels.restore(counters, (self._n_keys > 0).tolist())

    def held(self) -> dict[str, npt.NDArray[Any]]:
        return {**super().held(), **self.channels.held()}

    def check(self, n_tokens: int) -> None:
        self.channels.check()

    def clear(self) -> None:
        super().clear()
        self.channels.clear()

    def copy(self, other: Storage) -> None:
        assert isinstance(other, ThinSealed)
        super().copy(other)
        self.channels.copy(other.channels)


def _squares(stay: I32, stored: U8, staged: U8, n: int) -> F32:
    """Of the keys that ``stay``, (n_kv_heads, kept): of ``n`` stored in half precision, and those staged behind them;
    their sum for each channel, (n_kv_heads, head_dim)."""
    found = np.zeros((len(stay), staged.shape[2] // 2), np.float32)
    for head, own in enumerate(stay):
        for start in range(0, len(own), MOVED_ROWS):
            part = own[start : start + MOVED_ROWS]
            for rows, entries in ((stored, part[part < n]), (staged, part[part >= n] - n)):
                found[head] += sum_of_squares(kvrows.decode(STAGED, rows[head, entries], found.shape[1]))
    return found
