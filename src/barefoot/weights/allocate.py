"""One allocator for all that divides bytes among matrices: which option each one gets under a budget.

Each item (a matrix, a layer, a stack of blocks) has options of (bytes, cost), and costs add up. The least cost within a
budget is a multiple-choice knapsack. Options that are not on an item's lower convex hull are never worth their bytes at
any price; along the hull, upgrades are bought in the order of cost saved per byte, which is optimal for every budget
that an upgrade fills exactly (Everett 1963), and elsewhere misses the optimum by less than one upgrade. What bytes are
left then buy whatever single exchange still fits and saves most.

Bit allocation by second-order sensitivity (Q-BERT, Shen et al. 2019, arXiv:1909.05840, section 3.2) and sorted residual
blocks (BitStack, Wang et al. 2024, arXiv:2410.23918, section 3.3) are this with their own costs.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from barefoot.core.errors import OverBudget


@dataclass(frozen=True)
class Option:
    """One way to store an item: its bytes, what it costs in quality (any unit that adds up), and its name."""

    n_bytes: int
    cost: float
    name: str


def allocate(items: Mapping[str, Sequence[Option]], budget_bytes: int) -> dict[str, Option]:
    """The option of each item, at the least total cost found within ``budget_bytes``.

    Raises
    ------
    OverBudget : even the smallest options don't fit.
    """
    hulls = {item: hull(options) for item, options in items.items()}
    taken = dict.fromkeys(hulls, 0)
    left = budget_bytes - sum(h[0].n_bytes for h in hulls.values())
    if left < 0:
        raise OverBudget(
            f"the smallest options take {budget_bytes - left} bytes, {budget_bytes} are allowed",
            needed=budget_bytes - left,
            available=budget_bytes,
            cure="allow more bytes, or formats of fewer bits",
        )
    upgrades = [(-_saved(h, 0), item) for item, h in hulls.items() if len(h) > 1]
    heapq.heapify(upgrades)
    while upgrades:
        _, item = heapq.heappop(upgrades)
        chain, at = hulls[item], taken[item]
        more = chain[at + 1].n_bytes - chain[at].n_bytes
        if more > left:
            continue  # this item stays; cheaper upgrades of others may still fit
        taken[item], left = at + 1, left - more
        if at + 2 < len(chain):
            heapq.heappush(upgrades, (-_saved(chain, at + 1), item))
    chosen = {item: hulls[item][at] for item, at in taken.items()}
    return _filled(items, chosen, left)


def hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of cost over bytes, by rising bytes and falling cost."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.n_bytes, o.cost)):
        if kept and option.cost >= kept[-1].cost:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(kept[-1], option):
            kept.pop()
        if kept and option.n_bytes == kept[-1].n_bytes:
            continue
        kept.append(option)
    return kept


def _slope(a: Option, b: Option) -> float:
    return (b.cost - a.cost) / (b.n_bytes - a.n_bytes) if b.n_bytes > a.n_bytes else float("-inf")


def _saved(chain: Sequence[Option], at: int) -> float:
    """Cost that the next upgrade saves per byte."""
    return -_slope(chain[at], chain[at + 1])


def _filled(items: Mapping[str, Sequence[Option]], chosen: dict[str, Option], left: int) -> dict[str, Option]:
    """Exchange options, off the hull too, while one fits and saves cost: the most saving first."""
    while True:
        best: tuple[float, str, Option] | None = None
        for item, options in items.items():
            now = chosen[item]
            for option in options:
                saved = now.cost - option.cost
                if saved > 0 and option.n_bytes - now.n_bytes <= left and (best is None or saved > best[0]):
                    best = (saved, item, option)
        if best is None:
            return chosen
        _, item, option = best
        left -= option.n_bytes - chosen[item].n_bytes
        chosen[item] = option
