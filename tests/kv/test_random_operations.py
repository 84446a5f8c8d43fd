"""Random prompts, tokens, forks and ways back on several caches, against plain models of them: the same entries."""

from __future__ import annotations

import numpy as np
import pytest
from plain_cache import PlainCache
from plain_tiers import PlainDemoted, PlainGroups, PlainThin
from test_cache import Counted, arrays, run_prompt

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.kv.cache import Cache
from barefoot.kv.layout import Layout, Workspace
from barefoot.kv.policies.h2o import H2O
from barefoot.kv.policies.scissorhands import Scissorhands
from barefoot.kv.policies.sinks import Sinks
from barefoot.kv.policies.snapkv import SnapKV
from barefoot.kv.slots import Slots
from barefoot.kv.storage import Heads
from barefoot.kv.stores.comet import Comet
from barefoot.kv.stores.f16 import HalfStore
from barefoot.kv.stores.mikv import MiKV
from barefoot.kv.stores.think import Think

HEADS = Heads(n_heads=2, n_kv_heads=2, head_dim=8, scale=1.0)
WIDE = Heads(n_heads=4, n_kv_heads=2, head_dim=16, scale=0.5)
STRIKES = Scissorhands(keep=9, window=7, recent=2, drop=3)
VOTES = SnapKV(keep=9, window=3, kernel=3, room=12)
POLICIES = [None, Sinks(keep=9, first=2), H2O(keep=9, recent=3), STRIKES, VOTES]
THIN = Think(ratio=0.5, window=5, recent=4)
CONTEXT, N_CACHES, N_OPERATIONS = 60, 4, 5000


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_operations(policy):
    operate(policy, HalfStore(), PlainCache, HEADS, N_OPERATIONS)


@pytest.mark.parametrize("policy", [*POLICIES[:4], H2O(keep=9, recent=0), VOTES], ids=str)
def test_operations_on_thin_keys(policy):
    """Some policies take entries out of those that are whole."""
    operate(policy, THIN, PlainThin, WIDE, 1200)


@pytest.mark.parametrize("policy", POLICIES[1:], ids=str)
def test_operations_on_what_is_demoted(policy):
    operate(policy, MiKV(bits=3), PlainDemoted, WIDE, 1200)


def test_operations_on_groups():
    operate(None, Comet(group=32), PlainGroups, WIDE, 1200, 70)


def operate(policy, store, plain_cache, heads, n_operations, context=CONTEXT):
    rng, dim = np.random.default_rng(7), heads.head_dim
    layout = Layout(heads, 1, context, policy, store, 16)
    own = [Counted() for _ in range(N_CACHES)]
    workspace = Workspace(layout, Counted(), ops.n_threads())
    caches = [Cache(layout, workspace, take) for take in own]
    plain = [plain_cache(layout) for _ in range(N_CACHES)]
    done = dict.fromkeys(("prompt", "token", "fork", "back", "clear", "refused"), 0)
    for _ in range(n_operations):
        i = int(rng.integers(N_CACHES))
        cache, model = caches[i], plain[i]
        what = rng.choice(["prompt", "token", "fork", "back", "clear"], p=[0.1, 0.62, 0.1, 0.16, 0.02])
        if what == "prompt":
            n = int(rng.integers(1, 14))
            if n > context - model.n_tokens:
                with pytest.raises(InvalidInput, match="don't fit"):
                    cache.begin(n)
                what = "refused"
            else:
                prompt = halves(rng, n, heads)
                expected = model.prompt(0, *prompt)
                model.done(n)
                assert np.allclose(run_prompt(cache, [prompt], 16)[0], expected, atol=1e-4)
        elif what == "token":
            entries = len(model.candidates(0, 0))
            if model.n_tokens == context or entries == layout.n_slots:
                what = "refused"
            else:
                q, k, v = halves(rng, 1, heads)
                out = np.empty_like(q)
                cache.check_step()
                cache.step(0, q, k, v, out)
                cache.stepped()
                assert np.allclose(out.reshape(1, -1, dim), model.step(0, q, k, v), atol=1e-4)
                model.stepped()
        elif what == "fork":
            into = int(rng.integers(N_CACHES))
            if into != i:
                cache.fork(caches[into])
                plain[into] = model.fork()
        elif what == "back":
            n = int(rng.integers(max(0, model.n_tokens - 4), model.n_tokens + 1))
            if model.can_trim(n):
                cache.trim(n)
                model.trim(n)
            else:
                with pytest.raises(InvalidInput, match="can't go back"):
                    cache.trim(n)
                what = "refused"
        else:
            cache.clear()
            plain[i] = plain_cache(layout)
        done[str(what)] += 1
        check(caches, plain)
    assert min(done.values()) > n_operations / 100, done
    assert {take.n_bytes for take in own} == {sum(term.bytes for term in layout.terms())}


def halves(rng, n, heads):
    """Queries, and keys and values that half precision has."""
    q, k, v = arrays(rng, n, heads)
    return q, *(x.astype(np.float16).astype(np.float32) for x in (k, v))


def check(caches, plain):
    """The same positions, and of each the rows that came, in every cache; what was observed, nearly."""
    for cache, model in zip(caches, plain, strict=True):
        assert cache.n_tokens == model.n_tokens
        storage = getattr(cache.storage, "kept", cache.storage)
        if not hasattr(storage, "regions"):  # blocks: what attention gives of them is looked at
            assert storage.n(0) == len(model.candidates(0, 0))
            continue
        for head, there in enumerate(model.entries[0]):
            slots = [s for s in range(storage.n(0)) if storage.free[0, head] != s]
            position = storage.position(0)[head, slots]
            assert sorted(position) == sorted(model.candidates(0, head))
            expected = np.array([there[p][:2] for p in position], np.float16).reshape(-1, 2, model.h.head_dim)
            assert np.array_equal(storage.regions[0].values[head, slots].view(np.float16), expected[:, 1])
            if isinstance(storage, Slots):
                assert np.array_equal(storage.regions[0].keys[head, slots].view(np.float16), expected[:, 0])
            if storage.mass(0) is not None:
                observed = np.array([there[p][2] for p in position])
                assert np.allclose(storage.mass(0)[head, slots], observed, atol=1e-3)
