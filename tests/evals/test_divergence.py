import numpy as np
import pytest

from barefoot.evals.divergence import Divergence, kl, nll, windows


def test_kl_of_two_coins():
    p, q = np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]])
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert kl(np.log(p).astype(np.float32), np.log(q).astype(np.float32))[0] == pytest.approx(expected, rel=1e-6)


def test_kl_does_not_see_a_shift_and_is_zero_on_itself():
    logits = np.random.default_rng(0).normal(size=(5, 100)).astype(np.float32)
    assert kl(logits, logits + 7).max() < 1e-10


def test_nll_of_a_uniform_guess():
    assert nll(np.zeros((2, 8), np.float32), np.array([3, 5])) == pytest.approx(np.log(8))


def test_tiles_add_up_to_the_whole():
    rng = np.random.default_rng(1)
    reference, logits = rng.normal(size=(2, 12, 50)).astype(np.float32)
    targets = rng.integers(0, 50, 12)
    whole, tiled = Divergence(), Divergence()
    whole.add(reference, logits, targets)
    for start in range(0, 12, 5):
        tile = slice(start, start + 5)
        tiled.add(reference[tile], logits[tile], targets[tile])
    assert tiled.summary == pytest.approx(whole.summary, rel=1e-12)
    assert whole.summary["perplexity"] == pytest.approx(np.exp(nll(logits, targets).mean()))
    assert whole.summary["same_top"] == (reference.argmax(1) == logits.argmax(1)).mean()


def test_windows_are_whole_and_begin_with_bos():
    assert list(windows(range(10), 4)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert list(windows(range(7), 4, bos=99)) == [[99, 0, 1, 2], [99, 3, 4, 5]]
