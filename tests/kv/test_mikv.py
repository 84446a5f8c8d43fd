"""What a policy sends away and mikv keeps: codes and balance, one softmax, and bytes."""

from __future__ import annotations

import numpy as np
import pytest
from passing import taken_and_stated
from plain_tiers import PlainDemoted
from test_cache import HEADS, Counted, arrays, decode, make, positions, run_prompt
from test_random_operations import halves

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.registry import techniques
from barefoot.kv import ruled
from barefoot.kv.cache import Cache
from barefoot.kv.demoting import balance
from barefoot.kv.layout import Layout, Workspace
from barefoot.kv.policies.h2o import H2O
from barefoot.kv.policies.random import Random
from barefoot.kv.policies.scissorhands import Scissorhands
from barefoot.kv.policies.sinks import Sinks
from barefoot.kv.policies.snapkv import SnapKV
from barefoot.kv.storage import Heads
from barefoot.kv.stores.f16 import HalfStore
from barefoot.kv.stores.mikv import MiKV
from barefoot.kv.stores.q8 import Int8Store
from barefoot.ops import kvrows

KNOWN = {**techniques("kv.stores"), **techniques("kv.policies")}
RULES = (
    Sinks(keep=20, first=3),
    H2O(keep=20, recent=7),
    Scissorhands(keep=20, window=8, recent=3),
    Scissorhands(keep=20, window=30, recent=0, drop=3),
    SnapKV(keep=20, window=6, kernel=3, room=400),
)


@pytest.mark.parametrize("store", [MiKV(), MiKV(bits=3), MiKV(bits=4, balance=False)], ids=str)
@pytest.mark.parametrize("policy", RULES, ids=str)
def test_what_attention_gives_and_what_is_demoted(policy, store):
    """All tokens in one softmax, those that went rounded once; scores are shares of all. Codes meet a token's queries
    as integers, a prompt's as they are."""
    rng = np.random.default_rng(3)
    cache = make(policy, store)
    plain = PlainDemoted(cache.layout)
    for n_prompt, n_steps in ((15, 4), (50, 40), (11, 9)):
        per_layer = [halves(rng, n_prompt, HEADS) for _ in range(2)]
        expected = [plain.prompt(layer, *each) for layer, each in enumerate(per_layer)]
        plain.done(n_prompt)
        for got, want in zip(run_prompt(cache, per_layer, 24), expected, strict=True):
            assert np.allclose(got, want, atol=5e-5)
        for _ in range(n_steps):
            for layer in range(2):
                q, k, v = halves(rng, 1, HEADS)
                out = np.empty_like(q)
                cache.step(layer, q, k, v, out)
                assert np.allclose(out.reshape(1, 6, 32), plain.step(layer, q, k, v), atol=2e-2)
            cache.stepped()
            plain.stepped()
            for layer, head in np.ndindex(2, 2):
                assert sorted(positions(cache, layer, head)) == sorted(plain.candidates(layer, head))
    codes = cache.storage.codes
    assert codes.n(1) == 129 - len(positions(cache, 1, 0))
    for layer, head in np.ndindex(2, 2):
        gone = plain.demoted[layer, head]
        assert sorted(codes.position(layer)[head]) == sorted(gone)
        for slot, p in enumerate(codes.position(layer)[head]):
            row = kvrows.decode(f"q{store.bits}", codes.regions[layer].values[head, slot], 32)
            assert np.array_equal(row, plain.entries[layer][head][p][1])


def test_where_all_stays_nothing_is_demoted():
    outs = []
    for store in (HalfStore(), MiKV()):
        cache, rng = make(H2O(keep=200), store), np.random.default_rng(2)
        outs.append(run_prompt(cache, [arrays(rng, 90) for _ in range(2)], 24))
        decode(cache, rng, 20)
        outs[-1] += run_prompt(cache, [arrays(rng, 10) for _ in range(2)], 24)
    assert all(np.array_equal(full, same) for full, same in zip(*outs, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_where_one_entry_stays_all_others_are_rounded_rows(bits):
    """The other end: as a store of that many bits, but for the last entry."""
    rng = np.random.default_rng(2)
    prompt = [arrays(rng, 90)]
    mixed = make(Random(keep=1, recent=1), MiKV(bits=bits, balance=False), n_layers=1)
    plain = make(None, KNOWN[f"q{bits}"](), n_layers=1)
    for cache in (mixed, plain):
        run_prompt(cache, prompt, 24)
    stored, codes = plain.storage.regions[0], mixed.storage.codes
    for head in range(2):
        at = codes.position(0)[head]
        assert sorted(at) == list(range(89))
        for rows, theirs in ((codes.regions[0].keys, stored.keys), (codes.regions[0].values, stored.values)):
            assert np.array_equal(rows[head, :89], theirs[head, at])


def test_what_is_lost_comes_back_in_part():
    """Attention to what went: with codes of 4 bits nearly as with all, without them not at all."""
    rng, errors = np.random.default_rng(2), {}
    prompt, (q, k, v) = [arrays(rng, 90)], arrays(rng, 1)
    q[:] = np.repeat(prompt[0][1][5].reshape(2, 1, 32), 3, axis=1).reshape(-1)  # asks for token 5
    for name, policy, store in (
        ("all", None, HalfStore()),
        ("mikv", Sinks(keep=20), MiKV(bits=4)),
        ("sinks", Sinks(keep=20), HalfStore()),
    ):
        cache, out = make(policy, store, n_layers=1), np.empty_like(q)
        run_prompt(cache, prompt, 24)
        cache.step(0, q, k, v, out)
        errors[name] = np.abs(out - np.repeat(prompt[0][2][5].reshape(2, 1, 32), 3, axis=1).reshape(-1)).mean()
    assert errors["all"] < 0.05
    assert errors["mikv"] < 0.2
    assert errors["sinks"] > 0.7


def test_balance_makes_room_for_small_channels():
    """Of keys with a few large channels that queries hardly ask for: less error of scores than without."""
    rng = np.random.default_rng(4)
    q, k, v = arrays(rng, 200)
    k.reshape(-1, 2, 32)[..., ::7] *= 20
    q.reshape(-1, 2, 3, 32)[..., ::7] *= 0.05
    errors = []
    for store in (MiKV(), MiKV(balance=False)):
        cache = make(Sinks(keep=8), store, n_layers=1)
        run_prompt(cache, [(q[:150], k[:150], v[:150])], 24)
        (part,) = cache.storage.parts(0)[1:]
        queries = q[150:] if part.query is None else part.query(q[150:].copy())
        codes = cache.storage.codes
        total = 0.0
        for head in range(2):
            keys = kvrows.decode("q2", codes.regions[0].keys[head, : codes.n(0)], 32)
            exact = k.reshape(-1, 2, 32)[codes.position(0)[head], head]
            got = np.einsum("tgd,nd->tgn", queries.reshape(50, 2, 3, 32)[:, head], keys)
            want = np.einsum("tgd,nd->tgn", q[150:].reshape(50, 2, 3, 32)[:, head], exact)
            total += np.square(got - want).mean()
        errors.append(total)
    assert errors[0] < 0.2 * errors[1]


def test_the_first_prompt_says_the_balance():
    rng = np.random.default_rng(4)
    cache = make(Sinks(keep=8), MiKV(), n_layers=1)
    q, k, v = arrays(rng, 50)
    run_prompt(cache, [(q, k, v)], 24)
    largest = np.abs(q).reshape(50, 2, 3, 32).max(axis=(0, 2)), np.abs(k).reshape(50, 2, 32).max(axis=0)
    part = cache.storage.parts(0)[1]
    ones = np.ones((1, 192), np.float32)
    factors = part.query(ones).reshape(2, 3, 32)
    assert np.allclose(factors, np.sqrt(largest[1] / largest[0])[:, None], rtol=1e-3)
    run_prompt(cache, [(9 * q, k, v)], 24)
    assert np.array_equal(cache.storage.parts(0)[1].query(ones).reshape(2, 3, 32), factors)
    odd = np.array([0, 1, np.inf, np.nan, 4], np.float32)
    assert balance(odd, np.array([1, 0, 1, 1, 1], np.float32)).tolist() == [1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("policy", "n_slots", "n_codes"),
    [
        (H2O(keep=50), 51, 150),
        (Scissorhands(keep=50, drop=20), 51, 200 - 31),
        (SnapKV(keep=50, room=30), 80, 150),
        (H2O(keep=500), 200, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("store", [MiKV(), MiKV(Int8Store(), bits=3), MiKV(bits=4, balance=False)], ids=str)
def test_bytes_are_those_that_were_stated(policy, n_slots, n_codes, store):
    heads = Heads(6, 2, 64, 0.7)
    layout = Layout(heads, 3, 200, policy, store, 16)
    own = Counted()
    Cache(layout, Workspace(layout, Counted(), n_threads=1), own)
    kept = 2 * {"f16": 128, "q8": 68}[store.inner.name] + 4
    kept += 4 if policy.name == "h2o" else 2 * policy.n_parts if policy.name == "scissorhands" else 0
    codes = 2 * (store.bits * 8 + 2 * 4) + 4
    expected = 3 * 2 * (n_slots * kept + n_codes * codes + 4 * 64 * store.balance)
    assert own.n_bytes == sum(term.bytes for term in layout.terms()) == expected


def test_a_context_can_be_filled():
    """The last token's place is there, whatever went."""
    for policy in RULES:
        cache, rng = make(policy, MiKV(), context=120), np.random.default_rng(1)
        run_prompt(cache, [arrays(rng, 70) for _ in range(2)], 24)
        decode(cache, rng, 30)
        run_prompt(cache, [arrays(rng, 12) for _ in range(2)], 24)
        decode(cache, rng, 8)
        kept, codes = cache.storage.kept, cache.storage.codes
        n_free = int(kept.free[0, 0] >= 0)
        assert kept.n(0) - n_free + codes.n(0) == cache.n_tokens == 120


@pytest.mark.parametrize("heads", [Heads(9, 3, 64, 0.1), Heads(4, 1, 128, 0.1)], ids=str)
@pytest.mark.parametrize(
    ("policy", "store"), [(H2O(keep=512), MiKV()), (Sinks(keep=2000), MiKV(Int8Store(), bits=3))], ids=str
)
def test_passing_takes_what_is_stated(policy, store, heads):
    took, stated = taken_and_stated(policy, store, heads)
    assert 0.5 * stated < took < 1.02 * stated


def test_compositions():
    for text in ("h2o(keep=64) > mikv(bits=3) > q8", "snapkv > mikv > f16"):
        assert str(ruled.parse(text, KNOWN)) == text
    assert str(ruled.parse("h2o > mikv", KNOWN)) == "h2o > mikv > f16"
    for text, message in (
        ("mikv", "needs a policy"),
        ("h2o > mikv > kivi", "can't demote entries of kivi"),
        ("h2o > mikv > think", "can't demote entries of think > f16"),
        ("h2o > think > mikv", "can't take channels from mikv > f16"),
        ("snapkv(layers=pyramid) > mikv", "gives layers unequal room"),
        ("d2o > mikv", "can.t rewrite"),
        ("sinks(rope=slot) > mikv", "has among others"),
    ):
        with pytest.raises(Incompatible, match=message):
            ruled.parse(text, KNOWN)
    with pytest.raises(InvalidInput, match="bits must be 2, 3 or 4, got 8"):
        MiKV(bits=8)
    with pytest.raises(Incompatible, match="needs a policy"):
        ruled.Ruled(None, MiKV())
