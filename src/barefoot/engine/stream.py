"""Weights that stay on disk: read ahead into two buffers, one in use while the other fills.

What is streamed is a list of items (a layer's matrices, or a tile of the head's rows), used in a cycle. An item is a
few extents of a file, each read whole; in GGUF files a layer is normally one extent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from barefoot.core.model import WeightSpec
from barefoot.core.units import round_up
from barefoot.engine.files import WeightFiles
from barefoot.engine.placement import PAGE, item_bytes
from barefoot.io.types import TensorInfo
from barefoot.ops import blocks

if TYPE_CHECKING:
    from concurrent.futures import Future

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Extent:
    """``n_bytes`` bytes from ``offset`` of a file, to ``at`` of the buffer; whole pages, but at a file's end."""

    shard: int
    offset: int
    n_bytes: int
    at: int


@dataclass(frozen=True)
class Item:
    """``extents`` are read; ``spans`` are the (start, stop) of each weight's blocks and of its parts in the buffer, in
    the order asked for."""

    extents: tuple[Extent, ...]
    spans: tuple[tuple[int, int], ...]


def byte_range(
    weight: WeightSpec, tensor: TensorInfo, first_row: int = 0, n_rows: int | None = None
) -> tuple[int, int]:
    """(first byte, number of bytes) in the file of rows of a weight."""
    row = blocks.row_bytes(weight.format, weight.cols)
    n_rows = weight.rows - first_row if n_rows is None else n_rows
    return tensor.offset + (weight.row_start + first_row) * row, n_rows * row


def layer_item(weights: Sequence[WeightSpec], tensors: Mapping[str, TensorInfo], file_sizes: Sequence[int]) -> Item:
    """The matrices of one layer as an item whose buffer needs at most ``item_bytes(weights)``."""
    pieces = []
    for weight in weights:
        pieces.append((tensors[weight.source].shard, *byte_range(weight, tensors[weight.source])))
        pieces += [(tensors[p.source].shard, tensors[p.source].offset, p.n_bytes) for p in weight.parts]
    item = arrange_item(pieces, file_sizes, join=True)
    # Joining reads what lies between the pieces too; where that is more than reading each by itself, it is not done.
    if _end(item) > item_bytes(weights):
        item = arrange_item(pieces, file_sizes, join=False)
    assert _end(item) <= item_bytes(weights)
    return item


def _end(item: Item) -> int:
    return max(round_up(e.at + e.n_bytes, PAGE) for e in item.extents)


def arrange_item(pieces: Sequence[tuple[int, int, int]], file_sizes: Sequence[int], *, join: bool) -> Item:
    """Extents of whole pages around ``pieces``, (shard, offset, bytes) each, and where the pieces then lie."""
    extents: list[Extent] = []
    spans: dict[int, tuple[int, int]] = {}
    at = 0
    for index in sorted(range(len(pieces)), key=lambda i: pieces[i]):
        shard, offset, n_bytes = pieces[index]
        last = extents[-1] if extents else None
        start = offset - offset % PAGE
        end = min(round_up(offset + n_bytes, PAGE), file_sizes[shard])
        if last is not None and join and last.shard == shard:
            start = last.offset
            extents[-1] = last = Extent(shard, start, max(end, start + last.n_bytes) - start, last.at)
        else:
            last = Extent(shard, start, end - start, at)
            extents.append(last)
        at = round_up(last.at + last.n_bytes, PAGE)
        begin = last.at + offset - start
        spans[index] = (begin, begin + n_bytes)
    return Item(tuple(extents), tuple(spans[i] for i in range(len(pieces))))


class Stream:
    """Reads items into two buffers, one ahead.

    Parameters
    ----------
    buffers : uint8, on whole pages, each large enough for every item.
    """

    def __init__(self, files: WeightFiles, items: Sequence[Item], buffers: tuple[U8, U8]) -> None:
        from concurrent.futures import ThreadPoolExecutor  # only runs that stream need it

        self._files, self._items, self._buffers = files, items, buffers
        self._held: list[tuple[int, Future[None]] | None] = [None, None]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="barefoot-stream")

    def get(self, index: int, then: int) -> U8:
        """The buffer that holds item ``index``, valid until the next call; ``then`` is read meanwhile.

        Raises
        ------
        CorruptFile : the file could not be read; the item is tried again when it is asked for again.
        """
        slot = self._slot(index)
        read_ahead = slot is not None
        if slot is None:
            slot = 0 if self._held[1] is not None and self._held[1][0] == then else 1
            self._read(slot, index)
        if self._slot(then) is None:
            self._read(1 - slot, then)
        held = self._held[slot]
        assert held is not None
        try:
            held[1].result()
        except BaseException:
            self._held[slot] = None
            if not read_ahead:
                raise
            return self.get(index, then)  # it failed some time ago, perhaps: the file may have come back since
        return self._buffers[slot]

    def spans(self, index: int) -> tuple[tuple[int, int], ...]:
        return self._items[index].spans

    def close(self) -> None:
        """Wait for a read in progress and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _slot(self, index: int) -> int | None:
        return next((s for s, held in enumerate(self._held) if held is not None and held[0] == index), None)

    def _read(self, slot: int, index: int) -> None:
        self._held[slot] = (index, self._thread.submit(self._fill, self._buffers[slot], self._items[index]))

    def _fill(self, buffer: U8, item: Item) -> None:
        for extent in item.extents:
            self._files.read(extent.shard, extent.offset, buffer[extent.at : extent.at + extent.n_bytes])
