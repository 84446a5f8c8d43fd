"""What a compressed cache is made of, in bytes, and the arrays that all layers and sequences use in turn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from barefoot import ops
from barefoot.core.ledger import Term
from barefoot.kv.policies import Observation, Policy
from barefoot.kv.storage import F32, STAGED, Array, Heads, Shape, Storage, Take, zeros
from barefoot.kv.stores import KVStore

OBSERVED_TOKENS = 8  # of a prompt whose scores are held at a time

# Bytes of numpy arrays that come and go while a layer's entries are chosen, merged, and then placed; tests measure
# them. For each entry and key head: to choose, to choose by votes, to choose and merge, to place; for each that stays;
# for each further query head that votes; for each number of one head's keys while its entries merge.
CHOOSE, CHOOSE_BY_VOTE, CHOOSE_AND_MERGE, PLACE, CHOSEN, VOTE, MERGE = 34, 37, 94, 18, 12, 15, 12
TURN = 16  # bytes for each number of the queries of a chunk while they turn


@dataclass(frozen=True)
class Layout:
    """What a cache of ``n_layers`` layers is made of, before anything is allocated."""

    heads: Heads
    n_layers: int
    context: int
    policy: Policy | None
    store: KVStore
    chunk: int = 64
    activations: str = "float32"  # how a prompt is attended to, as in ``ops.attention``

    @property
    def n_slots(self) -> int:
        """The most entries of a key head, in a layer of mean size."""
        return self.context if self.policy is None else self.policy.slots(self.context)

    @property
    def groups(self) -> tuple[range, ...]:
        """The layers in order, those together that keep the same entries."""
        return self.store.groups(self.n_layers)

    @property
    def observes(self) -> Observation:
        return "nothing" if self.policy is None else self.policy.observes

    @property
    def n_observed(self) -> int:
        """Rows of what is observed of a layer: a key head's, or a query head's."""
        n = self.heads.n_kv_heads
        return {"nothing": 0, "mass": n, "sums": n, "strikes": n, "votes": self.heads.n_heads}[self.observes]

    @property
    def n_parts(self) -> int:
        """In which strikes are counted; 0 where they aren't."""
        return self.policy.n_parts if self.policy is not None and self.observes == "strikes" else 0

    @property
    def n_anchored(self) -> int:
        """First entries that queries turn to meet."""
        return 0 if self.policy is None else self.policy.n_anchored

    @property
    def widest(self) -> int:
        """The most entries of a layer: the context's, where layers share their budgets."""
        shared = self.policy is not None and self.policy.layers != "uniform"
        return min(self.context, self.n_layers * self.n_slots) if shared else self.n_slots

    @property
    def shape(self) -> Shape:
        biased = self.policy is not None and self.policy.biased
        mass = self.observes == "mass"
        n_sent = 0 if self.policy is None else max(0, self.context - self.policy.n_left)
        return Shape(self.heads, self.n_layers, self.n_slots, mass, biased, self.n_parts, self.n_anchored, n_sent)

    def own(self) -> tuple[Array, ...]:
        """The arrays of a sequence."""
        return self.store.storage().arrays(self.shape, self.store)

    def storage(self, take: Take) -> Storage:
        return self.store.storage()(self.shape, self.store, take)

    def terms(self) -> tuple[Term, ...]:
        """Bytes that stay while a sequence lives."""
        return tuple(array.term for array in self.own())

    def shared(self, n_threads: int) -> tuple[Array, ...]:
        """What passes use in turn: staged keys and values, what is observed of all entries, the state of a pass, scores
        of the tokens that are observed, scratch."""
        h, widest = self.heads, max(self.widest, self.context)
        n_staged = max(map(len, self.groups)) * h.n_kv_heads
        staged = Array("kv staging", n_staged * self.context, ops.kv_row_bytes(STAGED, h.head_dim))
        both = self.widest + self.context
        n_scores = min(self.chunk, OBSERVED_TOKENS) * h.n_heads * both if self.n_observed else 0
        return (
            staged,
            staged,
            Array("kv observed", self.n_observed * self.context, 4),
            Array("kv state", self.chunk * h.n_heads * (h.head_dim + 2), 4),
            Array("kv scores", n_scores, 4),
            Array("kv strikes now", self.n_observed * widest if self.observes == "strikes" else 0, 4),
            Array("kv scratch", self._scratch_bytes(n_threads), 1),
        )

    def _scratch_bytes(self, n_threads: int) -> int:
        h = self.heads
        sizes = (
            ops.attention_scratch_bytes(n, h.n_heads, h.n_kv_heads, h.head_dim, self.activations, n_threads=n_threads)
            for n in {1, min(self.chunk, OBSERVED_TOKENS), self.chunk}
        )
        return max(sizes)

    def passing(self) -> Term:
        """What choosing, merging and placing, or queries of other keys, take for a while."""
        h, most, storage = self.heads, self.context, self.store.storage()
        each = CHOOSE * h.n_kv_heads
        if self.observes == "votes":
            each = CHOOSE_BY_VOTE * h.n_kv_heads + VOTE * (h.n_heads - h.n_kv_heads)
        if self.policy is not None and self.policy.merges:
            each = CHOOSE_AND_MERGE * h.n_kv_heads + MERGE * h.head_dim
        choosing = 0 if self.policy is None else most * each + CHOSEN * h.n_kv_heads * min(most, self.widest)
        turning = TURN * self.chunk * h.n_heads * h.head_dim if self.n_anchored else 0
        placing = PLACE * h.n_kv_heads * most + storage.placing_bytes(self.shape, self.store)
        asking = storage.asking_bytes(self.shape, self.store, self.chunk)
        return Term("kv choosing", max(choosing, placing, turning, asking), 1)


class Workspace:
    """The arrays that all layers, and all sequences, use in turn."""

    def __init__(self, layout: Layout, take: Take, n_threads: int) -> None:
        keys, values, observed, state, scores, strikes, scratch = layout.shared(n_threads)
        h, n = layout.heads, layout.chunk
        rows = (-1, layout.context, keys.n_bytes)  # of all key heads of a layer, and of those that choose with it
        self.keys, self.values = zeros(take, keys, rows), zeros(take, values, rows)
        self.observed: F32 = zeros(take, observed, (layout.n_observed, layout.context), np.float32)
        floats = zeros(take, state, (n * h.n_heads, h.head_dim + 2), np.float32).reshape(-1)
        ends = np.cumsum([n * h.n_heads * width for width in (h.head_dim, 1, 1)])
        self.sums = floats[: ends[0]].reshape(n, h.n_heads, h.head_dim)
        self.tops = floats[ends[0] : ends[1]].reshape(n, h.n_heads)
        self.totals = floats[ends[1] :].reshape(n, h.n_heads)
        self.scores = zeros(take, scores, (scores.count,), np.float32)
        self._strikes: F32 = zeros(take, strikes, (strikes.count,), np.float32)
        self.scratch = zeros(take, scratch, (scratch.count,))

    def no_strikes(self, n: int) -> F32:
        """Zeros for the strikes that one token gives ``n`` entries, (n_observed, n)."""
        rows = len(self.observed)
        found = self._strikes[: rows * n].reshape(rows, n)
        found[...] = 0
        return found
