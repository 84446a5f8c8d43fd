"""Plain models of ``think``, ``mikv`` and ``comet``: entries that are masked or rounded where they stand."""

from __future__ import annotations

import numpy as np
from plain_cache import PlainCache

from barefoot.ops import kvrows


def rounded(fmt, row):
    return kvrows.decode(fmt, kvrows.encode(fmt, np.asarray(row, np.float32)), len(row)).astype(np.float64)


class PlainThin(PlainCache):
    """Keys that are not among the newest have zeros where channels went; all rows are rounded as the store does."""

    def __init__(self, layout):
        super().__init__(layout)
        self.asked, self.kept, self.thin = {}, {}, {}

    def passed(self, layer, head, q, keys):
        last = q[-self.layout.store.window :].astype(np.float64)
        if (layer, head) not in self.kept:
            self.asked[layer, head] = np.square(last).mean(axis=1).sum(axis=0)

    def stored(self, layer, head, new, *, decoded=False):
        store, there = self.layout.store, self.entries[layer][head]
        thin = self.thin.setdefault((layer, head), set())
        thin &= set(there) - set(new)  # positions come again where they were taken back
        for p in set(new) & set(there):
            there[p][1] = rounded(store.inner.row_format, there[p][1])
        old = sorted(there)[: -store.recent]
        if old and (layer, head) not in self.kept:
            squares = sum(np.square(e[0]) for p, e in there.items() if not decoded or p not in new)
            scores = self.asked.get((layer, head), 1) * squares
            n_kept = store.n_kept(self.h.head_dim)
            self.kept[layer, head] = np.sort(np.argsort(-scores)[:n_kept])
        for p in set(old) - thin:
            own, key = self.kept[layer, head], np.zeros(self.h.head_dim)
            key[own] = rounded(store.inner.row_format, there[p][0][own])
            there[p][0] = key
        thin |= set(old)

    def trim(self, n):
        super().trim(n)
        if n == 0:
            self.__init__(self.layout)

    def fork(self):
        other = super().fork()
        other.asked, other.kept = dict(self.asked), dict(self.kept)
        other.thin = {at: set(positions) for at, positions in self.thin.items()}
        return other


def by_channel(bits, rows):
    """Rows (n, channels), float32, as the codes of each channel give them back, scales and minimums in half
    precision; codes are found in float32, too, as what lies half-way between two would differ."""
    low, high = rows.min(axis=0), rows.max(axis=0)
    scale = ((high - low) / np.float32(2**bits - 1)).astype(np.float16).astype(np.float32)
    low = low.astype(np.float16).astype(np.float32)
    codes = (rows - low) * np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    return np.clip(np.rint(codes), 0, 2**bits - 1).astype(np.float64) * scale + low


class PlainGroups(PlainCache):
    """Entries in groups, each rounded by channel when one more comes behind it."""

    def stored(self, layer, head, new, *, decoded=False):
        there, store = self.entries[layer][head], self.layout.store
        self.sealed = getattr(self, "sealed", {})
        while len(there) - self.sealed.get((layer, head), 0) > store.group:
            first = self.sealed.get((layer, head), 0)
            group = [there[p] for p in range(first, first + store.group)]
            for i in (0, 1):
                rows = by_channel(store.bits, np.array([entry[i] for entry in group], np.float32))
                for entry, row in zip(group, rows, strict=True):
                    entry[i] = row
            self.sealed[layer, head] = first + store.group

    def can_trim(self, n):
        return n == 0 or n >= max(getattr(self, "sealed", {}).values(), default=0)

    def trim(self, n):
        super().trim(n)
        if n == 0:
            self.sealed = {}

    def fork(self):
        other = super().fork()
        other.sealed = dict(getattr(self, "sealed", {}))
        return other


class PlainDemoted(PlainCache):
    """What a policy sends away is rounded, keys times the balance and back."""

    def __init__(self, layout):
        super().__init__(layout)
        self.balance, self.demoted = {}, {}

    def candidates(self, layer, head):
        gone = self.demoted.get((layer, head), set())
        return [p for p in self.entries[layer][head] if p not in gone]

    def passed(self, layer, head, q, keys):
        if self.layout.store.balance:
            largest = np.abs(q).max(axis=(0, 1)) / np.abs(keys).max(axis=0).astype(np.float32)
            self.balance.setdefault((layer, head), np.sqrt(largest))

    def send(self, layer, head, p):
        entry, fmt = self.entries[layer][head][p], f"q{self.layout.store.bits}"
        own = self.balance.setdefault((layer, head), np.ones(self.h.head_dim, np.float32))
        entry[:2] = rounded(fmt, entry[0].astype(np.float32) * own) / own, rounded(fmt, entry[1])
        self.demoted.setdefault((layer, head), set()).add(p)

    def trim(self, n):
        super().trim(n)
        if n == 0:
            self.__init__(self.layout)

    def fork(self):
        other = super().fork()
        other.balance = dict(self.balance)
        other.demoted = {at: set(positions) for at, positions in self.demoted.items()}
        return other
