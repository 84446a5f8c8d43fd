"""Elements moved by attention in two orders: counted while it computes, against the closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from barefoot.sim import attention_io as io


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def attention(q, k, v, scale):
    weights = np.exp(scale * q @ k.T)
    return weights @ v / weights.sum(1, keepdims=True), np.log(weights.sum(1))


@pytest.mark.parametrize(("n", "d", "rows", "keys"), [(64, 8, 16, 16), (100, 16, 24, 7), (37, 4, 64, 5), (50, 8, 1, 1)])
def test_both_orders_compute_attention_and_move_what_is_stated(n, d, rows, keys, rng):
    q, k, v = rng.standard_normal((3, n, d))
    out, lse = attention(q, k, v, 0.3)
    capacity = io.live_elements(d, min(rows, n), keys)
    first, second = io.TwoLevelMachine(capacity), io.TwoLevelMachine(capacity)
    assert np.allclose(io.first_order(first, q, k, v, 0.3, rows, keys), out, atol=1e-10)
    found, norms = io.second_order(second, q, k, v, 0.3, rows, keys)
    assert np.allclose(found, out, atol=1e-10)
    assert np.allclose(norms, lse, atol=1e-10)
    assert first.moved == io.first_order_elements(n, d, keys)
    assert second.moved == io.second_order_elements(n, d, rows)
    assert first.loaded == 2 * n * d + -(-n // keys) * (2 * n * d + 2 * n)  # of which the rest is stored
    assert second.stored == n * d + n
    for machine in (first, second):
        assert machine.peak == capacity
        assert machine.live == 0
        assert machine.moved >= 4 * n * d  # what must be read and written


@pytest.mark.parametrize("tile", [8, 16, 32])
def test_the_second_order_moves_less_with_the_same_tiles(tile, rng):
    n, d = 96, 16
    q, k, v = rng.standard_normal((3, n, d))
    first, second = io.TwoLevelMachine(1 << 16), io.TwoLevelMachine(1 << 16)
    io.first_order(first, q, k, v, 1.0, tile, tile)
    io.second_order(second, q, k, v, 1.0, tile, tile)
    assert first.peak == second.peak
    assert second.moved < first.moved
    assert second.moved < 0.75 * first.moved


@pytest.mark.parametrize("order", [io.first_order, io.second_order])
def test_what_does_not_fit_is_refused(order, rng):
    q, k, v = rng.standard_normal((3, 20, 4))
    needed = io.live_elements(4, 8, 5)
    order(io.TwoLevelMachine(needed), q, k, v, 1.0, 8, 5)
    with pytest.raises(MemoryError, match=f"{needed} elements in a fast memory of {needed - 1}"):
        order(io.TwoLevelMachine(needed - 1), q, k, v, 1.0, 8, 5)
