"""LaMDA's numbers: the decomposition against LAPACK's own, the schedule, the ranks, the bytes."""

from __future__ import annotations

import numpy as np
import pytest
from random_files import LLAMA

from barefoot.adapters.lamda import LaMDA, allocate, energy, principal, squares
from barefoot.adapters.lora import LoRA
from barefoot.core.errors import InvalidInput
from barefoot.engine.specs import spec_from_config

SPEC = spec_from_config(LLAMA, "random")


@pytest.mark.parametrize(("rows", "cols"), [(40, 24), (24, 40), (32, 32), (1, 7), (7, 1)])
def test_principal_parts_are_those_of_the_singular_value_decomposition(rows, cols, rng):
    w = rng.standard_normal((rows, cols)).astype(np.float32)
    u, s, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    rank = min(rows, cols, 5)
    a, b, values = principal(w, rank)
    assert a.shape == (rank, cols)
    assert b.shape == (rank, rows)
    # The best approximation of that rank, whatever signs its vectors have; a Gram matrix squares float32's rounding.
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert np.abs((b.T * values) @ a - best).max() <= 64 * 2.0**-24 * s[0] ** 2 / s[rank - 1]
    np.testing.assert_allclose(values, s[:rank], rtol=1e-5)
    for factor in (a, b):
        np.testing.assert_allclose(factor @ factor.T, np.eye(rank), atol=1e-5)
    np.testing.assert_allclose(squares(w)[:rank], s[:rank] ** 2, rtol=1e-4)
    assert energy(squares(w), rank) == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum(), rel=1e-5)


def test_rows_stop_learning_linearly_until_a_share_of_the_steps():
    lamda = LaMDA(rank=8, eta=0.4)
    assert [lamda.rows_learning(8, step, 10) for step in range(11)] == [8, 6, 4, 2, 0, 0, 0, 0, 0, 0, 0]
    assert [LaMDA(rank=2).rows_learning(2, step, 10) for step in range(5)] == [2, 2, 1, 0, 0]
    assert [LaMDA(eta=0.1).rows_learning(32, step, 30) for step in range(4)] == [32, 22, 11, 0]
    assert LaMDA(eta=0.0).rows_learning(32, 0, 30) == 0, "and where it is 0, none learns"
    assert LaMDA().rows_learning(32, 0, 1) == 32, "before anything is known of the steps"


def test_what_the_released_code_does_hardly_freezes_anything():
    """The teeth of the schedule: a share of one row, in place of one of all rows, is no row until the end."""
    lamda, end = LaMDA(rank=32, eta=0.3), 30
    ours = np.mean([lamda.rows_learning(32, step, 100) for step in range(end)])
    released = np.mean([32 - int(step / end) for step in range(end)])
    assert released == 32
    assert ours < 0.55 * 32


def test_numbers_that_learn_at_the_end_are_those_of_the_cores():
    spec = spec_from_config(
        LLAMA | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
        | {"num_attention_heads": 9, "num_key_value_heads": 3}, "smollm2-135m",
    )  # fmt: skip
    assert LaMDA(rank=32).n_trained(spec, 30, 100) == 215_040  # the brief's numbers of SmolLM2
    assert LoRA(rank=16).n_trained(spec) == 4_884_480


def test_the_flat_spectra_get_the_larger_ranks_of_the_same_sum():
    shares = {"a": 0.9, "b": 0.2, "c": 0.5, "d": 0.8, "e": 0.3, "f": 0.6}
    assert allocate(shares, 16) == {"a": 8, "d": 8, "c": 16, "f": 16, "b": 24, "e": 24}
    for n in range(1, 9):
        for rank in (1, 2, 5, 32):
            found = allocate({str(i): (i * 7 % 5) / 5 for i in range(n)}, rank)
            assert sum(found.values()) == n * rank
            assert min(found.values()) >= 1
    assert allocate(dict.fromkeys("ab", 0.5), 4) == {"a": 4, "b": 4}


def test_bytes_are_known_before_the_spectra():
    """Which matrices get which ranks hangs on the weights; how many numbers there are doesn't."""
    lamda, rng = LaMDA(rank=8, ranks="spectrum"), np.random.default_rng(1)

    def original(weight):
        flat = rng.random()
        values = np.exp(-np.arange(min(weight.rows, weight.cols)) * flat).astype(np.float32)
        return np.pad(np.diag(values), [(0, n - len(values)) for n in (weight.rows, weight.cols)])

    guessed, known = lamda.ranks_of(SPEC), lamda.ranks_of(SPEC, original)
    assert guessed != known
    assert set(known.values()) == {4, 8, 12}

    def sizes(ranks):
        factors = [f for w in lamda.matrices(SPEC) for f in lamda.beside(w, ranks[w.name], 1, 10)]
        return sorted((f.n_elements, f.trained) for f in factors)

    assert sizes(guessed) == sizes(known)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"rank": 0}, "rank must be 1 or more"),
        ({"eta": 1.5}, "eta must lie between 0 and 1, got 1.5"),
        ({"order": "random"}, "order must be one of largest_first, smallest_first, got 'random'"),
        ({"init": "svd"}, "init must be one of spectral, zero_core"),
        ({"ranks": "many"}, "ranks must be one of uniform, spectrum"),
        ({"targets": "some"}, "targets must be one of"),
    ],
)
def test_knobs(knobs, says):
    with pytest.raises(InvalidInput, match=says):
        LaMDA(**knobs)


def test_a_matrix_without_so_many_singular_values_is_refused():
    with pytest.raises(InvalidInput, match=r"layers\.0\.k \(32, 96\) has no 33 singular values"):
        LaMDA(rank=33).factors(SPEC)
