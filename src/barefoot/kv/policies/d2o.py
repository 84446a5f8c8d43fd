"""d2o — heavy hitters with budgets by layer, where entries that resemble one that stays are merged into it.

D2O: Dynamic Discriminative Operations for Efficient Generative Inference of Large Language Models (Wan et al. 2024,
arXiv:2406.13035, sections 3.1 and 3.2). Entries stay as in :mod:`~barefoot.kv.policies.h2o`, and the ``first``
positions always; each layer's budget follows how its attention to the prompt is spread (``layers``,
:mod:`barefoot.kv.budgets`). Of an entry i that goes:

1. u_i is its largest cosine to a key of its key head that stays, that of entry j.
2. A layer's threshold is τ = mean_i u_i at first, then β · mean_i u_i + (1 - β) · τ, ``smoothing`` being β.
3. Where u_i ≥ τ the entry joins j: with e = exp(1), of all entries M that join j,
   k_j ← (e · k_j + Σ exp(u_i) k_i) / (e + Σ exp(u_i)), and values by the same weights. The others are lost.

What has merged keeps j's position, and counts once in the softmax; with ``mass="bias"`` as often as it stands for
entries, whose logarithm is added to its scores. Entries of a key head: ``keep`` and the newest, as the mean of all
layers; for each a position and a score, 4 bytes each, and 4 of bias where there is one.

*Differs from the paper*: the variance is that of shares of attention (:func:`barefoot.kv.budgets.density`); all layers
are compressed, and the budgets add up to the stated one. Layers take the prompt in turn and give room to later ones as
these come, so that entries of a layer go in several steps, each of which moves τ. The bias is ours: without it the
outputs of SmolLM2 are further off than those of the same entries without merging, with it they are nearer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from barefoot.core.errors import InvalidInput
from barefoot.kv.budgets import LAYERS, Layers
from barefoot.kv.policies import (
    F32,
    I32,
    SINGLY,
    Merge,
    Observation,
    Policy,
    Seen,
    at_least,
    lowest,
    one_of,
    protect_recent,
    stands_for,
    top,
)

TILE = 32  # entries that go whose cosines are taken at a time


@dataclass(frozen=True)
class D2O(Policy, name="d2o", papers=(63,), conflicts=SINGLY):
    keep: int = 1024
    recent: int | None = None  # half of ``keep``
    first: int = 4
    smoothing: float = 0.7
    layers: Layers = "measured"
    merging: bool = True
    mass: Literal["none", "bias"] = "none"

    observes: ClassVar[Observation] = "mass"
    n_carried: ClassVar[int] = 2  # the threshold, and whether there is one

    def __post_init__(self) -> None:
        at_least(self, keep=(self.keep, 2), first=(self.first, 0))
        if self.n_recent < 0 or self.n_recent + self.first >= self.keep:
            raise InvalidInput(
                f"d2o: first and recent must be less than keep together, got {self.first} and {self.n_recent} of "
                f"{self.keep}"
            )
        if not 0 <= self.smoothing <= 1:
            raise InvalidInput(f"d2o: smoothing must lie between 0 and 1, got {self.smoothing}")
        one_of(self, "layers", self.layers, LAYERS)
        one_of(self, "mass", self.mass, ("none", "bias"))

    @property
    def n_recent(self) -> int:
        return self.keep // 2 if self.recent is None else self.recent

    @property
    def least_keep(self) -> int:
        return 2 * self.first + 2

    def with_keep(self, keep: int) -> D2O:
        recent = None if self.recent is None else min(keep - self.first - 1, self.recent * keep // self.keep)
        return replace(self, keep=keep, recent=recent)

    def slots(self, context: int) -> int:
        return min(context, self.keep + 1)

    @property
    def merges(self) -> bool:
        return self.merging

    @property
    def merges_tokens(self) -> bool:
        return self.merging

    @property
    def biased(self) -> bool:
        return self.merging and self.mass == "bias"

    def _scores(self, seen: Seen) -> F32:
        assert seen.observed is not None
        scores = protect_recent(seen.observed, seen.position, seen.n_tokens, self.n_recent)
        return np.where(seen.position < self.first, np.float32(np.inf), scores)

    def choose(self, seen: Seen) -> I32:
        return top(self._scores(seen), min(self.keep, seen.n))

    def sends_away(self, n: int, n_tokens: int) -> bool:
        return n > self.keep

    def evict(self, seen: Seen) -> I32:
        return lowest(self._scores(seen))

    def merge(self, seen: Seen, stay: I32) -> Merge:
        assert seen.keys is not None
        assert seen.carried is not None
        into = np.full(seen.position.shape, -1, np.int32)
        likeness = np.zeros(seen.position.shape, np.float32)  # of those that go
        goes = np.ones(seen.position.shape, bool)
        np.put_along_axis(goes, stay, False, axis=1)
        for head, own in enumerate(stay):
            keys = seen.keys(head)
            unit = keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-30)
            for some, nearest, cosine in most_alike(unit, np.flatnonzero(goes[head]).astype(np.int32), own):
                into[head, some], likeness[head, some] = own[nearest], cosine
        mean = float(likeness[goes].mean())
        before, started = seen.carried
        threshold = self.smoothing * mean + (1 - self.smoothing) * before if started else mean
        into[goes & (likeness < threshold - 1e-6)] = -1  # of equal ones rounding decides nothing
        np.put_along_axis(into, stay, stay, axis=1)
        weight = np.where(goes, np.exp(likeness), np.float32(math.e)) * (into >= 0)
        for head, own in enumerate(into):
            lives = own >= 0
            total = np.bincount(own[lives], weights=weight[head, lives], minlength=seen.n)
            weight[head, lives] /= total[own[lives]]
        bias = stands_for(into, seen.bias) if self.biased else None
        return Merge(into, weight.astype(np.float32), bias=bias, carried=np.array([threshold, 1], np.float32))


def most_alike(keys: F32, gone: I32, stay: I32) -> Iterator[tuple[I32, I32, F32]]:
    """Some of ``gone``, for each the place in ``stay`` of the key most alike, and the cosine; keys are of length 1."""
    kept = keys[stay]
    for start in range(0, len(gone), TILE):
        some = gone[start : start + TILE]
        cosines = keys[some] @ kept.T
        nearest = cosines.argmax(axis=1)
        yield some, nearest, np.take_along_axis(cosines, nearest[:, None], axis=1)[:, 0]
