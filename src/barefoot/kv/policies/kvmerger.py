"""kvmerger — neighbours with alike keys become one entry, a mean around the one that was attended to most.

KVMerger: Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks (Wang et al. 2024,
arXiv:2407.08454, sections 3 and 4). When a prompt of n > ``keep`` tokens is done, for each layer and key head:

1. Exempt are the ``recent`` last entries and the ``heavy`` ones of most attention (probability that all of the
   prompt's queries gave it).
2. Of all pairs of neighbours i, i + 1 that are not exempt, with s_i = cos(k_i, k_(i+1)) above ``alike``, the n - keep
   most alike are linked. Runs of linked entries are the sets S. Where too few are alike, the sets that were attended to
   least are lost.
3. A set's pivot p was attended to most. g_i = exp(-‖k_p - k_i‖² / (2 σ²)), where σ² = ``spread`` times the mean of
   ‖k_p - k_i‖² over the others; the key is Σ g_i k_i / Σ g_i, at p's position, and the value is |S| Σ g_i v_i / Σ g_i
   (``mass="value"``): one entry gets the attention of one token, but stands for |S|.

With ``mass="bias"`` the value is the mean instead, and log |S| is added to the entry's scores, which is what attention
to |S| equal keys gives; a set that merges again counts as often as it stands for. ``"none"`` does neither.

What is decoded afterwards is appended. Entries of a key head: ``keep``, and ``room`` for what is decoded; for each a
position, and with ``mass="bias"`` 4 bytes more.

*Differs from the paper*: the number of entries is stated, and the threshold follows from it; no layer is exempt; σ is
measured in distances of keys, where the paper's formula needs g to have σ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput
from barefoot.kv.policies import F32, I32, Merge, Observation, Policy, Seen, at_least, every, one_of, stands_for


@dataclass(frozen=True)
class KVMerger(Policy, name="kvmerger", papers=(70,)):
    keep: int = 1024
    recent: int | None = None  # a third of ``keep``
    heavy: int | None = None  # a quarter of ``keep``
    alike: float = 0.75
    spread: float = 0.5
    mass: Literal["value", "bias", "none"] = "value"
    room: int = 512

    observes: ClassVar[Observation] = "sums"

    def __post_init__(self) -> None:
        at_least(self, keep=(self.keep, 2), recent=(self.n_recent, 0), heavy=(self.n_heavy, 0), room=(self.room, 0))
        one_of(self, "mass", self.mass, ("value", "bias", "none"))
        if self.n_recent + self.n_heavy >= self.keep:
            raise InvalidInput(
                f"kvmerger: recent and heavy must be less than keep together, got {self.n_recent} and {self.n_heavy} "
                f"of {self.keep}"
            )
        if not self.spread > 0:
            raise InvalidInput(f"kvmerger: spread must be above 0, got {self.spread}")

    @property
    def n_recent(self) -> int:
        return self.keep // 3 if self.recent is None else self.recent

    @property
    def n_heavy(self) -> int:
        return self.keep // 4 if self.heavy is None else self.heavy

    @property
    def merges(self) -> bool:
        return True

    @property
    def biased(self) -> bool:
        return self.mass == "bias"

    def slots(self, context: int) -> int:
        return min(context, self.keep + self.room)

    def choose(self, seen: Seen) -> I32:
        if seen.n <= self.keep:
            return every(seen)
        return np.stack([self._pivots(seen, head)[0] for head in range(len(seen.position))])

    def _pivots(self, seen: Seen, head: int) -> tuple[I32, I32]:
        """The entries that a head keeps, ascending, and the pivot that each entry has, -1 where its set is lost."""
        assert seen.keys is not None
        assert seen.observed is not None
        attended = seen.observed[head].astype(np.float64)
        exempt = np.zeros(seen.n, bool)
        exempt[seen.n - self.n_recent :] = True
        exempt[np.argsort(-np.where(exempt, -np.inf, attended), kind="stable")[: self.n_heavy]] = True
        linked = links(seen.keys(head), exempt, seen.n - self.keep, self.alike)
        sets = np.concatenate([[0], np.cumsum(~linked)])
        first = np.flatnonzero(np.diff(sets, prepend=-1))
        best = np.maximum.reduceat(attended, first)
        at_best = np.flatnonzero(attended == best[sets])
        pivots = np.full(len(first), -1, np.int64)
        pivots[sets[at_best][::-1]] = at_best[::-1]  # of equal ones the first
        n_lost = len(first) - self.keep
        if n_lost > 0:
            order = np.argsort(np.where(exempt[pivots], np.inf, best), kind="stable")
            pivots[order[:n_lost]] = -1
        pivot = pivots[sets].astype(np.int32)
        return np.sort(pivots[pivots >= 0]).astype(np.int32), pivot

    def merge(self, seen: Seen, stay: I32) -> Merge:
        assert seen.keys is not None
        into = np.stack([self._pivots(seen, head)[1] for head in range(len(seen.position))])
        bias = stands_for(into, seen.bias)
        before = np.ones(into.shape) if seen.bias is None else np.exp(seen.bias.astype(np.float64))
        weight = np.zeros(into.shape, np.float32)
        for head, pivot in enumerate(into):
            lives = np.flatnonzero(pivot >= 0)
            to = pivot[lives]
            keys = seen.keys(head)
            apart = np.square(keys[lives] - keys[to]).sum(axis=1, dtype=np.float64)
            others = np.maximum(np.bincount(to, minlength=seen.n) - 1, 1)
            variance = self.spread * np.bincount(to, weights=apart, minlength=seen.n) / others
            near = np.exp(-apart / (2 * np.maximum(variance[to], 1e-30))) * before[head, lives]
            weight[head, lives] = near / np.bincount(to, weights=near, minlength=seen.n)[to]
        return Merge(
            into,
            weight,
            value_factor=np.exp(bias) if self.mass == "value" else None,
            bias=bias if self.mass == "bias" else None,
        )


def links(keys: F32, exempt: npt.NDArray[np.bool_], n: int, alike: float) -> npt.NDArray[np.bool_]:
    """Which neighbours (n_entries - 1,) are linked: the ``n`` most alike of those that are alike and not exempt."""
    lengths = np.maximum(np.linalg.norm(keys, axis=1), 1e-30)
    cosine = np.einsum("nd,nd->n", keys[:-1], keys[1:]) / (lengths[:-1] * lengths[1:])
    cosine[exempt[:-1] | exempt[1:] | ~(cosine > alike)] = -np.inf
    linked: npt.NDArray[np.bool_] = np.zeros(len(cosine), bool)
    linked[np.argsort(-cosine, kind="stable")[:n]] = True
    linked[np.isneginf(cosine)] = False
    return linked
