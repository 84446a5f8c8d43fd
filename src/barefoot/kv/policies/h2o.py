"""h2o — heavy hitters: the entries that have collected most attention, and the last ones.

H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (Zhang et al. 2023,
arXiv:2306.14048, algorithm 1). The score of an entry is the attention probability that all queries so far have given
it, summed over the query heads that share its key head; it is not divided by how many queries could see it, so early
positions, the attention sink among them, score high. After each token the entry of least score goes, of those that are
not among the ``recent`` last positions; softmax is over what is left, and so are later scores.

Entries of a key head: ``keep`` and the newest; for each a position and a score, 4 bytes each. Where budgets differ by
layer (:mod:`barefoot.kv.budgets`), ``keep`` is their mean, and a stated ``recent`` is the same part of each.

*Differs from the paper*: with grouped queries one set serves all query heads of a key head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from barefoot.core.errors import InvalidInput
from barefoot.kv.budgets import LAYERS, Layers
from barefoot.kv.policies import (
    I32,
    SINGLY,
    Observation,
    Policy,
    Seen,
    at_least,
    lowest_before,
    one_of,
    protect_recent,
    top,
)


@dataclass(frozen=True)
class H2O(Policy, name="h2o", papers=(46,), conflicts=SINGLY):
    keep: int = 1024
    recent: int | None = None  # half of ``keep``
    layers: Layers = "uniform"

    observes: ClassVar[Observation] = "mass"
    evicts_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least(self, keep=(self.keep, 2))
        if not 0 <= self.n_recent < self.keep:
            raise InvalidInput(f"h2o: recent must lie between 0 and keep - 1, got {self.recent} of {self.keep}")
        one_of(self, "layers", self.layers, LAYERS)

    @property
    def n_recent(self) -> int:
        return self.keep // 2 if self.recent is None else self.recent

    def slots(self, context: int) -> int:
        return min(context, self.keep + 1)

    def choose(self, seen: Seen) -> I32:
        assert seen.observed is not None
        scores = protect_recent(seen.observed, seen.position, seen.n_tokens, self.n_recent)
        return top(scores, min(self.keep, seen.n))

    def sends_away(self, n: int, n_tokens: int) -> bool:
        return n > self.keep

    def evict(self, seen: Seen) -> I32:
        assert seen.observed is not None
        return lowest_before(seen.observed, seen.position, seen.n_tokens, self.n_recent)

    def with_keep(self, keep: int) -> H2O:
        recent = None if self.recent is None else min(keep - 1, self.recent * keep // self.keep)
        return replace(self, keep=keep, recent=recent)
