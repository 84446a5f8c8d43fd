"""MiniCache: interpolated directions, what stays exact, pairs that choose together, and bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plain_cache import PlainCache
from plain_pairs import MASS, MERGED, PlainPairs
from test_cache import Counted, arrays, run_prompt

from barefoot import ops
from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.measure import TracedPeak
from barefoot.core.registry import techniques
from barefoot.kv import ruled
from barefoot.kv.cache import Cache
from barefoot.kv.layout import Layout, Workspace
from barefoot.kv.policies.h2o import H2O
from barefoot.kv.policies.scissorhands import Scissorhands
from barefoot.kv.policies.sinks import Sinks
from barefoot.kv.policies.snapkv import SnapKV
from barefoot.kv.ruled import Ruled
from barefoot.kv.storage import Heads
from barefoot.kv.stores.f32 import FloatStore
from barefoot.kv.stores.kivi import Kivi
from barefoot.kv.stores.minicache import MiniCache, angles, slerp
from barefoot.kv.stores.q4 import Int4Store
from barefoot.kv.stores.q8 import Int8Store
from barefoot.ops import kvrows

HEADS = Heads(n_heads=6, n_kv_heads=2, head_dim=32, scale=0.7)
WHOLE = MiniCache(start=0, inner=FloatStore())  # directions aren't rounded
POLICIES = (None, Sinks(keep=20, first=3), H2O(keep=20, recent=7), SnapKV(keep=20, window=6, kernel=3, room=400))


def make(store, policy=None, heads=HEADS, n_layers=2, context=400, chunk=24):
    layout = Layout(heads, n_layers, context, policy, store, chunk)
    return Cache(layout, Workspace(layout, Counted(), ops.n_threads()), Counted())


def the_pair(cache, i=0):
    return cache.storage._pairs._pairs[i]


def step(cache, per_layer):
    """Outputs of each layer, (1, n_heads, head_dim)."""
    outs = []
    for layer, (q, k, v) in enumerate(per_layer):
        out = np.empty_like(q)
        cache.step(layer, q, k, v, out)
        outs.append(out.reshape(1, -1, cache.layout.heads.head_dim))
    cache.stepped()
    return outs


# --- directions ---


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 0.6, 1.0])
def test_a_direction_lies_at_t_of_the_way_between(t):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 50, 16)).astype(np.float32)
    found, whole = slerp(a, b, t), angles(a, b)
    assert np.allclose(np.linalg.norm(found.direction, axis=1), 1, atol=1e-6)
    # Where t is 0 or 1, the arc cosine near 1 turns a rounding of 1e-7 into its root.
    assert np.allclose(angles(a, found.direction), t * whole, atol=1e-3)
    assert np.allclose(angles(found.direction, b), (1 - t) * whole, atol=1e-3)
    assert np.allclose(found.lengths, [np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)], rtol=1e-6)


@pytest.mark.parametrize("factor", [1, 0.01, 300, -1])
def test_multiples_of_a_row_come_back(factor):
    """x and a x: the same direction, or for -1 opposite ones, of which the nearer layer's stays."""
    rows = np.random.default_rng(1).standard_normal((40, 24)).astype(np.float32)
    found = slerp(rows, np.float32(factor) * rows, 0.6)
    own = found.lengths[..., None] * found.direction
    assert np.allclose(own[1], factor * rows, rtol=1e-3)
    assert np.allclose(own[0], np.sign(factor) * rows, rtol=1e-3)


def test_edges_of_angles():
    """Rows of zeros, opposite ones half way, nearly equal and nearly opposite ones: unit vectors, and no warning."""
    x, y = np.eye(2, dtype=np.float32)
    zero, near = np.zeros(2, np.float32), np.array([1, 1e-4], np.float32)
    for a, b, t, expected in (
        (x, y, 0.5, (x + y) / np.sqrt(2)),
        (x, -x, 0.5, -x),
        (x, -x, 0.3, x),
        (zero, y, 0.6, y),
        (x, zero, 0.6, x),
        (x, zero, 1.0, x),
        (zero, zero, 0.6, zero),
        (x, near, 0.6, x),
        (-x, near, 0.6, x),
    ):
        found = slerp(a[None], b[None], t)
        assert np.allclose(found.direction[0], expected, atol=1e-3), (a, b, t)
        assert np.allclose(found.lengths[:, 0], [np.linalg.norm(a), np.linalg.norm(b)])
    assert np.allclose(angles(np.stack([x, x, x, zero]), np.stack([x, -x, y, x])), [0, np.pi, np.pi / 2, 0])


def test_turning_commutes_with_it():
    """Keys are merged behind RoPE: both layers turn them alike."""
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 30, 12)).astype(np.float32)
    turn = np.linalg.qr(rng.standard_normal((12, 12)))[0].astype(np.float32)
    assert np.allclose(slerp(a @ turn, b @ turn, 0.6).direction, slerp(a, b, 0.6).direction @ turn, atol=1e-5)


# --- what a cache keeps, and what attention gives ---


@pytest.mark.parametrize("inner", [FloatStore(), Int8Store()], ids=str)
def test_layers_that_are_multiples_lose_nothing(inner):
    """x of one layer and a x of the other, a of each token: as two layers by themselves would give. The mean of both
    rows, or one layer's for both, is far off."""
    rng = np.random.default_rng(3)
    q, k, v = arrays(rng, 90)
    a = np.exp(rng.standard_normal((90, 1))).astype(np.float32)
    a[a < 1] *= 0.5
    per_layer = [(q, k, v), (q, a * k, a * v)]
    token = [arrays(rng, 1) for _ in range(2)]

    def answers(store):
        cache = make(store)
        run_prompt(cache, per_layer, 24)
        return np.array(step(cache, token))

    expected = answers(inner)
    apart = np.abs(answers(MiniCache(start=0, retain=0, recent=1, inner=inner)) - expected).max()
    # Rows pass in half precision, and 8 bits of a group are 1/254 of its largest.
    bound = 1e-3 if inner.name == "f32" else 2e-2
    assert apart < bound * np.abs(expected).max()

    class Mean(MiniCache):
        def merge(self, first, second):
            found = super().merge(first, second)
            return found._replace(direction=(first + second) / 2, lengths=np.ones_like(found.lengths))

    imitated = np.abs(answers(Mean(start=0, retain=0, recent=1, inner=inner)) - expected).max()
    assert imitated > 0.2 * np.abs(expected).max()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize(("retain", "recent"), [(0, 1), (0.05, 4), (0.3, 2), (0.95, 40)])
def test_what_is_kept_and_what_attention_gives(policy, retain, recent, isa):
    """Two prompts with decoding in between and behind: the same entries, the same ones exact, the same outputs."""
    rng = np.random.default_rng(4)
    cache = make(replace(WHOLE, retain=retain, recent=recent), policy)
    plain = PlainPairs(cache.layout)
    for n_prompt, n_steps in ((15, 4), (50, 30), (11, 9)):
        per_layer = [arrays(rng, n_prompt) for _ in range(2)]
        assert np.allclose(run_prompt(cache, per_layer, 24), plain.prompt(per_layer), atol=1e-4)
        check(cache, plain)
        for _ in range(n_steps):
            token = [arrays(rng, 1) for _ in range(2)]
            expected = [plain.step(which, *each) for which, each in enumerate(token)]
            assert np.allclose(step(cache, token), expected, atol=1e-4)
            plain.stepped()
            check(cache, plain)
    assert cache.n_tokens == plain.n_tokens == 119


def check(cache, plain, first=0):
    """The same entries, and of these the same ones merged."""
    pair = the_pair(cache)
    for head, there in enumerate(plain.heads):
        merged, exact = pair.position[head, : pair.n_merged], pair.position[head, pair.n_merged : pair.n]
        assert sorted(merged) == sorted(p for p, e in there.items() if e[MERGED])
        assert sorted(exact) == sorted(p for p, e in there.items() if not e[MERGED])
        if pair.mass is not None:
            observed = [there[p][MASS] for p in pair.position[head, : pair.n]]
            assert np.allclose(pair.mass[head, : pair.n], observed, atol=1e-3)
    for layer in (first, first + 1):
        assert cache.storage.n(layer) == pair.n


def test_what_differs_most_stays_exact():
    """A tenth of the entries has nothing in common in both layers, in the one key head's keys, the other one's values;
    these are the ones that stay, bit by bit; a cache without them is off."""
    rng = np.random.default_rng(5)
    q, k, v = arrays(rng, 100)
    odd = rng.permutation(100)[:10]
    others = k.copy(), v.copy()
    others[0][odd, :32], others[1][odd, 32:] = rng.standard_normal((2, 10, 32))
    cache = make(MiniCache(start=0, retain=0.05, recent=8), context=200)
    run_prompt(cache, [(q, k, v), (q, *others)], 24)
    pair = the_pair(cache)
    for head in range(2):
        there = pair.position[head, pair.n_merged : pair.n]
        assert sorted(there) == sorted(odd)
        for which, rows in enumerate(((k, v), others)):
            for i, whole in enumerate(rows):
                expected = whole.reshape(100, 2, 32)[there, head].astype(np.float16)
                assert np.array_equal(pair.exact[which, i, head, : pair.n_exact].view(np.float16), expected)


def test_directions_are_rows_of_the_wrapped_store():
    rng = np.random.default_rng(6)
    per_layer = [arrays(rng, 60) for _ in range(2)]
    cache = make(MiniCache(start=0, retain=0, recent=1, inner=Int4Store()))
    run_prompt(cache, per_layer, 24)
    pair = the_pair(cache)
    for i in (0, 1):
        first, second = (each[1 + i].reshape(60, 2, 32)[:, 1].astype(np.float16) for each in per_layer)
        order = pair.position[1, :60]
        found = slerp(first[order].astype(np.float32), second[order].astype(np.float32), 0.6)
        assert np.array_equal(pair.directions[i, 1, :60], kvrows.encode("q4", found.direction))
        assert np.array_equal(pair.lengths[:, i, 1, :60], found.lengths)


def test_a_pair_chooses_by_the_sum_of_both_layers():
    """Each layer looks at a position of its own; each alone would keep only that one of both."""
    rng, heads = np.random.default_rng(7), Heads(1, 1, 16, 1.0)
    q, k, v = arrays(rng, 40, heads)
    k *= 0.01
    looks = [q.copy(), q.copy()]
    keys = [k.copy(), k.copy()]
    for which, position in enumerate((5, 9)):
        keys[which][position] = looks[which][position:] = np.eye(16, dtype=np.float32)[which] * 3
    per_layer = [(looks[i], keys[i], v) for i in range(2)]
    cache = make(MiniCache(start=0), H2O(keep=4, recent=1), heads)
    run_prompt(cache, per_layer, 24)
    together = set(cache.storage.position(1)[0].tolist())
    assert {5, 9} < together
    alone = [make(FloatStore(), H2O(keep=4, recent=1), heads, n_layers=1) for _ in range(2)]
    masses = []
    for one, layer in zip(alone, per_layer, strict=True):
        run_prompt(one, [layer], 24)
        masses.append(dict(zip(one.storage.position(0)[0].tolist(), one.storage.mass(0)[0], strict=True)))
    mass = dict(zip(cache.storage.position(0)[0].tolist(), cache.storage.mass(0)[0], strict=True))
    both = [p for p in mass if p in masses[0] and p in masses[1]]
    assert len(both) >= 2
    for p in both:
        assert mass[p] == pytest.approx(masses[0][p] + masses[1][p], rel=1e-4)


def test_strikes_of_both_layers_count():
    """Each token looks at position 3 alone: others have a strike of each in each layer, since they came. Of the prompt
    only its last query is among those that will count when the first entry goes."""
    rng, heads = np.random.default_rng(8), Heads(1, 1, 16, 1.0)
    cache = make(MiniCache(start=0), Scissorhands(keep=12, window=6, recent=2, drop=6), heads)
    q, k, v = arrays(rng, 12, heads)
    q[:] = k[3] = np.eye(16, dtype=np.float32)[0] * 4
    k[np.arange(12) != 3] *= 0.01
    run_prompt(cache, [(q[:8], k[:8], v[:8])] * 2, 24)
    for t in range(8, 12):
        step(cache, [(q[t, None], k[t, None], v[t, None])] * 2)
    strikes = dict(zip(cache.storage.position(0)[0].tolist(), cache.storage.strikes(0).sum(0)[0].tolist(), strict=True))
    assert [strikes[p] for p in (0, 3, 7, 8, 9, 11)] == [10, 0, 10, 8, 6, 2]


# --- going back, forks, and random operations ---


def test_operations(isa):
    """Three layers, two of them a pair; several caches, against plain models."""
    small = Heads(n_heads=2, n_kv_heads=2, head_dim=8, scale=1.0)
    store = replace(WHOLE, start=1, retain=0.2, recent=3)
    for policy in (None, H2O(keep=9, recent=3), SnapKV(keep=9, window=3, kernel=3, room=12)):
        rng, layout = np.random.default_rng(9), Layout(small, 3, 40, policy, store, 16)
        of_first, of_pair = replace(layout, n_layers=1, store=FloatStore()), replace(layout, n_layers=2)
        own = [Counted() for _ in range(3)]
        workspace = Workspace(layout, Counted(), ops.n_threads())
        caches = [Cache(layout, workspace, take) for take in own]
        plain = [(PlainCache(of_first), PlainPairs(of_pair)) for _ in caches]
        done = dict.fromkeys(("prompt", "token", "fork", "back", "clear"), 0)
        for _ in range(400):
            i = int(rng.integers(3))
            cache, (single, pair) = caches[i], plain[i]
            what = str(rng.choice(["prompt", "token", "fork", "back", "clear"], p=[0.12, 0.62, 0.1, 0.12, 0.04]))
            n = int(rng.integers(1, 12))
            if what == "prompt" and n <= 40 - pair.n_tokens:
                per_layer = [arrays(rng, n, small) for _ in range(3)]
                expected = [single.prompt(0, *per_layer[0]), *pair.prompt(per_layer[1:])]
                single.done(n)
                assert np.allclose(run_prompt(cache, per_layer, 16), expected, atol=1e-4)
            elif what == "token" and pair.n_tokens < 40 and len(pair.heads[0]) < layout.n_slots:
                token = [[x.astype(np.float16).astype(np.float32) for x in arrays(rng, 1, small)] for _ in range(3)]
                expected = [single.step(0, *token[0]), *(pair.step(j, *token[1 + j]) for j in range(2))]
                cache.check_step()
                assert np.allclose(step(cache, token), expected, atol=1e-4)
                single.stepped()
                pair.stepped()
            elif what == "fork":
                into = int(rng.integers(3))
                if into != i:
                    cache.fork(caches[into])
                    plain[into] = (single.fork(), pair.fork())
            elif what == "back":
                n = int(rng.integers(max(0, pair.n_tokens - 4), pair.n_tokens + 1))
                if not single.can_trim(n):
                    with pytest.raises(InvalidInput, match="can't go back"):
                        cache.trim(n)
                elif n:
                    cache.trim(n)
                    single.trim(n)
                    pair.trim(n)
            elif what == "clear":
                cache.clear()
                plain[i] = (PlainCache(of_first), PlainPairs(of_pair))
            else:
                continue
            done[what] += 1
            for each, (of_single, of_both) in zip(caches, plain, strict=True):
                assert each.n_tokens == of_single.n_tokens == of_both.n_tokens
                check(each, of_both, first=1)
        assert min(done.values()) > 8, done
        assert {take.n_bytes for take in own} == {sum(term.bytes for term in layout.terms())}


# --- bytes ---


@pytest.mark.parametrize("inner", [FloatStore(), Int8Store(), Int4Store()], ids=str)
@pytest.mark.parametrize("policy", [*POLICIES, Scissorhands(keep=40, window=31, recent=3, drop=7)], ids=str)
@pytest.mark.parametrize("n_layers", [1, 6, 7])
def test_bytes_are_those_that_were_stated(inner, policy, n_layers):
    """And those of the formula: H = 2 key heads, 2 pairs where there are 6 layers or 7."""
    store = MiniCache(retain=0.1, recent=5, inner=inner)
    layout = Layout(HEADS, n_layers, 200, policy, store, 16)
    shared, own = Counted(), Counted()
    Cache(layout, Workspace(layout, shared, n_threads=2), own)
    assert own.n_bytes == sum(term.bytes for term in layout.terms())
    assert shared.n_bytes == sum(array.bytes for array in layout.shared(2))
    n = 200 if policy is None else policy.slots(200)
    n_pairs = {1: 0, 6: 1, 7: 2}[n_layers]
    row = {"f32": 128, "q8": 34, "q4": 20}[inner.name]
    kept = 4 + 4 * (layout.observes == "mass") + 2 * layout.n_parts
    exact = int(0.1 * n) + 5
    pair = 2 * ((n - exact) * (2 * row + 16) + exact * (8 * 32 + 4) + kept * n)
    single = 2 * n * (2 * row + kept)
    assert own.n_bytes == n_pairs * pair + (n_layers - 2 * n_pairs) * single


def test_both_layers_of_a_pair_are_staged():
    shared = [
        {a.name: a.bytes for a in Layout(HEADS, 4, 100, None, store, 16).shared(1)}
        for store in (FloatStore(), MiniCache(), MiniCache(start=4))
    ]
    assert shared[1]["kv staging"] == 2 * shared[0]["kv staging"] == 2 * 2 * 100 * 64
    assert shared[2]["kv staging"] == shared[0]["kv staging"]


@pytest.mark.parametrize("heads", [Heads(9, 3, 64, 0.1), Heads(4, 1, 128, 0.1), Heads(8, 8, 64, 0.1)], ids=str)
@pytest.mark.parametrize("policy", [None, H2O(keep=512), SnapKV(keep=1024)], ids=str)
def test_placing_takes_what_is_stated(policy, heads):
    """A prompt that fills the context, as numpy allocates for it."""
    n, store = 8192, MiniCache(start=0, inner=Int8Store())
    rng = np.random.default_rng(1)
    took = []
    for size in (600, n):
        cache = make(store, policy, heads, context=n + 3, chunk=64)
        cache.begin(size)
        q, k, v = arrays(rng, 64, heads)
        for layer in range(2):
            cache.prefill(layer, q, k, v, np.empty_like(q))
            rows = cache._staging_of(layer)
            for start in range(64, size, 64):  # what attention would do here is not looked at
                k, v = arrays(rng, 64, heads)[1:]
                ops.kv_append(k, v, rows.keys, rows.values, "f16", n + 3, start)
            cache._staged[:] = size
            if layer == 0:
                cache.settle(0)
        cache._work.observed[...] = rng.random(cache._work.observed.shape)
        with TracedPeak() as settling:
            cache.settle(1)
        took.append(settling.result.peak - settling.result.before)
    stated = cache.layout.passing().bytes
    assert 0.6 * stated < took[1] < 1.02 * stated


# --- what goes together ---


def parse(text):
    return ruled.parse(text, {**techniques("kv.stores"), **techniques("kv.policies")})


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("minicache", "minicache > f16"),
        ("minicache(t=0.5,retain=0.1) > q8", "minicache(t=0.5,retain=0.1) > q8"),
        ("h2o(keep=512) > minicache(start=none)", "h2o(keep=512) > minicache > f16"),
        ("snapkv > minicache(start=4) > q4", "snapkv > minicache(start=4) > q4"),
    ],
)
def test_compositions_are_read_and_printed(text, printed):
    found = parse(text)
    assert str(found) == printed
    assert parse(printed) == found
    store = found.store if isinstance(found, Ruled) else found
    assert isinstance(store, MiniCache)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("minicache > kivi", "can't keep directions in kivi: they come one by one"),
        ("minicache > think > q8", "can't keep directions in think > q8"),
        ("think > minicache", "think can't take channels from minicache > f16"),
        ("d2o > minicache", "lets entries join others, which minicache > f16 can't rewrite"),
        ("sinks(rope=slot) > minicache", "turns queries to its first entries, which minicache > f16 has among others"),
        ("minicache > h2o", "policies come first"),
        ("q8 > minicache", "policies come first"),
        ("h2o(layers=pyramid) > minicache", "unequal room, which minicache > f16 can't share"),
    ],
)
def test_what_does_not_go_together_is_refused(text, message):
    with pytest.raises(Incompatible, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("minicache(start=-1)", "start must be 0 or more, got -1"),
        ("minicache(t=1.5)", "t must lie between 0 and 1, got 1.5"),
        ("minicache(retain=1.0)", "retain must be 0 or more and less than 1, got 1.0"),
        ("minicache(recent=0)", "recent must be 1 or more, got 0"),
        ("minicache(inner=q8)", "inner"),
    ],
)
def test_knobs_out_of_range_are_refused(text, message):
    with pytest.raises(InvalidInput, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("start", "n_layers", "groups"),
    [
        (None, 6, [[0], [1], [2], [3], [4, 5]]),
        (None, 4, [[0], [1], [2, 3]]),
        (None, 3, [[0], [1, 2]]),
        (0, 3, [[0], [1, 2]]),
        (0, 2, [[0, 1]]),
        (1, 2, [[0], [1]]),
        (9, 2, [[0], [1]]),
    ],
)
def test_which_layers_are_pairs(start, n_layers, groups):
    """From the start on, and the deepest layer is always in one."""
    assert [list(group) for group in MiniCache(start=start).groups(n_layers)] == groups


def test_kivi_still_reads():
    assert parse("snapkv(keep=1024) > kivi(bits=4)") == Ruled(SnapKV(keep=1024), Kivi(bits=4))
