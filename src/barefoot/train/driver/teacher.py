"""A teacher that is never in memory as a whole: its layers are read one by one, its embeddings and its head by rows.

All micro-batches of a step pass a layer before the next one is read, so that a step reads the teacher once. What stays
is a hidden state for each token of the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from barefoot.core.errors import Incompatible
from barefoot.core.model import ModelSpec, WeightSpec
from barefoot.engine.rows import read_rows
from barefoot.io.inventory import Checkpoint
from barefoot.train import MicroBatch
from barefoot.train.driver.decoder import Frozen, turns_of
from barefoot.train.driver.imitation import Taught
from barefoot.train.driver.loop import Data
from barefoot.train.footprint import Compute
from barefoot.weights.module import PackedEmbedding, decode


class StoredRows(PackedEmbedding):
    """A matrix that stays in its file: rows are read when they are asked for.

    Raises
    ------
    Incompatible : it is a sum of blocks and other parts, which has no rows of its own.
    """

    def __init__(self, checkpoint: Checkpoint, weight: WeightSpec, scale: float = 1.0) -> None:
        if weight.parts:
            raise Incompatible(f"{weight.name} is a sum of blocks and other parts, of which no rows can be read")
        super().__init__(weight.format, weight.rows, weight.cols, scale=scale, device="meta")
        self._checkpoint, self._stored = checkpoint, weight

    def stored_rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        start, stop, _ = slice(start, stop).indices(self.rows)
        return torch.from_numpy(read_rows(self._checkpoint, self._stored, start, stop - start))

    def at(self, ids: Tensor) -> Tensor:
        """Each row is read once."""
        different, places = np.unique(ids.numpy(), return_inverse=True)
        stored = np.concatenate([read_rows(self._checkpoint, self._stored, int(i), 1) for i in different])
        return decode(self.format, torch.from_numpy(stored[places.reshape(-1)]), self.cols)


class Teacher(Frozen):
    """A model as it is stored, of which one layer is in memory at a time, while it is passed."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, *, compute: Compute = "float32") -> None:
        super().__init__(checkpoint, spec, compute=compute, resident=False)

    def _embedding(self, weight: WeightSpec) -> PackedEmbedding:
        return StoredRows(self._checkpoint, weight, self.spec.embed_scale)

    def _head(self, weight: WeightSpec) -> PackedEmbedding:
        return StoredRows(self._checkpoint, weight)

    @torch.no_grad()
    def taught(self, batches: Iterable[MicroBatch]) -> list[MicroBatch]:
        """The same micro-batches, each with what the teacher makes of it."""
        batches = list(batches)
        turns = [turns_of(self.spec, batch.lengths) for batch in batches]
        states = [self.embedded(batch) for batch in batches]
        for index in range(self.spec.n_layers):
            self.load_layer(index)
            for i, batch in enumerate(batches):
                states[i] = self.layer(index, turns[i], batch.lengths)(states[i])
            self.drop_layer(index)
        normed = (self.normed(states.pop(0)) for _ in batches)
        cap = self.spec.logit_softcap
        return [replace(batch, taught=Taught(x, self.head, cap)) for batch, x in zip(batches, normed, strict=True)]


class Lessons:
    """Data with what a teacher makes of them, a step at a time."""

    def __init__(self, data: Data, teacher: Teacher) -> None:
        self._data, self._teacher = data, teacher

    def step(self) -> Sequence[MicroBatch]:
        return self._teacher.taught(self._data.step())

    @property
    def place(self) -> Mapping[str, int]:
        return self._data.place
