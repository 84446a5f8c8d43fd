"""taylor — the units of a pruned copy whose removal would change the loss most, to first order.

LoRAM-Stru (Zhang et al. 2025, arXiv:2502.13533) with LLM-Pruner's importance (Ma et al. 2023, arXiv:2305.11627): of a
unit's weights w, on a few sequences,

    score = Σ |w × ∂L/∂w|      a channel: row of gate, row of up, column of down; a group: rows of q, k, v, columns of o

and those with the largest scores stay. What is cut, and how an adapter is put back: :mod:`barefoot.adapters.pruning`.

Bytes: 4 a kept unit. The scores come from one pass of a micro-batch through the whole model, forward and back, with one
layer of it in memory at a time (:mod:`barefoot.train.driver.importance`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from barefoot.adapters import F32
from barefoot.adapters.pruning import I32, Kept, Pruning, Scores, Sizes
from barefoot.core.model import ModelSpec


@dataclass(frozen=True)
class Taylor(Pruning, name="taylor", papers=(62,)):
    scored: ClassVar[bool] = True

    def kept(self, spec: ModelSpec, sizes: Sizes, seed: int, scores: Callable[[], Scores]) -> dict[int, Kept]:
        """Of equal scores the first."""
        found = scores()
        return {
            layer: Kept(_largest(found[layer][0], n_groups), _largest(found[layer][1], n_channels))
            for layer, (n_groups, n_channels) in sizes.items()
        }


def _largest(scores: F32, n_kept: int) -> I32:
    largest: I32 = np.argsort(-scores, kind="stable")[:n_kept].astype(np.int32)
    largest.sort()
    return largest


def group_scores(
    spec: ModelSpec, rows: Mapping[str, F32], cols: Mapping[str, F32], layers: Sequence[int]
) -> dict[int, tuple[F32, F32]]:
    """Scores of groups and channels by layer, from sums of |w × ∂L/∂w| over each row and each column of matrices, by
    name: all that a unit's removal takes."""
    found = {}
    for layer in layers:
        name = f"layers.{layer}."
        heads = [*(rows[f"{name}{role}"] for role in "qkv"), cols[f"{name}o"]]
        groups = np.concatenate([each.reshape(spec.n_kv_heads, -1) for each in heads], axis=1).sum(1)
        found[layer] = (groups, rows[f"{name}gate"] + rows[f"{name}up"] + cols[f"{name}down"])
    return found
