"""Norms, rotations, gates, argmax and top_k against the reference; the reference against plain formulas."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest

from barefoot import ops
from barefoot.ops import reference

WIDTHS = (1, 15, 64, 577, 20_001)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("plus_one", [False, True])
def test_rmsnorm(isa, n, plus_one, rng):
    x, weight = normal(rng, 5, n), normal(rng, n)
    out = np.empty_like(x)
    ops.rmsnorm(x, weight, 1e-5, out, plus_one=plus_one)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * (weight + float(plus_one))
    assert np.allclose(out, expected, rtol=2e-6, atol=1e-6)
    ops.rmsnorm(x, weight, 1e-5, x, plus_one=plus_one)
    assert np.array_equal(x, out)


def test_head_rmsnorm_norms_each_head(isa, rng):
    x, weight = normal(rng, 4, 3 * 20), normal(rng, 20)
    expected = np.empty((12, 20), np.float32)
    reference.rmsnorm(x.reshape(12, 20), weight, 1e-6, expected, plus_one=True)
    ops.head_rmsnorm(x, 3, 20, weight, 1e-6, plus_one=True)
    assert np.allclose(x.reshape(12, 20), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", [ops, reference])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rot_dim", [12, 16])
def test_rope_rotates_pairs_and_leaves_the_rest(isa, implementation, interleaved, rot_dim, rng):
    half = rot_dim // 2
    x, angles = normal(rng, 5, 3 * 16), normal(rng, 5, half)
    before = x.reshape(5, 3, 16).copy()
    implementation.rope(x, 3, 16, np.cos(angles), np.sin(angles), interleaved=interleaved)
    after = x.reshape(5, 3, 16)
    for token, head, i in np.ndindex(5, 3, half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turned = complex(*before[token, head, [a, b]]) * cmath.exp(1j * float(angles[token, i]))
        assert np.allclose(after[token, head, [a, b]], [turned.real, turned.imag], atol=1e-6)
    assert np.array_equal(after[..., rot_dim:], before[..., rot_dim:])


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_glu(isa, n, activation, rng):
    gate, up = 6 * normal(rng, 2, n), normal(rng, 2, n)
    out, expected = np.empty_like(gate), np.empty_like(gate)
    ops.glu(gate, up, out, activation=activation)
    reference.glu(gate, up, expected, activation=activation)
    assert np.abs(out - expected).max() < 5e-6
    ops.glu(gate, up, gate, activation=activation)
    assert np.array_equal(gate, out)


def test_glu_formulas():
    gate, up, out = np.float32([[-3.0, 0.0, 1.5]]), np.float32([[2.0, 2.0, 2.0]]), np.empty((1, 3), np.float32)
    reference.glu(gate, up, out, activation="silu")
    assert np.allclose(out, [[2 * x / (1 + math.exp(-x)) for x in (-3.0, 0.0, 1.5)]])
    reference.glu(gate, up, out, activation="gelu_tanh")
    inner = [math.sqrt(2 / math.pi) * (x + 0.044715 * x**3) for x in (-3.0, 0.0, 1.5)]
    assert np.allclose(out, [[x * (1 + math.tanh(a)) for x, a in zip((-3.0, 0.0, 1.5), inner, strict=True)]])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_glu_at_the_extremes(isa, activation):
    gate = np.float32([[-1e30, -100.0, 100.0, 1e30, np.inf, np.nan]])
    out = np.empty_like(gate)
    ops.glu(gate, np.ones_like(gate), out, activation=activation)
    assert np.abs(out[0, :2]).max() <= 1e-30
    assert np.array_equal(out[0, 2:5], gate[0, 2:5])
    assert np.isnan(out[0, 5])


@pytest.mark.parametrize("n", WIDTHS)
def test_add(isa, n, rng):
    x, y = normal(rng, 3, n), normal(rng, 3, n)
    expected = x + y
    ops.add_(x, y)
    assert np.array_equal(x, expected)


@pytest.mark.parametrize("n", WIDTHS)
def test_argmax(isa, n, rng):
    logits = normal(rng, n)
    assert ops.argmax(logits) == int(np.argmax(logits))
    logits[n // 2 :: 3] = 9  # ties: the first wins
    assert ops.argmax(logits) == n // 2
    assert ops.argmax(np.full(n, -np.inf, np.float32)) == 0
    logits[n - 1] = np.nan
    assert ops.argmax(logits) == n - 1


def test_argmax_finds_the_first_wherever_it_stands(isa, rng):
    for place in range(700):
        logits = normal(rng, 700)
        logits[place] = 10
        assert ops.argmax(logits) == place
        logits[place:] = np.inf
        assert ops.argmax(logits) == place
        logits[place // 2] = np.nan
        assert ops.argmax(logits) == place // 2


@pytest.mark.parametrize("n", [1, 15, 16, 17, 4097])
def test_lowest_before_is_the_least_of_the_old_ones(isa, n, rng):
    scores = rng.choice(np.array([-np.inf, -1.5, -0.0, 0.0, 1e-30, 2.0, np.inf], np.float32), (3, n + 5))[:, :n]
    position = np.stack([rng.permutation(2 * n)[:n] for _ in range(3)]).astype(np.int32)
    for end in (0, n // 2, 2 * n):
        found, other = np.full(3, -1, np.int32), np.full(3, -1, np.int32)
        ops.lowest_before(scores, position, end, found)
        reference.lowest_before(scores, position, end, other)
        assert np.array_equal(found, other)
        for row, column in enumerate(found):
            old = np.flatnonzero(position[row] < end)
            ordered = sorted(old, key=lambda i: (scores[row, i], not np.signbit(scores[row, i]), i))
            assert column == (ordered[0] if len(old) else 0)


def test_lowest_before_finds_nan_last(isa):
    scores, position = np.array([[np.nan, np.inf, np.nan]], np.float32), np.arange(3, dtype=np.int32)[None]
    found = np.zeros(1, np.int32)
    for end, expected in ((3, 1), (1, 0)):
        ops.lowest_before(scores, position, end, found)
        assert found[0] == expected
    with pytest.raises(ValueError, match="distance"):
        ops.lowest_before(scores.repeat(2, 1)[:, ::2], position, 3, found)


def top_k(logits, k):
    values, ids = np.zeros(k, np.float32), np.zeros(k, np.int32)
    ops.top_k(logits, values, ids)
    return values, ids


@pytest.mark.parametrize("n", WIDTHS)
def test_top_k_is_the_head_of_a_stable_sort(isa, n, rng):
    ascending = np.arange(n, dtype=np.float32)
    for logits in (normal(rng, n), np.rint(normal(rng, n)), ascending, -ascending):
        for k in sorted({1, min(40, n), n // 3 + 1, n}):
            order = sorted(range(n), key=lambda i: (-logits[i], i))[:k]
            values, ids = top_k(logits, k)
            assert ids.tolist() == order
            assert np.array_equal(values, logits[order])
            assert ids[0] == ops.argmax(logits)


def test_top_k_puts_nan_first_and_knows_infinity(isa, rng):
    logits = normal(rng, 900)
    logits[[5, 800, 433]] = np.nan
    logits[[6, 801]] = np.inf
    logits[20:700:2] = -np.inf
    finite = [i for i in np.argsort(-logits, kind="stable").tolist() if np.isfinite(logits[i])]
    expected = [5, 433, 800, 6, 801, *finite, *(i for i in range(20, 700, 2))]
    for k in (1, 2, 4, 5, 90, 900):
        values, ids = top_k(logits, k)
        assert ids.tolist() == expected[:k]
        assert np.array_equal(values, logits[expected[:k]], equal_nan=True)
        reference.top_k(logits, values, ids)
        assert ids.tolist() == expected[:k]


def test_wrong_shapes_are_refused():
    x, weight = np.zeros((2, 8), np.float32), np.zeros(7, np.float32)
    with pytest.raises(ValueError, match="length of the norm's weight: expected 8, got 7"):
        ops.rmsnorm(x, weight, 1e-5, x)
    with pytest.raises(ValueError, match="columns of x: expected 16, got 8"):
        ops.head_rmsnorm(x, 2, 8, np.zeros(8, np.float32), 1e-5)
    with pytest.raises(ValueError, match="at most: expected 4, got 5"):
        ops.rope(x, 1, 8, np.zeros((2, 5), np.float32), np.zeros((2, 5), np.float32), interleaved=True)
    with pytest.raises(ValueError, match="rows of cos: expected 2, got 1"):
        ops.rope(x, 1, 8, np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32), interleaved=True)
    with pytest.raises(ValueError, match="same shape"):
        ops.add_(x, x[:1])
    with pytest.raises(ValueError, match="activation"):
        ops.glu(x, x, x, activation="relu")
    with pytest.raises(ValueError, match="empty"):
        ops.argmax(np.zeros(0, np.float32))
    with pytest.raises(ValueError, match="1 to 7 of 7 logits, got 8"):
        top_k(weight, 8)
    with pytest.raises(ValueError, match="1 to 7 of 7 logits, got 0"):
        top_k(weight, 0)
    with pytest.raises(ValueError, match="number of ids: expected 3, got 2"):
        ops.top_k(weight, np.zeros(3, np.float32), np.zeros(2, np.int32))
    frozen = np.zeros((2, 8), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(TypeError):
        ops.add_(frozen, x)
