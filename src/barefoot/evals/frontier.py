"""Quality over bytes: one point for each way of storing a model, and what no other way beats."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

LOSSLESS = 1e-4  # nats; below that a logarithm says more about rounding errors than about what is lost


@dataclass(frozen=True)
class Point:
    """A way of storing the weights: its name, its bytes, and KL to the reference and perplexity on one text.

    ``cost`` : of a fit, the nats a token that its allocation foresaw.
    """

    name: str
    n_bytes: int
    kl: float
    perplexity: float
    cost: float | None = None


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points of which none takes as few bytes at a lower KL, by rising bytes."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.n_bytes, p.kl)):
        if not kept or point.kl < kept[-1].kl:
            kept.append(point)
    return kept


def expected(fits: Sequence[Point], n_bytes: int, cost: float) -> Point | None:
    """What to expect of a fit to ``n_bytes`` whose allocation foresees ``cost``, from fits around it.

    A solver leaves a share of what an allocation foresees, much the same one at neighbouring sizes, even where formats
    that lose nothing come in and KL over bytes has a kink. So it is the share that lies between the neighbours', by the
    logarithm of the cost, and perplexity follows KL. None outside the fits, where nothing was measured.
    """
    ordered = sorted((p for p in fits if p.cost is not None), key=lambda p: _cost(p), reverse=True)
    for coarse, fine in itertools.pairwise(ordered):
        if _cost(fine) <= cost <= _cost(coarse):
            kl = cost * _share(coarse, fine, cost) if _cost(coarse) > LOSSLESS else coarse.kl
            rise = (coarse.perplexity - fine.perplexity) / (coarse.kl - fine.kl) if coarse.kl > fine.kl else 0.0
            return Point("expected", n_bytes, kl, fine.perplexity + rise * (kl - fine.kl), cost)
    return None


def _share(coarse: Point, fine: Point, cost: float) -> float:
    if _cost(fine) < LOSSLESS or fine.kl < LOSSLESS:
        return coarse.kl / _cost(coarse)
    if _cost(fine) == _cost(coarse):
        return fine.kl / cost
    part = log(_cost(coarse) / cost) / log(_cost(coarse) / _cost(fine))
    return exp((1 - part) * log(coarse.kl / _cost(coarse)) + part * log(fine.kl / _cost(fine)))


def _cost(fit: Point) -> float:
    assert fit.cost is not None
    return fit.cost
