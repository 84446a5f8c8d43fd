"""JLCM: rows in order, bytes, and a search for codewords that is proximal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from barefoot.core.errors import CorruptFile, InvalidInput
from barefoot.weights.codebooks import jlcm
from barefoot.weights.codebooks.jlcm import Jlcm, Mapped
from barefoot.weights.codebooks.ordering import group_of_rows, order_by_distribution

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def weights(rows=96, cols=64, seed=0):
    """Rows of three kinds, shuffled: narrow, wide, and one-sided."""
    rng = np.random.default_rng(seed)
    kinds = [
        rng.normal(0, 0.2, (rows // 3, cols)),
        rng.normal(0, 2, (rows // 3, cols)),
        rng.gamma(2, 0.5, (rows // 3, cols)),
    ]
    return rng.permutation(np.concatenate(kinds)).astype(np.float32)


def squared_error(weight, mapped):
    return float(((weight - mapped.weights()) ** 2).sum())


# Order


def test_an_order_is_a_permutation_and_groups_are_equal():
    order = order_by_distribution(weights(), 7)
    assert sorted(order) == list(range(96))
    assert np.bincount(group_of_rows(96, 7)).tolist() == [14, 14, 14, 13, 14, 14, 13]


def test_like_rows_come_together():
    w = weights()
    kind = np.where(w.min(axis=1) >= 0, 2, w.std(axis=1) > 1).astype(int)
    ordered = kind[order_by_distribution(w, 3)].reshape(3, 32)
    assert np.all(ordered == ordered[:, :1])


def test_groups_by_distribution_beat_random_groups_and_one_codebook():
    w = weights()
    ordered = w[order_by_distribution(w, 6)]
    by_kind = squared_error(ordered, jlcm.initial(Jlcm(3, 6), ordered))
    at_random = squared_error(w, jlcm.initial(Jlcm(3, 6), w))
    single = squared_error(w, jlcm.initial(Jlcm(3, 1), w))
    assert by_kind < 0.7 * at_random
    assert at_random < single


def test_a_hidden_layer_computes_the_same_in_any_order():
    rng = np.random.default_rng(1)
    up, down, x = weights(), rng.standard_normal((20, 96)).astype(np.float32), rng.standard_normal((5, 64))
    order = order_by_distribution(up, 8)
    np.testing.assert_allclose(
        np.tanh(x @ up[order].T) @ down[:, order].T, np.tanh(x @ up.T) @ down.T, rtol=1e-5, atol=1e-5
    )


# Bytes


@pytest.mark.parametrize(("per_group", "numbers"), [("codebooks", 2 * 8 * 5), ("scales", 2 * (8 + 5))])
def test_what_is_packed_takes_the_stated_bytes_and_comes_back(per_group, numbers):
    knobs, w = Jlcm(3, 5, per_group), weights(33, 10)
    mapped = jlcm.stored(jlcm.initial(knobs, w))
    streams = jlcm.pack(knobs, mapped)
    assert sum(s.nbytes for s in streams) == knobs.n_bytes(w.shape) == -(-33 * 10 * 3 // 8) + numbers
    back = jlcm.unpack(knobs, w.shape, *streams)
    np.testing.assert_array_equal(back.weights(), mapped.weights())
    with pytest.raises(CorruptFile, match="bytes, got"):
        jlcm.unpack(knobs, w.shape, streams[0], streams[1][:-2])
    # 33 rows of 5 groups: 3 bits each.
    assert knobs.n_bytes(w.shape, absorbed=False) - knobs.n_bytes(w.shape) == 13


def test_weights_are_looked_up_in_their_row_s_codebook():
    codes = np.array([[0, 1], [1, 1], [1, 0]])
    table = np.array([[1.0, 2.0], [10.0, 20.0]], np.float32)
    assert Mapped(codes, table).weights().tolist() == [[1, 2], [2, 2], [20, 10]]
    scaled = Mapped(codes, np.array([[1.0, 2.0]], np.float32), np.array([1.0, -3.0], np.float32))
    assert scaled.weights().tolist() == [[1, 2], [2, 2], [-6, -3]]


def test_importance_draws_codewords_to_itself():
    w = weights(30, 16)
    importance = np.where(np.arange(16) < 4, 50, 1).astype(np.float32)
    plain, weighted = jlcm.initial(Jlcm(2, 2), w), jlcm.initial(Jlcm(2, 2), w, importance)

    def error(m):
        return float((importance * (w - m.weights()) ** 2).sum())

    assert error(weighted) < error(plain)


# The search


def first_choice(weighting):
    """The first codeword that a weight at 0 leaves for, when the loss asks for a larger value."""
    levels = np.array([[-4.0, -1.0, 0.0, 1.0, 4.0]])
    codes, place = np.array([[2]]), np.zeros((1, 1))
    for pressure in np.arange(0, 10, 0.01):
        found = jlcm.moved(codes, levels, place, np.full((1, 1), pressure), weighting)
        if found != codes:
            return float(levels[0, found[0, 0]])
    return None


def test_the_nearest_codeword_comes_first_and_the_plain_gradient_jumps_to_the_far_end():
    assert first_choice(jlcm.proximal) == 1
    assert first_choice(jlcm.straight_through) == 4


def test_without_pressure_nothing_moves():
    w = weights()
    start = jlcm.initial(Jlcm(3, 4), w)
    levels = start.levels()[group_of_rows(96, 4)] + 0.3
    np.testing.assert_array_equal(jlcm.moved(start.codes, levels, w, np.zeros_like(w), jlcm.proximal), start.codes)


def test_torch_moves_the_same_weights():
    rng = np.random.default_rng(3)
    w = weights()
    start = jlcm.initial(Jlcm(2, 3), w)
    levels = start.levels()[group_of_rows(96, 3)]
    arrays = start.codes, levels, w, rng.normal(0, 2, w.shape).astype(np.float32)
    expected = jlcm.moved(*arrays, jlcm.proximal)
    assert 0.05 < (expected != start.codes).mean() < 0.95
    np.testing.assert_array_equal(jlcm.moved(*map(torch.from_numpy, arrays), jlcm.proximal).numpy(), expected)


@pytest.fixture(scope="module")
def layer():
    """A matrix in order, correlated inputs, what it makes of them, and the same held out."""
    w = weights(48, 32)
    w = w[order_by_distribution(w, 4)]
    mix = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1200, 32, generator=torch.Generator().manual_seed(1)) @ mix
    return w, x[:1000], x[1000:]


def learned_error(layer, knobs, **options):
    w, x, held_out = layer
    original = torch.from_numpy(w)
    start = jlcm.initial(knobs, w)
    found = jlcm.learn(
        knobs, {"w": w}, {"w": start}, lambda ws, x: x @ ws["w"].T, x, x @ original.T, batch=128, **options
    )["w"]

    def error(mapped):
        return float(((held_out @ (torch.from_numpy(mapped.weights()) - original).T) ** 2).mean())

    return error(found), error(start), found, start


@pytest.mark.parametrize("per_group", ["codebooks", "scales"])
def test_learning_both_beats_codewords_alone_and_the_plain_gradient(layer, per_group):
    knobs = Jlcm(3, 4, per_group, n_steps=150)
    joint, before, found, start = learned_error(layer, knobs)
    frozen, _, kept, _ = learned_error(layer, Jlcm(3, 4, per_group, n_steps=150, mapping_travel=0))
    plain, *_ = learned_error(layer, knobs, weighting=jlcm.straight_through)
    assert joint < 0.9 * before
    assert joint < min(frozen, plain)
    np.testing.assert_array_equal(kept.codes, start.codes)
    np.testing.assert_array_equal(jlcm.stored(found).weights(), found.weights())  # already as it is stored


def test_learning_is_deterministic(layer):
    knobs = Jlcm(2, 4, n_steps=20)
    np.testing.assert_array_equal(learned_error(layer, knobs)[2].weights(), learned_error(layer, knobs)[2].weights())


def test_bad_input_is_named():
    with pytest.raises(InvalidInput, match="1 to 8 bits, got 9"):
        Jlcm(9)
    with pytest.raises(InvalidInput, match="codebooks or scales, got 'rows'"):
        Jlcm(per_group="rows")
    with pytest.raises(InvalidInput, match="3 rows make 1 to 3 groups, got 4"):
        group_of_rows(3, 4)
