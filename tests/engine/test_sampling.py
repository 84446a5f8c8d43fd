import numpy as np
import pytest

from barefoot.core.errors import InvalidInput
from barefoot.engine import sampling
from barefoot.engine.sampling import SamplingParams, kept, sample

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.3, 0.15], np.float32))


def frequencies(params, n=4000, history=()):
    rng = np.random.default_rng(3)
    counts = np.bincount([sample(LOGITS, history, params, rng) for _ in range(n)], minlength=5)
    return counts / n


def test_greedy_takes_the_largest_and_first():
    rng = np.random.default_rng(0)
    assert sample(LOGITS, (), SamplingParams(), rng) == 1
    assert sample(np.array([0, 2, 1, 2], np.float32), (), SamplingParams(), rng) == 1


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(1.0), [0.05, 0.4, 0.1, 0.3, 0.15]),
        (SamplingParams(0.5), np.array([0.0025, 0.16, 0.01, 0.09, 0.0225]) / 0.285),
        (SamplingParams(1.0, top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (SamplingParams(1.0, top_p=0.75), [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
        (SamplingParams(1.0, top_p=0.01), [0, 1, 0, 0, 0]),
        (SamplingParams(1.0, min_p=0.3), [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
        (SamplingParams(1.0, top_k=3, top_p=0.8), [0, 4 / 7, 0, 3 / 7, 0]),
    ],
)
def test_tokens_are_drawn_by_what_the_filters_leave(params, expected):
    # five standard deviations of a frequency of 4,000 draws are at most 0.04
    assert np.abs(frequencies(params) - expected).max() < 0.04
    assert set(np.flatnonzero(frequencies(params))) == set(np.flatnonzero(np.array(expected) > 0))


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = np.array([2.0, -1.0, 1.5], np.float32)
    params = SamplingParams(repetition_penalty=2.0)
    rng = np.random.default_rng(0)
    assert sample(logits, (0,), params, rng) == 2
    assert sample(np.array([-3.0, -1.0, -1.5], np.float32), (1, 1), params, rng) == 2
    assert logits.tolist() == [2.0, -1.0, 1.5]


def test_equal_logits_are_drawn_equally():
    logits = np.zeros(8, np.float32)
    rng = np.random.default_rng(1)
    counts = np.bincount([sample(logits, (), SamplingParams(1.0), rng) for _ in range(4000)], minlength=8)
    assert counts.min() > 400
    assert len(kept(logits, SamplingParams(1.0, top_k=3))[0]) == 3


def test_few_tokens_picked_are_those_of_the_whole_sort(monkeypatch, rng):
    """The same draws, with many equal logits, whether the vocabulary is sorted or the top_k picked from it."""
    logits = np.rint(3 * rng.standard_normal(4000)).astype(np.float32)

    def draws(params):
        generator = np.random.default_rng(5)
        return [sample(logits, (), params, generator) for _ in range(200)]

    for params in (
        SamplingParams(1.0, top_k=50),
        SamplingParams(3.0, top_k=700, top_p=0.7),
        SamplingParams(3.0, top_k=900, min_p=0.05),
    ):
        monkeypatch.setattr(sampling, "FEW", 0.25)
        assert kept(logits, params)[2] is not None
        picked = draws(params)
        monkeypatch.setattr(sampling, "FEW", 0.0)
        assert kept(logits, params)[2] is None
        assert draws(params) == picked
        assert len(set(picked)) > 10


def test_a_seed_repeats_the_draws():
    def draw(seed):
        rng = SamplingParams(1.0, seed=seed).rng()
        return [sample(LOGITS, (), SamplingParams(1.0), rng) for _ in range(50)]

    assert draw(7) == draw(7) != draw(8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or a positive number, got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"min_p": 1.5}, "min_p must be 0 to 1, got 1.5"),
        ({"top_k": -1}, "top_k must be a whole number"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a positive number"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(InvalidInput, match=message):
        SamplingParams(**values)
