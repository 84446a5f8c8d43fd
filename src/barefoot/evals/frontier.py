"""Quality over bytes: one point for each way of storing a model, and what no other way beats."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

LOSSLESS = 1e-4  # nats; below that a logarithm says more about rounding errors than about what is lost


@dataclass(frozen=True)
class Point:
    """A way of storing the weights: its name, its bytes, and KL to the reference and perplexity on one text."""

    name: str
    n_bytes: int
    kl: float
    perplexity: float


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points of which none takes as few bytes at a lower KL, by rising bytes."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.n_bytes, p.kl)):
        if not kept or point.kl < kept[-1].kl:
            kept.append(point)
    return kept


def between(points: Sequence[Point], n_bytes: int) -> Point | None:
    """What to expect at ``n_bytes`` of a family of points: KL and perplexity between their neighbours, on a straight
    line of their logarithms over bytes; of the numbers themselves where one point loses next to nothing. None outside
    the points, where nothing was measured."""
    ordered = sorted(points, key=lambda p: p.n_bytes)
    for low, high in itertools.pairwise(ordered):
        if low.n_bytes <= n_bytes <= high.n_bytes:
            share = (n_bytes - low.n_bytes) / max(1, high.n_bytes - low.n_bytes)

            def mixed(a: float, b: float, share: float = share) -> float:
                if min(a, b) < LOSSLESS:
                    return (1 - share) * a + share * b
                return exp((1 - share) * log(a) + share * log(b))

            return Point("between", n_bytes, mixed(low.kl, high.kl), mixed(low.perplexity, high.perplexity))
    return None
