"""SnapKV's sets where it is known what each head looks at."""

from __future__ import annotations

import numpy as np
import pytest
from test_cache import HEADS, make, positions, run_prompt

from barefoot.kv.policies.snapkv import SnapKV

N, WINDOW = 100, 6
PLANTED = ((4, 20, 37, 61, 80), (9, 27, 44, 52, 88))  # of each key head, no two of them near each other
SHARING = HEADS.n_heads // HEADS.n_kv_heads


def looking(planted):
    """A layer's queries, keys and values, where the window of each key head's queries looks at its planted keys, and
    those before it at the other head's."""
    rng = np.random.default_rng(2)
    q = np.zeros((N, HEADS.n_kv_heads, SHARING, HEADS.head_dim), np.float32)
    k = 0.01 * rng.standard_normal((N, HEADS.n_kv_heads, HEADS.head_dim)).astype(np.float32)
    for head, own in enumerate(planted):
        k[list(own), head, 0] = 5
        k[list(planted[1 - head]), head, 1] = 5
        q[:-WINDOW, head, :, 1] = q[-WINDOW:, head, :, 0] = 4
    v = rng.standard_normal(k.shape).astype(np.float32)
    return q, k, v


def kept(q, k, v, policy):
    cache = make(policy, n_layers=1)
    run_prompt(cache, [tuple(each.reshape(N, -1) for each in (q, k, v))], 24)
    return [set(positions(cache, 0, head)) for head in range(HEADS.n_kv_heads)]


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_what_the_window_looks_at_stays_with_its_neighbours(kernel, pooling):
    side = kernel // 2
    policy = SnapKV(keep=5 * kernel + WINDOW, window=WINDOW, kernel=kernel, pooling=pooling)
    arrays = looking(PLANTED)
    window = set(range(N - WINDOW, N))
    near = [{p + i for p in own for i in range(-side, side + 1)} for own in PLANTED]
    assert kept(*arrays, policy) == [own | window for own in near]
    turned = (each[:, ::-1].copy() for each in arrays)
    assert kept(*turned, policy) == [own | window for own in near[::-1]]


def test_a_query_that_looks_into_the_window_votes_for_little():
    """Softmax is over all keys, those of the window too: of two places that as many queries look at, the one goes whose
    queries look at the window as well."""
    q = np.zeros((N, HEADS.n_kv_heads, SHARING, HEADS.head_dim), np.float32)
    k = np.zeros((N, HEADS.n_kv_heads, HEADS.head_dim), np.float32)
    k[10, :, 0] = k[50, :, 1] = k[-WINDOW:, :, 2] = 5
    first, second = slice(-WINDOW, -WINDOW // 2), slice(-WINDOW // 2, None)
    q[first, ..., 0] = q[second, ..., 1] = 4
    policy = SnapKV(keep=WINDOW + 1, window=WINDOW, kernel=1)
    for inside, stays in ((first, 50), (second, 10)):
        torn = q.copy()
        torn[inside, ..., 2] = 4
        assert kept(torn, k, k, policy) == [{stays, *range(N - WINDOW, N)}] * HEADS.n_kv_heads
