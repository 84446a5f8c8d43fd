"""A plain model of layers in pairs: dictionaries by position; what is merged holds both layers' restored rows."""

from __future__ import annotations

import copy

import numpy as np
from plain_cache import PlainCache

KEYS, VALUES, MASS, MERGED, ANGLE = range(5)  # of an entry; rows are float64 (2 layers, head_dim)


def restored(rows, t):
    """Both layers' rows as their lengths times one direction."""
    n = np.linalg.norm(rows, axis=1)
    a, b = rows / n[:, None]
    angle = np.arccos(np.clip(a @ b, -1, 1))
    e = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return n[:, None] * e


class PlainPairs:
    """Two layers, the only ones of ``layout``."""

    def __init__(self, layout):
        self.layout, self.h, self.store, n = layout, layout.heads, layout.store, layout.n_slots
        self.room_exact = min(n - 1, int(self.store.retain * n) + self.store.recent)
        self.room_merged = n - self.room_exact
        self.retained = min(int(self.store.retain * n), self.room_exact - 1)
        self.heads = [{} for _ in range(self.h.n_kv_heads)]
        self.n_tokens = self.evicted_at = 0
        self._plain = PlainCache(layout)

    def attend(self, head, which, q, seen, observe):
        """Outputs (sharing, head_dim) of one token; ``observe`` gets each query head's share of each entry."""
        there, sharing = self.heads[head], self.h.n_heads // self.h.n_kv_heads
        rows = [(there[p][KEYS][which], there[p][VALUES][which]) for p in seen]
        out = np.empty((sharing, self.h.head_dim))
        for i, query in enumerate(q.reshape(-1, self.h.head_dim)[head * sharing : (head + 1) * sharing]):
            shares, out[i] = self._plain.attend(query, rows)
            for p, share in zip(seen, shares, strict=True):
                observe(p, i, share)
        return out

    def prompt(self, per_layer):
        """All tokens of a prompt in both layers; outputs (2, n, n_heads, head_dim)."""
        n, dim, sharing = len(per_layer[0][0]), self.h.head_dim, self.h.n_heads // self.h.n_kv_heads
        rows = [[x.reshape(n, -1, dim).astype(np.float16).astype(float) for x in each[1:]] for each in per_layer]
        out = np.empty((2, n, self.h.n_heads, dim))
        window = getattr(self.layout.policy, "window", 0)
        kept = []
        for head, there in enumerate(self.heads):
            old = list(there)
            for t in range(n):
                there[self.n_tokens + t] = self.entry(*(np.array([both[i][t, head] for both in rows]) for i in (0, 1)))
            votes = {p: np.zeros(sharing) for p in there}
            for which, t in np.ndindex(2, n):

                def observe(p, i, share, there=there, votes=votes, t=t):
                    there[p][MASS] += share
                    votes[p][i] += share if t >= n - window else 0

                seen = [*old, *range(self.n_tokens, self.n_tokens + t + 1)]
                own = slice(head * sharing, (head + 1) * sharing)
                out[which, t, own] = self.attend(head, which, per_layer[which][0][t], seen, observe)
            kept.append(self._plain.chosen(there, votes, None, self.n_tokens + n))
        if len(kept[0]) < len(self.heads[0]):
            self.evicted_at = self.n_tokens + n
        self.settle(kept, self.most_exact(len(kept[0])))
        self.n_tokens += n
        return out

    @staticmethod
    def entry(keys, values):
        angles = [np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)) for a, b in (keys, values)]
        return [keys, values, 0.0, False, max(angles)]

    def most_exact(self, n):
        return min(n, max(self.retained, n - self.room_merged))

    def settle(self, kept, most):
        """Keep these of each head; all heads have as many exact ones, ``most`` or fewer."""
        exact = min(most, *(sum(not self.heads[h][p][MERGED] for p in own) for h, own in enumerate(kept)))
        for head, own in enumerate(kept):
            there = self.heads[head] = {p: self.heads[head][p] for p in own}
            loose = sorted((p for p in own if not there[p][MERGED]), key=lambda p, there=there: there[p][ANGLE])
            for p in loose[: len(loose) - exact]:
                for i in (KEYS, VALUES):
                    there[p][i] = restored(there[p][i], self.store.t)
                there[p][MERGED] = True

    def step(self, which, q, k, v):
        out = []
        for head, there in enumerate(self.heads):
            rows = [x.reshape(-1, self.h.head_dim)[head].astype(np.float16).astype(float) for x in (k, v)]
            if which == 0:
                there[self.n_tokens] = [np.array([row, row]) for row in rows] + [0.0, False, 0.0]
            else:
                mass = there[self.n_tokens][MASS]
                both = [np.array([there[self.n_tokens][i][0], row]) for i, row in enumerate(rows)]
                there[self.n_tokens] = self.entry(*both)
                there[self.n_tokens][MASS] = mass

            def observe(p, i, share, there=there):
                there[p][MASS] += share

            out.append(self.attend(head, which, q, list(there), observe))
        return np.concatenate(out)[None]

    def stepped(self):
        self.n_tokens += 1
        n, policy = len(self.heads[0]), self.layout.policy
        exact = sum(not e[MERGED] for e in self.heads[0].values())
        if exact == self.room_exact > self.most_exact(n):
            self.settle([list(there) for there in self.heads], self.most_exact(n))
        if policy is None or policy.name == "snapkv" or n <= policy.keep:
            return
        self.evicted_at = self.n_tokens
        kept = []
        for there in self.heads:
            if policy.name == "sinks":
                gone = min(p for p in there if p >= policy.first)
            else:
                old = [p for p in there if p < self.n_tokens - policy.n_recent]
                gone = min(old, key=lambda p, there=there: there[p][MASS])
            kept.append([p for p in there if p != gone])
        self.settle(kept, self.room_exact - 1)

    def trim(self, n):
        if n < self.n_tokens:
            self.settle([[p for p in there if p < n] for there in self.heads], self.room_exact - 1)
        self.n_tokens, self.evicted_at = n, self.evicted_at if n else 0

    def fork(self):
        other = PlainPairs(self.layout)
        other.heads = copy.deepcopy(self.heads)
        other.n_tokens, other.evicted_at = self.n_tokens, self.evicted_at
        return other
