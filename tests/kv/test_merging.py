"""Policies that merge, against their papers written out in loops; what equal entries become; ways back and forks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_cache import HEADS, Counted, arrays, decode, make, positions, run_prompt

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.kv.cache import Cache
from barefoot.kv.entries import NONE
from barefoot.kv.layout import Layout, Workspace
from barefoot.kv.policies import Merge, Seen
from barefoot.kv.policies.d2o import D2O
from barefoot.kv.policies.elastic import Elastic
from barefoot.kv.policies.h2o import H2O
from barefoot.kv.policies.kvmerger import KVMerger
from barefoot.kv.storage import Heads
from barefoot.kv.stores.f16 import HalfStore

SHARING = HEADS.n_heads // HEADS.n_kv_heads


def rows(x, head):
    """A head's rows as they are staged, in float64."""
    return x.reshape(len(x), -1, HEADS.head_dim)[:, head].astype(np.float16).astype(np.float64)


def attention(q, keys, head):
    """Shares of all queries of a key head, (queries, entries), causal; float64."""
    n, dim = len(keys), HEADS.head_dim
    own = q.reshape(len(q), -1, dim)[:, head * SHARING : (head + 1) * SHARING].astype(np.float64)
    scores = np.einsum("tgd,nd->gtn", own, keys) * HEADS.scale
    scores = np.where(np.arange(n) <= np.arange(len(q))[:, None], scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (shares / shares.sum(axis=-1, keepdims=True)).reshape(-1, n)


def stored(cache, layer, head):
    """Position → key and value, as the cache has them."""
    region = cache.storage.regions[layer]
    there = region.position[head, : cache.storage.n(layer)].tolist()
    free = cache.storage.free[layer, head]
    return {
        p: tuple(x[head, slot].view(np.float16).astype(np.float64) for x in (region.keys, region.values))
        for slot, p in enumerate(there)
        if slot != free or free == NONE
    }


def agree(got, want):
    assert sorted(got) == sorted(want)
    for p, (key, value) in want.items():
        assert np.allclose(got[p][0], key, rtol=2e-3, atol=2e-3), p  # rounded to half precision, maybe twice
        assert np.allclose(got[p][1], value, rtol=2e-3, atol=2e-3), p


def test_elastic_keeps_one_set_a_layer_and_means_of_what_is_around_it():
    policy, n = Elastic(ratio=0.3, first=2, distance=4), 50
    cache, rng = make(policy), np.random.default_rng(2)
    per_layer = [arrays(rng, n) for _ in range(2)]
    run_prompt(cache, per_layer, 24)
    for layer, (q, k, v) in enumerate(per_layer):
        scores = sum(attention(q, rows(k, head), head).sum(axis=0) for head in range(2))
        best = sorted(range(2, n - 1), key=lambda i: -scores[i])[: 15 - 3]
        kept, anchors = {0, 1, n - 1, *best}, sorted(best)
        buckets = {p: [p] for p in kept}
        for i in set(range(n)) - kept:
            buckets[min(anchors, key=lambda a: (abs(a - i), a))].append(i)
        for head in range(2):
            want = {p: (rows(k, head)[b].mean(axis=0), rows(v, head)[b].mean(axis=0)) for p, b in buckets.items()}
            agree(stored(cache, layer, head), want)
    assert max(map(len, buckets.values())) > 3


def test_elastic_forgets_at_a_fixed_place_as_it_goes_on():
    """After each token ⌈ratio · t⌉ entries: the last ones of the prompt go first, then the oldest that was decoded."""
    policy = Elastic(ratio=0.5, first=1, distance=5)
    cache, rng = make(policy, n_layers=1), np.random.default_rng(4)
    run_prompt(cache, [arrays(rng, 41)], 24)
    there = sorted(positions(cache, 0, 0))
    assert len(there) == 21
    for t in range(42, 90):
        q, k, v = arrays(rng, 1)
        cache.step(0, q, k, v, np.empty_like(q))
        cache.stepped()
        there.append(t - 1)
        if len(there) > math.ceil(t / 2):
            del there[21 - 5]
        assert sorted(positions(cache, 0, 1)) == there
        assert len(there) == math.ceil(t / 2)
    assert there[:16] == sorted(positions(cache, 0, 0))[:16]
    assert cache.storage.n(0) <= policy.slots(90)


def test_elastic_attends_to_what_is_left_and_asks_for_no_scores(monkeypatch):
    """Nothing merged: a token's output is softmax over the entries that stayed. H2O can't do without probabilities."""
    cache, rng = make(Elastic(ratio=0.5, first=1, distance=5, merging=False), n_layers=1), np.random.default_rng(12)
    q, k, v = arrays(rng, 41)
    run_prompt(cache, [(q, k, v)], 24)

    def refuse(*_, **__):
        raise AssertionError("asked for probabilities")

    other = make(H2O(keep=20), n_layers=1)
    run_prompt(other, [(q, k, v)], 24)
    monkeypatch.setattr(ops, "attention_mass", refuse)
    for t in range(41, 80):
        there = [sorted([*positions(cache, 0, head), t]) for head in range(2)]
        own_q, own_k, own_v = arrays(rng, 1)
        k, v = np.concatenate([k, own_k]), np.concatenate([v, own_v])
        out = np.empty_like(own_q)
        cache.step(0, own_q, own_k, own_v, out)
        cache.stepped()
        for head in range(HEADS.n_heads):
            kept = there[head // SHARING]
            own = own_q.reshape(-1, HEADS.head_dim)[head].astype(np.float64) * HEADS.scale
            keys, values = (rows(x, head // SHARING)[kept] for x in (k, v))
            assert np.allclose(out.reshape(-1, HEADS.head_dim)[head], softmax_output(own, keys, values), atol=2e-5)
    assert len(kept) < 45
    with pytest.raises(AssertionError, match="probabilities"):
        other.step(0, own_q, own_k, own_v, out)


def test_elastic_of_all_is_the_cache_that_keeps_all():
    caches = [make(policy) for policy in (Elastic(ratio=1.0), None)]
    outs = []
    for cache in caches:
        rng = np.random.default_rng(13)
        out = np.concatenate(run_prompt(cache, [arrays(rng, 50) for _ in range(2)], 24)).reshape(100, -1)
        steps = np.empty((30, 2, out.shape[1]), np.float32)
        for step in steps:
            for layer in range(2):
                cache.step(layer, *arrays(rng, 1), step[layer : layer + 1])
            cache.stepped()
        outs.append((out, steps))
    (prompt, steps), (all_prompt, all_steps) = outs
    assert np.array_equal(steps, all_steps)
    assert np.allclose(prompt, all_prompt, atol=2e-5)


def joined(keys, values, gone, stay, threshold_of):
    """D2O's merge of a layer: lists by head of rows, what goes and what stays. Groups by head, and the threshold."""
    alike = []
    for own, away, kept in zip(keys, gone, stay, strict=True):
        unit = own / np.linalg.norm(own, axis=1, keepdims=True)
        cosine = unit[away] @ unit[kept].T
        alike.append((cosine.max(axis=1), np.array(kept)[cosine.argmax(axis=1)]))
    threshold = threshold_of(np.concatenate([u for u, _ in alike]).mean())
    out = []
    for head, (u, nearest) in enumerate(alike):
        groups = {}
        for j in stay[head]:
            members = [
                (i, u_i) for i, u_i, to in zip(gone[head], u, nearest, strict=True) if to == j and u_i >= threshold
            ]
            total = math.e + sum(math.exp(u_i) for _, u_i in members)
            parts = [(j, math.e / total), *((i, math.exp(u_i) / total) for i, u_i in members)]
            groups[j] = tuple(sum(w * x[head][i] for i, w in parts) for x in (keys, values))
        out.append(groups)
    return out, threshold


def test_d2o_merges_what_is_alike_by_its_weights():
    """One layer's prompt, and then tokens one by one, with the threshold going along."""
    policy, n = D2O(keep=20, recent=6, first=2, smoothing=0.4), 60
    cache, rng = make(policy, n_layers=1), np.random.default_rng(5)
    q, k, v = arrays(rng, n)
    run_prompt(cache, [(q, k, v)], 24)
    keys, values = ([rows(x, head) for head in range(2)] for x in (k, v))
    mass = [attention(q, keys[head], head).sum(axis=0) for head in range(2)]
    stay = []
    for own in mass:
        heavy = sorted(range(2, n - 6), key=lambda i: -own[i])[: 20 - 8]
        stay.append([0, 1, *sorted(heavy), *range(n - 6, n)])
    gone = [sorted(set(range(n)) - set(kept)) for kept in stay]
    groups, threshold = joined(keys, values, gone, stay, lambda mean: mean)
    for head, want in enumerate(groups):
        agree(stored(cache, 0, head), want)
    assert cache._course.carried[0, 0] == pytest.approx(threshold, rel=1e-4)
    lived = sum(not np.array_equal(want[p][0], keys[head][p]) for head, want in enumerate(groups) for p in want)
    assert 5 < lived < 40  # of the entries that stay, some have taken others in
    for t in range(n, n + 12):
        before = [stored(cache, 0, head) for head in range(2)]
        q, k, v = arrays(rng, 1)
        cache.step(0, q, k, v, np.empty_like(q))
        cache.stepped()
        after = [stored(cache, 0, head) for head in range(2)]
        order = []
        for head in range(2):
            before[head][t] = (rows(k, head)[0], rows(v, head)[0])
            order.append(sorted(before[head]))
        keys = [np.array([before[head][p][0] for p in order[head]]) for head in range(2)]
        values = [np.array([before[head][p][1] for p in order[head]]) for head in range(2)]
        away = [[order[head].index(p) for p in set(before[head]) - set(after[head])] for head in range(2)]
        assert [len(each) for each in away] == [1, 1]
        kept = [[i for i in range(21) if i not in away[head]] for head in range(2)]
        groups, threshold = joined(keys, values, away, kept, lambda mean, tau=threshold: 0.4 * mean + 0.6 * tau)
        for head in range(2):
            agree(after[head], {order[head][i]: pair for i, pair in groups[head].items()})
        assert cache._course.carried[0, 0] == pytest.approx(threshold, rel=1e-3)
        threshold = float(cache._course.carried[0, 0])


def test_d2o_without_its_own_is_h2o():
    """No merging, equal budgets, no first positions: the same entries, bit by bit."""
    caches = [make(p) for p in (D2O(keep=20, first=0, layers="uniform", merging=False), H2O(keep=20))]
    for cache in caches:
        rng = np.random.default_rng(6)
        run_prompt(cache, [arrays(rng, 70) for _ in range(2)], 24)
        decode(cache, rng, 30)
    one, other = (cache.storage for cache in caches)
    assert np.array_equal(one.all_positions, other.all_positions)
    assert np.array_equal(one.all_keys, other.all_keys)
    assert np.array_equal(one.all_mass, other.all_mass)


def seen_of(keys, observed, **more):
    n = keys.shape[1]
    position = np.tile(np.arange(n, dtype=np.int32), (len(keys), 1))
    more = {"carried": np.zeros(2, np.float32), **more}
    return Seen(position, n, observed.astype(np.float32), n_prompt=n, keys=lambda head: keys[head].copy(), **more)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_d2o_leaves_an_anchor_whose_copies_join_as_it_is(scale):
    """Weights of a group sum to one: copies change nothing, and one of another length moves the key by its part."""
    rng = np.random.default_rng(1)
    kept = rng.standard_normal((1, 8, 32)).astype(np.float32)
    keys = np.concatenate([kept, scale * kept[:, 2:4]], axis=1)
    seen = seen_of(keys, np.ones((1, 10)))
    found = D2O(keep=8, first=0, recent=0).merge(seen, np.arange(8, dtype=np.int32)[None])
    assert found.into[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 2, 3]
    assert np.allclose(np.bincount(found.into[0], weights=found.weight[0]), 1, atol=1e-6)
    sums = np.stack([(found.weight[0] * (found.into[0] == j)) @ keys[0] for j in range(8)])
    half = [1, 1, (1 + scale) / 2, (1 + scale) / 2, 1, 1, 1, 1]  # exp(1) and exp(cosine 1): equal weights
    assert np.allclose(sums, kept[0] * np.array(half)[:, None], atol=1e-5)


def softmax_output(q, keys, values, bias=None):
    scores = q @ keys.T + (0 if bias is None else bias)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (shares / shares.sum(axis=-1, keepdims=True)) @ values


def merged_rows(found: Merge, keys, values):
    """Keys, values and biases of those that stay, float64."""
    into, weight = found.into[0], found.weight[0].astype(np.float64)
    stay = np.unique(into[into >= 0])
    out = [np.stack([(weight * (into == j)) @ x for j in stay]) for x in (keys, values)]
    if found.value_factor is not None:
        out[1] = out[1] * found.value_factor[0, stay, None]
    return *out, None if found.bias is None else found.bias[0, stay]


def test_equal_keys_that_merge_with_a_bias_are_attended_to_as_before():
    """Runs of equal keys: exact with the bias of log |S|; without it, and with larger values, far off."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 7, 30)
    keys = np.repeat(rng.standard_normal((30, 32)), lengths, axis=0)
    values = rng.standard_normal((len(keys), 32))
    q = rng.standard_normal((50, 32)) / 4
    full = softmax_output(q, keys, values)
    error = {}
    for mass in ("bias", "value", "none"):
        policy = KVMerger(keep=30, recent=0, heavy=0, mass=mass)
        seen = seen_of(keys[None].astype(np.float32), rng.random((1, len(keys))))
        found = policy.merge(seen, policy.choose(seen))
        k, v, bias = merged_rows(found, keys, values)
        assert len(k) == 30
        error[mass] = np.linalg.norm(softmax_output(q, k, v, bias) - full) / np.linalg.norm(full)
    assert error["bias"] < 1e-6
    assert error["none"] > 10 * error["bias"]
    assert error["value"] > 10 * error["bias"]


def test_kvmerger_links_the_most_alike_neighbours_and_weighs_by_distance():
    """The paper's steps in loops: exempt entries, the most alike pairs, sets, pivots, Gaussian weights, |S| times V."""
    rng = np.random.default_rng(8)
    n, dim = 40, 16
    keys = np.cumsum(rng.standard_normal((n, dim)) * 0.4, axis=0) + rng.standard_normal(dim) * 2
    attended = rng.random(n)
    policy = KVMerger(keep=24, recent=6, heavy=4, alike=0.3, spread=0.5)
    seen = seen_of(keys[None].astype(np.float32), attended[None])
    stay = policy.choose(seen)
    found = policy.merge(seen, stay)
    exempt = {*range(n - 6, n), *sorted(range(n - 6), key=lambda i: -attended[i])[:4]}
    cosine = {
        i: keys[i] @ keys[i + 1] / np.linalg.norm(keys[i]) / np.linalg.norm(keys[i + 1])
        for i in range(n - 1)
        if i not in exempt and i + 1 not in exempt
    }
    linked = sorted((i for i in cosine if cosine[i] > 0.3), key=lambda i: -cosine[i])[: n - 24]
    assert len(linked) == n - 24
    sets = [[0]]
    for i in range(n - 1):
        if i in linked:
            sets[-1].append(i + 1)
        else:
            sets.append([i + 1])
    assert stay[0].tolist() == sorted(max(s, key=lambda i: attended[i]) for s in sets)
    assert max(map(len, sets)) > 2
    for members in sets:
        pivot = max(members, key=lambda i: attended[i])
        apart = np.array([np.sum((keys[pivot] - keys[i]) ** 2) for i in members])
        variance = 0.5 * apart.sum() / max(1, len(members) - 1)
        near = np.exp(-apart / (2 * variance)) if len(members) > 1 else np.ones(1)
        assert found.into[0, members].tolist() == [pivot] * len(members)
        assert np.allclose(found.weight[0, members], near / near.sum(), rtol=1e-4)
        assert found.value_factor[0, pivot] == pytest.approx(len(members))


def test_where_too_few_are_alike_the_least_attended_sets_are_lost():
    rng = np.random.default_rng(9)
    keys, attended = rng.standard_normal((1, 30, 64)).astype(np.float32), rng.random((1, 30))
    policy = KVMerger(keep=12, recent=3, heavy=2, alike=0.99)
    stay = policy.choose(seen_of(keys, attended))[0].tolist()
    rest = sorted(range(27), key=lambda i: -attended[0, i])[:9]
    assert stay == sorted([*rest, 27, 28, 29])


def test_a_merged_entry_counts_for_all_it_stands_for_when_it_merges_again():
    keys = np.ones((1, 4, 8), np.float32)
    bias = np.log(np.array([[1, 3, 1, 5]], np.float32))
    policy = KVMerger(keep=2, recent=1, heavy=0, mass="bias")
    seen = seen_of(keys, np.array([[1, 3, 2, 9]]), bias=bias)
    found = policy.merge(seen, policy.choose(seen))
    assert found.into[0].tolist() == [1, 1, 1, 3]
    assert np.allclose(found.weight[0], [0.2, 0.6, 0.2, 1])
    assert np.allclose(np.exp(found.bias[0, [1, 3]]), [5, 5])


MERGING = (
    Elastic(ratio=0.4, first=1, distance=3),
    D2O(keep=9, recent=3, first=1, layers="uniform"),
    D2O(keep=9, recent=3, first=1, mass="bias"),
    D2O(keep=9, recent=3, first=1, layers="pyramid", merging=False),
    H2O(keep=9, recent=3, layers="measured"),
    KVMerger(keep=9, recent=3, heavy=2, alike=-1.0, room=14),
    KVMerger(keep=9, recent=3, heavy=2, alike=0.0, mass="bias", room=14),
)


@pytest.mark.parametrize("policy", MERGING, ids=str)
def test_bytes_are_those_that_were_stated(policy):
    layout = Layout(HEADS, 3, 200, policy, HalfStore(), 16)
    own, shared = Counted(), Counted()
    Cache(layout, Workspace(layout, shared, n_threads=1), own)
    assert own.n_bytes == sum(term.bytes for term in layout.terms())
    assert shared.n_bytes == sum(array.bytes for array in layout.shared(1))


@pytest.mark.parametrize("policy", MERGING, ids=str)
def test_random_operations_lead_where_their_history_does(policy):
    """Prompts, tokens, forks and ways back on three caches: each is what a new cache of the same history is."""
    heads, rng = Heads(n_heads=4, n_kv_heads=2, head_dim=8, scale=1.0), np.random.default_rng(11)
    layout = Layout(heads, 3, 60, policy, HalfStore(), 16)
    own = [Counted() for _ in range(4)]
    workspace = Workspace(layout, Counted(), ops.n_threads())
    *caches, fresh = (Cache(layout, workspace, take) for take in own)
    histories = [[] for _ in caches]  # (whether a prompt, seed, tokens)

    def play(cache, prompt, seed, n):
        source = np.random.default_rng(seed)
        if prompt:
            run_prompt(cache, [arrays(source, n, heads) for _ in range(3)], 16)
            return
        cache.check_step()
        for layer in range(3):
            q, k, v = arrays(source, 1, heads)
            cache.step(layer, q, k, v, np.empty_like(q))
        cache.stepped()

    done = dict.fromkeys(("prompt", "token", "fork", "back", "clear", "refused"), 0)
    for operation in range(2000):
        i = int(rng.integers(3))
        cache, history = caches[i], histories[i]
        what = str(rng.choice(["prompt", "token", "fork", "back", "clear"], p=[0.1, 0.62, 0.1, 0.16, 0.02]))
        try:
            if what in ("prompt", "token"):
                event = (
                    what == "prompt",
                    int(rng.integers(1 << 30)),
                    int(rng.integers(1, 14)) if what == "prompt" else 1,
                )
                if what == "token" and cache.n_tokens == 60:
                    continue
                play(cache, *event)
                history.append(event)
            elif what == "fork":
                into = int(rng.integers(3))
                if into != i:
                    cache.fork(caches[into])
                    histories[into] = list(history)
            elif what == "back" and history:
                _, _, n = history[-1]
                cache.trim(cache.n_tokens - n)
                history.pop()
            elif what == "clear":
                cache.clear()
                histories[i] = []
        except InvalidInput:
            what = "refused"
        done[what] += 1
        if operation % 25 == 0:
            for each, events in zip(caches, histories, strict=True):
                fresh.clear()
                for event in events:
                    play(fresh, *event)
                same(each, fresh)
    assert min(done.values()) > 3, done
    stated = sum(term.bytes for term in layout.terms())
    assert {take.n_bytes for take in own} == {stated}


def same(cache, other):
    """The same entries with the same rows, biases and mass, wherever they lie."""
    assert cache.n_tokens == other.n_tokens
    for layer in range(3):
        one, two = cache.storage, other.storage
        assert one.n(layer) - (one.free[layer, 0] != NONE) == two.n(layer) - (two.free[layer, 0] != NONE)
        for head in range(2):
            found = []
            for storage in (one, two):
                region, n = storage.regions[layer], storage.n(layer)
                order = [s for s in np.argsort(region.position[head, :n]) if s != storage.free[layer, head]]
                found.append([array[head, order] for array in region.by_entry.values()])
            for a, b in zip(*found, strict=True):
                assert np.array_equal(a, b) if a.dtype != np.float32 else np.allclose(a, b, atol=1e-5)


def test_with_a_bias_every_token_that_d2o_recalls_counts():
    """Equal keys and values: attention to what is left is attention to all of it; without the bias it is not."""
    rng = np.random.default_rng(1)
    which = np.concatenate([np.arange(8), rng.integers(0, 8, 30)])
    kept, values = rng.standard_normal((8, 32)), rng.standard_normal((8, 32))
    seen = seen_of(kept[which][None].astype(np.float32), rng.random((1, 38)))
    stay = np.arange(8, dtype=np.int32)[None]
    q = rng.standard_normal((20, 32)) / 4
    full = softmax_output(q, kept[which], values[which])
    error = {}
    for mass in ("bias", "none"):
        found = D2O(keep=8, first=0, recent=0, smoothing=0.0, mass=mass).merge(seen, stay)
        out = softmax_output(q, *merged_rows(found, kept[which], values[which]))
        error[mass] = np.abs(out - full).max()
    assert error["bias"] < 1e-5
    assert error["none"] > 0.01
