"""Quality over bytes: which points no other one beats, and what to expect of a fit between two others."""

import math

import pytest

from barefoot.evals.frontier import LOSSLESS, Point, expected, frontier


def point(n_bytes, kl, perplexity=20.0):
    return Point(f"{n_bytes}", n_bytes, kl, perplexity)


def test_points_that_another_one_beats_are_left_out():
    points = [point(30, 0.1), point(10, 0.9), point(20, 0.95), point(20, 0.4), point(40, 0.1), point(50, 0.01)]
    assert [(p.n_bytes, p.kl) for p in frontier(points)] == [(10, 0.9), (20, 0.4), (30, 0.1), (50, 0.01)]


def fit(n_bytes, kl, cost, perplexity=20.0):
    return Point(f"fit {n_bytes}", n_bytes, kl, perplexity, cost)


def test_the_share_of_the_cost_lies_between_the_neighbours():
    """0.5 of 4 and 0.25 of 0.25: in the middle, at cost 1, the geometric mean of both shares."""
    found = expected([fit(100, 2.0, 4.0, 60.0), fit(300, 0.0625, 0.25, 21.25), point(200, 9.0)], 200, 1.0)
    assert found.kl == pytest.approx(math.sqrt(0.5 * 0.25))
    assert found.perplexity == pytest.approx(20 + 20 * found.kl)
    assert (found.n_bytes, found.cost) == (200, 1.0)


def test_beside_a_fit_that_loses_nothing_the_share_is_the_other_one_s():
    """A kink: KL is 0 from some size on, and the cost of the allocation knows from where."""
    fits = [fit(100, 0.1, 0.4), fit(300, 0.0, 0.0)]
    assert expected(fits, 290, 0.08).kl == pytest.approx(0.02)
    assert expected(fits, 295, 0.0).kl == 0
    assert expected([fit(100, 1e-6, LOSSLESS / 2), fit(300, 0.0, 0.0)], 200, 1e-6).kl == 1e-6


def test_nothing_is_expected_where_nothing_was_measured():
    fits = [fit(100, 1.0, 2.0), fit(200, 0.5, 1.0)]
    assert expected(fits, 99, 2.1) is None
    assert expected(fits, 201, 0.9) is None
    assert expected(fits[:1], 100, 2.0) is None
    assert expected(fits, 200, 1.0).kl == pytest.approx(0.5)
    assert expected([fit(100, 1.0, 2.0), fit(100, 1.0, 2.0)], 100, 2.0).kl == pytest.approx(1.0)
