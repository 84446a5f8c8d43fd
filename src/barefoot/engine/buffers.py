"""The arrays of a pass, laid out in the arena as the footprint says, and their views for a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot.core.model import ModelSpec, Rope
from barefoot.engine.arena import Arena
from barefoot.engine.config import EngineConfig
from barefoot.engine.footprint import activation_buffers, activations
from barefoot.engine.rope import inverse_frequencies

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Views:
    """Activations of ``n`` tokens, float32 (n, width) each; ``o`` and ``down`` only exist where norms follow them."""

    n: int
    ids: npt.NDArray[np.int32]
    x: F32
    attn_in: F32
    q: F32
    k: F32
    v: F32
    attn_out: F32
    ffn_in: F32
    gate: F32
    up: F32
    head_in: F32
    o: F32 | None
    down: F32 | None
    rope: tuple[tuple[F32, F32], ...]


class Buffers:
    """Activations and rope tables of up to ``n_rows`` tokens."""

    def __init__(self, spec: ModelSpec, config: EngineConfig, arena: Arena) -> None:
        arrangement = activations(spec, config)
        block = arena.take("activations", arrangement.bytes)
        self._widths: dict[str, int] = {}
        self._memory: dict[str, U8] = {}
        for buffer, width in activation_buffers(spec, config):
            start = arrangement.offsets[buffer.name]
            self._memory[buffer.name] = block[start : start + buffer.bytes]
            self._widths[buffer.name] = width
        self.tables = RopeTables(spec, config, arena)
        self._views: dict[int, Views] = {}

    @property
    def embed_rows(self) -> U8:
        """Embedding rows read from disk, uint8, for one pass."""
        return self._memory["embed_rows"]

    def views(self, n: int) -> Views:
        """The arrays for ``n`` tokens; made once for each ``n``."""
        if n not in self._views:
            self._views[n] = self._make(n)
        return self._views[n]

    def _make(self, n: int) -> Views:
        arrays = {
            name: self._memory[name][: 4 * n * width].view(np.float32).reshape(n, width)
            for name, width in self._widths.items()
            if width
        }
        arrays.setdefault("o", None)  # type: ignore[arg-type]
        arrays.setdefault("down", None)  # type: ignore[arg-type]
        ids = self._memory["ids"][: 4 * n].view(np.int32)
        return Views(n=n, ids=ids, rope=self.tables.views(n), **arrays)


class RopeTables:
    """Cosines and sines of the positions of the present pass, for each kind of rope."""

    def __init__(self, spec: ModelSpec, config: EngineConfig, arena: Arena) -> None:
        self.ropes: list[Rope] = list(dict.fromkeys(layer.rope for layer in spec.layers))
        n = config.n_rows
        self._steps = arena.floats("rope", n)
        self._steps[:] = np.arange(n)
        self._positions = arena.floats("rope", n)
        self._tables: list[tuple[F32, F32, F32]] = []
        for rope in self.ropes:
            half = rope.dim // 2
            frequencies = arena.floats("rope", half)
            frequencies[:] = inverse_frequencies(rope, config.context)
            tables = arena.floats("rope", n, half), arena.floats("rope", n, half)
            self._tables.append((frequencies, *tables))

    def views(self, n: int) -> tuple[tuple[F32, F32], ...]:
        return tuple((cos[:n], sin[:n]) for _, cos, sin in self._tables)

    def fill(self, start: int, n: int) -> None:
        """Compute the tables of positions ``start`` to ``start + n``."""
        np.add(self._steps[:n], np.float32(start), out=self._positions[:n])
        self._compute(n)

    def fill_each(self, positions: Sequence[int]) -> None:
        """Compute the tables of these positions."""
        self._positions[: len(positions)] = positions
        self._compute(len(positions))

    def _compute(self, n: int) -> None:
        positions = self._positions[:n]
        for rope, (frequencies, cos, sin) in zip(self.ropes, self._tables, strict=True):
            angles = np.multiply(positions[:, None], frequencies, out=sin[:n])
            np.cos(angles, out=cos[:n])
            np.sin(angles, out=sin[:n])
            if rope.attention_factor != 1:
                cos[:n] *= np.float32(rope.attention_factor)
                sin[:n] *= np.float32(rope.attention_factor)
