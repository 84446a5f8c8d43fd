"""LoRAM's arithmetic: the paper's own numbers of parameters, products that are put back where they came from, and the
file of units, which is read without trusting it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from random_files import LLAMA

from barefoot.adapters.files import Pair
from barefoot.adapters.pruning import (
    Kept,
    entries,
    pruned_matrix,
    pruned_spec,
    recovered,
    sizes_of,
)
from barefoot.adapters.pruning.drawn import Drawn
from barefoot.adapters.pruning.files import KEY, NAME, read_units, write_units
from barefoot.adapters.pruning.taylor import Taylor, group_scores
from barefoot.core.errors import CorruptFile, Incompatible, InvalidInput, SourceNotFound, UnsupportedFormat
from barefoot.core.model import PartSpec
from barefoot.engine.specs import spec_from_config
from barefoot.io.safetensors import array_entry, read_safetensors, write_safetensors

BIG = LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
MODELS = {
    "llama-2-70b": BIG | {"num_key_value_heads": 8, "vocab_size": 32000},
    "llama-3.1-70b": BIG | {"num_key_value_heads": 8, "vocab_size": 128256},
    "llama-2-13b": LLAMA
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    | {"num_key_value_heads": 40, "vocab_size": 32000},
}
SPEC = spec_from_config(LLAMA | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}, "random")


def drawn(seed: int) -> dict[int, Kept]:
    pruning = Drawn(0.4, first=1, last=1)
    return pruning.kept(SPEC, pruning.sizes(SPEC), seed, dict)


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
    assert pruned_spec(spec, Drawn(ratio).sizes(spec)).n_parameters == n_parameters


def test_units_are_counted_as_the_paper_does():
    spec = spec_from_config(MODELS["llama-2-13b"], "13b")
    assert Drawn(0.65).counts(spec) == (14, 4838)
    assert Drawn(0.65).layers(spec) == range(4, 38)
    assert not Drawn(0.65, first=9, last=9).layers(SPEC)


def test_drawn_units_are_ascending_of_their_number_and_of_the_seed():
    kept = drawn(5)
    assert list(kept) == [1, 2]
    for each in kept.values():
        assert len(each.groups) == 2
        assert len(each.channels) == 96
        assert (np.diff(each.groups) > 0).all()
        assert (np.diff(each.channels) > 0).all()
        assert each.n_bytes == 4 * 98
    again, other = drawn(5), drawn(6)
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
    pruning = Taylor(0.4, first=2, last=1)
    kept = pruning.kept(SPEC, pruning.sizes(SPEC), 0, lambda: scores)
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
    kept = drawn(1)
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
        Drawn(**knobs)


def test_columns_in_blocks_keep_whole_blocks():
    """30 channels of 160 fill no block of 32: as many more stay. A group of heads feeds 32 columns of o."""
    pruning = Drawn(0.4, first=1, last=1)
    assert pruning.sizes(SPEC) == {1: (2, 96), 2: (2, 96)}
    assert Drawn(0.5, first=1, last=1).sizes(SPEC) == {1: (2, 80), 2: (2, 80)}
    assert Drawn(0.5, first=1, last=1).sizes(SPEC, lambda weight: "q8_0") == {1: (2, 96), 2: (2, 96)}
    assert Drawn(0.7, first=1, last=2).sizes(SPEC, lambda weight: "int4_g64_sym") == {1: (2, 64)}, "two groups fill 64"


def test_a_sum_of_parts_is_refused():
    part = PartSpec("a", "csr", 8, "x")
    weights = tuple(replace(w, parts=(part,)) if w.name == "layers.1.up" else w for w in SPEC.weights)
    with pytest.raises(Incompatible, match=r"layers\.1\.up is a sum"):
        pruned_spec(replace(SPEC, weights=weights), {1: (2, 96)})
    assert pruned_spec(replace(SPEC, weights=weights), {2: (2, 96)}).n_parameters < SPEC.n_parameters


# --- the file -------------------------------------------------------------------------------------------------------


def test_units_are_read_as_they_were_written(tmp_path):
    pruning, kept = Drawn(0.4, first=1, last=1), drawn(3)
    write_units(tmp_path, pruning, kept, "this model")
    found = read_units(tmp_path, SPEC, "this model")
    assert str(found) == "drawn(ratio=0.4,first=1,last=1)"
    assert found.layers(SPEC) == pruning.layers(SPEC)
    assert found.sizes(SPEC) == sizes_of(kept)
    again = found.kept(SPEC, found.sizes(SPEC), 99, dict)
    for layer, each in kept.items():
        assert again[layer].groups.tolist() == each.groups.tolist()
        assert again[layer].channels.tolist() == each.channels.tolist()
    file = read_safetensors(tmp_path / NAME)
    assert sum(tensor.n_bytes for tensor in file.tensors) == sum(each.n_bytes for each in kept.values()) == 2 * 4 * 98
    with pytest.raises(Incompatible, match="of another model"):
        read_units(tmp_path, SPEC, "that model")
    with pytest.raises(SourceNotFound, match=r"lacks pruned\.safetensors"):
        read_units(tmp_path / "none", SPEC, "this model")


def forged(folder, facts=None, **changes):
    """The file with some tensors in place of its own, or without them."""
    arrays = {}
    for layer, each in drawn(3).items():
        arrays |= {f"layers.{layer}.groups": each.groups, f"layers.{layer}.channels": each.channels}
    arrays |= {name.replace("_", "."): array for name, array in changes.items()}
    known = {"version": 1, "pruning": "drawn(ratio=0.4,first=1,last=1)", "model": "m"} | (facts or {})
    entries = [array_entry(name, array) for name, array in arrays.items() if array is not None]
    write_safetensors(folder / NAME, entries, {KEY: json.dumps(known)})
    return read_units(folder, SPEC, "m")


LARGE, LEAST = 2**31 - 1, -(2**31)


@pytest.mark.parametrize(
    "numbers",
    [[1, 0], [1, 1], [0, 3], [-1, 0], [], [0, 1, 2, 3], [[0, 1]], [0, LARGE, LEAST, 2], [0.0, 1.0]],
)
def test_numbers_that_are_no_units_are_refused(tmp_path, numbers):
    forged(tmp_path)
    kind = np.float32 if numbers and isinstance(numbers[0], float) else np.int32
    with pytest.raises(CorruptFile, match=r"layers\.1\.groups"):
        forged(tmp_path, layers_1_groups=np.array(numbers, kind))


def test_descending_by_overflow_is_noticed(tmp_path):
    """Differences of int32 wrap: each of these is above 0."""
    numbers = np.array([0, LARGE, LEAST, -1, 5], np.int32)
    assert (np.diff(numbers) > 0).all()
    with pytest.raises(CorruptFile, match="ascending"):
        forged(tmp_path, layers_2_channels=numbers)


def test_other_layers_and_names_are_refused(tmp_path):
    some = np.array([0], np.int32)
    with pytest.raises(CorruptFile, match=r"lacks 'layers\.2\.groups'"):
        forged(tmp_path, layers_2_groups=None)
    with pytest.raises(CorruptFile, match=r"has besides 'layers\.3\.groups'"):
        forged(tmp_path, layers_3_groups=some)
    with pytest.raises(CorruptFile, match=r"lacks 'layers\.0"):
        forged(tmp_path, {"pruning": "drawn(ratio=0.4,first=0,last=1)"})
    for text in ("lora", "drawn(ratio=2)", "drawn > taylor", 7, "x" * 2000, None):
        with pytest.raises(CorruptFile, match="no pruning"):
            forged(tmp_path, {"pruning": text})
    with pytest.raises(UnsupportedFormat, match="version 2"):
        forged(tmp_path, {"version": 2})
