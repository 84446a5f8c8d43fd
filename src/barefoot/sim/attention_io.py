"""Elements that exact attention moves between a fast memory and a slow one, counted while it computes. Simulated.

FlashAttention (Dao et al. 2022, arXiv:2205.14135), algorithm 1, and FlashAttention-2 (Dao 2023, arXiv:2307.08691),
algorithm 1, on a machine with two levels of memory: what a schedule reads it must load, what it works on must fit, and
every element that crosses counts. Of one head with N queries and keys of d channels, in tiles of B_r and B_c::

    first order    2 N d + ⌈N / B_c⌉ (3 N d + 4 N)     keys outside: outputs, maxima and totals come and go each time
    second order   2 N d + N + ⌈N / B_r⌉ 2 N d         queries outside: only keys and values come again

What lives in fast memory is a tile of queries and one of outputs, of keys and of values, their scores, and two numbers
a query: ``2 (B_r + B_c) d + B_r B_c + 2 B_r`` elements. Without a causal mask, forward.

*Differs from the papers*: they count orders of growth; numbers that pass from one operation to the next within a row
(the maximum of a tile) count as registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class TwoLevelMachine:
    """A fast memory of ``capacity`` elements. ``loaded`` and ``stored`` count what has crossed, ``peak`` what has been
    in it at once.

    Raises
    ------
    MemoryError : more than the capacity is to be in it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.loaded = self.stored = self.live = self.peak = 0

    @property
    def moved(self) -> int:
        return self.loaded + self.stored

    def make(self, *shape: int) -> Array:
        """Room in fast memory."""
        tile = np.zeros(shape)
        self.live += tile.size
        self.peak = max(self.peak, self.live)
        if self.live > self.capacity:
            raise MemoryError(f"{self.live} elements in a fast memory of {self.capacity}")
        return tile

    def load(self, slow: Array) -> Array:
        tile = self.make(*slow.shape)
        tile[:] = slow
        self.loaded += tile.size
        return tile

    def store(self, tile: Array, slow: Array) -> None:
        slow[:] = tile
        self.stored += tile.size

    def free(self, *tiles: Array) -> None:
        self.live -= sum(tile.size for tile in tiles)


def live_elements(d: int, rows: int, keys: int) -> int:
    """In fast memory at most, in either order."""
    return 2 * (rows + keys) * d + rows * keys + 2 * rows


def first_order_elements(n: int, d: int, keys: int) -> int:
    return 2 * n * d + ceil(n / keys) * (3 * n * d + 4 * n)


def second_order_elements(n: int, d: int, rows: int) -> int:
    return 2 * n * d + n + ceil(n / rows) * 2 * n * d


def _tiles(n: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, n)) for first in range(0, n, size))


def first_order(machine: TwoLevelMachine, q: Array, k: Array, v: Array, scale: float, rows: int, keys: int) -> Array:
    """Outputs (n, d), with the loop over tiles of keys outside; they are normalised in every step."""
    n = len(q)
    out, top, total = np.zeros_like(q), np.full(n, -np.inf), np.zeros(n)
    for some in _tiles(n, keys):
        key, value = machine.load(k[some]), machine.load(v[some])
        for own in _tiles(n, rows):
            query, sums, highest, norm = (machine.load(x[own]) for x in (q, out, top, total))
            score = machine.make(len(query), len(key))
            score[:] = scale * query @ key.T
            above = np.maximum(highest, score.max(axis=1))
            score[:] = np.exp(score - above[:, None])
            kept = norm * np.exp(highest - above)
            norm[:] = kept + score.sum(axis=1)
            sums[:] = (kept[:, None] * sums + score @ value) / norm[:, None]
            highest[:] = above
            for tile, slow in ((sums, out), (highest, top), (norm, total)):
                machine.store(tile, slow[own])
            machine.free(query, sums, highest, norm, score)
        machine.free(key, value)
    return out


def second_order(
    machine: TwoLevelMachine, q: Array, k: Array, v: Array, scale: float, rows: int, keys: int
) -> tuple[Array, Array]:
    """Outputs (n, d) and L (n,), with the loop over tiles of queries outside; outputs are normalised once."""
    n = len(q)
    out, lse = np.zeros_like(q), np.zeros(n)
    for own in _tiles(n, rows):
        query = machine.load(q[own])
        sums, top, total = machine.make(*query.shape), machine.make(len(query)), machine.make(len(query))
        top[:] = -np.inf
        for some in _tiles(n, keys):
            key, value = machine.load(k[some]), machine.load(v[some])
            score = machine.make(len(query), len(key))
            score[:] = scale * query @ key.T
            above = np.maximum(top, score.max(axis=1))
            score[:] = np.exp(score - above[:, None])
            keep = np.exp(top - above)
            total[:] = keep * total + score.sum(axis=1)
            sums[:] = keep[:, None] * sums + score @ value
            top[:] = above
            machine.free(key, value, score)
        sums /= total[:, None]
        machine.store(sums, out[own])
        total[:] = top + np.log(total)
        machine.store(total, lse[own])
        machine.free(query, sums, top, total)
    return out, lse
