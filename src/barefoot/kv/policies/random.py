"""random — positions drawn by lot beside the last ones: what a choice must beat.

Each layer and key head draws for itself, by ``seed``. Entries of a key head: ``keep`` and the newest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from barefoot.kv.policies import I32, SINGLY, Policy, Seen, at_least, lowest_before, protect_recent, top


@dataclass(frozen=True)
class Random(Policy, name="random", status="stable", conflicts=SINGLY):
    keep: int = 1024
    recent: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, keep=(self.keep, 1), recent=(self.recent, 0))

    def slots(self, context: int) -> int:
        return min(context, self.keep + 1)

    def choose(self, seen: Seen) -> I32:
        lots = np.random.default_rng((self.seed, seen.layer)).random(seen.position.shape, np.float32)
        return top(protect_recent(lots, seen.position, seen.n_tokens, self.recent), min(self.keep, seen.n))

    def sends_away(self, n: int, n_tokens: int) -> bool:
        return n > self.keep

    def evict(self, seen: Seen) -> I32:
        rng = np.random.default_rng((self.seed, seen.layer, seen.n_tokens))
        lots = rng.random(seen.position.shape, np.float32)
        return lowest_before(lots, seen.position, seen.n_tokens, self.recent)
