"""KV stores and attention against the reference, and the reference against sums written out position by position."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.ops import blocks, cases, kvrows, reference

COARSER = {"q3": 15 / 7, "q2": 5}  # steps than those of q4


def attend(case, q, k_buf, v_buf, implementation=ops, *, activations="float32", scale=None):
    out = np.full_like(q, 7)
    shape = (len(q), case.n_heads, case.n_kv_heads, case.head_dim)
    scratch = np.empty(ops.attention_scratch_bytes(*shape, activations), np.uint8)
    implementation.attention(
        q, k_buf, v_buf, case.format, out,
        n_heads=case.n_heads, n_kv_heads=case.n_kv_heads, head_dim=case.head_dim, capacity=case.capacity,
        n_past=case.n_past, n_tokens=len(q), window=case.window, softcap=case.softcap,
        scale=scale or case.head_dim**-0.5, activations=activations, scratch=scratch,
    )  # fmt: skip
    return out


def queries(case, rng):
    return rng.standard_normal((case.n_tokens, case.n_heads * case.head_dim)).astype(np.float32)


def rounds_to_16_bits(case, n_tokens):
    """Whether the kernels multiply the codes of this case as integers."""
    few = n_tokens == 1 and case.n_heads // case.n_kv_heads <= 32
    return ops.isa() != "numpy" and case.format in kvrows.INTEGERS and case.head_dim % 32 == 0 and few


def rounded_queries(q):
    """Queries as integer kernels see them: 32,384 levels to either side of zero, a scale for each 32 elements."""
    groups = q.reshape(-1, 32).astype(np.float64)
    step = np.abs(groups).max(axis=1, keepdims=True) / 32384
    return (np.rint(groups / step) * step).reshape(q.shape).astype(np.float32)


def weight_rounding(case, q, k_buf, v_buf):
    """Six standard deviations of what rounding the weights of one token's values adds, float64 [n_heads * head_dim].

    Within 64 keys and a group of values, probability times scale is rounded to steps of 1/32767 of the largest, and
    the error of each, uniform within half a step, is multiplied by the code.
    """
    last = case.n_past + 1
    positions = np.arange(max(0, last - case.window) if case.window else 0, last)
    k, v = (
        kvrows.decode(case.format, buffer[:, positions % case.capacity], case.head_dim).astype(np.float64)
        for buffer in (k_buf, v_buf)
    )
    n_groups, sharing = case.head_dim // 32, case.n_heads // case.n_kv_heads
    group_bytes = v_buf.shape[2] // n_groups
    headers = v_buf[:, positions % case.capacity].reshape(case.n_kv_heads, len(positions), n_groups, group_bytes)
    scale = np.ascontiguousarray(headers[..., :2]).view(np.float16)[..., 0].astype(np.float64)
    low = 0 if case.format == "q8" else np.ascontiguousarray(headers[..., 2:4]).view(np.float16).astype(np.float64)
    codes = (v.reshape(*scale.shape, 32) - low) / scale[..., None]
    scores = np.einsum("ghd,gnd->ghn", q.reshape(case.n_kv_heads, sharing, -1), k) * case.head_dim**-0.5
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    variance = np.zeros((case.n_kv_heads, sharing, n_groups, 32))
    for at in range(0, len(positions), 64):
        tile = slice(at, at + 64)
        step = (weights[:, :, tile, None] * scale[:, None, tile]).max(axis=2) / 32767
        variance += step[..., None] ** 2 / 12 * (codes[:, tile] ** 2).sum(axis=1)[:, None]
    return 6 * np.sqrt(variance).reshape(1, -1)


def expected(case, q, k_buf, v_buf):
    """What attention with float32 activations gives, and how far from it a kernel's sums may be."""
    bound = 3e-6
    if rounds_to_16_bits(case, len(q)):
        q = rounded_queries(q)
        bound = bound + weight_rounding(case, q, k_buf, v_buf)
        assert bound.max() < 5e-4 * COARSER.get(case.format, 1), case
    return attend(case, q, k_buf, v_buf, reference), bound


def bfloat16(x):
    rows = x.reshape(-1, x.shape[-1])
    return blocks.decode("bf16", blocks.encode("bf16", rows), rows.shape[1]).reshape(x.shape)


def expected_bfloat16(case, q, k_buf, v_buf):
    """Attention of queries times scale, keys and values rounded to bfloat16; how far rounded probabilities may be off.

    A probability, of 8 significant bits, moves by at most 2^-8 of itself. It also inherits the error of its exponent,
    which a float32 sum of head_dim products bounds by head_dim + 1 roundings of the sum of their magnitudes, and tanh
    by a few of the cap; the power of two is within 3e-6, and n float32 additions round n times.
    """
    k, v = (bfloat16(kvrows.decode(case.format, buffer, case.head_dim)) for buffer in (k_buf, v_buf))
    q = bfloat16(q * np.float32(case.head_dim**-0.5))
    heads = q.reshape(len(q), case.n_kv_heads, -1, case.head_dim)
    products = np.einsum("tgrd,gpd->tgrp", np.abs(heads), np.abs(k)).max()
    exponent = ((case.head_dim + 1) * products + 8 * case.softcap) * 2.0**-24
    relative = 2.0**-8 + 3e-6 + 2 * exponent + case.capacity * 2.0**-24
    plain = dataclasses.replace(case, format="f32")
    k_rows, v_rows, magnitudes = (rows.view(np.uint8) for rows in (k, v, np.abs(v)))
    exact = attend(plain, q, k_rows, v_rows, reference, scale=1.0)
    return exact, relative * attend(plain, q, k_rows, magnitudes, reference, scale=1.0)


@pytest.mark.parametrize("fmt", kvrows.FORMATS)
def test_attention_equals_the_reference(isa, fmt, rng, threads):
    for i, case in enumerate(c for c in cases.ATTENTION if c.format == fmt):
        threads(1 + i % 3)
        k_buf, v_buf = cases.filled_store(case, rng)
        q = queries(case, rng)
        exact, bound = expected(case, q, k_buf, v_buf)
        assert (np.abs(attend(case, q, k_buf, v_buf) - exact) < bound).all(), case


@pytest.mark.parametrize("fmt", kvrows.FORMATS)
def test_int8_activations_let_tiles_round_to_bfloat16_and_nothing_else(isa, fmt, rng, threads):
    few = [
        cases.AttentionCase(fmt, heads, 1, 64, 300, 200, n, w) for heads, n, w in ((1, 2, 0), (3, 11, 0), (5, 7, 70))
    ]
    for i, case in enumerate([*few, *(c for c in cases.ATTENTION if c.format == fmt)]):
        threads(1 + i % 3)
        k_buf, v_buf = cases.filled_store(case, rng)
        q = queries(case, rng)
        got = attend(case, q, k_buf, v_buf, activations="int8")
        kept = np.array_equal(got, attend(case, q, k_buf, v_buf))
        assert kept == (isa != "amx" or case.n_tokens == 1), case
        if not kept:
            exact, bound = expected_bfloat16(case, q, k_buf, v_buf)
            assert (np.abs(got - exact) <= bound).all(), case


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
    head_dim = head_dim // kvrows.whole(fmt) * kvrows.whole(fmt)
    rows = rng.standard_normal((9, 3 * head_dim)).astype(np.float32) * np.float32([[1e-9], [1], [100]] * 3)
    rows[4] = 0
    rows[5, ::2] = -0.25  # few distinct values: many exact ties
    stores = [np.zeros((2, 3, 7, ops.kv_row_bytes(fmt, head_dim)), np.uint8) for _ in range(2)]
    for store, implementation in zip(stores, (ops, reference), strict=True):
        implementation.kv_append(rows[:6], rows[3:], store[0], store[1], fmt, 7, 5)
    assert np.array_equal(*stores)
    assert not stores[0][0, :, 4].any()  # six rows from slot 5 of 7 leave slot 4 alone
    assert stores[0][0, :, 0].any()


@pytest.mark.parametrize(("fmt", "levels"), [("q8", 254), ("q4", 15), ("q3", 7), ("q2", 3)])
def test_kv_rows_round_to_half_a_step(fmt, levels, rng):
    rows = rng.standard_normal((50, 80)).astype(np.float32)
    decoded = kvrows.decode(fmt, kvrows.encode(fmt, rows), 80)
    for group in (slice(0, 32), slice(32, 64), slice(64, 80)):
        part, back = rows[:, group], decoded[:, group]
        span = 2 * np.abs(part).max(1) if fmt == "q8" else part.max(1) - part.min(1)
        assert (np.abs(part - back).max(1) <= 0.5 * span / levels * 1.01 + 2e-3).all()


@pytest.mark.parametrize(
    ("fmt", "n_bytes"), [("f16", 160), ("q8", 86), ("q4", 52), ("q3", 42), ("q2", 32), ("bfp4", 43)]
)
def test_kv_row_bytes(fmt, n_bytes):
    assert ops.kv_row_bytes(fmt, 80) == n_bytes == kvrows.encode(fmt, np.zeros((1, 80), np.float32)).size
    with pytest.raises(InvalidInput):
        ops.kv_row_bytes(fmt, 7)
    with pytest.raises(InvalidInput, match="q8"):
        ops.kv_row_bytes("q9", 8)


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("fmt", kvrows.FORMATS)
def test_nan_and_infinity_in_a_key_reach_only_the_queries_that_see_it(isa, fmt, activations, rng):
    case = cases.AttentionCase(fmt, 4, 2, 32, 40, 0, 40)
    k, v = (rng.standard_normal((40, 64)).astype(np.float32) for _ in range(2))
    k[25, 3] = np.nan
    k_buf, v_buf = (np.zeros((2, 40, ops.kv_row_bytes(fmt, 32)), np.uint8) for _ in range(2))
    ops.kv_append(k, v, k_buf, v_buf, fmt, 40, 0)
    out = attend(case, queries(case, rng), k_buf, v_buf, activations=activations).reshape(40, 2, 64)
    assert np.isfinite(out[:25]).all()
    assert np.isnan(out[25:, 0]).all()
    assert np.isfinite(out[:, 1]).all()


@pytest.mark.parametrize("fmt", kvrows.FORMATS)
def test_nan_in_one_row_spoils_one_token_no_further_than_it_must(isa, fmt, rng):
    case = cases.AttentionCase(fmt, 4, 2, 64, 70, 69, 1)
    k, v = (rng.standard_normal((70, 128)).astype(np.float32) for _ in range(2))
    q = queries(case, rng)

    def output(keys, values, of=q):
        k_buf, v_buf = (np.zeros((2, 70, ops.kv_row_bytes(fmt, 64)), np.uint8) for _ in range(2))
        ops.kv_append(keys, values, k_buf, v_buf, fmt, 70, 0)
        return attend(case, of, k_buf, v_buf).reshape(2, 2, 2, 32)  # KV head, query of it, group of 32, element

    good = output(k, v)
    assert np.isfinite(good).all()
    for row in (0, 66, 69):  # both tiles, and the last of an odd number of rows or not
        bad = k.copy()
        bad[row, 3] = np.inf if row == 66 else np.nan
        out = output(bad, v)
        assert np.isnan(out[0]).all()
        assert np.array_equal(out[1], good[1])
        bad = v.copy()
        bad[row, 64 + 40] = np.nan
        out = output(k, bad)
        spoiled = np.isnan(out)
        assert spoiled[1, :, 1, 8].all()
        assert np.array_equal(out[~spoiled], good[~spoiled])
        assert spoiled.sum() == (2 * 32 if fmt not in ("f32", "f16") else 2)
    bad = q.copy()
    bad[0, 70] = np.nan
    out = output(k, v, bad)
    assert np.isnan(out[0, 1]).all()
    assert np.array_equal(np.delete(out.reshape(4, 64), 1, 0), np.delete(good.reshape(4, 64), 1, 0))


@pytest.mark.parametrize("sharing", [1, 2, 3, 4, 5, 32, 33])
@pytest.mark.parametrize("fmt", kvrows.FORMATS)
def test_one_token_for_any_number_of_queries_a_key(isa, fmt, sharing, rng):
    case = cases.AttentionCase(fmt, 2 * sharing, 2, 32, 66, 100, 1, 65, 0.0)  # an odd number of keys, wrapped
    k_buf, v_buf = cases.filled_store(case, rng)
    q = queries(case, rng)
    got = attend(case, q, k_buf, v_buf)
    exact, bound = expected(case, q, k_buf, v_buf)
    assert (np.abs(got - exact) < bound).all()
    alone = cases.AttentionCase(fmt, 2, 2, 32, 66, 100, 1, 65, 0.0)
    first = q.reshape(2, sharing, 32)[:, 0].reshape(1, -1).copy()
    if sharing <= (32 if fmt in kvrows.INTEGERS else 4):  # beyond, tiles are copied to float32
        assert np.array_equal(got.reshape(2, sharing, 32)[:, 0].reshape(1, -1), attend(alone, first, k_buf, v_buf))


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
        if size == 1:
            alone, (exact, bound) = start, expected(case, q[start : start + size], k_buf, v_buf)
        start += size
    whole = [np.zeros((2, 96, ops.kv_row_bytes(fmt, 32)), np.uint8) for _ in range(2)]
    ops.kv_append(k, v, *whole, fmt, 96, 0)
    one_shot = attend(cases.AttentionCase(fmt, 6, 2, 32, 96, 0, 96, window), q, *whole)
    got = np.concatenate(pieces)
    assert np.abs(np.delete(got - one_shot, alone, axis=0)).max() < 2e-6
    assert (np.abs(got[alone] - exact) < bound).all()  # which may be rounded to 16 bits


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("case", [c for c in cases.ATTENTION if (c.format, c.head_dim) == ("q8", 64)])
def test_results_do_not_depend_on_threads(isa, case, activations, threads, rng):
    k_buf, v_buf = cases.filled_store(case, rng)
    q = queries(case, rng)
    seen = set()
    for n in (1, 2, 3):
        threads(n)
        seen.add(attend(case, q, k_buf, v_buf, activations=activations).tobytes())
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("fmt", "n_heads", "n_kv_heads", "head_dim"),
    [("f16", 9, 3, 80), ("f16", 9, 3, 64), ("q8", 64, 2, 32), ("q4", 9, 3, 64), ("q4", 33, 1, 96)],
)
@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("n_tokens", [1, 2, 50])
def test_the_stated_scratch_is_exactly_what_is_used(
    isa, n_tokens, activations, fmt, n_heads, n_kv_heads, head_dim, threads, rng
):
    threads(2)
    case = cases.AttentionCase(fmt, n_heads, n_kv_heads, head_dim, 64, 3, n_tokens)
    k_buf, v_buf = cases.filled_store(case, rng)
    q = queries(case, rng)
    size = ops.attention_scratch_bytes(n_tokens, n_heads, n_kv_heads, head_dim, activations, n_threads=2)
    guarded = np.full(size + 64, 0xA5, np.uint8)
    shape = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
    shape |= {"capacity": 64, "n_past": 3, "n_tokens": n_tokens, "activations": activations}
    out = np.empty_like(q)
    ops.attention(q, k_buf, v_buf, fmt, out, **shape, scale=0.1, scratch=guarded[:size])
    assert (guarded[size:] == 0xA5).all()
    with pytest.raises(ValueError, match=f"scratch: expected {size}, got {size - 1}"):
        ops.attention(q, k_buf, v_buf, fmt, out, **shape, scale=0.1, scratch=guarded[: size - 1])


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
        ("activations must be int8 or float32, got 'int4'", {"activations": "int4"}),
    ):
        with pytest.raises(ValueError, match=match):
            ops.attention(**(good | changed))
    rows = np.zeros((17, 64), np.float32)
    with pytest.raises(ValueError, match="at most the capacity: expected 16, got 17"):
        ops.kv_append(rows, rows, k_buf, v_buf, "q8", 16, 0)
    with pytest.raises(ValueError, match="start"):
        ops.kv_append(rows[:1], rows[:1], k_buf, v_buf, "q8", 16, -1)
