"""Thin factors beside a matrix: the layout, hostile bytes, and products on every instruction set of this machine."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.ops import blocks, lowrank, parts

SHAPES = [(1, 1, 1), (3, 20, 2), (37, 51, 5), (64, 96, 16), (200, 1331, 9), (96, 48, 130)]  # rows, cols, rank


def thin(type_id, rows, cols, rank, rng, scale=0.75):
    """Factors that the type holds, and their bytes."""
    a, b = rng.standard_normal((rank, cols)), rng.standard_normal((rows, rank))
    a, b = (blocks.decode(type_id, blocks.encode(type_id, f.astype(np.float32)), f.shape[1]) for f in (a, b))
    return a, b, lowrank.encode(type_id, a, b, scale)


def product(x, part, add=False):
    out = np.full((len(x), part.rows), np.float32(7))
    kind = parts.lookup(part.kind)
    size = kind.scratch_bytes(len(x), part.rows, part.cols, part.buffer.size, ops.n_threads())
    ops.part_matmul(x, part, out, add=add, scratch=np.empty(size, np.uint8))
    return out


def test_the_documented_example():
    a, b = np.arange(40, dtype=np.float32).reshape(2, 20), np.arange(38, dtype=np.float32).reshape(19, 2)
    data = lowrank.encode("f16", a, b, 0.5)
    assert data.size == lowrank.n_bytes("f16", 19, 20, 2) == 320
    assert struct.unpack_from("<f", data) == (0.5,)
    assert struct.unpack_from("<e", data, 64 + 2 * (32 + 19)) == (39.0,)  # A[1, 19]
    assert struct.unpack_from("<e", data, 64 + 2 * (2 * 32 + (1 * 2 + 1) * 16 + 2)) == (37.0,)  # B[18, 1]
    assert not data[4:64].any()
    assert not data[64 + 2 * 20 : 64 + 2 * 32].any()
    assert not data[-2 * 13 :].any()
    assert np.array_equal(parts.lookup("lowrank_f16").decode(19, 20, data), 0.5 * b @ a)


@pytest.mark.parametrize("type_id", lowrank.TYPES)
@pytest.mark.parametrize(("rows", "cols", "rank"), SHAPES)
def test_what_was_encoded_is_read_back_in_the_stated_bytes(type_id, rows, cols, rank, rng):
    a, b, data = thin(type_id, rows, cols, rank, rng)
    number = 4 if type_id == "f32" else 2
    assert data.nbytes == 64 + number * rank * (-(-rows // 16) * 16 + -(-cols // 16) * 16)
    assert lowrank.rank_of(type_id, rows, cols, data.size) == rank
    found = lowrank.factors(type_id, rows, cols, data)
    assert np.array_equal(found[0], a)
    assert np.array_equal(found[1], b)
    assert found[2] == 0.75


@pytest.mark.parametrize("type_id", lowrank.TYPES)
@pytest.mark.parametrize("n_tokens", [1, 3, 4, 5, 15, 16, 17, 40])
def test_products_equal_those_of_the_factors(isa, type_id, n_tokens, rng, threads):
    """Against float64; each of the two sums errs by its length times half a unit of the last place at most."""
    for i, (rows, cols, rank) in enumerate(SHAPES):
        threads(1 + i % 3)
        a, b, data = thin(type_id, rows, cols, rank, rng)
        part = ops.Part(lowrank.kind(type_id), rows, cols, data)
        x = rng.standard_normal((n_tokens, cols)).astype(np.float32)
        exact = 0.75 * (x.astype(np.float64) @ a.T.astype(np.float64)) @ b.T
        most = 0.75 * (np.abs(x).astype(np.float64) @ np.abs(a.T)) @ np.abs(b.T)
        bound = most * (cols + rank + 3) * 2.0**-24
        assert (np.abs(product(x, part) - exact) <= bound).all()
        assert (np.abs(product(x, part, add=True) - 7 - exact) <= bound + 2.0**-24 * (7 + np.abs(exact))).all()


@pytest.mark.parametrize("type_id", lowrank.TYPES)
def test_results_depend_neither_on_threads_nor_on_which_tokens_come_together(isa, type_id, rng, threads):
    rows, cols, rank = 301, 777, 21
    _, _, data = thin(type_id, rows, cols, rank, rng)
    shifted = np.zeros(data.size + 1, np.uint8)
    shifted[1:] = data
    x = rng.standard_normal((35, cols)).astype(np.float32)
    seen = set()
    for n_threads in (1, 2, 3):
        threads(n_threads)
        for buffer in (data, shifted[1:]):
            part = ops.Part(lowrank.kind(type_id), rows, cols, buffer)
            seen.add(product(x, part).tobytes())
            for n in (1, 5, 17):
                pieces = [product(x[i : i + n].copy(), part) for i in range(0, 35, n)]
                seen.add(np.concatenate(pieces).tobytes())
    assert len(seen) == 1


@pytest.mark.parametrize("n_tokens", [2, 20])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_token(isa, n_tokens, bad, rng):
    _, _, data = thin("f16", 50, 96, 4, rng)
    part = ops.Part("lowrank_f16", 50, 96, data)
    x = rng.standard_normal((n_tokens, 96)).astype(np.float32)
    clean = product(x, part)
    x[1, 33] = bad
    got = product(x, part)
    assert not np.isfinite(got[1]).any()
    assert np.array_equal(np.delete(got, 1, 0), np.delete(clean, 1, 0))


@pytest.mark.parametrize("type_id", lowrank.TYPES)
def test_hostile_bytes_are_refused_alike_by_both(type_id, rng):
    kind = lowrank.kind(type_id)
    _, _, good = thin(type_id, 6, 40, 3, rng)
    number = 4 if type_id == "f32" else 2
    infinity = {"f32": b"\0\0\x80\x7f", "f16": b"\0\x7c", "bf16": b"\x80\x7f"}[type_id]
    nan = {"f32": b"\1\0\xc0\xff", "f16": b"\1\xfe", "bf16": b"\xc1\xff"}[type_id]

    def with_bytes(at, raw):
        data = good.copy()
        data[at : at + len(raw)] = np.frombuffer(raw, np.uint8)
        return data

    bad = {
        "no header": good[:63],
        "no factors": good[:64],
        "half a rank": good[: 64 + (good.size - 64) // 6],
        "a byte too many": np.append(good, np.uint8(0)),
        "infinite scale": with_bytes(0, b"\0\0\x80\x7f"),
        "NaN in A": with_bytes(64 + 7 * number, nan),
        "infinity in the last of B": with_bytes(good.size - number, infinity),
    }
    for what, data in bad.items():
        wrong = parts.lookup(kind).flaw(6, 40, data)
        assert wrong, what
        with pytest.raises(ValueError, match=rf"{kind} \[6, 40\]: {wrong}"):
            ops.Part(kind, 6, 40, data)
        with pytest.raises(InvalidInput, match=wrong):
            parts.lookup(kind).decode(6, 40, data)
    assert parts.lookup(kind).flaw(6, 40, good) is None
    assert ops.Part(kind, 6, 40, good).cols == 40


def test_scratch_is_what_is_stated_and_not_overrun(isa, threads, rng):
    threads(3)
    _, _, data = thin("bf16", 100, 500, 7, rng)
    part, kind = ops.Part("lowrank_bf16", 100, 500, data), parts.lookup("lowrank_bf16")
    assert kind.scratch_bytes(15, 100, 500, data.size, 3) == 64 + 15 * 7 * 4
    assert kind.scratch_bytes(16, 100, 500, data.size, 3) == 64 + 3 * 16 * 7 * 4
    for n_tokens in (15, 70):
        x, out = np.ones((n_tokens, 500), np.float32), np.empty((n_tokens, 100), np.float32)
        size = kind.scratch_bytes(n_tokens, 100, 500, data.size, 3)
        guarded = np.full(size + 128, 0xA5, np.uint8)
        ops.part_matmul(x, part, out, scratch=guarded[64 : 64 + size])
        assert (guarded[:64] == 0xA5).all()
        assert (guarded[64 + size :] == 0xA5).all()
        with pytest.raises(ValueError, match="bytes of scratch"):
            ops.part_matmul(x, part, out, scratch=guarded[: size - 1])
