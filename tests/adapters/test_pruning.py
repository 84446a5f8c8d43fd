"""LoRAM's arithmetic: the paper's own numbers of parameters, and products that are put back where they came from."""

from __future__ import annotations

import numpy as np
import pytest
from random_files import LLAMA

from barefoot.adapters.files import Pair
from barefoot.adapters.pruning import (
    Kept,
    Pruning,
    entries,
    group_scores,
    pruned_matrix,
    pruned_spec,
    recovered,
    sizes_of,
)
from barefoot.core.errors import InvalidInput
from barefoot.engine.specs import spec_from_config

BIG = LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
MODELS = {
    "llama-2-70b": BIG | {"num_key_value_heads": 8, "vocab_size": 32000},
    "llama-3.1-70b": BIG | {"num_key_value_heads": 8, "vocab_size": 128256},
    "llama-2-13b": LLAMA
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    | {"num_key_value_heads": 40, "vocab_size": 32000},
}
SPEC = spec_from_config(LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}, "random")


@pytest.mark.parametrize(
    ("name", "ratio", "n_parameters"),
    [
        ("llama-2-70b", 0.0, 68_976_648_192),
        ("llama-2-70b", 0.65, 28_099_436_544),
        ("llama-2-70b", 0.75, 21_488_738_304),
        ("llama-2-70b", 0.85, 16_272_924_672),
        ("llama-2-70b", 0.95, 9_662_226_432),
        ("llama-3.1-70b", 0.0, 70_553_706_496),
        ("llama-3.1-70b", 0.85, 17_849_982_976),
        ("llama-2-13b", 0.0, 13_015_864_320),
        ("llama-2-13b", 0.65, 6_005_662_720),
    ],
)
def test_parameters_are_the_papers_to_the_unit(name, ratio, n_parameters):
    spec = spec_from_config(MODELS[name] | {"tie_word_embeddings": False}, name)
    assert pruned_spec(spec, Pruning(ratio).sizes(spec)).n_parameters == n_parameters


def test_units_are_counted_as_the_paper_does():
    spec = spec_from_config(MODELS["llama-2-13b"], "13b")
    assert Pruning(0.65).counts(spec) == (14, 4838)
    assert Pruning(0.65).layers(spec) == range(4, 38)
    assert not Pruning(0.65, first=9, last=9).layers(SPEC)


def test_drawn_units_are_ascending_of_their_number_and_of_the_seed():
    pruning = Pruning(0.4, first=1, last=1)
    kept = pruning.random(SPEC, 5)
    assert list(kept) == [1, 2]
    for each in kept.values():
        assert len(each.groups) == 2
        assert len(each.channels) == 96
        assert (np.diff(each.groups) > 0).all()
        assert (np.diff(each.channels) > 0).all()
        assert each.n_bytes == 4 * 98
    again, other = pruning.random(SPEC, 5), pruning.random(SPEC, 6)
    assert all(np.array_equal(kept[i].channels, again[i].channels) for i in kept)
    assert not np.array_equal(kept[1].channels, other[1].channels)
    assert not np.array_equal(kept[1].channels, kept[2].channels)


def test_the_best_units_are_those_whose_removal_changes_most():
    rng = np.random.default_rng(0)
    changes = {w.name: np.abs(rng.standard_normal((w.rows, w.cols), np.float32)) for w in SPEC.weights}
    rows, cols = ({n: c.sum(axis) for n, c in changes.items()} for axis in (1, 0))
    scores = group_scores(SPEC, rows, cols, [2])
    for group in range(3):
        mine, theirs = slice(32 * group, 32 * group + 32), slice(16 * group, 16 * group + 16)
        expected = changes["layers.2.q"][mine].sum() + changes["layers.2.o"][:, mine].sum()
        expected += changes["layers.2.k"][theirs].sum() + changes["layers.2.v"][theirs].sum()
        assert scores[2][0][group] == pytest.approx(expected, rel=1e-5)
    channel = changes["layers.2.gate"][7].sum() + changes["layers.2.up"][7].sum() + changes["layers.2.down"][:, 7].sum()
    assert scores[2][1][7] == pytest.approx(channel, rel=1e-5)
    kept = Pruning(0.4, first=2, last=1).best(SPEC, scores)
    cut = np.setdiff1d(np.arange(160), kept[2].channels)
    assert scores[2][1][kept[2].channels].min() >= scores[2][1][cut].max()
    assert kept[2].groups.tolist() == sorted(np.argsort(-scores[2][0])[:2].tolist())


def random_pairs(spec, seed=0) -> dict[str, Pair]:
    rng = np.random.default_rng(seed)
    return {
        w.name: Pair(rng.standard_normal((4, w.cols), np.float32), rng.standard_normal((w.rows, 4), np.float32), 2.0)
        for w in spec.weights
        if w.layer is not None and w.group != "norm"
    }


def test_what_was_learned_is_put_back_and_nothing_beside_it():
    kept = Pruning(0.4, first=1, last=1).random(SPEC, 1)
    small = pruned_spec(SPEC, sizes_of(kept))
    pairs = random_pairs(small)
    found = recovered(SPEC, pairs, kept)
    assert found.keys() == pairs.keys()
    for weight in SPEC.weights:
        if weight.name not in pairs:
            continue
        pair, whole = pairs[weight.name], found[weight.name]
        product = whole.b @ whole.a
        assert product.shape == (weight.rows, weight.cols)
        assert whole.scale == 2.0
        expected = np.zeros_like(product)
        rows, cols = entries(SPEC, weight, kept[weight.layer]) if weight.layer in kept else (None, None)
        index = np.ix_(
            np.arange(weight.rows) if rows is None else rows, np.arange(weight.cols) if cols is None else cols
        )
        expected[index] = pair.b @ pair.a
        assert np.array_equal(product[index], expected[index])
        assert np.array_equal(product != 0, expected != 0)


def test_zeros_on_the_wrong_side_would_be_noticed():
    """The teeth: o and down are cut by columns, and so it is A that grows."""
    kept = {1: Kept(np.array([0, 2], np.int32), np.arange(5, dtype=np.int32))}
    pairs = random_pairs(pruned_spec(SPEC, sizes_of(kept)))
    found = recovered(SPEC, pairs, kept)
    for role, grown in (("q", "b"), ("k", "b"), ("gate", "b"), ("o", "a"), ("down", "a")):
        name = f"layers.1.{role}"
        same = "a" if grown == "b" else "b"
        assert getattr(found[name], same) is getattr(pairs[name], same)
        assert getattr(found[name], grown).size > getattr(pairs[name], grown).size
    assert np.array_equal(np.flatnonzero(found["layers.1.k"].b.any(1)), [*range(16), *range(32, 48)])
    assert np.array_equal(np.flatnonzero(found["layers.1.o"].a.any(0)), [*range(32), *range(64, 96)])
    with pytest.raises(InvalidInput, match=r"layers\.0\.q: a pair of a matrix \(5, 96\); the pruned one is \(96, 96\)"):
        recovered(SPEC, {"layers.0.q": Pair(np.zeros((1, 96)), np.zeros((5, 1)), 1.0)}, kept)


def test_cutting_removes_and_does_not_mask():
    w = np.arange(12, dtype=np.float32).reshape(3, 4)
    some = pruned_matrix(w, np.array([0, 2]), None)
    assert some.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert pruned_matrix(w, None, np.array([1])).tolist() == [[1], [5], [9]]
    assert some.nbytes == 32
    assert not np.shares_memory(some, w)


@pytest.mark.parametrize("knobs", [{"ratio": 1.0}, {"ratio": -0.1}, {"ratio": 0.5, "first": -1}])
def test_knobs(knobs):
    with pytest.raises(InvalidInput, match="must be"):
        Pruning(**knobs)
