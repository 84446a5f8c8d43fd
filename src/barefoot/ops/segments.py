"""Segments of a KV store, in numpy: attention takes one after the other, and all of them are one softmax.

A segment holds entries, ``counts[h]`` of key head h, as rows (:mod:`barefoot.ops.kvrows`) or in blocks
(:mod:`barefoot.ops.kvblocks`): keys and values by channel, formats ``"c2"``, ``"c3"``, ``"c4"`` and ``"c8"``, and
values by token, ``"t2"``, ``"t3"``, ``"t4"`` and ``"t8"``. Keys and values may have other formats and widths: a key
that lost channels meets queries that lost the same ones.

The state of a pass is, for each token and query head, the largest score so far, the total of exp(score - largest) and
the sum of the values with these weights; it starts at ``-inf``, 0 and 0, and sums / totals are the outputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot.ops import kvblocks, kvrows

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]

BY_CHANNEL = tuple(f"c{bits}" for bits in kvblocks.BITS)
BY_TOKEN = tuple(f"t{bits}" for bits in kvblocks.BITS)
EXCLUDED = -1e30  # a bias that takes an entry out, beside entries that stay


class Segment:
    """A part of a store; the arrays stay the caller's, who changes what is in them.

    Parameters
    ----------
    key_format, keys : uint8 (n_kv_heads, slots, row bytes), or (n_kv_heads, blocks, block bytes) by channel.
    value_format, values : uint8 (n_kv_heads, slots, row bytes), or (n_kv_heads, blocks, block bytes) in blocks.
    key_dim, value_dim : channels of a key and of a value.
    counts : int32 (n_kv_heads,), entries that are there.
    group : positions of a block by channel.
    bias, key_scale, value_scale : float32 (n_kv_heads, stride): added to an entry's scores, and factors of its key and
        value. ``stride`` is the number of entries that both keys and values have room for.

    Entry e lies in slot (``key_start`` + e) mod slots of the rows of keys, and (``value_start`` + e) of values; in
    blocks it is number ``key_start`` + e, with a start that is a multiple of 32, and blocks are no ring.
    """

    def __init__(
        self,
        key_format: str,
        keys: U8,
        value_format: str,
        values: U8,
        *,
        key_dim: int,
        value_dim: int,
        counts: I32,
        group: int = kvblocks.RUN,
        bias: F32 | None = None,
        key_scale: F32 | None = None,
        value_scale: F32 | None = None,
    ) -> None:
        key_bytes = (
            kvblocks.block_bytes(int(key_format[1]), group, key_dim)
            if key_format in BY_CHANNEL
            else kvrows.row_bytes(key_format, key_dim)
        )
        if value_format in BY_CHANNEL:
            value_bytes = kvblocks.channel_block_bytes(int(value_format[1]), group, value_dim)
        elif value_format in BY_TOKEN:
            value_bytes = kvblocks.value_block_bytes(int(value_format[1]), value_dim)
        else:
            value_bytes = kvrows.row_bytes(value_format, value_dim)
        if (keys.shape[2], values.shape[2]) != (key_bytes, value_bytes):
            raise ValueError("keys or values have other bytes than their formats")
        if not len(keys) == len(values) == len(counts):
            raise ValueError("keys, values and counts are of another number of key heads")
        self._keys, self._key_format, self._key_dim, self._group = keys, key_format, key_dim, group
        self._values, self._value_format, self._value_dim = values, value_format, value_dim
        self.counts, self.bias, self.key_scale, self.value_scale = counts, bias, key_scale, value_scale
        self.key_start = self.value_start = 0
        for extra in (bias, key_scale, value_scale):
            if extra is not None and extra.shape != (len(keys), self.stride):
                raise ValueError(f"bias and scales must be {(len(keys), self.stride)}, got {extra.shape}")

    @property
    def stride(self) -> int:
        """Entries that there is room for."""
        n_keys = self._keys.shape[1] * (self._group if self._key_format in BY_CHANNEL else 1)
        return int(min(n_keys, self._values.shape[1] * self._values_each))

    @property
    def _values_each(self) -> int:
        """Positions of a row or block of values."""
        if self._value_format in BY_CHANNEL:
            return self._group
        return kvblocks.RUN if self._value_format in BY_TOKEN else 1

    def key(self, head: int, n: int) -> F32:
        """The first ``n`` keys of a head, (n, key_dim)."""
        if self._key_format in BY_CHANNEL:
            own = slice(self.key_start // self._group, -(-(self.key_start + n) // self._group))
            blocks = kvblocks.decode(int(self._key_format[1]), self._keys[head, own], self._group, self._key_dim)
            return blocks.reshape(-1, self._key_dim)[self.key_start % self._group :][:n]
        slots = (self.key_start + np.arange(n)) % self._keys.shape[1]
        return kvrows.decode(self._key_format, self._keys[head, slots], self._key_dim)

    def value(self, head: int, n: int) -> F32:
        """The first ``n`` values of a head, (n, value_dim)."""
        each, dim = self._values_each, self._value_dim
        if self._value_format in (*BY_CHANNEL, *BY_TOKEN):
            stored = self._values[head, self.value_start // each : -(-(self.value_start + n) // each)]
            bits = int(self._value_format[1])
            if self._value_format in BY_CHANNEL:
                blocks = kvblocks.decode_channels(bits, stored, each, dim)
            else:
                blocks = kvblocks.decode_values(bits, stored, dim)
            return blocks.reshape(-1, dim)[self.value_start % each :][:n]
        slots = (self.value_start + np.arange(n)) % self._values.shape[1]
        return kvrows.decode(self._value_format, self._values[head, slots], dim)


def attend_segment(
    q: F32,
    segment: Any,
    sums: F32,
    tops: F32,
    totals: F32,
    *,
    n_before: int = -1,
    scale: float,
    softcap: float = 0.0,
    scores: F32 | None = None,
    scratch: U8 | None = None,
) -> None:
    n_tokens, n_heads, _ = sums.shape
    n_kv_heads = len(segment.counts)
    sharing = n_heads // n_kv_heads
    queries = q.reshape(n_tokens, n_kv_heads, sharing, -1).astype(np.float64)
    for head in range(n_kv_heads):
        n = int(segment.counts[head])
        if not 0 <= n <= segment.stride:
            raise ValueError(f"a segment of {segment.stride} entries has a count of {n}")
        if not n:
            continue
        own = slice(head * sharing, (head + 1) * sharing)
        raw = np.einsum("tgd,nd->tgn", queries[:, head], segment.key(head, n).astype(np.float64)) * scale
        if segment.key_scale is not None:
            raw *= segment.key_scale[head, :n]
        if softcap:
            raw = softcap * np.tanh(raw / softcap)
        if segment.bias is not None:
            raw += segment.bias[head, :n]
        if n_before >= 0:
            seen = np.arange(n) < (n_before + 1 + np.arange(n_tokens))[:, None, None]
            raw = np.where(seen, raw, -np.inf)
        if scores is not None:
            scores[own, :, :n] = raw.transpose(1, 0, 2)
        tops_before = tops[:, own].astype(np.float64)
        top = np.maximum(raw.max(axis=-1), tops_before)
        with np.errstate(invalid="ignore"):
            weights = np.where(np.isneginf(raw), 0.0, np.exp(raw - top[..., None]))
            keep = np.where(np.isneginf(tops_before), 0.0, np.exp(tops_before - top))
        totals[:, own] = totals[:, own] * keep + weights.sum(axis=-1)
        if segment.value_scale is not None:
            weights = weights * segment.value_scale[head, :n]
        mixed = np.einsum("tgn,nd->tgd", weights, segment.value(head, n).astype(np.float64))
        sums[:, own] = np.where(keep[..., None] == 0, 0.0, sums[:, own] * keep[..., None]) + mixed
        tops[:, own] = top


def attention_mass(
    scores: F32, tops: F32, totals: F32, counts: I32, mass: F32, *, thresholds: F32 | None = None
) -> None:
    sharing = len(scores) // len(mass)
    for head, n in enumerate(counts):
        own = slice(head * sharing, (head + 1) * sharing)
        top, total = tops[:, own].T[..., None].astype(np.float64), totals[:, own].T[..., None]
        shares = np.exp(scores[own, :, :n].astype(np.float64) - top) / total
        if thresholds is None:
            mass[head, :n] += shares.sum(axis=(0, 1))
        else:
            most = np.fmax.reduce(shares, axis=0)  # NaN is below
            mass[head, :n] += (~(most >= thresholds[:, None])).sum(axis=0)


def kv_write(rows: F32, buffer: U8, fmt: str, slots: I32) -> None:
    heads = rows.reshape(len(rows), len(buffer), -1)
    encoded = kvrows.encode(fmt, heads)
    for head, own in enumerate(slots):
        for token, slot in enumerate(own):
            if not 0 <= slot < buffer.shape[1]:
                raise ValueError(f"slots must be 0 to {buffer.shape[1] - 1}, got {slot}")
            buffer[head, slot] = encoded[token, head]
