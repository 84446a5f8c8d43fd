"""Entries that live on in others: the sums that a policy's :class:`Merge` says, over rows wherever they are."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from barefoot import ops
from barefoot.kv.policies import Merge, Policy, Seen
from barefoot.kv.storage import F32, I32, STAGED, U8, Storage
from barefoot.ops import kvrows


class Rows(Protocol):
    """Keys and values of a layer's entries, as a policy numbers them."""

    def keys(self, head: int) -> F32: ...
    def values(self, head: int, entries: I32) -> F32: ...
    def rewrite(self, head: int, entries: I32, keys: F32, values: F32) -> None: ...


class StoredRows:
    """A storage's entries."""

    def __init__(self, storage: Storage, layer: int) -> None:
        self._storage, self._layer = storage, layer

    def keys(self, head: int) -> F32:
        return self._storage.keys(self._layer, head)

    def values(self, head: int, entries: I32) -> F32:
        return self._storage.values(self._layer, head, entries)

    def rewrite(self, head: int, entries: I32, keys: F32, values: F32) -> None:
        self._storage.rewrite(self._layer, head, entries, keys, values)


class PromptRows:
    """A storage's entries and those that are staged behind them, in an ``order``, (n_kv_heads, n)."""

    def __init__(self, storage: Storage, layer: int, keys: U8, values: U8, order: I32) -> None:
        self._stored, self._n = StoredRows(storage, layer), storage.n(layer)
        self._keys, self._values, self._order = keys, values, order

    def keys(self, head: int) -> F32:
        order = self._order[head]
        staged = self._keys[head, : len(order) - self._n]
        rows = kvrows.decode(STAGED, staged, staged.shape[-1] // 2)
        # What is staged is in order by itself.
        return np.concatenate([self._stored.keys(head), rows])[order] if self._n else rows

    def values(self, head: int, entries: I32) -> F32:
        own = self._order[head, entries]
        out = np.empty((len(own), self._values.shape[-1] // 2), np.float32)
        old = own < self._n
        if old.any():
            out[old] = self._stored.values(head, own[old])
        out[~old] = kvrows.decode(STAGED, self._values[head, own[~old] - self._n], out.shape[1])
        return out

    def rewrite(self, head: int, entries: I32, keys: F32, values: F32) -> None:
        own = self._order[head, entries]
        old = own < self._n
        if old.any():
            self._stored.rewrite(head, own[old], keys[old], values[old])
        slots = np.ascontiguousarray(own[None, ~old] - self._n, np.int32)
        for rows, staged in ((keys, self._keys), (values, self._values)):
            ops.kv_write(np.ascontiguousarray(rows[~old]), staged[head : head + 1], STAGED, slots)


def merge(policy: Policy, seen: Seen, stay: I32, rows: Rows) -> Merge:
    """Have those that ``stay``, (n_kv_heads, n_kept), take in what the policy says; what is alone stays as it is."""
    found = policy.merge(seen, stay)
    for head, (into, weight) in enumerate(zip(found.into, found.weight, strict=True)):
        joins = np.flatnonzero((into >= 0) & (into != np.arange(seen.n)))
        if not len(joins):
            continue
        anchors = np.unique(into[joins])
        members = np.flatnonzero(np.isin(into, anchors)).astype(np.int32)
        members = members[np.argsort(into[members], kind="stable")]
        first = np.searchsorted(into[members], anchors)
        parts = weight[members, None]
        keys = np.add.reduceat(rows.keys(head)[members] * parts, first, axis=0)
        values = np.add.reduceat(rows.values(head, members) * parts, first, axis=0)
        if found.value_factor is not None:
            values *= found.value_factor[head, anchors, None]
        rows.rewrite(head, anchors.astype(np.int32), keys, values)
    return found
