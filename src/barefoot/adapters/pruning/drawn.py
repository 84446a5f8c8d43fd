"""drawn — units of a pruned copy drawn uniformly: what costs no pass, and what a choice must beat.

LoRAM-Rand (Zhang et al. 2025, arXiv:2502.13533): in each layer the heads of keys and the channels that stay follow from
the seed alone. What is cut, and how an adapter is put back: :mod:`barefoot.adapters.pruning`.

Bytes: 4 a kept unit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from barefoot.adapters.pruning import I32, Kept, Pruning, Scores, Sizes
from barefoot.core.model import ModelSpec


@dataclass(frozen=True)
class Drawn(Pruning, name="drawn", papers=(62,)):
    def kept(self, spec: ModelSpec, sizes: Sizes, seed: int, scores: Callable[[], Scores]) -> dict[int, Kept]:
        rng = np.random.default_rng(seed)
        return {
            layer: Kept(_drawn(rng, spec.n_kv_heads, n_groups), _drawn(rng, spec.d_ff, n_channels))
            for layer, (n_groups, n_channels) in sizes.items()
        }


def _drawn(rng: np.random.Generator, n: int, n_kept: int) -> I32:
    return np.sort(rng.permutation(n)[:n_kept]).astype(np.int32)
