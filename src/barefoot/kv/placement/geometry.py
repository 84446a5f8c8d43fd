"""Addresses of growing sequences: which pages of which tensors so many tokens of a sequence need.

A store is a list of tensors, uint8 (n_slots, n_ranges, capacity, row_bytes): a range of rows for each slot, or several
where a kernel wants each head's rows together. A token adds a row to every range of its slot; the pages that hold the
first n rows of a range are the first ⌈n · row_bytes / page⌉ of it. Ranges start on pages, so that giving back one
sequence's last page takes nothing from its neighbour.

A *group* is the pages of a slot that are first needed by the same token, of all tensors. Where all rows are equally
wide, groups are the paper's: one page of each range, 2 · n_layers of them where a range holds a layer's keys or values.
One count of groups says all about a slot, so that layers can't disagree.

==============================  ===================================================  ==================================
layout                          tensors                                              pages of n tokens
==============================  ===================================================  ==================================
the paper's                     2L of (slots, 1, S, H·d·w)                           2L · ⌈n·H·d·w / page⌉
sliced (its "mega cache")       2 of (slots, 1, S, L·H·d·w)                          2 · ⌈n·L·H·d·w / page⌉
the engine's, head by head      2L of (slots, H, S, row), a window layer's shorter   2LH · ⌈n·row / page⌉
==============================  ===================================================  ==================================
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput
from barefoot.core.units import round_up

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class VirtualTensor:
    """``n_ranges`` ranges of ``capacity`` rows for each slot. A ring is a range that is full from some length on."""

    n_ranges: int
    capacity: int
    row_bytes: int

    def __post_init__(self) -> None:
        if min(self.n_ranges, self.capacity, self.row_bytes) < 1:
            raise InvalidInput(f"ranges, rows and bytes of a row must be at least 1, got {self}")


def layered(n_layers: int, capacity: int, row_bytes: int) -> tuple[VirtualTensor, ...]:
    """Keys and values of each layer apart, the rows of all heads together."""
    return 2 * n_layers * (VirtualTensor(1, capacity, row_bytes),)


def sliced(n_layers: int, capacity: int, row_bytes: int) -> tuple[VirtualTensor, ...]:
    """All layers' keys in one range, and all values: a layer is a slice of its rows, ``row_bytes`` wide."""
    return 2 * (VirtualTensor(1, capacity, n_layers * row_bytes),)


@dataclass(frozen=True)
class Change:
    """Groups ``first`` to ``stop`` of a slot are to be committed, or else to be given back."""

    slot: int
    first: int
    stop: int
    commit: bool


class Geometry:
    """Where the tensors of ``n_slots`` sequences lie, one behind the other, and their groups.

    Attributes
    ----------
    n_bytes : of addresses, all tensors.
    n_groups : of a slot that is full.
    """

    def __init__(self, tensors: Sequence[VirtualTensor], n_slots: int, page_bytes: int) -> None:
        if not tensors or min(n_slots, page_bytes) < 1:
            raise InvalidInput(
                f"expected tensors, slots and bytes of a page, got {len(tensors)}, {n_slots}, {page_bytes}"
            )
        self.tensors, self.n_slots, self.page_bytes = tuple(tensors), n_slots, page_bytes
        self._strides = [round_up(t.capacity * t.row_bytes, page_bytes) for t in self.tensors]
        sizes = [n_slots * t.n_ranges * stride for t, stride in zip(self.tensors, self._strides, strict=True)]
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self.n_bytes = sum(sizes)
        kinds = Counter[tuple[int, int]]()
        for tensor in self.tensors:
            kinds[tensor.capacity, tensor.row_bytes] += tensor.n_ranges
        self._starts = _first_tokens(kinds, page_bytes)
        self.n_groups = len(self._starts)
        # Tokens that fit in so many groups: all before the first that needs the next one.
        self._tokens = [start - 1 for start in self._starts] + [max(t.capacity for t in self.tensors)]
        tokens = np.array(self._tokens, np.int64)
        n_pages = sum(n * -(-np.minimum(tokens, rows) * row // page_bytes) for (rows, row), n in kinds.items())
        self._n_pages: list[int] = np.asarray(n_pages).tolist()

    def groups(self, n_tokens: int) -> int:
        """Groups of a slot that so many tokens need."""
        return bisect_right(self._starts, n_tokens)

    def n_pages(self, n_groups: int) -> int:
        """Pages of the first ``n_groups`` groups of a slot."""
        return self._n_pages[n_groups]

    def pages_of_groups(self) -> list[int]:
        """Pages of each group by itself."""
        return [after - before for before, after in itertools.pairwise(self._n_pages)]

    def spans(self, slot: int, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """(first byte, bytes) of the pages of groups ``first`` to ``stop`` of a slot, a span for each range."""
        page, (begin, end) = self.page_bytes, (self._tokens[first], self._tokens[stop])
        for tensor, offset, stride in zip(self.tensors, self._offsets, self._strides, strict=True):
            start, after = (round_up(min(n, tensor.capacity) * tensor.row_bytes, page) for n in (begin, end))
            if start < after:
                for i in range(slot * tensor.n_ranges, (slot + 1) * tensor.n_ranges):
                    yield offset + i * stride + start, after - start

    def arrays(self, memory: U8) -> list[U8]:
        """Each tensor as a view of ``memory`` (n_bytes,), uint8 (n_slots, n_ranges, capacity, row_bytes); contiguous
        where rows fill their pages."""
        found = []
        for t, offset, stride in zip(self.tensors, self._offsets, self._strides, strict=True):
            ranges = memory[offset : offset + self.n_slots * t.n_ranges * stride]
            rows = ranges.reshape(self.n_slots, t.n_ranges, stride)[:, :, : t.capacity * t.row_bytes]
            found.append(rows.reshape(self.n_slots, t.n_ranges, t.capacity, t.row_bytes))
        return found


def _first_tokens(kinds: Counter[tuple[int, int]], page: int) -> list[int]:
    """The tokens, counted from 1, that are the first to need another page of some range, ascending."""
    found = []
    for capacity, row in kinds:
        pages = np.arange(-(-capacity * row // page), dtype=np.int64)
        found.append(pages * page // row + 1)
    ascending: list[int] = np.unique(np.concatenate(found)).tolist()
    return ascending
