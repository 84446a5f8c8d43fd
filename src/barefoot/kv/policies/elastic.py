"""elastic — a prompt's entries merge into those around that matter; of what follows, a place in the cache goes.

Elastic Cache: Efficient Inference of Vision Instruction-Following Models with Elastic Cache (Liu et al. 2024,
arXiv:2407.18121, section 3). When a prompt is done, for each layer:

1. The score of an entry is the attention probability that all of the prompt's queries gave it, over all heads: one set
   for the whole layer. The ``first`` positions, the last one, and the highest scores stay, ⌈ratio · n⌉ in all.
2. Every other entry joins the one that stays nearest to it in position (neither a first one nor the last one), whose
   key and value become the plain mean of its bucket.

While tokens follow, t of them in all, an entry goes whenever there are more than ⌈ratio · t⌉: always the one at place
``distance`` before the end of the prompt's entries. So the prompt's last entries go first, then the oldest of what was
decoded, and no scores are looked at.

Entries of a key head: ⌈ratio · t⌉ and the newest.

*Differs from the paper*: the description's ranks and offsets, where its code compares argsort with a count; with the
distance more than the prompt's entries, the place behind the first ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from barefoot.core.errors import InvalidInput
from barefoot.kv.policies import I32, SINGLY, Merge, Observation, Policy, Seen, at_least, every, top


@dataclass(frozen=True)
class Elastic(Policy, name="elastic", papers=(34,), conflicts=SINGLY):
    ratio: float = 0.5
    first: int = 1
    distance: int = 25
    merging: bool = True

    observes: ClassVar[Observation] = "sums"

    def __post_init__(self) -> None:
        at_least(self, first=(self.first, 0), distance=(self.distance, 1))
        if not 0 < self.ratio <= 1:
            raise InvalidInput(f"elastic: ratio must be above 0 and at most 1, got {self.ratio}")

    def budget(self, n_tokens: int) -> int:
        """Entries of so many tokens; the first ones and one more at least."""
        return min(n_tokens, max(self.first + 1, math.ceil(self.ratio * n_tokens - 1e-9)))

    def slots(self, context: int) -> int:
        return min(context, self.budget(context - 1) + 1)

    @property
    def merges(self) -> bool:
        return self.merging

    def choose(self, seen: Seen) -> I32:
        keep = self.budget(seen.n_tokens)
        if seen.n <= keep:
            return every(seen)
        assert seen.observed is not None
        scores = seen.observed.sum(axis=0)
        scores[: self.first] = scores[-1] = np.inf
        return np.broadcast_to(top(scores, keep), (len(seen.position), keep))

    def merge(self, seen: Seen, stay: I32) -> Merge:
        anchors = stay[0, self.first : -1]  # of the layer: all heads keep the same
        into = np.full(seen.n, -1, np.int32)
        if len(anchors):
            position = seen.position[0].astype(np.int64)
            above = np.clip(np.searchsorted(anchors, np.arange(seen.n)), 0, len(anchors) - 1)
            below = np.clip(above - 1, 0, None)
            nearer_below = position - position[anchors[below]] <= position[anchors[above]] - position
            into = np.where(nearer_below & (anchors[above] != np.arange(seen.n)), anchors[below], anchors[above])
        into[stay[0]] = stay[0]
        size = np.bincount(into[into >= 0], minlength=seen.n)
        weight = (1 / np.maximum(size[into], 1)).astype(np.float32)
        heads = len(seen.position)
        return Merge(np.tile(into.astype(np.int32), (heads, 1)), np.tile(weight, (heads, 1)))

    def sends_away(self, n: int, n_tokens: int) -> bool:
        return n > self.budget(n_tokens)

    def evict(self, seen: Seen) -> I32:
        place = max(self.first, self.budget(seen.n_prompt) - self.distance)
        return np.argsort(seen.position, axis=1)[:, place : place + 1].astype(np.int32)
