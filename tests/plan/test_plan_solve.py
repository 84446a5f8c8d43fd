"""The search is exact: it finds what trying everything finds."""

import itertools
import math
import random

import pytest

from barefoot.plan.solve import Choice, Option, best, by_bytes, by_speed, pace


def everything(slots):
    for combination in itertools.product(*slots):
        size = tuple(sum(o.bytes[i] for o in combination) for i in range(len(combination[0].bytes)))
        seconds = kl = 0.0
        for option in combination:  # the same order of additions as the search, so that floats are equal
            seconds, kl = seconds + option.seconds, kl + option.kl
        yield Choice(tuple(o.value for o in combination), size, seconds, kl)


def random_slots(rng, n_places):
    return [
        [
            Option(
                (slot, i),
                tuple(rng.randrange(1, 60) for _ in range(n_places)),
                # few distinct values, so that ties in speed and in quality occur
                rng.choice([0.5, 1.0, 1.004, 2.0, rng.random()]),
                rng.choice([0.0, 0.0, 0.01, 0.03, rng.random() / 10]),
            )
            for i in range(rng.randrange(1, 5))
        ]
        for slot in range(rng.randrange(1, 5))
    ]


def key_of(choice, key):
    return key(choice.bytes[0], choice.seconds, choice.kl)


@pytest.mark.parametrize("seed", range(300))
def test_the_search_finds_the_best_of_all(seed):
    rng = random.Random(seed)
    n_places = rng.choice([1, 2])
    slots = random_slots(rng, n_places)
    capacities = [rng.randrange(10, 60 * len(slots)) for _ in range(n_places)]
    max_kl = rng.choice([0.01, 0.03, 0.1, math.inf])
    forbidden = rng.randrange(7)

    def accept(choice):  # a test that no bound knows of
        return sum(choice.bytes) % 7 != forbidden

    fitting = [
        c
        for c in everything(slots)
        if all(b <= m for b, m in zip(c.bytes, capacities, strict=True)) and c.kl <= max_kl and accept(c)
    ]
    key = rng.choice([by_speed, by_bytes])
    found = best(slots, capacities, max_kl=max_kl, key=key, accept=accept)
    if not fitting:
        assert found is None
    else:
        assert found is not None
        assert key_of(found, key) == min(key_of(c, key) for c in fitting)
        assert found in fitting


def test_a_speed_gain_below_one_percent_costs_no_quality():
    slots = [[Option("lossy", (1,), 1.000, 0.02), Option("exact", (1,), 1.0001, 0.0)]]
    assert pace(1.0) == pace(1.0001)
    assert best(slots, [1]).values == ("exact",)
    slots = [[Option("lossy", (1,), 1.0, 0.02), Option("exact", (1,), 1.5, 0.0)]]
    assert best(slots, [1]).values == ("lossy",)


def test_the_key_to_beat_is_exclusive():
    slots = [[Option("only", (3,), 1.0, 0.0)]]
    assert best(slots, [3], below=(pace(1.0), 0.0, 4)).values == ("only",)
    assert best(slots, [3], below=(pace(1.0), 0.0, 3)) is None
