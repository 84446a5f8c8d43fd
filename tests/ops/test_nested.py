"""Grids whose groups share numbers: what is stored means what codes were chosen for, and costs little."""

import numpy as np
import pytest

from barefoot import ops
from barefoot.ops import blocks
from barefoot.ops.grids import Nested, Uniform
from barefoot.weights.solvers import expanded, solve_groups
from barefoot.weights.solvers.mse import Mse, least_error, settle

WITH_GRID = [name for name in blocks.names() if blocks.lookup(name).grid is not None]
NESTED = [name for name in WITH_GRID if isinstance(blocks.lookup(name).grid, Nested)]


def weights(rng, rows, cols):
    """Groups of many sizes; one block of zeros, one without a negative weight, one with a single weight."""
    w = (
        rng.standard_normal((rows, cols))
        * np.exp(rng.standard_normal((rows, cols // 16, 1))).repeat(16, 1).reshape(rows, cols)
    ).astype(np.float32)
    w[0] = 0
    w[1] = np.abs(w[1])
    w[2], w[2, 5] = 0, -3
    return w


def test_the_super_blocks_and_bilevel_blocks_are_nested():
    assert set(NESTED) == {*(f"q{bits}_k" for bits in range(2, 7)), "bilevel2", "bilevel3", "bilevel4"}


@pytest.mark.parametrize("name", WITH_GRID)
def test_blocks_hold_what_the_solution_says(rng, name):
    grid = blocks.lookup(name).grid
    w = weights(rng, 7, 512)
    solution = Mse().solve(w, grid, None)
    rows = blocks.pack(name, solution.codes, solution.params)
    np.testing.assert_array_equal(blocks.decode(name, rows, 512), solution.weights(grid))
    codes, params = blocks.unpack(name, rows)
    np.testing.assert_array_equal(codes, solution.codes)
    np.testing.assert_array_equal(
        grid.expand(params.reshape(-1, params.shape[2])).reshape(-1), expanded(grid, solution.params).reshape(-1)
    )


@pytest.mark.parametrize("name", NESTED)
def test_sharing_costs_what_rounding_the_shares_must(rng, name):
    """A minimum that is rounded to multiples of t steps, or a scale that moves the ends by as much, adds t² to a
    squared error of 1 (in 12ths of a step); half as much again is for both."""
    grid = blocks.lookup(name).grid
    w = rng.standard_normal((64, 1024)).astype(np.float32)
    nested, free = (((w - Mse().solve(w, g, None).weights(g)) ** 2).mean() for g in (grid, grid.inner))
    levels = 2**grid.inner.bits
    coarse = 3 * levels / 64 if name.startswith("bilevel") else levels / 2 / max(-grid.least, grid.most)
    assert 0.9 * free <= nested <= (1 + 1.5 * coarse**2) * free


@pytest.mark.parametrize("name", NESTED)
def test_a_better_fit_than_spanning_the_range(rng, name):
    grid, w = blocks.lookup(name).grid, weights(rng, 32, 1024)
    importance = np.exp(rng.standard_normal(1024)).astype(np.float32)
    plain = blocks.decode(name, blocks.encode(name, w), 1024)
    fitted = solve_groups(w, grid, least_error(w, grid, importance)).weights(grid)
    assert (importance * (w - fitted) ** 2).sum() < (importance * (w - plain) ** 2).sum()
    assert not fitted[0].any()
    assert not plain[0].any()


@pytest.mark.parametrize("name", NESTED)
def test_settling_lowers_the_error_of_its_group_and_leaves_the_others(rng, name):
    grid, w = blocks.lookup(name).grid, weights(rng, 40, blocks.block_elements(name))
    n_groups, group = grid.block // grid.group, grid.group
    before = grid.store(grid.inner.plain(w.reshape(-1, group)).reshape(len(w), n_groups, -1))
    after = before.copy()
    at = n_groups - 2
    settle(np.ascontiguousarray(w[:, at * group : (at + 1) * group]), grid, after, at)

    def errors(stored):
        found, params = np.empty((len(w), n_groups), np.float32), np.ascontiguousarray(grid.expand(stored))
        ops.group_errors(w, grid, params, found)
        return found

    others = np.arange(n_groups) != at
    np.testing.assert_array_equal(errors(after)[:, others], errors(before)[:, others])
    assert (errors(after)[:, at] <= errors(before)[:, at]).all()
    assert errors(after)[:, at].sum() < 0.98 * errors(before)[:, at].sum()


def test_plain_grids_store_their_parameters(rng):
    grid = Uniform(4, 32)
    params = grid.plain(rng.standard_normal((5, 32)).astype(np.float32))
    np.testing.assert_array_equal(grid.expand(grid.store(params[:, None])), params[:, None])
