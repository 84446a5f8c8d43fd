"""Solvers on grids that are not uniform, and the formats that name them."""

from __future__ import annotations

import numpy as np
import pytest

from barefoot.core.errors import InvalidInput
from barefoot.ops import blocks
from barefoot.weights import folds
from barefoot.weights.formats.bfp import BlockFloat, by_size
from barefoot.weights.formats.bitmod import BitMod
from barefoot.weights.formats.minifloat import MinifloatGroups
from barefoot.weights.formats.nf4 import NormalFloat
from barefoot.weights.solvers import Inputs
from barefoot.weights.solvers.gptq import Gptq
from barefoot.weights.solvers.hqq import Hqq
from barefoot.weights.solvers.mse import Mse
from barefoot.weights.solvers.range import Range

FORMATS = ("nf4_g32", "e2m1_g32", "e3m0_g64", "e4m3_g32", "bitmod3_g64", "bitmod4_g32", "bfp3_g32", "bfp4_g64")


@pytest.fixture
def problem():
    """Weights with outliers, (24, 192), and correlated inputs."""
    rng = np.random.default_rng(7)
    weight = rng.standard_t(4, size=(24, 192)).astype(np.float32)
    x = rng.standard_normal((2000, 192)) @ (np.eye(192) + 0.3 * rng.standard_normal((192, 192)))
    x *= np.exp(rng.standard_normal(192))
    hessian = (x.T @ x / len(x)).astype(np.float32)
    return weight, Inputs(np.diag(hessian).copy(), hessian)


def errors(weight, stored, inputs):
    """Squared error of the weights, weighted by squares of the inputs, and of the products."""
    e = (weight - stored).astype(np.float64)
    return (e**2).sum(), (e**2 * inputs.squares).sum(), np.einsum("ri,ij,rj", e, inputs.hessian.astype(np.float64), e)


@pytest.mark.parametrize("name", FORMATS)
def test_each_solver_lowers_the_error_it_looks_at(name, problem):
    weight, inputs = problem
    grid = blocks.lookup(name).grid
    plain, searched, weighted, hqq, gptq = (
        errors(weight, solver.solve(weight, grid, inputs).weights(grid), inputs)
        for solver in (Range(), Mse(), Mse(weighted=True), Hqq(), Gptq())
    )
    assert searched[0] < 0.995 * plain[0]
    assert weighted[1] < searched[1]
    assert hqq[0] <= searched[0]
    assert gptq[2] < 0.75 * weighted[2]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("solver", [Mse(), Gptq(), Gptq(sweeps=0)], ids=str)
def test_what_is_solved_is_what_is_stored(name, solver, problem):
    weight, inputs = problem
    solution = solver.solve(weight, blocks.lookup(name).grid, inputs)
    packed = blocks.pack(name, solution.codes, solution.params)
    assert packed.shape == (24, blocks.row_bytes(name, 192))
    assert np.array_equal(blocks.decode(name, packed, 192), solution.weights(blocks.lookup(name).grid))


@pytest.mark.parametrize("name", ["nf4_g32", "bitmod3_g32", "bitmod4_g32", "bfp4_g32"])
def test_refit_finds_the_scale_that_codes_were_made_with(name):
    """Codes of every kind of group, from weights that the grid holds exactly."""
    rng = np.random.default_rng(3)
    grid = blocks.lookup(name).grid
    x = rng.standard_normal((40, 32)).astype(np.float32)
    for params in grid.kinds(x.min(axis=1), x.max(axis=1)):
        codes = grid.round(x, params)
        exact = grid.values(codes, params)
        refitted = grid.refit(exact, codes, np.ones_like(x))
        if name.startswith("bitmod"):  # the kind can't be told where no code is the special one
            special = (codes == 2 ** (int(name[6]) - 1)).any(axis=1)
            assert special.sum() > 10
            assert np.array_equal(refitted[special], params[special])
        else:
            assert np.array_equal(refitted, params)


def test_sorted_channels_share_blocks_and_leave_the_function_as_it_is():
    """K-sort of a feed-forward layer: the same function before rounding, and less error of its last matrix after."""
    rng = np.random.default_rng(11)
    sizes = np.exp(0.3 * rng.standard_normal(256)) * np.where(rng.permutation(256) < 16, 8, 1)
    layer = {
        "gate": rng.standard_normal((256, 32)),
        "up": rng.standard_normal((256, 32)),
        "down": rng.standard_normal((32, 256)) * sizes,
    }

    def ffn(there, x):
        return (np.maximum(x @ there["gate"].T, 0) * (x @ there["up"].T)) @ there["down"].T

    order = by_size(np.linalg.norm(layer["down"], axis=0))
    there, x = folds.permute_ffn(layer, order), rng.standard_normal((50, 32))
    np.testing.assert_allclose(ffn(there, x), ffn(layer, x), rtol=1e-10, atol=1e-10)
    assert (np.diff(np.linalg.norm(there["down"], axis=0)) <= 0).all()

    def error(name, down):
        down = down.astype(np.float32)
        return np.square(down - blocks.decode(name, blocks.encode(name, down), 256)).mean()

    assert error("bfp4_g32", layer["down"]) > 1.25 * error("bfp4_g32", there["down"])
    first = layer["down"][:, :128], layer["down"][:, by_size(np.linalg.norm(layer["down"][:, :128], axis=0))]
    values = [np.sort(blocks.decode("bfp4_g128", blocks.encode("bfp4_g128", f.astype(np.float32)), 128)) for f in first]
    assert np.array_equal(*values)  # a block of all channels: their order is of no matter


def test_channels_of_one_size_keep_their_order():
    assert by_size(np.array([[1.0, 3, 3, 2], [5, 5, 5, 5]])).tolist() == [[1, 2, 3, 0], [0, 1, 2, 3]]


def test_knobs_are_checked_and_name_layouts():
    assert NormalFloat().layout("f32") == "nf4_g64"
    assert MinifloatGroups().layout("f32") == "e2m1_g32"
    assert MinifloatGroups(4, 3, 128).layout("q4_0") == "e4m3_g128"
    assert BitMod().layout("f32") == "bitmod3_g128"
    assert BlockFloat(8, 64).layout("f32") == "bfp8_g64"
    with pytest.raises(InvalidInput, match="one exponent bit is a uniform grid"):
        MinifloatGroups(1, 2)
    with pytest.raises(InvalidInput, match=r"must be one of .*\(2, 1\).*, got \(7, 1\)"):
        MinifloatGroups(7, 1)
    with pytest.raises(InvalidInput, match="bitmod: bits must be one of 3, 4, got 5"):
        BitMod(5)
    with pytest.raises(InvalidInput, match="bfp: block must be one of 32, 64, 128, got 16"):
        BlockFloat(4, 16)


@pytest.mark.parametrize("fmt", [NormalFloat(), MinifloatGroups(3, 2, 64), BitMod(4, 64), BlockFloat(6, 64)], ids=str)
def test_terms_add_up_to_the_stored_bytes(fmt):
    layout = fmt.layout("f32")
    stored = blocks.encode(layout, np.ones((5, 192), np.float32))
    assert sum(term.count * term.bytes_each for term in fmt.terms("w", 5, 192, "f32")) == stored.nbytes
