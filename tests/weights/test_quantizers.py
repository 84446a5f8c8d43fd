"""Ranges, uniform grids and granularities: what the survey's axes promise, for numpy and torch alike."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from barefoot.core.errors import CorruptFile, InvalidInput
from barefoot.weights import bitstream, ranges
from barefoot.weights.affine import Affine, stored_scale
from barefoot.weights.granularity import count_groups, from_groups, to_groups

BLOCKS = ((None, None), (1, None), (6, None), (1, 16), (3, 7))
SHAPES = ((12, 48), (13, 50), (1, 5), (7, 1))
GRIDS = [Affine(b, s) for b in (2, 3, 4, 8) for s in ("asymmetric", "restricted", "full")]


def matrix(shape, seed=0):
    return np.random.default_rng(seed).standard_t(4, shape).astype(np.float32)


@given(st.integers(1, 16), st.integers(0, 70), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_stream_gives_its_codes_back_and_wastes_less_than_a_byte(bits, n, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, n)
    stream = bitstream.pack(codes, bits)
    assert 0 <= 8 * stream.nbytes - n * bits < 8
    np.testing.assert_array_equal(bitstream.unpack(stream, bits, n), codes)


def test_the_layout_of_a_stream():
    # 5, 2 and 7 of 3 bits, low bits first: 101 010 11|1
    assert bitstream.pack([5, 2, 7], 3).tolist() == [0b11010101, 0b1]


def test_streams_refuse_what_does_not_fit():
    with pytest.raises(InvalidInput, match="0 to 7, got 0 to 8"):
        bitstream.pack([0, 8], 3)
    with pytest.raises(CorruptFile, match="take 2 bytes, got 1"):
        bitstream.unpack(np.zeros(1, np.uint8), 3, 3)


@pytest.mark.parametrize(("shape", "block"), [*itertools.product(SHAPES, BLOCKS)])
def test_groups_hold_what_lies_in_their_block(shape, block):
    x = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    groups = to_groups(x, block)
    rows, cols = (axis if size is None else min(size, axis) for axis, size in zip(shape, block, strict=True))
    blocks = [x[i : i + rows, j : j + cols] for i in range(0, shape[0], rows) for j in range(0, shape[1], cols)]
    assert len(groups) == len(blocks) == count_groups(shape, block)
    for group, block_of_x in zip(groups, blocks, strict=True):
        assert set(group) == set(block_of_x.reshape(-1))
    np.testing.assert_array_equal(from_groups(groups, shape, block), x)
    np.testing.assert_array_equal(to_groups(torch.from_numpy(x), block).numpy(), groups)


@pytest.mark.parametrize(("grid", "block", "shape"), [*itertools.product(GRIDS, BLOCKS, SHAPES)], ids=str)
def test_no_element_inside_the_range_moves_by_more_than_half_a_step(grid, block, shape):
    groups = to_groups(matrix(shape), block)
    scale, zero = grid.parameters(*ranges.extremes(groups))
    codes = grid.quantize(groups, scale, zero)
    assert grid.least <= codes.min()
    assert codes.max() < 1 << grid.bits
    assert np.all(codes == np.rint(codes))
    values = grid.dequantize(codes, scale, zero)
    # Half a step, and the rounding of float32 in quotients and products of at most 255 steps.
    assert np.all(np.abs(values - groups) <= scale * (0.5 + 255 * 2.0**-22))
    np.testing.assert_array_equal(grid.quantize(values, scale, zero), codes)
    assert np.all(grid.rounded(np.zeros_like(groups), *ranges.extremes(groups)) == 0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_torch_computes_the_same(grid):
    x = matrix((20, 60))
    expected = grid.rounded(x, *ranges.extremes(x))
    tensor = torch.from_numpy(x)
    np.testing.assert_array_equal(grid.rounded(tensor, *ranges.extremes(tensor)).numpy(), expected)
    torch_range = ranges.least_error(tensor, grid)
    for ours, theirs in zip(ranges.least_error(x, grid), torch_range, strict=True):
        np.testing.assert_array_equal(theirs.numpy(), ours)


def test_parameters_of_the_three_symmetries():
    low, high = np.array([-1.0], np.float32), np.array([3.0], np.float32)
    for symmetry, steps, zero in (("asymmetric", 4 / 15, 4), ("restricted", 3 / 7, 8), ("full", 6 / 15, 8)):
        scale, found = Affine(4, symmetry).parameters(low, high)
        assert steps <= scale[0, 0] <= steps * (1 + 2.0**-9)
        assert found[0, 0] == zero


@given(st.floats(0, 60000, width=32))
def test_stored_scales_never_fall_short(value):
    scale = stored_scale(np.array([value], np.float32))
    assert scale.astype(np.float16).astype(np.float32) == scale
    assert scale >= value
    assert scale[0] in (1, 0) or scale <= value * (1 + 2.0**-9) + 2.0**-23


def test_a_group_of_zeros_stays_zero():
    x = np.zeros((2, 8), np.float32)
    for grid in GRIDS:
        assert np.all(grid.rounded(x, *ranges.extremes(x)) == 0)


def test_finer_groups_never_need_a_larger_scale():
    x = matrix((24, 64))
    coarse = to_groups(Affine(4).parameters(*ranges.extremes(to_groups(x, (None, None))))[0], (None, None))
    for block in BLOCKS[1:]:
        assert Affine(4).parameters(*ranges.extremes(to_groups(x, block)))[0].max() <= coarse.max()


def test_asymmetric_grids_spend_no_codes_below_a_relu():
    x = np.maximum(matrix((40, 64)), 0)
    error = {s: float(((x - Affine(4, s).rounded(x, *ranges.extremes(x))) ** 2).mean()) for s in ("asymmetric", "full")}
    # Half the range is half the step, and a quarter of the error; full range has 15 codes for 2 x the range.
    assert error["asymmetric"] < 0.4 * error["full"]


def test_percentiles_are_of_the_elements():
    x = np.arange(1001, dtype=np.float32)[None] - 500
    low, high = ranges.percentile(x, 99)
    np.testing.assert_allclose([low[0], high[0]], [-490, 490], atol=1e-3)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_ranges_of_least_error_are_no_worse_and_help_where_tails_are_heavy(grid):
    x = matrix((30, 400), 3)
    plain = ((x - grid.rounded(x, *ranges.extremes(x))) ** 2).sum(axis=1)
    fitted = ((x - grid.rounded(x, *ranges.least_error(x, grid))) ** 2).sum(axis=1)
    assert np.all(fitted <= plain)
    if grid.bits < 8:
        assert fitted.sum() < 0.9 * plain.sum()


def test_entropy_cuts_a_lone_outlier_off_and_keeps_a_flat_range():
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((1, 60000)).astype(np.float32)
    lone = np.concatenate([normal, np.full((1, 1), 100, np.float32)], axis=1)
    low, high = ranges.entropy(lone)
    assert 3 < high[0] < 25
    assert low[0] == -high[0]
    flat = rng.uniform(0, 1, (1, 60000)).astype(np.float32)
    low, high = ranges.entropy(flat)
    assert low[0] == 0
    assert high[0] > 0.95


def test_moving_average():
    seen = [(np.array([-1.0]), np.array([1.0])), (np.array([-2.0]), np.array([3.0]))]
    low, high = ranges.moving_average(seen, 0.75)
    assert (low[0], high[0]) == (-1.25, 1.5)
    with pytest.raises(InvalidInput, match="no ranges"):
        ranges.moving_average([])


def test_bad_input_is_named():
    with pytest.raises(InvalidInput, match="has 2 to 8 bits, got 1"):
        Affine(1, "full")
    with pytest.raises(InvalidInput, match="one of asymmetric, restricted, full"):
        Affine(4, "odd")
    with pytest.raises(InvalidInput, match="empty"):
        to_groups(np.zeros((3, 4), np.float32), (0, None))
    with pytest.raises(InvalidInput, match="above 50"):
        ranges.percentile(np.zeros((1, 4), np.float32), 2)
