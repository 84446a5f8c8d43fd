"""Sparse matrices: the layout, hostile bytes, and products on every instruction set of this machine."""

from __future__ import annotations

import numpy as np
import pytest

from barefoot import ops
from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.ops import csr, parts


def sparse(rows, cols, share, rng):
    """A matrix of numbers that f16 holds, and its bytes; its first and last rows are empty, one is full."""
    dense = (rng.standard_normal((rows, cols)) * (rng.random((rows, cols)) < share)).astype(np.float16)
    if rows > 2:
        dense[[0, -1]] = 0
        dense[rows // 2] = 1.5
    dense = dense.astype(np.float32)
    return dense, csr.encode(dense, dense != 0)


def product(x, part, add=False):
    out = np.full((len(x), part.rows), np.float32(7))
    size = parts.lookup("csr").scratch_bytes(len(x), part.rows, part.cols, part.buffer.size, ops.n_threads())
    ops.part_matmul(x, part, out, add=add, scratch=np.empty(size, np.uint8))
    return out


def test_the_documented_example():
    dense = np.zeros((2, 100), np.float32)
    dense[1, 7] = 0.5
    assert csr.encode(dense, dense != 0).view("<u4").tolist() == [0, 0, 1, 0x38000007]


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 64), (37, 576), (5, 65536)])
def test_what_was_encoded_decodes_and_takes_the_bytes_that_are_stated(rows, cols, rng):
    dense, data = sparse(rows, cols, 0.02, rng)
    assert data.nbytes == csr.n_bytes(rows, np.count_nonzero(dense)) == 4 * (rows + 1 + np.count_nonzero(dense))
    assert csr.flaw(rows, cols, data) is None
    assert np.array_equal(csr.decode(rows, cols, data), dense)


def test_values_are_rounded_to_f16_and_zeros_are_kept_where_asked():
    dense = np.array([[0.1, 0, 1e9]], np.float32)
    decoded = csr.decode(1, 3, csr.encode(dense, np.ones((1, 3), np.bool_)))
    assert decoded.tolist() == [[np.float32(np.float16(0.1)), 0, 65504]]
    with pytest.raises(Incompatible, match="65536 columns"):
        csr.encode(np.zeros((1, 65537), np.float32), np.zeros((1, 65537), np.bool_))


GOOD = [0, 2, 2, 3, 0x3C000001, 0x3C000004, 0xBC000000]  # [3, 5]: entries in columns 1 and 4, none, 0
BAD = {
    "no whole number of words": (GOOD, -1),
    "too short for its offsets": (GOOD[:3], 0),
    "begins after 0": ([1, *GOOD[1:]], 0),
    "ends before its entries": ([0, 2, 2, 2, *GOOD[4:]], 0),
    "ends behind its entries": ([0, 2, 2, 4, *GOOD[4:]], 0),
    "falls": ([0, 2, 1, 3, *GOOD[4:]], 0),
    "a huge offset": ([0, 0xFFFFFFFF, 2, 3, *GOOD[4:]], 0),
    "a column too many": ([*GOOD[:6], 0xBC000005], 0),
    "twice the same column": ([*GOOD[:5], 0x3C000001, GOOD[6]], 0),
    "columns that fall": ([*GOOD[:5], 0x3C000000, GOOD[6]], 0),
    "infinity": ([*GOOD[:6], 0x7C000000], 0),
    "NaN": ([*GOOD[:6], 0xFE000000], 0),
}


@pytest.mark.parametrize("what", BAD)
def test_hostile_bytes_are_refused_before_they_are_used(what):
    words, cut = BAD[what]
    data = np.array(words, "<u4").view(np.uint8)
    data = data[: data.size + cut]
    wrong = csr.flaw(3, 5, data)
    assert wrong
    with pytest.raises(ValueError, match=r"csr \[3, 5\]: " + wrong):
        ops.Part("csr", 3, 5, data)
    with pytest.raises(InvalidInput, match=wrong):
        csr.decode(3, 5, data)


def test_good_bytes_of_the_same_kind_are_not():
    data = np.array(GOOD, "<u4").view(np.uint8)
    assert csr.flaw(3, 5, data) is None
    assert ops.Part("csr", 3, 5, data).rows == 3


def test_random_bytes_are_refused_alike_by_both(rng):
    """Mutations of a good matrix: the kernels and the reference agree on which are matrices, and those multiply."""
    accepted = 0
    for _ in range(300):
        _, data = sparse(6, 40, 0.1, rng)
        at = rng.integers(0, data.size, 2)
        data[at] = rng.integers(0, 256, 2)
        wrong = csr.flaw(6, 40, data)
        if wrong is None:
            x = rng.standard_normal((2, 40)).astype(np.float32)
            assert product(x, ops.Part("csr", 6, 40, data)).shape == (2, 6)
            accepted += 1
        else:
            with pytest.raises(ValueError, match=r"csr \[6, 40\]: "):
                ops.Part("csr", 6, 40, data)
    assert 30 < accepted < 270


@pytest.mark.parametrize("n_tokens", [1, 3, 4, 5, 15, 16, 17, 40])
def test_products_equal_those_of_the_dense_matrix(isa, n_tokens, rng, threads):
    for i, (rows, cols, share) in enumerate([(1, 7, 0.5), (37, 576, 0.01), (200, 1331, 0.02), (64, 96, 0.0)]):
        threads(1 + i % 3)
        dense, data = sparse(rows, cols, share, rng)
        part = ops.Part("csr", rows, cols, data)
        x = rng.standard_normal((n_tokens, cols)).astype(np.float32)
        exact = x.astype(np.float64) @ dense.T
        bound = np.abs(x).astype(np.float64) @ np.abs(dense).T * (np.count_nonzero(dense, axis=1) + 1) * 2.0**-24
        assert (np.abs(product(x, part) - exact) <= bound).all()
        assert (np.abs(product(x, part, add=True) - 7 - exact) <= bound + 2.0**-24 * (7 + np.abs(exact))).all()


def test_results_depend_on_nothing_but_the_numbers(rng, threads):
    """Neither on threads, nor on how many tokens come together, nor on the instruction set: one order of sums."""
    _, data = sparse(300, 777, 0.03, rng)
    shifted = np.zeros(data.size + 1, np.uint8)
    shifted[1:] = data
    x = rng.standard_normal((35, 777)).astype(np.float32)
    seen, before = set(), ops.isa()
    for isa in ops.available_isas():
        ops.set_isa(isa)
        for n_threads in (1, 2, 3):
            threads(n_threads)
            for part in (ops.Part("csr", 300, 777, data), ops.Part("csr", 300, 777, shifted[1:])):
                seen.add(product(x, part).tobytes())
                seen.add(np.concatenate([product(x[i : i + 5].copy(), part) for i in range(0, 35, 5)]).tobytes())
                seen.add(np.concatenate([product(x[i : i + 1].copy(), part) for i in range(35)]).tobytes())
    ops.set_isa(before)
    assert len(seen) == 1


@pytest.mark.parametrize("n_tokens", [2, 20])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_the_rows_that_look_at_it(isa, n_tokens, bad, rng):
    dense, data = sparse(50, 96, 0.05, rng)
    x = rng.standard_normal((n_tokens, 96)).astype(np.float32)
    clean = product(x, ops.Part("csr", 50, 96, data))
    x[1, 33] = bad
    got = product(x, ops.Part("csr", 50, 96, data))
    touched = dense[:, 33] != 0
    assert 0 < touched.sum() < 50
    assert not np.isfinite(got[1, touched]).any()
    assert np.array_equal(got[1, ~touched], clean[1, ~touched])
    assert np.array_equal(np.delete(got, 1, 0), np.delete(clean, 1, 0))


def test_scratch_is_what_is_stated_and_not_overrun(isa, threads, rng):
    threads(3)
    _, data = sparse(100, 500, 0.2, rng)
    part, kind = ops.Part("csr", 100, 500, data), parts.lookup("csr")
    assert kind.scratch_bytes(15, 100, 500, data.size, 3) == 0
    assert kind.scratch_bytes(16, 100, 500, data.size, 3) == 64 + 3 * 16 * 500 * 4
    x, out = np.ones((70, 500), np.float32), np.empty((70, 100), np.float32)
    size = kind.scratch_bytes(70, 100, 500, data.size, 3)
    guarded = np.full(size + 128, 0xA5, np.uint8)
    ops.part_matmul(x, part, out, scratch=guarded[64 : 64 + size])
    assert (guarded[:64] == 0xA5).all()
    assert (guarded[64 + size :] == 0xA5).all()
    with pytest.raises(ValueError, match="bytes of scratch"):
        ops.part_matmul(x, part, out, scratch=guarded[: size - 1])
