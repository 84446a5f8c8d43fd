"""Thin keys: which channels stay, what attention gives of them, beside which stores, and bytes."""

from __future__ import annotations

import numpy as np
import pytest
from passing import taken_and_stated
from plain_tiers import PlainThin
from test_cache import HEADS, Counted, arrays, decode, make, positions, run_prompt
from test_kivi import Plain as PlainKivi
from test_random_operations import halves

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.registry import techniques
from barefoot.kv import ruled
from barefoot.kv.cache import Cache
from barefoot.kv.channels import Channels
from barefoot.kv.layout import Layout, Workspace
from barefoot.kv.policies.h2o import H2O
from barefoot.kv.policies.scissorhands import Scissorhands
from barefoot.kv.policies.snapkv import SnapKV
from barefoot.kv.storage import Heads, Shape
from barefoot.kv.stores.f16 import HalfStore
from barefoot.kv.stores.kivi import Kivi
from barefoot.kv.stores.q8 import Int8Store
from barefoot.kv.stores.think import Think

KNOWN = {**techniques("kv.stores"), **techniques("kv.policies")}
THIN = Think(window=9, recent=6)  # 24 of 32 channels
RULES = (None, H2O(keep=20, recent=7), Scissorhands(keep=20, window=8, recent=3), SnapKV(keep=20, window=6, room=400))


@pytest.mark.parametrize("inner", [HalfStore(), Int8Store()], ids=str)
@pytest.mark.parametrize("policy", RULES, ids=str)
def test_what_attention_gives(policy, inner):
    """As full keys with zeros where channels went, their factor unchanged: prompts of several chunks, tokens between
    and behind; three query heads share a key head."""
    rng = np.random.default_rng(3)
    cache = make(policy, Think(inner, window=9, recent=6))
    plain = PlainThin(cache.layout)
    for n_prompt, n_steps in ((4, 1), (50, 30), (11, 9)):
        per_layer = [halves(rng, n_prompt, HEADS) for _ in range(2)]
        expected = [plain.prompt(layer, *each) for layer, each in enumerate(per_layer)]
        plain.done(n_prompt)
        for got, want in zip(run_prompt(cache, per_layer, 24), expected, strict=True):
            assert np.allclose(got, want, atol=5e-5 if inner.name == "f16" else 2e-2)  # queries meet q8 as integers
        for _ in range(n_steps):
            for layer in range(2):
                q, k, v = halves(rng, 1, HEADS)
                out = np.empty_like(q)
                cache.step(layer, q, k, v, out)
                want = plain.step(layer, q, k, v)
                assert np.allclose(out.reshape(1, 6, 32), want, atol=5e-5 if inner.name == "f16" else 2e-2)
            cache.stepped()
            plain.stepped()
            for layer in range(2):
                for head in range(2):
                    assert sorted(positions(cache, layer, head)) == sorted(plain.entries[layer][head])
    kept = cache.storage.channels.kept
    for layer, head in np.ndindex(2, 2):
        assert np.array_equal(kept[layer, head], plain.kept[layer, head])
    assert len({own.tobytes() for own in kept.reshape(4, -1)}) == 4  # each head has its own


def test_without_a_ratio_nothing_is_lost(isa):
    outs = []
    for store in (HalfStore(), Think(ratio=0)):
        cache, rng = make(H2O(keep=40), store), np.random.default_rng(2)
        outs.append(run_prompt(cache, [arrays(rng, 90) for _ in range(2)], 24))
        decode(cache, rng, 20)
        outs[-1] += run_prompt(cache, [arrays(rng, 10) for _ in range(2)], 24)
    for full, thin in zip(*outs, strict=True):
        assert np.abs(full - thin).max() < 1e-5


@pytest.mark.parametrize("n_prompt", [20, 90, 130])
def test_what_kivi_seals_is_thin(n_prompt):
    """Sealed keys without their channels, quantized as full ones, since each channel has its own range."""
    store, rng = Think(Kivi(residual=32, bits=4), window=9), np.random.default_rng(n_prompt)
    cache, plain = make(None, store, n_layers=1), PlainKivi(store.inner)
    prompt = arrays(rng, n_prompt)
    run_prompt(cache, [prompt], 24)
    squares = sum(np.square(k.reshape(2, 32).astype(np.float16).astype(float)) for k in prompt[1])
    for k, v in zip(*prompt[1:], strict=True):
        plain.add(k, v)
    kept = None
    for step in range(40):
        if kept is None and len(plain.keys) >= 32:
            if step:  # none of the prompt was sealed
                squares = np.square(np.array(plain.keys, float)).sum(axis=0)
            asked = np.square(prompt[0][-9:].reshape(-1, 2, 3, 32)).sum(axis=(0, 2))
            kept = np.sort(np.argsort(-asked * squares, axis=1)[:, :24], axis=1)
        before = plain.n_keys
        plain.seal()
        for head, at in np.ndindex(2, plain.n_keys - before):
            plain.keys[before + at][head][np.setdiff1d(np.arange(32), kept[head])] = 0
        q, k, v = arrays(rng, 1)
        out = np.empty_like(q)
        cache.step(0, q, k, v, out)
        plain.add(k, v)
        assert np.abs(out[0] - plain.attend(q)).max() < 2e-3
        cache.stepped()
    assert np.array_equal(cache.storage.channels.kept[0], kept)


def test_channels_are_those_that_the_last_queries_ask_for():
    """Not the largest keys, nor what earlier queries asked for: ‖q_c‖ ‖k_c‖ of the window."""
    heads = Heads(4, 2, 16, 1.0)
    rng = np.random.default_rng(1)
    q, k, v = arrays(rng, 60, heads)
    by_head = q.reshape(60, 2, 2, 16)
    k.reshape(60, 2, 16)[:, :, :4] *= 9  # large, and hardly asked for at the end
    by_head[:-5, :, :, :4] *= 9
    by_head[-5:, :, :, :4] *= 0.01
    by_head[-5:, 1, 1, 8:] *= 5  # one query head of two
    cache = make(None, Think(ratio=0.5, window=5, recent=3), heads, n_layers=1)
    run_prompt(cache, [(q, k, v)], 24)
    kept = cache.storage.channels.kept[0]
    assert kept[1].tolist() == list(range(8, 16))
    assert kept[0].min() >= 4
    first = kept.copy()
    run_prompt(cache, [(q[::-1].copy(), k, v)], 24)
    assert np.array_equal(cache.storage.channels.kept[0], first)  # what has gone is gone


def test_future_queries_see_less_error_than_with_other_channels():
    """The keys' norm alone and the lot lose more of the scores of queries that come later; large channels of queries
    and of keys are others."""
    rng = np.random.default_rng(5)
    of_q, of_k = (np.exp(rng.standard_normal(64)).astype(np.float32) for _ in range(2))
    q, k = (rng.standard_normal((400, 64)).astype(np.float32) * each for each in (of_q, of_k))
    heads = Heads(1, 1, 64, 1.0)
    channels = Channels(Shape(heads, 1, 400), Think(), Counted())
    channels.see(0, q[:300], 0)
    channels.choose(0, np.square(k).sum(axis=0)[None])
    asked_for = channels.kept[0, 0].copy()
    by_key = np.argsort(-np.square(k).sum(axis=0))[:40]
    lot = rng.permutation(64)[:40]

    def error(kept):
        return np.square(q[300:] @ k.T - q[300:, kept] @ k[:, kept].T).mean()

    assert len(asked_for) == 40
    assert error(asked_for) < 0.5 * error(by_key) < error(by_key) < error(lot)


@pytest.mark.parametrize(("n_slots", "store"), [(200, Think()), (20, Think()), (200, Think(Int8Store(), ratio=0.3))])
def test_bytes_are_those_that_were_stated(n_slots, store):
    heads = Heads(6, 2, 64, 0.7)
    layout = Layout(heads, 3, n_slots, None, store, 16)
    own = Counted()
    Cache(layout, Workspace(layout, Counted(), n_threads=1), own)
    kept, recent = {0.4: 40, 0.3: 48}[store.ratio], min(32, n_slots)  # 39 and 45, in eights
    row = {"f16": lambda d: 2 * d, "q8": lambda d: d + 2 * -(-d // 32)}[store.inner.name]
    keys = recent * 2 * 64 + (n_slots - recent) * row(kept)
    expected = 3 * 2 * (keys + n_slots * (row(64) + 4) + 2 * kept + 4 * 64)
    assert own.n_bytes == sum(term.bytes for term in layout.terms()) == expected


def test_bytes_over_kivi():
    shape, store = Shape(Heads(6, 2, 64, 0.7), 3, 256), Think(Kivi())
    thin, full = (
        {a.name: a.bytes for a in s.storage().arrays(shape, s)} for s in (store, store.inner)
    )  # two bits: a byte for four channels of a position, and 4 bytes a channel for 32 positions; 40 are 48 in words
    assert full["kv blocks of keys"] == 3 * 2 * 128 * 64 * (2 / 8 + 4 / 32)
    assert thin["kv blocks of keys"] == 3 * 2 * 128 * (48 * 2 / 8 + 40 * 4 / 32)
    assert {name: thin[name] for name in full if name != "kv blocks of keys"} == {
        name: n for name, n in full.items() if name != "kv blocks of keys"
    }


@pytest.mark.parametrize("heads", [Heads(9, 3, 64, 0.1), Heads(4, 1, 128, 0.1)], ids=str)
@pytest.mark.parametrize(
    ("policy", "store"),
    [(None, Think()), (H2O(keep=512), Think(Int8Store())), (SnapKV(keep=512), Think(Kivi()))],
    ids=str,
)
def test_passing_takes_what_is_stated(policy, store, heads):
    took, stated = taken_and_stated(policy, store, heads)
    assert 0.5 * stated < took < 1.02 * stated


def test_compositions():
    for text in ("think > q8", "h2o(keep=64) > think(ratio=0.5) > q8", "snapkv(keep=64) > think > kivi(bits=4)"):
        assert str(ruled.parse(text, KNOWN)) == text
    for text, printed in (("think", "think > f16"), ("h2o(keep=64) > think", "h2o(keep=64) > think > f16")):
        assert str(ruled.parse(text, KNOWN)) == printed
    for text, message in (
        ("h2o > think > kivi", "quantized many positions at a time"),
        ("think > think > q8", "can't take channels from think > q8"),
        ("q8 > think", "policies come first"),
        ("think > h2o", "policies come first"),
        ("snapkv(layers=pyramid) > think", "gives layers unequal room"),
        ("d2o > think", "can.t rewrite"),
    ):
        with pytest.raises(Incompatible, match=message):
            ruled.parse(text, KNOWN)


def test_knobs_out_of_range_are_refused():
    for knobs, message in (
        ({"ratio": 1.0}, "ratio must be 0 or more and below 1, got 1.0"),
        ({"ratio": -0.1}, "got -0.1"),
        ({"window": 0}, "window must be 1 or more, got 0"),
        ({"recent": 0}, "recent must be 1 or more, got 0"),
    ):
        with pytest.raises(InvalidInput, match=message):
            Think(**knobs)
