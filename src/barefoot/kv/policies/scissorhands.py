"""scissorhands — what was seldom important lately goes, many entries at a time.

Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression at Test Time (Liu et al.
2023, arXiv:2305.17118, algorithm 2). An entry has a strike for each of the last ``window`` queries that gives it less
than an even share, one over the number of slots that the query saw; a count, not a rate, so that young entries have
few. As soon as there are more than ``keep`` entries, ``drop`` of them go at once, those with the most strikes, the
older ones of equals, and none of the ``recent`` newest. So a cache is looked through once in ``drop`` tokens.

Strikes are counted in *parts* of the time, which begin so that the last ``window`` queries before a compaction are
whole parts (:meth:`Scissorhands.begins_part`): with m = ``drop`` and w = ``window``, one part where w ≤ m, else
2 ⌊w / m⌋ + 1 of them. Entries of a key head: ``keep`` and the newest; for each 4 bytes of position and 2 for each part.

*Differs from the paper*: with grouped queries an entry has a strike if no query head of its key head gives it more. A
prompt is compressed to as many entries as a compaction leaves. Strikes from before a prompt don't count behind it; nor
do its own where something of it went, or where they would have to be counted in several parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from barefoot.core.errors import InvalidInput
from barefoot.kv.policies import F32, I32, SINGLY, Observation, Policy, Seen, at_least, every


@dataclass(frozen=True)
class Scissorhands(Policy, name="scissorhands", papers=(87,), conflicts=SINGLY):
    keep: int = 1024
    window: int = 400
    recent: int = 10
    drop: int | None = None  # half of ``keep``

    observes: ClassVar[Observation] = "strikes"

    def __post_init__(self) -> None:
        at_least(self, keep=(self.keep, 2), window=(self.window, 1), recent=(self.recent, 0), drop=(self.n_dropped, 1))
        if self.n_dropped > self.keep - self.recent:
            raise InvalidInput(
                f"scissorhands: drop and recent must be no more than keep together, got {self.n_dropped} and "
                f"{self.recent} of {self.keep}"
            )
        if self.n_dropped > np.iinfo(np.uint16).max:
            raise InvalidInput(f"scissorhands: drop must be 65,535 at most, got {self.n_dropped}")

    @property
    def n_dropped(self) -> int:
        return self.keep // 2 if self.drop is None else self.drop

    @property
    def n_left(self) -> int:
        return self.keep + 1 - self.n_dropped

    @property
    def n_parts(self) -> int:
        return 1 if self.window <= self.n_dropped else 2 * (self.window // self.n_dropped) + 1

    def n_observed(self, n: int) -> int:
        """Where nothing goes yet, what is still among the last queries when something does."""
        if n > self.keep:
            return self.window
        return max(0, self.window - (self.keep + 1 - n)) if self.n_parts == 1 else 0

    def begins_part(self, n: int) -> bool:
        left = self.keep + 1 - n
        return left <= self.window and (left - self.window) % self.n_dropped == 0

    def slots(self, context: int) -> int:
        return min(context, self.keep + 1)

    def choose(self, seen: Seen) -> I32:
        if seen.n <= self.keep:
            return every(seen)
        assert seen.observed is not None
        order = self._worst_first(seen.position, seen.observed, seen.n_tokens)
        return np.sort(order[:, seen.n - self.n_left :], axis=1).astype(np.int32)

    def sends_away(self, n: int, n_tokens: int) -> bool:
        return n > self.keep

    def evict(self, seen: Seen) -> I32:
        assert seen.observed is not None
        return self._worst_first(seen.position, seen.observed, seen.n_tokens)[..., : self.n_dropped].astype(np.int32)

    def _worst_first(self, position: I32, strikes: F32, n_tokens: int) -> I32:
        """Slots (..., n) by strikes, the most first, then by age."""
        protected = np.where(position >= n_tokens - self.recent, np.float32(-1), strikes)
        return np.asarray(np.lexsort((position, -protected), axis=-1), np.int32)
