"""Queries that meet keys at another distance: rotated further, or back, by whole positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from barefoot.kv.storage import F32


@dataclass(frozen=True)
class Turning:
    """The rotary embedding of a layer: the angle per position of each pair of channels, float32 (dim / 2,), and
    whether a pair's channels are neighbours or half of ``dim`` apart."""

    frequencies: F32
    interleaved: bool

    def turn(self, q: F32, head_dim: int, by: int) -> F32:
        """Queries (n, n_heads × head_dim) as of positions that are ``by`` higher."""
        angle = (self.frequencies.astype(np.float64) * by % (2 * np.pi)).astype(np.float32)
        cos, sin = np.cos(angle), np.sin(angle)
        dim = 2 * len(angle)
        out = q.reshape(len(q), -1, head_dim).copy()
        turned = out[..., :dim]
        one, other = (turned[..., ::2], turned[..., 1::2]) if self.interleaved else np.split(turned, 2, axis=-1)
        before = one.copy()
        one[...] = before * cos - other * sin
        other[...] = before * sin + other * cos
        return out.reshape(q.shape)
