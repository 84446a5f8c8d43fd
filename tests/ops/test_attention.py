"""KV stores and attention against the reference, and the reference against sums written out position by position."""

from __future__ import annotations

import math

import numpy as np
import pytest

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.ops import cases, kvrows, reference


def attend(case, q, k_buf, v_buf, implementation=ops):
    out = np.full_like(q, 7)
    scratch = np.empty(ops.attention_scratch_bytes(len(q), case.n_heads, case.n_kv_heads, case.head_dim), np.uint8)
    implementation.attention(
        q, k_buf, v_buf, case.format, out,
        n_heads=case.n_heads, n_kv_heads=case.n_kv_heads, head_dim=case.head_dim, capacity=case.capacity,
        n_past=case.n_past, n_tokens=len(q), window=case.window, softcap=case.softcap,
        scale=case.head_dim**-0.5, scratch=scratch,
    )  # fmt: skip
    return out


def queries(case, rng):
    return rng.standard_normal((case.n_tokens, case.n_heads * case.head_dim)).astype(np.float32)


@pytest.mark.parametrize("fmt", kvrows.FORMATS)
def test_attention_equals_the_reference(isa, fmt, rng, threads):
    for i, case in enumerate(c for c in cases.ATTENTION if c.format == fmt):
        threads(1 + i % 3)
        k_buf, v_buf = cases.filled_store(case, rng)
        q = queries(case, rng)
        error = np.abs(attend(case, q, k_buf, v_buf) - attend(case, q, k_buf, v_buf, reference)).max()
        assert error < 3e-6, case


@pytest.mark.parametrize(("window", "softcap", "n_past"), [(0, 0.0, 0), (5, 0.0, 30), (4, 3.0, 9)])
def test_the_reference_equals_sums_written_out(window, softcap, n_past, rng):
    case = cases.AttentionCase("f16", 6, 2, 8, 64 if not window else 16, n_past, 7, window, softcap)
    n = n_past + 7
    k, v = (rng.standard_normal((n, 2, 8)).astype(np.float16).astype(np.float32) for _ in range(2))
    k_buf, v_buf = (np.zeros((2, case.capacity, 16), np.uint8) for _ in range(2))
    for start in range(n):  # one position at a time, so that the ring wraps
        reference.kv_append(k[start].reshape(1, -1), v[start].reshape(1, -1), k_buf, v_buf, "f16", case.capacity, start)
    q = queries(case, rng)
    got = attend(case, q, k_buf, v_buf, reference).reshape(7, 6, 8)
    for i in range(7):
        for h in range(6):
            seen = [p for p in range(n) if p <= n_past + i and (not window or p > n_past + i - window)]
            scores = [float(q[i, 8 * h : 8 * h + 8] @ k[p, h // 3]) / math.sqrt(8) for p in seen]
            if softcap:
                scores = [softcap * math.tanh(s / softcap) for s in scores]
            weights = [math.exp(s) for s in scores]
            expected = sum(w * v[p, h // 3] for w, p in zip(weights, seen, strict=True)) / sum(weights)
            assert np.allclose(got[i, h], expected, atol=1e-6)


@pytest.mark.parametrize("fmt", kvrows.FORMATS)
@pytest.mark.parametrize("head_dim", [16, 34, 80, 128])
def test_kv_append_stores_the_reference_bytes(isa, fmt, head_dim, rng):
    rows = rng.standard_normal((9, 3 * head_dim)).astype(np.float32) * np.float32([[1e-9], [1], [100]] * 3)
    rows[4] = 0
    rows[5, ::2] = -0.25  # few distinct values: many exact ties
    stores = [np.zeros((2, 3, 7, ops.kv_row_bytes(fmt, head_dim)), np.uint8) for _ in range(2)]
    for store, implementation in zip(stores, (ops, reference), strict=True):
        implementation.kv_append(rows[:6], rows[3:], store[0], store[1], fmt, 7, 5)
    assert np.array_equal(*stores)
    assert not stores[0][0, :, 4].any()  # six rows from slot 5 of 7 leave slot 4 alone
    assert stores[0][0, :, 0].any()


@pytest.mark.parametrize(("fmt", "levels"), [("q8", 254), ("q4", 15)])
def test_kv_rows_round_to_half_a_step(fmt, levels, rng):
    rows = rng.standard_normal((50, 80)).astype(np.float32)
    decoded = kvrows.decode(fmt, kvrows.encode(fmt, rows), 80)
    for group in (slice(0, 32), slice(32, 64), slice(64, 80)):
        part, back = rows[:, group], decoded[:, group]
        span = 2 * np.abs(part).max(1) if fmt == "q8" else part.max(1) - part.min(1)
        assert (np.abs(part - back).max(1) <= 0.5 * span / levels * 1.01 + 2e-3).all()


@pytest.mark.parametrize(("fmt", "n_bytes"), [("f16", 160), ("q8", 86), ("q4", 52)])
def test_kv_row_bytes(fmt, n_bytes):
    assert ops.kv_row_bytes(fmt, 80) == n_bytes == kvrows.encode(fmt, np.zeros((1, 80), np.float32)).size
    with pytest.raises(InvalidInput):
        ops.kv_row_bytes(fmt, 7)
    with pytest.raises(InvalidInput, match="q8"):
        ops.kv_row_bytes("q9", 8)


@pytest.mark.parametrize("fmt", kvrows.FORMATS)
def test_nan_and_infinity_in_a_key_reach_only_the_queries_that_see_it(isa, fmt, rng):
    case = cases.AttentionCase(fmt, 4, 2, 32, 40, 0, 40)
    k, v = (rng.standard_normal((40, 64)).astype(np.float32) for _ in range(2))
    k[25, 3] = np.nan
    k_buf, v_buf = (np.zeros((2, 40, ops.kv_row_bytes(fmt, 32)), np.uint8) for _ in range(2))
    ops.kv_append(k, v, k_buf, v_buf, fmt, 40, 0)
    out = attend(case, queries(case, rng), k_buf, v_buf).reshape(40, 2, 64)
    assert np.isfinite(out[:25]).all()
    assert np.isnan(out[25:, 0]).all()
    assert np.isfinite(out[:, 1]).all()


@pytest.mark.parametrize(("capacity", "window"), [(96, 0), (50, 20)])
@pytest.mark.parametrize("fmt", kvrows.FORMATS)
def test_chunked_prefill_equals_one_shot(isa, fmt, capacity, window, rng):
    k, v = (rng.standard_normal((96, 64)).astype(np.float32) for _ in range(2))
    q = rng.standard_normal((96, 6 * 32)).astype(np.float32)
    k_buf, v_buf = (np.zeros((2, capacity, ops.kv_row_bytes(fmt, 32)), np.uint8) for _ in range(2))
    pieces, start = [], 0
    for size in (30, 1, 25, 30, 10):
        ops.kv_append(k[start : start + size], v[start : start + size], k_buf, v_buf, fmt, capacity, start)
        case = cases.AttentionCase(fmt, 6, 2, 32, capacity, start, size, window)
        pieces.append(attend(case, q[start : start + size], k_buf, v_buf))
        start += size
    whole = [np.zeros((2, 96, ops.kv_row_bytes(fmt, 32)), np.uint8) for _ in range(2)]
    ops.kv_append(k, v, *whole, fmt, 96, 0)
    one_shot = attend(cases.AttentionCase(fmt, 6, 2, 32, 96, 0, 96, window), q, *whole)
    assert np.abs(np.concatenate(pieces) - one_shot).max() < 2e-6


@pytest.mark.parametrize("case", [c for c in cases.ATTENTION if (c.format, c.head_dim) == ("q8", 64)])
def test_results_do_not_depend_on_threads(isa, case, threads, rng):
    k_buf, v_buf = cases.filled_store(case, rng)
    q = queries(case, rng)
    seen = set()
    for n in (1, 2, 3):
        threads(n)
        seen.add(attend(case, q, k_buf, v_buf).tobytes())
    assert len(seen) == 1


@pytest.mark.parametrize("n_tokens", [1, 2, 50])
def test_the_stated_scratch_is_exactly_what_is_used(n_tokens, threads, rng):
    threads(2)
    case = cases.AttentionCase("f16", 9, 3, 80, 64, 3, n_tokens)
    k_buf, v_buf = cases.filled_store(case, rng)
    q = queries(case, rng)
    size = ops.attention_scratch_bytes(n_tokens, 9, 3, 80, n_threads=2)
    guarded = np.full(size + 64, 0xA5, np.uint8)
    shape = {"n_heads": 9, "n_kv_heads": 3, "head_dim": 80, "capacity": 64, "n_past": 3, "n_tokens": n_tokens}
    out = np.empty_like(q)
    ops.attention(q, k_buf, v_buf, "f16", out, **shape, scale=0.1, scratch=guarded[:size])
    assert (guarded[size:] == 0xA5).all()
    with pytest.raises(ValueError, match=f"scratch: expected {size}, got {size - 1}"):
        ops.attention(q, k_buf, v_buf, "f16", out, **shape, scale=0.1, scratch=guarded[: size - 1])


def test_wrong_arguments_are_refused(rng):
    case = cases.AttentionCase("q8", 4, 2, 32, 16, 4, 3)
    k_buf, v_buf = cases.filled_store(case, rng)
    q = queries(case, rng)
    good = {
        "q": q, "k_buf": k_buf, "v_buf": v_buf, "fmt": "q8", "out": np.empty_like(q), "n_heads": 4, "n_kv_heads": 2,
        "head_dim": 32, "capacity": 16, "n_past": 4, "n_tokens": 3, "scale": 1.0,
        "scratch": np.empty(1 << 20, np.uint8),
    }  # fmt: skip
    for match, changed in (
        ("bytes of a KV row: expected 64, got 34", {"fmt": "f16"}),
        ("unknown KV format 'q5'", {"fmt": "q5"}),
        ("slots of the KV buffer: expected 17, got 16", {"capacity": 17}),
        ("at most the capacity: expected 16, got 17", {"n_past": 14}),
        ("key heads of the KV buffer", {"n_kv_heads": 4}),
        ("n_heads, a multiple of", {"n_heads": 3}),
        ("tokens of q", {"n_tokens": 2}),
        ("must not be negative", {"n_past": -1}),
        ("same shape", {"out": np.empty((3, 64), np.float32)}),
        ("not be the same array", {"out": q}),
    ):
        with pytest.raises(ValueError, match=match):
            ops.attention(**(good | changed))
    rows = np.zeros((17, 64), np.float32)
    with pytest.raises(ValueError, match="at most the capacity: expected 16, got 17"):
        ops.kv_append(rows, rows, k_buf, v_buf, "q8", 16, 0)
    with pytest.raises(ValueError, match="start"):
        ops.kv_append(rows[:1], rows[:1], k_buf, v_buf, "q8", 16, -1)
