"""Distances between entries in place of tokens: against the rotary embedding itself, and what attention gives."""

from __future__ import annotations

import numpy as np
import pytest
from test_cache import HEADS, Counted, arrays, decode, positions, run_prompt

from barefoot import ops
from barefoot.core.measure import TracedPeak
from barefoot.kv.cache import Cache
from barefoot.kv.layout import Layout, Workspace
from barefoot.kv.policies.sinks import Sinks
from barefoot.kv.storage import Heads
from barefoot.kv.stores.f16 import HalfStore
from barefoot.kv.turning import Turning

FREQUENCIES = (1 / 100 ** (np.arange(12) / 12)).astype(np.float32)  # of 24 of a head's 32 channels


def rotated(x, positions, *, interleaved, head_dim=32):
    """The rotary embedding by the engine's own kernel, (n, heads × head_dim)."""
    angles = np.asarray(positions, np.float32)[:, None] * FREQUENCIES
    out = x.copy()
    ops.rope(out, x.shape[1] // head_dim, head_dim, np.cos(angles), np.sin(angles), interleaved=interleaved)
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("by", [-700, -1, 0, 13])
def test_turning_is_the_rotary_embedding_of_other_positions(interleaved, by):
    rng = np.random.default_rng(0)
    x, at = rng.standard_normal((5, 96)).astype(np.float32), 900 + np.arange(5)
    turning = Turning(FREQUENCIES, interleaved)
    got = turning.turn(rotated(x, at, interleaved=interleaved), 32, by)
    assert np.abs(got - rotated(x, at + by, interleaved=interleaved)).max() < 3e-4  # float32 angles of up to 1600


def engineless(policy, n_layers=2, context=300, chunk=16):
    layout = Layout(HEADS, n_layers, context, policy, HalfStore(), chunk)
    turnings = [Turning(FREQUENCIES, interleaved=False)] * n_layers
    return Cache(layout, Workspace(layout, Counted(), ops.n_threads()), Counted(), turnings)


def test_attention_is_that_of_entries_at_their_places():
    """Prompts and tokens, keys unrotated here: outputs are those of keys and queries rotated by their places."""
    policy, rng = Sinks(keep=20, first=3, rope="slot"), np.random.default_rng(1)
    cache, n_tokens = engineless(policy, n_layers=1), 0
    history = []  # (position, key, value) of what is there, unrotated
    for n in (30, *[1] * 25, 40, *[1] * 10):
        q, k, v = arrays(rng, n)
        at = n_tokens + np.arange(n)
        turned = (rotated(x, at, interleaved=False) for x in (q, k))
        out = np.empty_like(q)
        if n > 1:
            cache.begin(n)
            q_turned, k_turned = turned
            for start in range(0, n, 16):
                part = slice(start, start + 16)
                cache.prefill(0, q_turned[part], k_turned[part], v[part], out[part])
            cache.settle(0)
        else:
            cache.check_step()
            cache.step(0, *turned, v, out)
            cache.stepped()
        for i in range(n):
            history.append((n_tokens + i, k[i], v[i]))
            places = np.arange(len(history))
            keys = rotated(np.stack([key for _, key, _ in history]), places, interleaved=False)
            query = rotated(q[i : i + 1], places[-1:], interleaved=False)
            assert (
                np.abs(out[i] - attend(query[0], keys, np.stack([value for *_, value in history]))).max() < 1e-2
            )  # keys of 11 bits, scores of ±10
            if n == 1 and len(history) > 20:
                del history[3]
        if n > 1:
            history = history[:3] + history[len(history) - 17 :] if len(history) > 20 else history
        n_tokens += n
        assert sorted(positions(cache, 0, 1)) == [p for p, *_ in history]


def attend(query, keys, values):
    out = []
    for h, own in enumerate(query.reshape(6, 32).astype(np.float64)):
        k, v = (x.reshape(len(x), 2, 32)[:, h // 3].astype(np.float64) for x in (keys, values))
        scores = k @ own * HEADS.scale
        shares = np.exp(scores - scores.max())
        out.append(shares @ v / shares.sum())
    return np.concatenate(out)


def test_distances_of_tokens_are_another_thing():
    """The imitation: entries kept the same, distances those of tokens."""
    caches = [engineless(Sinks(keep=20, first=3, rope=rope)) for rope in ("slot", "token")]
    outs = []
    for cache in caches:
        rng = np.random.default_rng(2)
        run_prompt(cache, [arrays(rng, 60) for _ in range(2)], 16)
        decode(cache, rng, 3)
        q, k, v = arrays(rng, 1)
        out = np.empty_like(q)
        cache.step(0, q, k, v, out)
        outs.append(out)
        assert positions(cache, 1, 0)[:3] == [0, 1, 2]
    assert np.abs(outs[0] - outs[1]).max() > 0.05


def test_turning_takes_what_is_stated():
    heads = Heads(8, 1, 128, 0.1)
    layout = Layout(heads, 1, 700, Sinks(keep=100, rope="slot"), HalfStore(), 512)
    cache = Cache(
        layout,
        Workspace(layout, Counted(), ops.n_threads()),
        Counted(),
        [Turning(np.linspace(0, 1, 64, dtype=np.float32), interleaved=False)],
    )
    rng = np.random.default_rng(2)
    run_prompt(cache, [arrays(rng, 150, heads)], 512)
    q, k, v = arrays(rng, 512, heads)
    out = np.empty_like(q)
    cache.begin(512)
    with TracedPeak() as traced:
        cache.prefill(0, q, k, v, out)
    took = traced.result.peak - traced.result.before
    assert 0.5 * layout.passing().bytes < took < 1.02 * layout.passing().bytes
