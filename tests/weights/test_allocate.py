"""The allocator against every combination, on small instances."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from barefoot.core.errors import OverBudget
from barefoot.weights.allocate import Option, allocate, hull


def random_items(rng, n_items, n_options):
    items = {}
    for i in range(n_items):
        sizes = np.sort(rng.choice(np.arange(10, 200), n_options, replace=False))
        costs = np.sort(rng.random(n_options))[::-1]
        items[f"m{i}"] = [Option(int(b), float(c), f"{b}") for b, c in zip(sizes, costs, strict=True)]
    return items


def best_of_all(items, budget):
    feasible = [c for c in itertools.product(*items.values()) if sum(o.n_bytes for o in c) <= budget]
    return min(sum(o.cost for o in c) for c in feasible)


def test_never_over_the_budget_and_within_one_upgrade_of_the_optimum():
    rng = np.random.default_rng(5)
    exact = 0
    for _ in range(60):
        items = random_items(rng, 5, 4)
        smallest = sum(min(o.n_bytes for o in options) for options in items.values())
        budget = int(smallest + rng.integers(0, 500))
        chosen = allocate(items, budget)
        assert sum(o.n_bytes for o in chosen.values()) <= budget
        assert all(chosen[name] in options for name, options in items.items())
        cost, optimum = sum(o.cost for o in chosen.values()), best_of_all(items, budget)
        largest_upgrade = max(
            a.cost - b.cost for options in items.values() for a, b in itertools.pairwise(hull(options))
        )
        assert optimum - 1e-12 <= cost <= optimum + largest_upgrade
        exact += cost <= optimum + 1e-12
    assert exact > 33  # what greedy upgrades on the hull alone reach, without filling what is left


def test_more_bytes_never_cost_more():
    items = random_items(np.random.default_rng(6), 30, 5)
    smallest = sum(min(o.n_bytes for o in options) for options in items.values())
    costs = [sum(o.cost for o in allocate(items, smallest + extra).values()) for extra in range(0, 4000, 37)]
    hulls_only = np.minimum.accumulate(costs)
    assert max(np.array(costs) - hulls_only) <= max(
        a.cost - b.cost for options in items.values() for a, b in itertools.pairwise(hull(options))
    )
    assert costs[-1] == pytest.approx(sum(min(o.cost for o in options) for options in items.values()))


def test_options_off_the_hull_are_left_out_of_it():
    a, b, c, d = Option(10, 9.0, "a"), Option(20, 8.5, "b"), Option(30, 2.0, "c"), Option(40, 2.5, "d")
    assert hull([d, b, a, c]) == [a, c]  # b saves less per byte than c, d costs more than c
    assert hull([Option(10, 3.0, "x"), Option(10, 2.0, "y")]) == [Option(10, 2.0, "y")]


def test_what_is_left_buys_an_option_off_the_hull():
    items = {"m": [Option(10, 9.0, "a"), Option(20, 8.5, "b"), Option(30, 2.0, "c")]}
    assert allocate(items, 25)["m"].name == "b"


def test_too_small_a_budget_is_refused_with_the_bytes():
    items = {"m": [Option(10, 1.0, "a")], "n": [Option(15, 1.0, "a")]}
    with pytest.raises(OverBudget) as refused:
        allocate(items, 24)
    assert (refused.value.needed, refused.value.available) == (25, 24)
