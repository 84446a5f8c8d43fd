"""Attention that trains: the kernels against the reference, the reference against derivatives taken by differences."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pytest

from barefoot import ops
from barefoot.ops import reference

EPS = 2.0**-24


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    n_heads: int
    n_kv_heads: int
    head_dim: int
    window: int = 0
    softcap: float = 0.0

    @property
    def options(self):
        return {"scale": self.head_dim**-0.5, "window": self.window, "softcap": self.softcap}

    def inputs(self, dtype=np.float32):
        """q, k, v and the gradient of the outputs, with two rows behind the documents."""
        rng = np.random.default_rng(self.head_dim + sum(self.lengths))
        n = sum(self.lengths) + 2
        shapes = [(n, heads, self.head_dim) for heads in (self.n_heads, self.n_kv_heads, self.n_kv_heads, self.n_heads)]
        return [rng.standard_normal(shape).astype(np.float32).astype(dtype) for shape in shapes]


CASES = (
    Case((1,), 1, 1, 32),
    Case((17,), 2, 1, 80, softcap=50.0),
    Case((64, 1, 0, 33), 9, 3, 64),
    Case((333,), 3, 1, 64, softcap=5.0),
    Case((333,), 2, 2, 128, window=64),
    Case((130, 203), 4, 2, 34, window=50, softcap=50.0),
    Case((133,), 97, 1, 16, window=65),
    Case((90, 64, 3), 2, 1, 256),
    Case((300,), 2, 2, 32, window=1),
    Case((1024,), 3, 1, 64),
    Case((1024,), 1, 1, 80, window=300),
    Case((1024,), 2, 1, 256),
)
NAMES = ("out", "lse", "dq", "dk", "dv")


def attend(case, q, k, v, d_out, implementation=ops, lengths=None):
    """out, lse, dq, dk, dv, in arrays of the type of q."""
    lengths = np.array(case.lengths if lengths is None else lengths, np.int64)
    n, n_heads, _ = q.shape
    shape = (n_heads, k.shape[1], q.shape[2])
    out, lse = np.full_like(q, 7), np.full((n_heads, n), 7, q.dtype)
    scratch = np.empty(ops.flash_scratch_bytes(lengths, *shape), np.uint8)
    implementation.flash_forward(q, k, v, lengths, out, lse, **case.options, scratch=scratch)
    gradients = [np.full_like(x, 7) for x in (q, k, v)]
    scratch = np.empty(ops.flash_scratch_bytes(lengths, *shape, backward=True), np.uint8)
    implementation.flash_backward(d_out, q, k, v, out, lse, lengths, *gradients, **case.options, scratch=scratch)
    return out, lse, *gradients


def written_out(case, q, k, v, d_out, dtype):
    """Attention with all its probabilities in one array, each step in ``dtype``; at last the largest sums of magnitudes
    behind dq and dk, in which terms cancel."""
    sharing = case.n_heads // case.n_kv_heads
    found = [np.zeros(x.shape, dtype) for x in (q, q[..., 0].T, q, k, v)]
    out, lse, dq, dk, dv = found
    lse[:] = -np.inf
    begin, terms = 0, [0, 0]
    for length in case.lengths:
        own = slice(begin, begin + length)
        begin += length
        back = np.arange(length)[:, None] - np.arange(length)
        hidden = (back < 0) | (back >= (case.window or length))
        for head in range(case.n_heads if length else 0):
            of = head // sharing
            queries, keys, values, gradient = (
                x.astype(dtype) for x in (q[own, head], k[own, of], v[own, of], d_out[own, head])
            )
            scores, slopes = queries @ keys.T * dtype(case.options["scale"]), dtype(1)
            if case.softcap:
                part = np.tanh(scores / dtype(case.softcap))
                scores, slopes = dtype(case.softcap) * part, 1 - part**2
            scores[hidden] = -np.inf
            top = scores.max(axis=1, keepdims=True)
            weights = np.exp(scores - top)
            total = weights.sum(axis=1, keepdims=True)
            weights /= total
            out[own, head] = weights @ values
            lse[head, own] = (top + np.log(total))[:, 0]
            d_weights = gradient @ values.T
            d_scores = weights * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True)) * slopes
            dq[own, head] = d_scores @ keys * dtype(case.options["scale"])
            dk[own, of] += d_scores.T @ queries * dtype(case.options["scale"])
            dv[own, of] += weights.T @ gradient
            magnitudes = 2 * weights * np.abs(d_weights) * case.options["scale"]
            sums = magnitudes @ np.abs(keys), magnitudes.T @ np.abs(queries)
            terms = [max(most, each.max()) for most, each in zip(terms, sums, strict=True)]
    return found, terms


@lru_cache
def exact_and_single(case):
    return tuple(written_out(case, *case.inputs(), dtype) for dtype in (np.float64, np.float32))


def largest(x):
    return np.abs(np.where(np.isfinite(x), x, 0)).max()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_err_no_more_than_attention_that_is_written_out(isa, case, threads):
    """Twice the error of float32 arrays of all probabilities, and a few roundings of what the results are sums of."""
    threads(2)
    (exact, terms), (single, _) = exact_and_single(case)
    got = attend(case, *case.inputs())
    sizes = largest(exact[0]), largest(exact[1]), *terms, largest(exact[4])
    for name, ours, right, usual, size in zip(NAMES, got, exact, single, sizes, strict=True):
        assert np.array_equal(np.isneginf(ours), np.isneginf(right))
        with np.errstate(invalid="ignore"):
            assert largest(ours - right) <= 2 * largest(usual - right) + 4 * EPS * size, name


@pytest.mark.parametrize("case", CASES[1:8], ids=str)
def test_the_reference_equals_attention_that_is_written_out(case):
    for ours, right in zip(
        attend(case, *case.inputs(np.float64), reference), exact_and_single(case)[0][0], strict=True
    ):
        assert np.allclose(ours, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_the_reference_gradients_are_derivatives(softcap):
    case = Case((17, 7), 4, 2, 8, window=9, softcap=softcap)
    *given, d_out = case.inputs(np.float64)
    _, _, *gradients = attend(case, *given, d_out, reference)

    def loss():
        return (attend(case, *given, d_out, reference)[0] * d_out).sum()

    rng = np.random.default_rng(1)
    for x, gradient in zip(given, gradients, strict=True):
        for _ in range(25):
            at = tuple(rng.integers(0, x.shape))
            before, step = x[at], 1e-5
            x[at] = before + step
            above = loss()
            x[at] = before - step
            slope = (above - loss()) / (2 * step)
            x[at] = before
            assert abs(slope - gradient[at]) < 1e-8


@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[6], CASES[10]], ids=str)
def test_threads_change_no_bit(isa, case, threads):
    given = case.inputs()
    threads(1)
    alone = attend(case, *given)
    for n in (2, 3, 7):
        threads(n)
        assert all(map(np.array_equal, attend(case, *given), alone)), n


def test_one_head_keeps_threads_in_order(isa, threads):
    """Tiles of keys that add to the same queries, all at once."""
    case = Case((1500,), 1, 1, 16)
    given = case.inputs()
    threads(1)
    alone = attend(case, *given)
    threads(8)
    for _ in range(5):
        assert all(map(np.array_equal, attend(case, *given), alone))


def test_documents_are_as_they_are_alone(isa):
    case = Case((65, 1, 200, 0, 31), 6, 2, 48, window=70)
    q, k, v, d_out = case.inputs()
    together = attend(case, q, k, v, d_out)
    begin = 0
    for length in case.lengths:
        own = slice(begin, begin + length)
        begin += length
        out, lse, *gradients = attend(case, *(x[own].copy() for x in (q, k, v, d_out)), lengths=[length])
        for got, right in zip((out, lse.T, *gradients), (together[0], together[1].T, *together[2:]), strict=True):
            assert np.array_equal(got, right[own])


def test_rows_behind_the_documents_see_nothing(isa):
    case = Case((5, 70), 4, 2, 32)
    given = case.inputs()
    for x in given:
        x[75:] = np.nan
    out, lse, *gradients = attend(case, *given)
    assert np.isneginf(lse[:, 75:]).all()
    for x in (out, *gradients):
        assert not x[75:].any()
        assert np.isfinite(x[:75]).all()
    nothing = attend(case, *given, lengths=[])
    assert not any(x.any() for x in (nothing[0], *nothing[2:]))


def test_a_window_of_everything_is_none(isa):
    case, same = Case((150,), 2, 1, 64), Case((150,), 2, 1, 64, window=150)
    given = case.inputs()
    for got, right in zip(attend(same, *given), attend(case, *given), strict=True):
        assert np.array_equal(got, right)
    huge = Case((150,), 2, 1, 64, window=2**62)
    assert np.array_equal(attend(huge, *given)[2], attend(case, *given)[2])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_document(isa, bad):
    case = Case((70, 80, 90), 4, 2, 32)
    clean = attend(case, *case.inputs())
    for which in range(4):
        given = case.inputs()
        head = given[which].shape[1] - 1
        given[which][100, head, 5] = bad
        out, lse, *gradients = attend(case, *given)
        for got, right in zip((out, lse.T, *gradients), (clean[0], clean[1].T, *clean[2:]), strict=True):
            for own in (slice(0, 70), slice(150, 242)):
                assert np.array_equal(got[own], right[own])
            others = slice(0, got.shape[1] // 2)  # heads of the other key head
            assert np.array_equal(got[:, others], right[:, others])
        if which == 0:  # a query: its own row, and the gradients of the keys that it sees
            assert not np.isfinite(out[100, head]).any()
            assert np.isfinite(np.delete(out[:, head], 100, 0)).all()
            assert np.isnan(gradients[1][70:101, 1]).all()
        elif which == 1:  # a key: whoever sees it
            assert np.isnan(out[100:150, 2:]).any(axis=-1).all() or np.isinf(bad)
            assert np.isfinite(out[70:100]).all()
        elif which == 2:
            assert not np.isfinite(out[100:150, 2:, 5]).any()
        else:
            assert np.isfinite(out).all()
            assert not np.isfinite(gradients[2][70:101, 1, 5]).any()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("case", [CASES[2], CASES[6], CASES[7]], ids=str)
def test_the_stated_scratch_is_exactly_what_is_used(isa, case, backward, threads):
    threads(3)
    q, k, v, d_out = case.inputs()
    lengths = np.array(case.lengths, np.int64)
    out, lse = np.zeros_like(q), np.zeros((q.shape[1], len(q)), np.float32)
    gradients = [np.empty_like(x) for x in (q, k, v)]

    def call(scratch):
        if backward:
            ops.flash_backward(d_out, q, k, v, out, lse, lengths, *gradients, **case.options, scratch=scratch)
        else:
            ops.flash_forward(q, k, v, lengths, out, lse, **case.options, scratch=scratch)

    size = ops.flash_scratch_bytes(lengths, case.n_heads, case.n_kv_heads, case.head_dim, backward=backward)
    guarded = np.full(size + 64, 0xA5, np.uint8)
    call(guarded[:size])
    assert (guarded[size:] == 0xA5).all()
    with pytest.raises(ValueError, match=f"scratch: expected {size}, got {size - 1}"):
        call(guarded[: size - 1])


def test_memory_does_not_grow_with_the_square_of_the_length():
    """Of 8,192 tokens and one head: 5 % of an array of all scores, 256 MiB, is the most that may be taken."""
    array = 8192**2 * 4
    for backward in (False, True):
        for n_threads in (1, 8):
            assert ops.flash_scratch_bytes([8192], 1, 1, 128, backward=backward, n_threads=n_threads) < 0.05 * array
    one, two = (ops.flash_scratch_bytes([n], 1, 1, 64, backward=True, n_threads=1) for n in (1 << 20, 1 << 21))
    assert (1 << 20) * (4 + 40 / 64) <= two - one <= (1 << 20) * (4 + 40 / 64 + 4 / 96) + 128


def test_wrong_arguments_are_refused():
    case = Case((5, 7), 4, 2, 16)
    q, k, v, d_out = case.inputs()
    good = {"q": q, "k": k, "v": v, "lengths": np.array(case.lengths), "out": np.empty_like(q)}
    three = np.zeros((14, 3, 16), np.float32)
    good |= {"lse": np.empty((4, len(q)), np.float32), "scratch": np.empty(1 << 20, np.uint8), "scale": 1.0}
    for match, changed in (
        ("lengths must not be negative, nor more than 14 in all", {"lengths": np.array([9, 6])}),
        ("lengths must not be negative", {"lengths": np.array([9, -1])}),
        ("query heads, a multiple of: expected 3", {"k": three, "v": three}),
        ("k and v must have the same shape", {"v": v[:-1]}),
        ("tokens of k: expected 14, got 13", {"k": k[:-1], "v": v[:-1]}),
        ("head_dim of k: expected 16, got 8", {"k": k.reshape(14, 4, 8), "v": v.reshape(14, 4, 8)}),
        ("q and out must have the same shape", {"out": np.empty_like(k)}),
        ("heads of lse: expected 4, got 3", {"lse": np.empty((3, 14), np.float32)}),
        ("window must be 0 or more, got -1", {"window": -1}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            ops.flash_forward(**(good | changed))
    with pytest.raises(TypeError):
        ops.flash_forward(**(good | {"q": q.astype(np.float64)}))
    gradients = {"dq": np.empty_like(q), "dk": np.empty_like(k), "dv": np.empty_like(v), "d_out": d_out}
    for match, changed in (
        ("q and d_out must have the same shape", {"d_out": k}),
        ("q and dq must have the same shape", {"dq": np.empty_like(k)}),
        ("k and dk must have the same shape", {"dk": np.empty_like(q)}),
        ("v and dv must have the same shape", {"dv": np.empty_like(q)}),
        ("tokens of lse: expected 14, got 13", {"lse": np.empty((4, 13), np.float32)}),
    ):
        with pytest.raises(ValueError, match=match):
            ops.flash_backward(**(good | gradients | changed))
