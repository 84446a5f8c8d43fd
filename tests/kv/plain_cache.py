"""A plain model of the cache: dictionaries by position, softmax written out, policies as their papers say them."""

from __future__ import annotations

import numpy as np


class PlainCache:
    """Entries of each layer and key head: position → [key, value, mass], in float64 of half-precision rows."""

    def __init__(self, layout):
        self.layout, self.h = layout, layout.heads
        self.entries = [[{} for _ in range(self.h.n_kv_heads)] for _ in range(layout.n_layers)]
        self.struck = {}  # (layer, head, position) → tokens that there were when it had a strike
        self.n_tokens = self.evicted_at = 0  # the latter: tokens when an entry went last

    def prompt(self, layer, q, k, v):
        """All tokens of a prompt in one layer; outputs (n, n_heads, head_dim)."""
        n, dim, sharing = len(q), self.h.head_dim, self.h.n_heads // self.h.n_kv_heads
        keys, values = (x.reshape(n, -1, dim).astype(np.float16).astype(np.float64) for x in (k, v))
        out = np.empty((n, self.h.n_heads, dim))
        for head, there in enumerate(self.entries[layer]):
            old = dict(there)
            for t in range(n):
                there[self.n_tokens + t] = [keys[t, head], values[t, head], 0.0]
            votes = {p: np.zeros(sharing) for p in there}
            strikes, new = dict.fromkeys(there, 0), {}
            for t in range(n):
                most = dict.fromkeys(there, 0.0)
                seen = [*old, *range(self.n_tokens, self.n_tokens + t + 1)]
                for i in range(sharing):
                    h = head * sharing + i
                    shares, out[t, h] = self.attend(q[t].reshape(-1, dim)[h], [there[p] for p in seen])
                    for p, share in zip(seen, shares, strict=True):
                        there[p][2] += share
                        most[p] = max(most[p], share)
                        votes[p][i] += share if t >= n - getattr(self.layout.policy, "window", 0) else 0
                for p in seen:
                    if most[p] < 1 / len(seen):
                        new.setdefault(p, []).append(self.n_tokens + t + 1)
                        strikes[p] += t >= n - getattr(self.layout.policy, "window", 0)
            mine = self.candidates(layer, head)
            kept = self.chosen({p: there[p] for p in mine}, votes, strikes, self.n_tokens + n)
            self.passed(layer, head, q.reshape(n, self.h.n_kv_heads, sharing, dim)[:, head], keys[:, head])
            self.struck = {at: when for at, when in self.struck.items() if at[:2] != (layer, head)}
            if len(kept) == len(mine) and self.layout.n_parts == 1:
                self.struck |= {(layer, head, p): when for p, when in new.items()}
            if len(kept) < len(mine):
                self.evicted_at = self.n_tokens + n
            for p in set(mine) - set(kept):
                self.send(layer, head, p)
            self.stored(layer, head, range(self.n_tokens, self.n_tokens + n))
        return out

    # What techniques make of entries.

    def candidates(self, layer, head):
        """Positions that the policy chooses among."""
        return list(self.entries[layer][head])

    def send(self, layer, head, p):
        del self.entries[layer][head][p]

    def passed(self, layer, head, q, keys):
        """A prompt with q (n, query heads of the head, dim) and keys (n, dim) has passed."""

    def stored(self, layer, head, new, *, decoded=False):
        """Positions ``new`` have come, as far as they are kept; a decoded one is attended to next."""

    def done(self, n):
        self.n_tokens += n

    def chosen(self, there, votes, strikes, n_tokens):
        policy, order = self.layout.policy, sorted(there)
        if policy is None or len(order) <= policy.keep:
            return order
        if policy.name == "sinks":
            return order[: policy.first] + order[len(order) - policy.keep + policy.first :]
        if policy.name == "h2o":
            recent = order[len(order) - policy.n_recent :] if policy.n_recent else []
            heavy = sorted(set(order) - set(recent), key=lambda p: -there[p][2])
            return sorted([*heavy[: policy.keep - len(recent)], *recent])
        if policy.name == "scissorhands":
            best = sorted(order, key=lambda p: (strikes[p] if p < n_tokens - policy.recent else -1, -p))
            return sorted(best[: policy.keep + 1 - policy.n_dropped])
        assert policy.name == "snapkv"
        front, side = order[: -policy.window], policy.kernel // 2
        score = {}
        for at, p in enumerate(front):
            near = front[max(0, at - side) : at + side + 1]
            each = np.array([votes[p] for p in near])
            score[p] = (each.sum(0) / policy.kernel if policy.pooling == "mean" else each.max(0)).mean()
        best = sorted(front, key=lambda p: (-score[p], -p))[: policy.keep - policy.window]
        return sorted([*best, *order[-policy.window :]])

    def attend(self, q, entries):
        keys, values = (np.array([e[i] for e in entries]) for i in (0, 1))
        scores = keys @ q.astype(np.float64) * self.h.scale
        if self.h.softcap:
            scores = self.h.softcap * np.tanh(scores / self.h.softcap)
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        return shares, shares @ values

    def step(self, layer, q, k, v):
        dim, sharing = self.h.head_dim, self.h.n_heads // self.h.n_kv_heads
        out = np.empty((1, self.h.n_heads, dim))
        for head, there in enumerate(self.entries[layer]):
            key, value = (x.reshape(-1, dim)[head].astype(np.float16).astype(np.float64) for x in (k, v))
            there[self.n_tokens] = [key, value, 0.0]
            self.stored(layer, head, [self.n_tokens], decoded=True)
            most = np.zeros(len(there))
            for i in range(sharing):
                h = head * sharing + i
                shares, out[0, h] = self.attend(q.reshape(-1, dim)[h], list(there.values()))
                most = np.maximum(most, shares)
                for entry, share in zip(there.values(), shares, strict=True):
                    entry[2] += share
            for p, share in zip(there, most, strict=True):
                if share < 1 / len(there):
                    self.struck.setdefault((layer, head, p), []).append(self.n_tokens + 1)
        return out

    def stepped(self):
        self.n_tokens += 1
        policy = self.layout.policy
        if policy is None or policy.name == "snapkv":
            return
        for layer, head in np.ndindex(len(self.entries), self.h.n_kv_heads):
            there, mine = self.entries[layer][head], self.candidates(layer, head)
            if len(mine) > policy.keep:
                self.evicted_at = self.n_tokens
                if policy.name == "sinks":
                    self.send(layer, head, min(p for p in mine if p >= policy.first))
                elif policy.name == "scissorhands":

                    def strikes(p, at=(layer, head)):
                        return sum(t > self.n_tokens - policy.window for t in self.struck.get((*at, p), ()))

                    old = [p for p in mine if p < self.n_tokens - policy.recent]
                    for p in sorted(old, key=lambda p: (-strikes(p), p))[: policy.n_dropped]:
                        self.send(layer, head, p)
                else:
                    old = [p for p in mine if p < self.n_tokens - policy.n_recent]
                    self.send(layer, head, min(old, key=lambda p: there[p][2]))

    def fork(self):
        other = type(self)(self.layout)
        other.entries = [[{p: list(e) for p, e in there.items()} for there in heads] for heads in self.entries]
        other.struck = {at: list(tokens) for at, tokens in self.struck.items()}
        other.n_tokens, other.evicted_at = self.n_tokens, self.evicted_at
        return other

    def can_trim(self, n):
        return n in (0, self.n_tokens) or (n >= self.evicted_at and self.layout.observes not in ("mass", "strikes"))

    def trim(self, n):
        self.entries = [[{p: e for p, e in there.items() if p < n} for there in heads] for heads in self.entries]
        self.n_tokens, self.evicted_at = n, self.evicted_at if n else 0
