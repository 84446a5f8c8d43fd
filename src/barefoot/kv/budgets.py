"""Budgets by layer: how many entries each layer keeps, when all of them together may keep ``total``.

``uniform`` gives every layer as many. ``pyramid`` falls linearly from the first layer to the last, whose attention
looks at fewer entries (PyramidKV, Cai et al. 2024, arXiv:2406.02069, section 3.2). ``measured`` follows how the prompt
at hand is attended to: a layer whose attention is spread over many entries gets more (D2O, Wan et al. 2024,
arXiv:2406.13035, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

Layers = Literal["uniform", "pyramid", "measured"]
LAYERS: tuple[Layers, ...] = ("uniform", "pyramid", "measured")
STEEPNESS = 20  # of a pyramid: its top is so much less than the mean


def pyramid(n_layers: int) -> list[float]:
    """Weights that fall from 2 - 1 / 20 to 1 / 20."""
    return [float(w) for w in np.linspace(2 - 1 / STEEPNESS, 1 / STEEPNESS, n_layers)]


def density(mass: F32) -> float:
    """A layer's weight, of the attention mass of its entries (n_kv_heads, n): exp(-f), where f is the variance of a
    head's shares of mass (times n, and 1 / n more: the sum of their squares), its mean over the heads, 0 to 1.

    Raw column sums grow with the prompt; shares of them don't, so that layers and prompts compare.
    """
    share = mass.astype(np.float64) / np.maximum(mass.sum(axis=1, keepdims=True, dtype=np.float64), 1e-30)
    return float(np.exp(-np.square(share).sum(axis=1).mean()))


def shares(total: int, weights: Sequence[float], least: int, most: int) -> list[int]:
    """``total`` in parts as ``weights`` say, each of ``least`` to ``most``; in all no more than all can take, no less
    than all must. Rests go to the largest fractions.

    A part never grows by more than its rounding when further weights come and the total stays.
    """
    w = np.asarray(weights, np.float64)
    total = min(max(total, least * len(w)), most * len(w))
    low, high = 0.0, most / w.min()
    for _ in range(100):  # the factor for which the parts, each kept within its bounds, add up
        middle = (low + high) / 2
        if np.clip(middle * w, least, most).sum() < total:
            low = middle
        else:
            high = middle
    exact = np.clip(high * w, least, most)
    parts = np.floor(exact + 1e-9).astype(int)
    rest = total - int(parts.sum())
    order = np.argsort(parts - exact, kind="stable")
    for i in [i for i in order if parts[i] < most][:rest]:
        parts[i] += 1
    return [int(part) for part in parts]
