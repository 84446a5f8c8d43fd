"""BitStack's decomposition: energies, what signs and scales are worth, and what is stored."""

from __future__ import annotations

import numpy as np
import pytest

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.ops import signs
from barefoot.weights.solvers import Inputs
from barefoot.weights.structures.bitstack import (
    BitStack,
    as_halves,
    channel_scales,
    decompose,
    rank_for,
    truncated,
)


@pytest.fixture
def gaussian(rng):
    return rng.standard_normal((384, 384)).astype(np.float32)


@pytest.fixture
def rng():
    return np.random.default_rng(22)


def left_over(weight, blocks, squares=None):
    """The energy that is left after each block, of that before the first; columns count as ``squares`` say."""
    importance = np.ones(weight.shape[1]) if squares is None else squares.astype(np.float64)
    rest = weight.astype(np.float64)
    before = float((rest**2 * importance).sum())
    found = []
    for block in blocks:
        rest = rest - signs.decode(*weight.shape, block)
        found.append(float((rest**2 * importance).sum()) / before)
    return found


def svd_left_over(weight, block_bytes, n):
    """The same of a plain SVD of the signed weights, cut off at as many f16 numbers as fit the bytes of n blocks."""
    values = np.linalg.svd(weight, compute_uv=False).astype(np.float64) ** 2
    rank = block_bytes // (2 * sum(weight.shape))
    return [1 - values[: rank * (i + 1)].sum() / values.sum() for i in range(n)]


def ones_like_columns(weight):
    return np.ones(weight.shape[1], np.float32)


def test_signs_and_one_rank_keep_what_theory_says(rng):
    """|g| of a Gaussian has mean sqrt(2 / π): rank one of magnitudes leaves its variance, 1 - 2 / π = 0.363."""
    weight = rng.standard_normal((1024, 1024)).astype(np.float32)
    (left,) = left_over(weight, decompose(weight, ones_like_columns(weight), 1, 1))
    assert abs(left - (1 - 2 / np.pi)) < 0.01


def test_energies_beside_a_plain_svd_of_the_same_bytes(gaussian):
    """The numbers of a Gaussian matrix; magnitudes decomposed without their signs' bits, an SVD, fail this."""
    blocks = list(decompose(gaussian, ones_like_columns(gaussian), 4, 4))
    ours, svd = left_over(gaussian, blocks), svd_left_over(gaussian, blocks[0].size, 4)
    np.testing.assert_allclose(ours, [0.351, 0.123, 0.052, 0.027], rtol=0.03)
    assert ours[0] <= 0.7 * svd[0]
    assert all(a <= 0.5 * b for a, b in zip(ours[1:], svd[1:], strict=True))


def test_stretching_reaches_the_tail(gaussian):
    """Steps of 1.2 times the mean of |r| leave 0.019 of a Gaussian's energy after four, steps of the mean 0.033."""
    scales = ones_like_columns(gaussian)
    plain, stretched = (left_over(gaussian, decompose(gaussian, scales, 5, 3, stretch)) for stretch in (1.0, 1.2))
    assert stretched[1] <= plain[1]
    assert stretched[2] <= 0.9 * plain[2]
    assert all(a <= 0.65 * b for a, b in zip(stretched[3:], plain[3:], strict=True))


def test_later_blocks_undo_the_rounding_of_earlier_ones(rng):
    """A matrix whose magnitudes are of rank one: after the first block only the rounding to f16 is left, 2^-11 of each
    factor, and the second block takes most of that away too."""
    weight = np.outer(rng.uniform(1, 2, 64), rng.uniform(1, 2, 96)).astype(np.float32)
    weight *= np.where(rng.random(weight.shape) < 0.5, -1, 1)
    first, second = left_over(weight, decompose(weight, ones_like_columns(weight), 2, 1))
    assert 1e-9 < first < (2 * 2.0**-11) ** 2
    assert second < 0.5 * first


def test_scales_lower_the_error_that_inputs_see(rng):
    """Two halves of the columns whose magnitudes have a rank each, and blocks of one: the scales say whose to take."""
    halves = [np.outer(rng.uniform(0.2, 2, 192) ** 2, rng.uniform(0.2, 2, 128)) for _ in range(2)]
    magnitudes = np.concatenate(halves, axis=1)
    weight = np.where(rng.random(magnitudes.shape) < 0.5, -magnitudes, magnitudes).astype(np.float32)
    squares = np.repeat([100, 1], 128).astype(np.float32)
    with_scales = left_over(weight, decompose(weight, channel_scales(squares), 3, 1), squares)
    without = left_over(weight, decompose(weight, ones_like_columns(weight), 3, 1), squares)
    assert with_scales[0] < 0.1 * without[0]
    assert all(a < b for a, b in zip(with_scales, without, strict=True))


def test_scales_are_root_mean_squares_within_bounds():
    scales = channel_scales(np.array([4.0, 1.0, 0.25, 0.0], np.float32))
    np.testing.assert_allclose(scales[:3] / scales[1], [2, 1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(scales[3] / scales[0], 1e-3, rtol=1e-6)
    np.testing.assert_allclose(np.prod(scales), 1, rtol=1e-5)
    assert np.array_equal(channel_scales(np.zeros(3, np.float32)), np.ones(3))


@pytest.mark.parametrize("shape", [(384, 384), (96, 640), (7, 5)])
def test_the_approximation_is_nearly_the_best_of_its_rank(shape, rng):
    a = np.abs(rng.standard_normal(shape)).astype(np.float32)
    rank = rank_for(*shape, 16)
    u, v = truncated(a, rank)
    values = np.linalg.svd(a.astype(np.float64), compute_uv=False)
    best = (values[rank:] ** 2).sum()
    assert best * (1 - 1e-6) <= ((a - u.astype(np.float64) @ v) ** 2).sum() <= 1.005 * best + 1e-9


def test_ranks_keep_factors_below_a_quarter_of_a_bit():
    for rows, cols in ((576, 576), (192, 576), (1536, 576), (4096, 4096)):
        rank = rank_for(rows, cols, 64)
        assert 16 * rank * (rows + cols) <= 0.25 * rows * cols < 16 * (rank + 1) * (rows + cols)
    assert [rank_for(576, 576, 16), rank_for(4096, 4096, 16), rank_for(8, 8, 16)] == [4, 16, 1]


def test_halves_are_balanced_and_within_range(rng):
    u, v = rng.standard_normal((5, 2)).astype(np.float32) * 1e6, rng.standard_normal((2, 7)).astype(np.float32) * 1e-6
    u16, v16 = as_halves(u, v)
    assert np.isfinite(u16).all()
    np.testing.assert_allclose(u16.astype(np.float64) @ v16.astype(np.float64), u @ v, rtol=0, atol=2.0**-9 * 10)
    zero16, _ = as_halves(np.zeros_like(u), v)
    assert not zero16.any()


def test_what_is_stored(rng):
    weight = rng.standard_normal((64, 96)).astype(np.float32)
    inputs = Inputs(rng.uniform(0.5, 2, 96).astype(np.float32))
    matrix = BitStack(blocks=3).solve(weight, inputs)
    assert list(matrix.parts) == ["01", "02", "03"]
    assert {kind for kind, _ in matrix.parts.values()} == {"signs"}
    rank = 96 * 64 // (64 * (96 + 64)) or 1
    assert matrix.n_bytes == 3 * (64 * 96 // 8 + 2 * rank * (64 + 96))
    again = BitStack(blocks=3).solve(weight, inputs)
    assert all(np.array_equal(matrix.parts[label][1], again.parts[label][1]) for label in matrix.parts)
    fewer = BitStack(blocks=2).solve(weight, inputs)
    assert all(np.array_equal(matrix.parts[label][1], fewer.parts[label][1]) for label in fewer.parts)
    assert BitStack(scale=False).wants == "nothing"
    assert BitStack().wants == "squares"


def test_zeros_stay_zeros():
    matrix = BitStack(blocks=2, scale=False).solve(np.zeros((16, 8), np.float32), None)
    assert not any(signs.decode(16, 8, data).any() for _, data in matrix.parts.values())


def test_what_can_not_be():
    for stretch in (0.9, 2.0):
        with pytest.raises(InvalidInput, match="stretch must be at least 1 and below 2"):
            BitStack(stretch=stretch)
    for wrong in ({"blocks": 0}, {"blocks": 100}, {"rank": 0}, {"rank": 65}):
        with pytest.raises(InvalidInput, match="expected 1 to 99 blocks and a rank of 1 to 64"):
            BitStack(**wrong)
    with pytest.raises(Incompatible, match="NaN or infinity"):
        BitStack(scale=False).solve(np.full((16, 8), np.nan, np.float32), None)
