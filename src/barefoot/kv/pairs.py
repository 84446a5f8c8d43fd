"""Pairs of layers that share the directions of their entries; a few entries stay exact in both.

The storage of the deeper layers of :mod:`barefoot.kv.stores.minicache`, where layouts and bytes are stated. An entry
comes as exact rows of both layers. There are slots for n_exact of them; when they are full, those whose directions
differ least are merged, which can't be undone. So what stays exact at any time is what differed most of all that came,
as far as it hasn't gone since. Merged entries come first in a pair's numbering, exact ones behind them; each key head
has its own of both, as many as the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core import untrusted
from barefoot.core.errors import CorruptFile
from barefoot.kv.entries import pack
from barefoot.kv.storage import F32, I32, STAGED, U8, U16, Array, Part, Shape, Storage, Take, zeros
from barefoot.kv.stores.minicache import MiniCache, angles
from barefoot.ops import kvrows

MERGED_ROWS = 128  # entries of a key head that are merged at a time
MERGED = 64  # bytes of numpy arrays for each of their numbers
ARRANGED = 26  # and for each entry of a key head, while those to merge are found


class Pair:
    """Views of the arrays that a pair of layers has.

    Attributes
    ----------
    directions : keys and values, uint8 (2, n_kv_heads, slots of merged entries, row bytes).
    lengths : float32 (2 layers, 2, n_kv_heads, slots of merged entries).
    exact : keys and values, uint8 (2 layers, 2, n_kv_heads, slots of exact entries, row bytes).
    angles : float32 (n_kv_heads, slots of exact entries).
    position, mass, strikes : by entry, (…, n_kv_heads, slots).
    counts : int32 (2, n_kv_heads), of merged and of exact entries.
    """

    def __init__(
        self,
        shape: Shape,
        store: MiniCache,
        directions: U8,
        lengths: F32,
        exact: U8,
        angles: F32,
        position: I32,
        mass: F32 | None,
        strikes: U16 | None,
    ) -> None:
        self._store, self.directions, self.lengths, self.exact = store, directions, lengths, exact
        self.angles, self.position, self.mass, self.strikes = angles, position, mass, strikes
        self._dim = shape.heads.head_dim
        self.counts: I32 = np.zeros((2, shape.heads.n_kv_heads), np.int32)
        self.room_merged, self.room_exact = int(lengths.shape[-1]), int(angles.shape[-1])
        self._retained = min(store.n_retained(shape.n_slots), self.room_exact - 1)
        fmt, dim = store.row_format, shape.heads.head_dim
        merged, whole = self.counts
        self._parts = [
            (
                Part(ops.Segment(
                    fmt, directions[0], fmt, directions[1],
                    key_dim=dim, value_dim=dim, counts=merged, key_scale=of_keys, value_scale=of_values,
                ), merged),
                Part(ops.Segment(STAGED, keys, STAGED, values, key_dim=dim, value_dim=dim, counts=whole), whole),
            )
            for (of_keys, of_values), (keys, values) in zip(lengths, exact, strict=True)
        ]  # fmt: skip

    @property
    def n_merged(self) -> int:
        return int(self.counts[0, 0])

    @property
    def n_exact(self) -> int:
        return int(self.counts[1, 0])

    @property
    def n(self) -> int:
        return self.n_merged + self.n_exact

    @property
    def by_entry(self) -> list[I32 | F32 | U16]:
        """What is kept of each besides its rows, (n_kv_heads, slots)."""
        return [
            self.position,
            *([] if self.mass is None else [self.mass]),
            *([] if self.strikes is None else self.strikes),
        ]

    def parts(self, which: int) -> list[Part]:
        """What the first or the second layer sees."""
        return [part for part in self._parts[which] if part.counts[0]]

    def append(self, which: int, k: F32, v: F32, position: int) -> None:
        """The entry comes with the first layer, and has rows of both when it comes with the second."""
        if which == 0:
            for kept in self.by_entry:
                kept[:, self.n] = 0
            self.position[:, self.n] = position
            self.counts[1] += 1
        slots = self.counts[1][:, None] - 1
        for rows, stored in zip((k, v), self.exact[which], strict=True):
            ops.kv_write(rows, stored, STAGED, slots)

    def stepped(self) -> None:
        last = self.n_exact - 1
        self.angles[:, last] = _larger(self._decode(self.exact[..., last, :]))
        if self.n_exact == self.room_exact > self.most_exact(self.n):
            everything = np.broadcast_to(np.arange(self.n, dtype=np.int32), (len(self.position), self.n))
            self.keep(everything, self.most_exact(self.n))

    def most_exact(self, n: int) -> int:
        """Of ``n`` entries, when some are merged: what is retained, or what the others have no room for."""
        return min(n, max(self._retained, n - self.room_merged))

    def drop(self, gone: I32) -> None:
        """Let entries ``gone`` go, (n_kv_heads, m)."""
        if not gone.shape[1]:
            return
        stays = np.ones((len(self.position), self.n), bool)
        for own, those in zip(stays, gone, strict=True):
            own[those] = False
        stay = np.nonzero(stays)[1].astype(np.int32).reshape(len(stays), -1)
        self.keep(stay, self.room_exact - 1)

    def keep(self, stay: I32, most: int, position: I32 | None = None, staged: Sequence[U8] = ()) -> None:
        """Keep the entries ``stay``, (n_kv_heads, kept), no more than ``most`` of them exact: the nearest are merged.

        position, staged : of all entries, (n_kv_heads, n and staged), and keys and values of those behind ``n``, uint8
        (2 layers, n_kv_heads, staged, row bytes); there are none where they are left out.
        """
        n, n_merged = self.n, self.n_merged
        loose = [own[own >= n_merged] - n_merged for own in stay]  # numbers of exact rows: slots, then those staged
        exact = min(most, *map(len, loose))
        merged = stay.shape[1] - exact
        assert merged <= self.room_merged
        for head, (own, rows) in enumerate(zip(stay, loose, strict=True)):
            far = self._angles(head, rows, staged)
            near, rest = np.split(np.argsort(far, kind="stable").astype(np.int32), [len(rows) - exact])
            before = np.empty(merged + exact, np.int32)  # of each entry its number
            before[:merged] = self._have_merged(head, merged, own[own < n_merged], rows[near], staged)
            before[merged:] = n_merged + self._have_exact(head, exact, rows[rest], far[rest], staged)
            for array in self.by_entry:
                array[head, : len(before)] = np.where(before < n, np.take(array[head], before, mode="clip"), 0)
            if position is not None:
                self.position[head, : len(before)] = position[head, before]
        self.counts[0], self.counts[1] = merged, exact

    def _have_merged(self, head: int, n: int, there: I32, rows: I32, staged: Sequence[U8]) -> I32:
        """Have ``n`` merged entries, those ``there`` and exact ``rows``; return their numbers before."""
        before = np.arange(self.room_merged, dtype=np.int32)
        arrays = (self.directions.transpose(1, 2, 0, 3), self.lengths.transpose(2, 3, 0, 1))
        slots = pack([before[None], *(array[head : head + 1] for array in arrays)], 0, there, 0, n)
        before[slots] = self.n_merged + rows
        for some in _at_a_time(len(rows)):
            found = self._store.merge(*self._rows(head, rows[some], staged))
            for directions, stored in zip(found.direction, self.directions, strict=True):
                ops.kv_write(directions, stored[head : head + 1], self._store.row_format, slots[None, some])
            self.lengths[:, :, head, slots[some]] = found.lengths
        return before[:n]

    def _have_exact(self, head: int, n: int, rows: I32, far: F32, staged: Sequence[U8]) -> I32:
        """Have these ``n`` exact rows, of angles ``far``; return their numbers before."""
        before = np.arange(self.room_exact, dtype=np.int32)
        old = rows < self.n_exact
        arrays = (self.exact.transpose(2, 3, 0, 1, 4), self.angles)
        slots = pack([before[None], *(array[head : head + 1] for array in arrays)], 0, rows[old], 0, n)
        before[slots], self.angles[head, slots] = rows[~old], far[~old]
        for i, each in enumerate(staged):
            self.exact[:, i, head, slots] = each[:, head, rows[~old] - self.n_exact]
        return before[:n]

    def _angles(self, head: int, rows: I32, staged: Sequence[U8]) -> F32:
        """Of exact rows; those of slots are known."""
        found = np.empty(len(rows), np.float32)
        old = rows < self.n_exact
        found[old] = self.angles[head, rows[old]]
        new = np.flatnonzero(~old).astype(np.int32)
        for some in _at_a_time(len(new)):
            found[new[some]] = _larger(self._rows(head, rows[new[some]], staged))
        return found

    def _rows(self, head: int, rows: I32, staged: Sequence[U8]) -> F32:
        """Of both layers, keys and values, (2, 2, n, head_dim)."""
        old = rows < self.n_exact
        found = np.empty((2, 2, len(rows), self.exact.shape[-1]), np.uint8)
        found[:, :, old] = self.exact[:, :, head, rows[old]]
        for i, each in enumerate(staged):
            found[:, i, ~old] = each[:, head, rows[~old] - self.n_exact]
        return self._decode(found)

    def _decode(self, rows: U8) -> F32:
        return kvrows.decode(STAGED, rows, self._dim)

    def held(self) -> dict[str, npt.NDArray[Any]]:
        """All that is there, by name."""
        merged, exact = self.n_merged, self.n_exact
        return {
            "directions": self.directions[..., :merged, :],
            "lengths": self.lengths[..., :merged],
            "exact": self.exact[..., :exact, :],
            "angles": self.angles[:, :exact],
            **{f"entries{i}": array[:, : self.n] for i, array in enumerate(self.by_entry)},
        }

    def copy(self, other: Pair) -> None:
        self.counts[...] = other.counts
        theirs = other.held()
        for name, own in self.held().items():
            own[...] = theirs[name]


def _larger(rows: F32) -> F32:
    """The larger angle of keys and of values, rows (2 layers, 2, …, d)."""
    found: F32 = angles(*rows).max(axis=0)
    return found


def _at_a_time(n: int) -> Iterator[slice]:
    return (slice(start, start + MERGED_ROWS) for start in range(0, n, MERGED_ROWS))


class Pairs(Storage):
    lets_go: ClassVar[bool] = True

    @staticmethod
    def arrays(shape: Shape, store: MiniCache) -> tuple[Array, ...]:
        """Directions, lengths, exact rows and their angles, and what is kept of each entry, of a sequence."""
        heads, n_exact = shape.n_layers // 2 * shape.heads.n_kv_heads, store.n_exact(shape.n_slots)
        merged, exact, n = heads * store.n_merged(shape.n_slots), heads * n_exact, heads * shape.n_slots
        row, whole = (kvrows.row_bytes(fmt, shape.heads.head_dim) for fmt in (store.row_format, STAGED))
        return (
            Array("kv directions", 2 * merged, row),
            Array("kv lengths", 4 * merged, 4),
            Array("kv exact rows", 4 * exact, whole),
            Array("kv angles", exact, 4),
            Array("kv positions", n, 4),
            *([Array("kv mass", n, 4)] if shape.mass else []),
            *([Array("kv strikes", shape.n_parts * n, 2)] if shape.n_parts else []),
        )

    @staticmethod
    def placing_bytes(shape: Shape, store: MiniCache) -> int:
        heads = shape.heads
        return MERGED * MERGED_ROWS * heads.head_dim + ARRANGED * shape.n_slots

    def __init__(self, shape: Shape, store: MiniCache, take: Take) -> None:
        n_pairs, h, n = shape.n_layers // 2, shape.heads.n_kv_heads, shape.n_slots
        n_merged, n_exact = store.n_merged(n), store.n_exact(n)
        found = {array.name: array for array in self.arrays(shape, store)}

        def all_of(name: str, *each: int, dtype: npt.DTypeLike = np.uint8) -> Any:
            return zeros(take, found[name], (n_pairs, *each), dtype) if name in found else [None] * n_pairs

        row, whole = found["kv directions"].n_bytes, found["kv exact rows"].n_bytes
        self._pairs = [
            Pair(shape, store, *own)
            for own in zip(
                all_of("kv directions", 2, h, n_merged, row),
                all_of("kv lengths", 2, 2, h, n_merged, dtype=np.float32),
                all_of("kv exact rows", 2, 2, h, n_exact, whole),
                all_of("kv angles", h, n_exact, dtype=np.float32),
                all_of("kv positions", h, n, dtype=np.int32),
                all_of("kv mass", h, n, dtype=np.float32),
                all_of("kv strikes", shape.n_parts, h, n, dtype=np.uint16),
                strict=True,
            )
        ]

    def n(self, layer: int) -> int:
        return self._pairs[layer // 2].n

    def room(self, layer: int) -> int:
        pair = self._pairs[layer // 2]
        return int(pair.position.shape[1]) - pair.n

    def position(self, layer: int) -> I32:
        pair = self._pairs[layer // 2]
        return pair.position[:, : pair.n]

    def mass(self, layer: int) -> F32 | None:
        """The sum of both layers'."""
        pair = self._pairs[layer // 2]
        return None if pair.mass is None else pair.mass[:, : pair.n]

    def strikes(self, layer: int) -> U16 | None:
        """The sum of both layers'."""
        pair = self._pairs[layer // 2]
        return None if pair.strikes is None else pair.strikes[:, :, : pair.n]

    def parts(self, layer: int) -> Sequence[Part]:
        return self._pairs[layer // 2].parts(layer % 2)

    def place(self, layer: int, stay: I32, position: I32, keys: U8, values: U8) -> None:
        pair = self._pairs[layer // 2]
        staged = [rows.reshape(2, -1, *rows.shape[1:]) for rows in (keys, values)]
        pair.keep(stay, pair.most_exact(stay.shape[1]), position, staged)

    def append(self, layer: int, k: F32, v: F32, position: int) -> None:
        self._pairs[layer // 2].append(layer % 2, k, v, position)

    def stepped(self, layer: int) -> None:
        self._pairs[layer // 2].stepped()

    def drop(self, layer: int, gone: I32) -> None:
        self._pairs[layer // 2].drop(gone)

    def trim(self, layer: int, n_tokens: int) -> None:
        """What was merged on account of later entries stays merged."""
        position = self.position(layer)
        self.drop(layer, np.nonzero(position >= n_tokens)[1].reshape(len(position), -1).astype(np.int32))

    def clear(self) -> None:
        for pair in self._pairs:
            pair.counts[...] = 0

    def counters(self) -> dict[str, list[int]]:
        return {"merged": [pair.n_merged for pair in self._pairs], "exact": [pair.n_exact for pair in self._pairs]}

    def restore(self, counters: Mapping[str, Any]) -> None:
        merged = untrusted.counts(counters, "merged", len(self._pairs), [pair.room_merged for pair in self._pairs])
        exact = untrusted.counts(counters, "exact", len(self._pairs), [pair.room_exact for pair in self._pairs])
        for pair, n_merged, n_exact in zip(self._pairs, merged, exact, strict=True):
            if n_exact == pair.room_exact and n_merged < pair.room_merged:
                raise CorruptFile(
                    f"{n_exact} exact entries beside {n_merged} merged ones: some of them would be merged"
                )
            pair.counts[0], pair.counts[1] = n_merged, n_exact

    def held(self) -> dict[str, npt.NDArray[Any]]:
        return {f"pair{i}.{name}": array for i, pair in enumerate(self._pairs) for name, array in pair.held().items()}

    def copy(self, other: Storage) -> None:
        assert isinstance(other, Pairs)
        for own, theirs in zip(self._pairs, other._pairs, strict=True):
            own.copy(theirs)
