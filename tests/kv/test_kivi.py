"""Sealed storage: when keys and values are quantized, what attention gives of them, and bytes."""

from __future__ import annotations

import numpy as np
import pytest
from test_cache import Counted, arrays, run_prompt

from barefoot import ops
from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.registry import techniques
from barefoot.engine.specs import spec_from_config
from barefoot.kv import ruled
from barefoot.kv.cache import Cache
from barefoot.kv.layout import Layout, Workspace
from barefoot.kv.policies.h2o import H2O
from barefoot.kv.policies.snapkv import SnapKV
from barefoot.kv.storage import Heads
from barefoot.kv.stores.kivi import Kivi
from barefoot.ops import kvblocks, kvrows

HEADS = Heads(n_heads=6, n_kv_heads=2, head_dim=32, scale=0.7)


def make(store, policy=None, context=600, n_layers=2):
    layout = Layout(HEADS, n_layers, context, policy, store, 40)
    return Cache(layout, Workspace(layout, Counted(), ops.n_threads()), Counted())


class Plain:
    """Rows of every position as float16, quantized as the brief of the paper says, by list."""

    def __init__(self, store):
        self.store, self.keys, self.values = store, [], []
        self.n_keys = self.n_values = 0

    def add(self, k, v):
        self.keys.append(k.reshape(2, 32).astype(np.float16).astype(np.float32))
        self.values.append(v.reshape(2, 32).astype(np.float16).astype(np.float32))

    def seal(self):
        """What the next entry makes room by."""
        store = self.store
        while len(self.keys) - self.n_keys >= store.residual:
            for first in range(self.n_keys, self.n_keys + store.residual, store.group):
                block = np.stack(self.keys[first : first + store.group], axis=1)  # head, position, channel
                rounded = kvblocks.decode(store.bits, kvblocks.encode(store.bits, block), store.group, 32)
                self.keys[first : first + store.group] = list(rounded.swapaxes(0, 1))
            self.n_keys += store.residual
        while len(self.values) - self.n_values >= store.residual + 32:
            for at in range(self.n_values, self.n_values + 32):
                fmt = f"q{store.bits}"
                self.values[at] = kvrows.decode(fmt, kvrows.encode(fmt, self.values[at]), 32)
            self.n_values += 32

    def attend(self, q):
        keys, values = (np.array(rows, np.float64).transpose(1, 0, 2) for rows in (self.keys, self.values))
        scores = np.einsum("grd,gnd->grn", q.reshape(2, 3, 32).astype(np.float64), keys) * HEADS.scale
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.einsum("grn,gnd->grd", weights, values).reshape(-1)


@pytest.mark.parametrize("store", [Kivi(residual=32), Kivi(bits=4, group=64, residual=64), Kivi(bits=3, residual=96)])
@pytest.mark.parametrize("n_prompt", [1, 31, 32, 33, 127, 200, 321])
def test_what_is_sealed_and_when(store, n_prompt, isa):
    """A prompt is attended to as it came; behind it and while decoding, what has waited is quantized."""
    rng = np.random.default_rng(n_prompt)
    cache, plain = make(store, n_layers=1), Plain(store)
    prompt = arrays(rng, n_prompt)
    (out,) = run_prompt(cache, [prompt], 40)
    for t, (q, k, v) in enumerate(zip(*prompt, strict=True)):
        plain.add(k, v)
        if t in (0, n_prompt // 2, n_prompt - 1):
            assert np.allclose(out[t].reshape(-1), plain.attend(q), atol=2e-5)
    for _ in range(store.residual + 40):
        q, k, v = arrays(rng, 1)
        got = np.empty_like(q)
        cache.step(0, q, k, v, got)
        plain.seal()
        plain.add(k, v)
        assert np.abs(got[0] - plain.attend(q)).max() < 2e-3  # queries and weights of codes are rounded to 16 bits
        cache.stepped()
        storage = cache.storage
        assert (storage._n_keys[0], storage._n_values[0]) == (plain.n_keys, plain.n_values)
    n = len(plain.keys)
    assert n - plain.n_keys == (n - 1) % store.residual + 1
    assert store.residual < n - plain.n_values <= store.residual + 32


@pytest.mark.parametrize("store", [Kivi(), Kivi(bits=4, group=64, residual=64)])
@pytest.mark.parametrize("policy", [None, SnapKV(keep=200, room=56)])
def test_bytes_are_those_that_were_stated(store, policy):
    layout = Layout(HEADS, 3, 600, policy, store, 16)
    own = Counted()
    Cache(layout, Workspace(layout, Counted(), 1), own)
    assert own.n_bytes == sum(term.bytes for term in layout.terms())
    slots = 600 if policy is None else 256
    heads = 3 * 2
    # Keys, and then values, when all slots are taken.
    n_sealed = {(600, 128): 512, (600, 64): 576, (256, 128): 128, (256, 64): 192}[slots, store.residual]
    codes, ranges = n_sealed * 32 * store.bits // 8, n_sealed // store.group * 4 * 32
    n_sealed = {(600, 128): 448, (600, 64): 512, (256, 128): 96, (256, 64): 160}[slots, store.residual]
    values = n_sealed * (32 * store.bits // 8 + 4)
    last = 2 * 32 * (store.residual + store.residual + 32)
    positions = 4 * slots if policy else 0  # without a policy, entries are where they came
    assert own.n_bytes == heads * (codes + ranges + values + last + positions)


def test_a_selection_is_quantized_behind_it():
    rng, store = np.random.default_rng(2), Kivi(residual=32)
    cache = make(store, SnapKV(keep=100, window=8, room=40), n_layers=1)
    prompt = arrays(rng, 300)
    run_prompt(cache, [prompt], 40)
    kept = cache.storage.position(0)
    assert kept.shape == (2, 100)
    plain = Plain(store)
    for i in range(100):
        rows = [np.stack([x.reshape(300, 2, 32)[kept[h, i], h] for h in range(2)]) for x in prompt[1:]]
        plain.add(*rows)
    q, k, v = arrays(rng, 1)
    got = np.empty_like(q)
    cache.step(0, q, k, v, got)
    plain.seal()
    plain.add(k, v)
    assert np.abs(got[0] - plain.attend(q)).max() < 2e-3
    cache.stepped()
    with pytest.raises(InvalidInput, match="40 tokens don't fit: 39 of"):  # nothing that is sealed makes room
        cache.begin(40)


@pytest.mark.parametrize("n_prompt", [60, 120, 300])
def test_every_layer_keeps_the_same_number(n_prompt):
    """A layer chooses as the one before it did, though that one has sealed entries by then."""
    rng = np.random.default_rng(2)
    cache = make(Kivi(residual=32), SnapKV(keep=100, window=8, room=40), n_layers=3)
    run_prompt(cache, [arrays(rng, n_prompt) for _ in range(3)], 40)
    assert [cache.storage.n(layer) for layer in range(3)] == 3 * [min(n_prompt, 100)]


def test_going_back_over_what_is_sealed_is_refused():
    cache = make(Kivi(residual=32))
    rng = np.random.default_rng(2)
    run_prompt(cache, [arrays(rng, 70) for _ in range(2)], 40)
    cache.trim(66)
    assert cache.storage.n(0) == cache.storage.n(1) == cache.n_tokens == 66
    with pytest.raises(InvalidInput, match="quantized together"):
        cache.trim(63)
    assert cache.n_tokens == 66
    with pytest.raises(InvalidInput, match="0 to 66 tokens, got 67"):
        cache.trim(67)
    cache.trim(0)
    assert cache.storage.n(1) == 0


@pytest.mark.parametrize("n_prompt", [10, 70, 200])
def test_a_fork_of_sealed_entries_goes_on_by_itself(n_prompt):
    layout = Layout(HEADS, 2, 600, None, Kivi(residual=32), 40)
    workspace = Workspace(layout, Counted(), ops.n_threads())
    first, second, alone = (Cache(layout, workspace, Counted()) for _ in range(3))
    prompts = [arrays(np.random.default_rng(layer), n_prompt) for layer in range(2)]
    run_prompt(first, prompts, 40)
    first.fork(second)
    run_prompt(alone, prompts, 40)

    def tokens(cache, seed, n):
        rng, outs = np.random.default_rng(seed), []
        for _ in range(n):
            for layer in range(2):
                q, k, v = arrays(rng, 1)
                cache.step(layer, q, k, v, out := np.empty_like(q))
                outs.append(out)
            cache.stepped()
        return np.array(outs)

    tokens(first, 5, 40)
    assert np.array_equal(tokens(second, 6, 50), tokens(alone, 6, 50))


def test_compositions():
    known = {**techniques("kv.stores"), **techniques("kv.policies")}
    for text in ("q8", "h2o(keep=64) > q8", "snapkv(keep=64) > kivi(bits=4)", "comet(group=64)", "sinks(keep=8) > f16"):
        assert str(ruled.parse(text, known)) == text
    assert str(ruled.parse("h2o(keep=64)", known)) == "h2o(keep=64) > f16"
    for text, message in (
        ("h2o > kivi", "quantized many positions at a time"),
        ("h2o > comet", "quantized many positions at a time"),
        ("q8 > h2o", "policies come first"),
        ("q8 > q4", "policies come first"),
        ("h2o > snapkv > q8", "one policy chooses the entries, got 2"),
    ):
        with pytest.raises(Incompatible, match=message):
            ruled.parse(text, known)
    with pytest.raises(Incompatible, match="quantized many positions at a time"):
        ruled.Ruled(H2O(), Kivi())
    with pytest.raises(Incompatible, match="ruled already"):
        ruled.Ruled(H2O(), ruled.Ruled(H2O(), known["q8"]()))


@pytest.mark.parametrize(("text", "head_dim"), [("q2", 34), ("q3", 36), ("h2o > q3", 36)])
def test_widths_that_rows_do_not_have_are_refused_by_name(text, head_dim):
    kv = ruled.parse(text, {**techniques("kv.stores"), **techniques("kv.policies")})
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": 2 * head_dim, "intermediate_size": 96}
    more = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 99}
    with pytest.raises(Incompatible, match="needs a head_dim in multiples of"):
        kv.terms(spec_from_config(config | more, "x"), 64, 16)
