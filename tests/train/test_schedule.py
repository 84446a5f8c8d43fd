"""Learning rates in closed form."""

from __future__ import annotations

import math

import pytest

from barefoot.core.errors import InvalidInput
from barefoot.train.schedule import Schedule


def shares(schedule: Schedule, n: int) -> list[float]:
    return [schedule.share(step, n) for step in range(n)]


def test_constant():
    assert shares(Schedule("constant", warmup=0), 3) == [1, 1, 1]
    assert shares(Schedule("constant", warmup=3), 5) == [0.25, 0.5, 0.75, 1, 1]


def test_linear():
    assert shares(Schedule("linear", warmup=0), 4) == [1, 0.75, 0.5, 0.25]
    assert shares(Schedule("linear", warmup=1, floor=0.5), 5) == [0.5, 1, 0.875, 0.75, 0.625]
    assert sum(shares(Schedule("linear", warmup=0), 100)) == pytest.approx(101 / 2)


def test_cosine():
    root = math.sqrt(0.5)
    expected = [1, (1 + root) / 2, 0.5, (1 - root) / 2]
    assert shares(Schedule("cosine", warmup=0), 4) == pytest.approx(expected, abs=1e-15)
    floored = [1 / 3, 2 / 3, *(0.1 + 0.9 * share for share in expected)]
    assert shares(Schedule("cosine", warmup=2, floor=0.1), 6) == pytest.approx(floored, abs=1e-15)
    assert sum(shares(Schedule("cosine", warmup=0), 100)) == pytest.approx(101 / 2)


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_every_step_learns_and_the_floor_comes_behind_the_last(shape: str):
    schedule = Schedule(shape, warmup=0.1, floor=0.0)  # type: ignore[arg-type]
    assert min(shares(schedule, 50)) > 0
    assert max(shares(schedule, 50)) == 1
    behind = 1.0 if shape == "constant" else 0.0
    assert schedule.share(50, 50) == schedule.share(70, 50) == pytest.approx(behind, abs=1e-15)


@pytest.mark.parametrize(
    ("warmup", "n_steps", "n"), [(0, 10, 0), (0.03, 100, 3), (0.03, 10, 0), (1, 10, 1), (7, 100, 7), (50, 10, 10)]
)
def test_warm_up_is_steps_or_a_share(warmup: float, n_steps: int, n: int):
    schedule = Schedule(warmup=warmup)
    assert schedule.n_warmup(n_steps) == n
    rising = shares(schedule, n_steps)[:n]
    assert rising == pytest.approx([(i + 1) / (n + 1) for i in range(n)])


def test_knobs():
    with pytest.raises(InvalidInput, match="unknown schedule 'cosin'") as caught:
        Schedule("cosin")  # type: ignore[arg-type]
    assert caught.value.cure == "did you mean cosine?"
    for warmup in (-1, 1.5, float("nan"), float("inf")):
        with pytest.raises(InvalidInput, match="warm-up must be"):
            Schedule(warmup=warmup)
    for floor in (-0.1, 1.1, float("nan")):
        with pytest.raises(InvalidInput, match="the floor of the learning rate"):
            Schedule(floor=floor)
