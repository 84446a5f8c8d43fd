"""sinks — the first positions and the last ones; without the first ones a plain sliding window.

StreamingLLM (Xiao et al. 2023, arXiv:2309.17453): much attention goes to the first few positions whatever they hold, so
a window that keeps them stays sound while it slides. It looks at nothing, so it is also the baseline of those that do.

With ``rope="token"`` distances are those between tokens, so that the first positions move away from the others for
ever. With ``"slot"``, as in the paper (section 3.2), they are those between entries: the first positions stay right
before the window, and a model never meets a distance above ``keep``, however long the text is.

Entries of a key head: ``keep`` and the newest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from barefoot.core.errors import InvalidInput
from barefoot.kv.policies import I32, SINGLY, Policy, Seen, at_least, lowest, one_of


@dataclass(frozen=True)
class Sinks(Policy, name="sinks", status="stable", conflicts=SINGLY):
    keep: int = 1024
    first: int = 4
    rope: Literal["token", "slot"] = "token"

    def __post_init__(self) -> None:
        at_least(self, keep=(self.keep, 1), first=(self.first, 0))
        if self.first >= self.keep:
            raise InvalidInput(f"sinks: first must be less than keep, got {self.first} of {self.keep}")
        one_of(self, "rope", self.rope, ("token", "slot"))

    @property
    def n_anchored(self) -> int:
        return self.first if self.rope == "slot" else 0

    def slots(self, context: int) -> int:
        return min(context, self.keep + 1)

    def choose(self, seen: Seen) -> I32:
        order = np.arange(seen.n, dtype=np.int32)
        if seen.n > self.keep:
            order = np.concatenate([order[: self.first], order[seen.n - self.keep + self.first :]])
        return np.broadcast_to(order, (len(seen.position), len(order)))

    def sends_away(self, n: int, n_tokens: int) -> bool:
        return n > self.keep

    def evict(self, seen: Seen) -> I32:
        return oldest(seen.position, self.first)


def oldest(position: I32, first: int) -> I32:
    """The slot (..., 1) of the lowest position that is not one of the ``first`` ones."""
    return lowest(np.where(position < first, np.iinfo(np.int32).max, position))
