"""Memory of tensors that come and go many times in a pass: made resident once, and lent again.

What is freed goes back to the system at once where peaks are to be as stated (``return_freed_memory``), and what it
takes to make the next array resident again is a quarter of a training step. Inside :func:`recycled`, arrays of
``LEAST`` bytes and more that :func:`empty` gives are those that earlier ones of the same size have left.

Bytes lent and left together are no more than the most that was ever lent at once. So where all that a pass allocates
comes from here, gradients of what learns included, it peaks where it does without.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LEAST = 16 << 10  # bytes; smaller arrays live in the heap
ALIGN = 64  # bytes; vectors of products start on a cache line

U8 = npt.NDArray[np.uint8]


class Recycler:
    """Lends memory by its size.

    Attributes
    ----------
    lent, left : bytes that tensors have, and that none has.
    most : bytes that were lent at once.
    """

    def __init__(self) -> None:
        self.lent = self.left = self.most = 0
        self._left: dict[int, list[U8]] = {}

    def lend(self, n_bytes: int) -> U8:
        """(n_bytes,) of any content; they come back when nothing refers to the array any more."""
        if free := self._left.get(n_bytes):
            memory = free.pop()
            self.left -= n_bytes
        else:
            self._make_room(n_bytes)
            memory = np.empty(n_bytes + ALIGN, np.uint8)
            memory = memory[-memory.ctypes.data % ALIGN :][:n_bytes]
        self.lent += n_bytes
        self.most = max(self.most, self.lent)
        array = np.ndarray((n_bytes,), np.uint8, memory)
        weakref.finalize(array, self._take_back, memory, n_bytes).atexit = False
        return array

    def _take_back(self, memory: U8, n_bytes: int) -> None:
        self.lent -= n_bytes
        self._left.setdefault(n_bytes, []).append(memory)
        self.left += n_bytes

    def _make_room(self, n_bytes: int) -> None:
        """Let go of what is left until as much more can be lent without more being held than ever was lent."""
        allowed = max(self.most, self.lent + n_bytes)
        for size in sorted(self._left, reverse=True):
            while self._left[size] and self.lent + self.left + n_bytes > allowed:
                self._left[size].pop()
                self.left -= size

    def clear(self) -> None:
        """Let go of all that is left."""
        self._left.clear()
        self.left = 0


class _InForce(threading.local):
    recycler: Recycler | None = None


_now = _InForce()


@contextmanager
def recycled(recycler: Recycler | None) -> Iterator[None]:
    """Let :func:`empty` take from it, if there is one, in this thread, until the end of the scope."""
    before, _now.recycler = _now.recycler, recycler
    try:
        yield
    finally:
        _now.recycler = before


def empty(shape: torch.Size | tuple[int, ...], like: Tensor) -> Tensor:
    """A tensor of any content, of the type and the device of ``like``."""
    recycler, n_bytes = _now.recycler, math.prod(shape) * like.element_size()
    if recycler is None or n_bytes < LEAST or like.device.type != "cpu":
        return like.new_empty(shape)
    made: Any = like.new_empty(0)  # a view of the bytes could not be changed in place
    lent: Tensor = made.set_(torch.from_numpy(recycler.lend(n_bytes)).untyped_storage(), 0, shape)
    return lent


def product(a: Tensor, b: Tensor, like: Tensor | None = None) -> Tensor:
    """a b of matrices, in their type, or rounded to that of ``like``."""
    if like is None or like.dtype == a.dtype:
        return torch.mm(a, b, out=empty((len(a), b.shape[1]), a))
    return empty((len(a), b.shape[1]), like).copy_(a @ b)
