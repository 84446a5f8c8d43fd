"""Bytes of PyTorch tensors while something runs: an instrument that sees every operation's storages."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """While active: ``live`` bytes of storages that operations met first here, and their ``peak``.

    A storage counts once, whole, from the first operation that makes or takes it until nothing refers to it. Those of
    ``held`` never count. Memory within an operation is not seen.
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}
        for tensor in held:
            self._meet(tensor, counts=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for taken in tree_leaves((args, kwargs)):
            self._meet(taken)
        result = func(*args, **kwargs)
        for made in tree_leaves(result):
            self._meet(made)
        return result

    def mark(self) -> None:
        """The peak begins anew, at what is live."""
        self.peak = self.live

    def _meet(self, value: Any, counts: bool = True) -> None:
        if not isinstance(value, torch.Tensor):
            return
        storage = value.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        n_bytes = storage.nbytes() if counts else 0
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, n_bytes))
        self.live += n_bytes
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, n_bytes: int) -> None:
        del self._known[key]
        self.live -= n_bytes
