"""Compiled rounding against the numpy reference, bit for bit; and both against what they should minimize."""

import tracemalloc

import numpy as np
import pytest

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.ops import blocks, levels, rounding
from barefoot.ops.grids import Shifted, Special, Table, Ternary, Uniform, row_sums

TABLE = tuple(np.sort(np.random.default_rng(1).standard_normal(16)).tolist())
GRIDS = [
    Uniform(4, 32),
    Uniform(1, 32),
    Uniform(8, 128, symmetric=True),
    Uniform(3, 64, symmetric=True),
    Uniform(2, 16),
    Uniform(5, 48),
    Ternary(64),
    Table(TABLE, 32),
    Table(levels.minifloat_table(2, 3), 32),
    Shifted(4, 32),
    Special(levels.minifloat_table(2, 0), levels.BITMOD_SPECIALS[3], 32),
    Table(tuple(np.linspace(-3, 2, 256).tolist()), 16),
]
ENCODED = [f for f in blocks.names() if blocks.lookup(f).grid or blocks.lookup(f).encode_blocks]
SHAPES = [(1, 1), (37, 3), (130, 2)]  # rows, groups: fewer than a vector has lanes, odd, and enough for threads


def weights(rng, rows, cols):
    """Rows of many magnitudes; constant groups, halves between levels, subnormal and saturating scales."""
    w = (rng.standard_normal((rows, cols)) * np.exp(2 * rng.standard_normal((rows, 1)))).astype(np.float32)
    w[0, : cols // 2] = 0
    if rows > 4:
        w[1] = np.round(w[1] * 2) / 2
        w[2] *= 1e-7
        w[3] *= 1e6
        w[4] = -np.abs(w[4])
    return w


def same_bits(a, b):
    return a.tobytes() == b.tobytes()


@pytest.fixture(params=GRIDS, ids=str)
def grid(request):
    return request.param


@pytest.mark.parametrize(("rows", "groups"), SHAPES)
def test_fits_and_codes_are_the_references(rng, isa, threads, grid, rows, groups):
    cols = groups * grid.group
    w = weights(rng, rows, cols)
    for importance in (None, rng.random(cols, np.float32), rng.random((rows, cols), np.float32)):
        expected, params = np.empty((2, rows, groups, grid.n_params), np.float32)
        rounding.fit_groups(w, grid, expected, importance)
        codes, expected_codes = np.empty((2, rows, cols), np.uint8)
        errors, expected_errors = np.empty((2, rows, groups), np.float32)
        rounding.group_errors(w, grid, expected, expected_errors, importance)
        rounding.round_groups(w, grid, expected, expected_codes)
        for n in (1, 3):
            threads(n)
            ops.fit_groups(w, grid, params, importance=importance)
            assert same_bits(params, expected)
            ops.round_groups(w, grid, params, codes)
            assert same_bits(codes, expected_codes)
            ops.group_errors(w, grid, params, errors, importance=importance)
            assert same_bits(errors, expected_errors)


@pytest.mark.parametrize(("rows", "cols"), [(1, 16), (37, 144), (300, 64)])
def test_feedback_is_the_references(rng, isa, threads, grid, rows, cols):
    n_groups = 5
    w = weights(rng, rows, cols)
    groups = rng.integers(0, n_groups, cols, np.int32)
    params = np.empty((rows, n_groups, grid.n_params), np.float32)
    rounding.fit_groups(weights(rng, rows, n_groups * grid.group), grid, params)
    mixing = rng.standard_normal((cols, cols), np.float32) / 8
    start = w + rng.standard_normal(w.shape, np.float32) / 8
    expected, expected_codes = start.copy(), np.empty(w.shape, np.uint8)
    rounding.feedback_round(w, expected, grid, params, groups, mixing, expected_codes)
    for n in (1, 3):
        threads(n)
        errors, codes = start.copy(), np.empty(w.shape, np.uint8)
        ops.feedback_round(w, errors, grid, params, groups, mixing, codes)
        assert same_bits(codes, expected_codes)
        np.testing.assert_array_equal(errors, expected)  # but for the sign of zeros


@pytest.mark.parametrize("format_id", ENCODED)
@pytest.mark.parametrize(("rows", "n_blocks"), [(1, 1), (37, 3)])
def test_encoding_is_the_references(rng, isa, threads, format_id, rows, n_blocks):
    w = weights(rng, rows, n_blocks * max(blocks.block_elements(format_id), 7))
    expected = blocks.encode(format_id, w)
    for n in (1, 3):
        threads(n)
        out = np.empty_like(expected)
        ops.encode(format_id, w, out)
        assert same_bits(out, expected)


def test_ties_go_to_the_even_code():
    x = np.arange(16, dtype=np.float32)[None] / 2
    codes = np.empty((1, 16), np.uint8)
    ops.round_groups(x, Uniform(3, 16), np.array([[[1, 0]]], np.float32), codes)
    assert codes.tolist() == [[0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6, 7, 7]]
    ops.round_groups(x, Table(tuple(map(float, range(-1, 8))), 16), np.ones((1, 1, 1), np.float32), codes)
    assert codes.tolist() == [[1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6, 7, 8, 8, 8]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format_id", ["int4_g32_asym", "ternary_g64", "int1_g128_asym", "q8_0"])
def test_weights_that_are_not_finite_are_refused(rng, isa, format_id, bad):
    w = weights(rng, 70, 128)
    out = np.empty((70, blocks.row_bytes(format_id, 128)), np.uint8)
    ops.encode(format_id, w, out)
    w[69, 127] = bad
    with pytest.raises(InvalidInput, match=f"{format_id} can't store"):
        ops.encode(format_id, w, out)


def test_wrong_shapes_are_refused(rng):
    w, grid = weights(rng, 4, 64), Uniform(4, 32)
    params, codes = np.zeros((4, 2, 2), np.float32), np.zeros((4, 64), np.uint8)
    mixing, groups = np.zeros((64, 64), np.float32), np.zeros(64, np.int32)
    for call in (
        lambda: ops.fit_groups(w, Uniform(4, 128), params),
        lambda: ops.fit_groups(w, grid, params[:3]),
        lambda: ops.fit_groups(w, grid, params, importance=np.ones(63, np.float32)),
        lambda: ops.round_groups(w, grid, params, codes[:3]),
        lambda: ops.round_groups(w, Uniform(4, 32, symmetric=True), params, codes),
        lambda: ops.feedback_round(w, w.copy(), grid, params, groups + 2, mixing, codes),
        lambda: ops.feedback_round(w, w.copy(), grid, params, groups, mixing[:63], codes),
        lambda: ops.encode("int4_g32_asym", w, np.zeros((4, 39), np.uint8)),
    ):
        with pytest.raises((ValueError, TypeError)):
            call()


def test_row_sums_are_sums(rng):
    x = rng.standard_normal((9, 144), np.float32)
    exact = x.astype(np.float64).sum(axis=1)
    assert np.abs(row_sums(x) - exact).max() <= 144 * 2**-24 * np.abs(x).sum(axis=1).max()


def test_least_error_is_near_the_best_of_all_ranges(rng):
    """Two levels a side are few enough to try every scale: the search comes within a few percent of the optimum."""
    x = rng.standard_normal((64, 32)).astype(np.float32)
    grid = Uniform(2, 32, symmetric=True)
    params = np.empty((64, 1, 1), np.float32)
    ops.fit_groups(x, grid, params)

    def errors(scales):
        off = x - grid.values(grid.round(x, scales), scales)
        return (off.astype(np.float64) ** 2).sum(axis=1)

    best = np.min([errors(np.full((64, 1), s, np.float32)) for s in np.linspace(-2, 2, 801) if abs(s) > 0.01], axis=0)
    found, plain = errors(params[:, 0]), errors(grid.plain(x))
    assert (found <= plain).all()
    assert found.sum() < 1.05 * best.sum() < 0.9 * plain.sum()


def test_encoding_allocates_nothing(rng):
    w = rng.standard_normal((256, 1024), np.float32)
    out = np.empty((256, blocks.row_bytes("int4_g32_asym", 1024)), np.uint8)
    ops.encode("int4_g32_asym", w, out)
    tracemalloc.start()
    ops.encode("int4_g32_asym", w, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8192 or ops.backend().startswith("reference")
