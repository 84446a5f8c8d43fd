"""Quality over bytes: which points no other one beats, and what to expect between two of them."""

import math

import pytest

from barefoot.evals.frontier import LOSSLESS, Point, between, frontier


def point(n_bytes, kl, perplexity=20.0):
    return Point(f"{n_bytes}", n_bytes, kl, perplexity)


def test_points_that_another_one_beats_are_left_out():
    points = [point(30, 0.1), point(10, 0.9), point(20, 0.95), point(20, 0.4), point(40, 0.1), point(50, 0.01)]
    assert [(p.n_bytes, p.kl) for p in frontier(points)] == [(10, 0.9), (20, 0.4), (30, 0.1), (50, 0.01)]


def test_losses_fall_exponentially_between_points():
    """As errors of rounding do: a quarter for each bit."""
    found = between([point(100, 4.0, 64.0), point(300, 0.25, 16.0)], 200)
    assert found.kl == pytest.approx(1.0)
    assert found.perplexity == pytest.approx(32.0)


def test_beside_a_point_that_loses_nothing_the_line_is_straight():
    found = between([point(100, 0.4), point(300, 0.0)], 250)
    assert found.kl == pytest.approx(0.1)
    just = between([point(100, 0.4), point(300, LOSSLESS)], 200)
    assert just.kl == pytest.approx(math.sqrt(0.4 * LOSSLESS))


def test_nothing_is_expected_where_nothing_was_measured():
    assert between([point(100, 1.0), point(200, 0.5)], 99) is None
    assert between([point(100, 1.0)], 200) is None
    assert between([point(100, 1.0), point(200, 0.5)], 200).kl == pytest.approx(0.5)
