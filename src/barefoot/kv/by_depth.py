"""Storage in which layers from some depth on lie in pairs: the first ones in slots, each by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy.typing as npt

from barefoot.kv.pairs import Pairs
from barefoot.kv.slots import Slots
from barefoot.kv.storage import F32, I32, U8, U16, Array, Part, Shape, Storage, Take
from barefoot.kv.stores.minicache import MiniCache


def shapes(shape: Shape, store: MiniCache) -> tuple[Shape, Shape]:
    """Of the layers by themselves, and of those in pairs."""
    n = store.n_single(shape.n_layers)
    return replace(shape, n_layers=n), replace(shape, n_layers=shape.n_layers - n)


class ByDepth(Storage):
    lets_go: ClassVar[bool] = True

    @staticmethod
    def arrays(shape: Shape, store: MiniCache) -> tuple[Array, ...]:
        single, paired = shapes(shape, store)
        return (*Slots.arrays(single, store.inner), *Pairs.arrays(paired, store))

    @staticmethod
    def placing_bytes(shape: Shape, store: MiniCache) -> int:
        single, paired = shapes(shape, store)
        return max(Slots.placing_bytes(single, store.inner), Pairs.placing_bytes(paired, store))

    def __init__(self, shape: Shape, store: MiniCache, take: Take) -> None:
        single, paired = shapes(shape, store)
        self._n_single = single.n_layers
        self._slots, self._pairs = Slots(single, store.inner, take), Pairs(paired, store, take)

    def _of(self, layer: int) -> tuple[Storage, int]:
        """Where a layer lies, and its number there."""
        return (self._slots, layer) if layer < self._n_single else (self._pairs, layer - self._n_single)

    def n(self, layer: int) -> int:
        storage, own = self._of(layer)
        return storage.n(own)

    def room(self, layer: int) -> int:
        storage, own = self._of(layer)
        return storage.room(own)

    def position(self, layer: int) -> I32:
        storage, own = self._of(layer)
        return storage.position(own)

    def mass(self, layer: int) -> F32 | None:
        storage, own = self._of(layer)
        return storage.mass(own)

    def strikes(self, layer: int) -> U16 | None:
        storage, own = self._of(layer)
        return storage.strikes(own)

    def parts(self, layer: int) -> Sequence[Part]:
        storage, own = self._of(layer)
        return storage.parts(own)

    def place(self, layer: int, stay: I32, position: I32, keys: U8, values: U8) -> None:
        storage, own = self._of(layer)
        storage.place(own, stay, position, keys, values)

    def append(self, layer: int, k: F32, v: F32, position: int) -> None:
        storage, own = self._of(layer)
        storage.append(own, k, v, position)

    def drop(self, layer: int, gone: I32) -> None:
        storage, own = self._of(layer)
        storage.drop(own, gone)

    def stepped(self, layer: int) -> None:
        storage, own = self._of(layer)
        storage.stepped(own)

    def close(self) -> None:
        self._slots.close()

    def trim(self, layer: int, n_tokens: int) -> None:
        storage, own = self._of(layer)
        storage.trim(own, n_tokens)

    def clear(self) -> None:
        self._slots.clear()
        self._pairs.clear()

    def counters(self) -> dict[str, list[int]]:
        return {**self._slots.counters(), **self._pairs.counters()}

    def restore(self, counters: Mapping[str, Any]) -> None:
        self._slots.restore(counters)
        self._pairs.restore(counters)

    def held(self) -> dict[str, npt.NDArray[Any]]:
        return {**self._slots.held(), **self._pairs.held()}

    def copy(self, other: Storage) -> None:
        assert isinstance(other, ByDepth)
        self._slots.copy(other._slots)
        self._pairs.copy(other._pairs)
