"""snapkv — what the last tokens of a prompt look at, and its neighbours, is what the answer will need.

SnapKV: LLM Knows What You are Looking for Before Generation (Li et al. 2024, arXiv:2404.14469, section 4). Once, when a
prompt of n > ``keep`` tokens is done, for each layer and key head:

1. votes of each query head: attention probabilities of the last ``window`` queries, softmax over all n keys, summed;
2. pooled along the positions before the window (``kernel`` wide, mean over zeros at the ends, or maximum), so that
   neighbours of a hit stay with it;
3. the mean over the query heads that share the key head; the ``keep - window`` largest stay, and the window.

What is decoded afterwards is appended. Entries of a key head: ``keep``, which is the mean of all layers where budgets
fall like a pyramid (:mod:`barefoot.kv.budgets`), and ``room`` for what is decoded.

*Differs from the paper*: one set for each key head, where its code repeats keys for all query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from barefoot.core.errors import InvalidInput
from barefoot.kv.policies import F32, I32, Observation, Policy, Seen, at_least, every, one_of, top


@dataclass(frozen=True)
class SnapKV(Policy, name="snapkv", papers=(78,)):
    keep: int = 1024
    window: int = 32
    kernel: int = 5
    pooling: Literal["mean", "max"] = "mean"
    room: int = 512
    layers: Literal["uniform", "pyramid"] = "uniform"

    observes: ClassVar[Observation] = "votes"

    def __post_init__(self) -> None:
        at_least(self, keep=(self.keep, 2), window=(self.window, 1), room=(self.room, 0))
        if self.window >= self.keep:
            raise InvalidInput(f"snapkv: window must be less than keep, got {self.window} of {self.keep}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise InvalidInput(f"snapkv: kernel must be an odd number, got {self.kernel}")
        one_of(self, "pooling", self.pooling, ("mean", "max"))
        one_of(self, "layers", self.layers, ("uniform", "pyramid"))

    @property
    def least_keep(self) -> int:
        return self.window + 1

    def slots(self, context: int) -> int:
        return min(context, self.keep + self.room)

    def choose(self, seen: Seen) -> I32:
        n_heads = len(seen.position)
        if seen.n <= self.keep:
            return every(seen)
        assert seen.observed is not None
        n_before = seen.n - self.window
        pooled = pool(seen.observed[:, :n_before], self.kernel, self.pooling)
        votes = pooled.reshape(n_heads, -1, n_before).mean(axis=1)
        window = np.broadcast_to(np.arange(n_before, seen.n, dtype=np.int32), (n_heads, self.window))
        return np.concatenate([top(votes, self.keep - self.window), window], axis=1)


def pool(scores: F32, width: int, how: Literal["mean", "max"]) -> F32:
    """Scores (..., n), each replaced by the mean or maximum of ``width`` around it; behind the ends are zeros."""
    side = width // 2
    padded = np.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(side, side)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=-1)
    return np.asarray(windows.mean(axis=-1) if how == "mean" else windows.max(axis=-1), np.float32)
