"""Budgets by layer: what the parts add up to, what a pyramid is; layers that share in turn end where all at once do."""

from __future__ import annotations

import numpy as np
import pytest
from test_cache import arrays, decode, make, positions, run_prompt
from test_merging import attention, rows

from barefoot.core.errors import Incompatible
from barefoot.kv import budgets
from barefoot.kv.policies.h2o import H2O
from barefoot.kv.policies.kvmerger import KVMerger
from barefoot.kv.policies.snapkv import SnapKV
from barefoot.kv.ruled import Ruled
from barefoot.kv.stores.kivi import Kivi


def test_parts_add_up_follow_the_weights_and_stay_within_bounds():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(1, 40))
        weights, least = rng.uniform(0.05, 3, n).tolist(), int(rng.integers(0, 9))
        most = least + int(rng.integers(1, 200))
        total = int(rng.integers(0, 120 * n))
        parts = budgets.shares(total, weights, least, most)
        assert sum(parts) == min(max(total, least * n), most * n)
        assert least <= min(parts) <= max(parts) <= most
        order = np.argsort(weights)
        assert (np.diff(np.array(parts)[order]) >= -1).all()  # more weight, no less but for rounding
    assert budgets.shares(60, [1, 2, 3], 0, 100) == [10, 20, 30]
    assert budgets.shares(60, [1, 2, 3], 0, 25) == [12, 23, 25]  # 35 over 1 : 2, after the bound
    assert budgets.shares(60, [1, 1, 28], 5, 100) == [5, 5, 50]


def test_a_part_only_shrinks_when_others_come():
    rng = np.random.default_rng(1)
    weights = rng.uniform(0.4, 1, 30).tolist()
    before = None
    for n in range(1, 31):
        parts = budgets.shares(3000, weights[:n], 2, 1024)
        assert sum(parts) == min(3000, 1024 * n)
        if before is not None:
            assert all(now <= then + 1 for now, then in zip(parts, before, strict=False))
        before = parts


def test_a_pyramid_falls_evenly_and_keeps_the_mean():
    parts = budgets.shares(30 * 100, budgets.pyramid(30), 2, 10_000)
    assert sum(parts) == 3000
    assert parts[0] == 195
    assert parts[-1] == 5
    assert set(np.diff(parts)) <= {-6, -7}


def test_density_is_of_shares():
    """All attention on one entry: f = 1; even attention of n: f = 1 / n; and it doesn't grow with the mass."""
    even, one = np.ones((2, 50), np.float32), np.zeros((2, 50), np.float32)
    one[:, 3] = 1
    assert budgets.density(even) == pytest.approx(np.exp(-1 / 50))
    assert budgets.density(7 * even) == pytest.approx(np.exp(-1 / 50))
    assert budgets.density(one) == pytest.approx(np.exp(-1))


@pytest.mark.parametrize("layers", ["pyramid", "measured"])
def test_layers_keep_what_their_budgets_say(layers):
    """As if all layers had waited for the others: entries of most attention, and the last ones; never more in all."""
    policy, n, n_layers = H2O(keep=20, layers=layers), 90, 5
    cache, rng = make(policy, n_layers=n_layers), np.random.default_rng(3)
    per_layer = []
    for drawn in (0, 2, 0.3, 1, 0.1):  # to the first position
        q, k, v = arrays(rng, n)
        k[0] = 1
        per_layer.append((0.2 * q + np.float32(drawn), k, v))
    run_prompt(cache, per_layer, 24)
    mass = [[attention(q, rows(k, head), head).sum(axis=0) for head in range(2)] for q, k, _ in per_layer]
    weights = budgets.pyramid(n_layers)
    if layers == "measured":
        shares = [[own / own.sum() for own in heads] for heads in mass]
        weights = [float(np.exp(-np.mean([np.sum(own**2) for own in heads]))) for heads in shares]
    parts = budgets.shares(n_layers * 20, weights, 2, 400)
    assert max(parts) - min(parts) > 5
    for layer, keep in enumerate(parts):
        recent = keep // 2
        for head in range(2):
            best = sorted(range(n - recent), key=lambda i: -mass[layer][head][i])[: keep - recent]
            want = sorted([*best, *range(n - recent, n)])
            got = sorted(positions(cache, layer, head))
            assert set(got) <= set(want)
            assert len(got) >= keep - 1  # a part may have grown by its rounding when the entry was gone
    decode(cache, rng, 10)
    assert [cache.storage.n(layer) for layer in range(n_layers)] == [keep + 1 for keep in parts]
    assert sum(region.n_slots for region in cache.storage.regions) <= n_layers * 21
    cache.clear()
    assert sum(region.n_slots for region in cache.storage.regions) <= n_layers * 21


def test_regions_keep_their_entries_whatever_their_sizes():
    """Sizes that go up and down at random move the slots about, and nothing in them changes."""
    cache, rng = make(H2O(keep=20), n_layers=4), np.random.default_rng(5)
    run_prompt(cache, [arrays(rng, 70) for _ in range(4)], 24)
    storage = cache.storage
    for layer, n in enumerate((20, 3, 11, 0)):
        every = np.arange(n, dtype=np.int32)[None].repeat(2, axis=0)
        storage.place(layer, every, storage.position(layer).copy(), cache._work.keys, cache._work.values)
    before = [[a[:, : storage.n(layer)].copy() for a in storage.regions[layer].by_entry.values()] for layer in range(4)]
    for _ in range(200):
        n = [storage.n(layer) for layer in range(4)]
        cuts = np.sort(rng.integers(0, 84 - sum(n) + 1, 3))
        spare = np.diff([0, *cuts, 84 - sum(n)])
        storage.resize([a + int(b) for a, b in zip(n, spare, strict=True)])
        for layer in range(4):
            assert storage.room(layer) == spare[layer]
            for now, then in zip(storage.regions[layer].by_entry.values(), before[layer], strict=True):
                assert np.array_equal(now[:, : n[layer]], then)


@pytest.mark.parametrize("policy", [SnapKV(keep=64, layers="pyramid"), KVMerger(keep=64, mass="bias")], ids=str)
def test_sealed_entries_take_no_budgets_by_layer_and_no_biases(policy):
    with pytest.raises(Incompatible, match="kivi"):
        Ruled(policy, Kivi())
