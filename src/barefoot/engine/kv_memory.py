"""The memory of all sequences' keys and values: resident from the start, or committed as the sequences grow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from barefoot.core.model import ModelSpec
from barefoot.engine.arena import Arena
from barefoot.engine.config import EngineConfig
from barefoot.engine.footprint import kv_tensors, row_layers
from barefoot.kv.placement.cache import VirtualCache
from barefoot.kv.placement.pages import HostPages

U8 = npt.NDArray[np.uint8]


class KVMemory:
    """Arrays for the rows of every layer, as the configuration places them.

    Attributes
    ----------
    arrays : of each of ``row_layers`` its keys and values, uint8 (n_sequences, n_kv_heads, capacity, row_bytes).
    cache : what commits pages; None where all are resident.
    """

    def __init__(self, spec: ModelSpec, config: EngineConfig, arena: Arena) -> None:
        tensors, n = kv_tensors(spec, config), config.n_sequences
        self.cache: VirtualCache | None = None
        if config.kv_placement is None:
            shapes = [(n, t.n_ranges, t.capacity, t.row_bytes) for t in tensors]
            self.arrays = _pairs(spec, config, [arena.take("kv", int(np.prod(s))).reshape(s) for s in shapes])
            return
        pages = HostPages()
        self.cache = config.kv_placement.open(tensors, n, pages)
        arena.lend("kv")
        self.arrays = _pairs(spec, config, self.cache.geometry.arrays(pages.memory))

    def grow(self, lengths: Sequence[int]) -> None:
        """Have memory for ``lengths`` tokens of each sequence.

        Raises
        ------
        PoolExhausted : the placement's pool is too small for them; all is as before.
        """
        if self.cache is not None:
            self.cache.step(lengths)

    def free(self, sequence: int) -> None:
        """The sequence is forgotten."""
        if self.cache is not None:
            self.cache.free(sequence)

    def close(self) -> None:
        """End the thread that commits pages, and give them back."""
        if self.cache is not None:
            self.cache.close()


def _pairs(spec: ModelSpec, config: EngineConfig, arrays: Sequence[U8]) -> dict[int, tuple[U8, U8]]:
    return dict(zip(row_layers(spec, config), zip(arrays[::2], arrays[1::2], strict=True), strict=True))
