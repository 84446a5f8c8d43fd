"""Solvers: the Hessian engine against its equations, solvers against each other, and the bytes of a solve."""

import itertools
import tracemalloc

import numpy as np
import pytest

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.ops import blocks
from barefoot.ops.grids import Uniform
from barefoot.ops.superblocks import GRIDS
from barefoot.weights.solvers import Inputs, expanded
from barefoot.weights.solvers.gptq import Gptq, solve_bytes
from barefoot.weights.solvers.hessian import corrected, corrected_bytes, feedback, lapack_bytes
from barefoot.weights.solvers.hqq import Hqq
from barefoot.weights.solvers.mse import Mse
from barefoot.weights.solvers.range import Range

ROWS, COLS = 96, 256


@pytest.fixture(scope="module")
def problem():
    """Weights, and correlated inputs of unequal sizes: (weight, Inputs, held-out Hessian)."""
    rng = np.random.default_rng(5)
    mix = rng.standard_normal((COLS, COLS)) * np.exp(0.7 * rng.standard_normal(COLS))
    seen, held = ((rng.standard_normal((4096, COLS)) @ mix).astype(np.float32) for _ in range(2))
    hessian = seen.T @ seen / np.float32(len(seen))
    weight = rng.standard_normal((ROWS, COLS), np.float32)
    return weight, Inputs(np.diag(hessian).copy(), hessian), held.T @ held / np.float32(len(held))


def cost(weight, stored, hessian):
    off = (weight - stored).astype(np.float64)
    return np.einsum("ij,jk,ik->", off, hessian.astype(np.float64), off)


def solved(solver, weight, grid, inputs):
    return solver.solve(weight, grid, inputs).weights(grid)


def dense(panels, diagonal):
    """M as a square."""
    return np.concatenate([np.pad(p, ((0, len(diagonal) - len(p)), (0, 0))) for p in panels], axis=1), diagonal


@pytest.mark.parametrize("step", [48, 128, 1000])
def test_the_factors_multiply_to_the_damped_hessian(problem, step):
    hessian = problem[1].hessian
    mixing, diagonal = dense(*feedback(hessian, 0.05, step))
    factor = np.eye(COLS) + mixing.astype(np.float64)
    damped = hessian + 0.05 * np.diag(hessian).mean() * np.eye(COLS)
    assert np.array_equal(mixing, np.triu(mixing, 1))
    # M and D are rounded to float32 once each; sums of COLS products of such numbers.
    bound = 4 * 2**-24 * (np.abs(factor) * diagonal @ np.abs(factor).T)
    assert (np.abs(factor * diagonal @ factor.T - damped) <= bound).all()


@pytest.mark.parametrize("missing", [False, True])
def test_drift_is_made_up_for_by_ridge_regression(problem, missing):
    """Against the least squares over the inputs themselves, in double precision."""
    weight, inputs, _ = problem
    rng = np.random.default_rng(8)
    x = rng.standard_normal((500, COLS))
    exact = x + 0.3 * x[:, ::-1] + 0.1 * rng.standard_normal(x.shape)
    late = rng.standard_normal((500, ROWS)) if missing else np.zeros((500, ROWS))
    hessian = x.T @ x / 500
    drift = ((exact - x).T @ x / 500).astype(np.float32)
    known = {"missing": (weight @ drift + late.T @ x / 500).astype(np.float32)} if missing else {"drift": drift}
    met = Inputs(np.diag(hessian).astype(np.float32), hessian.astype(np.float32), **known)
    # Rows √(500 λ) I below x, which want W itself, make the ridge.
    pull = np.sqrt(500 * 0.2 * np.diag(hessian).mean()) * np.eye(COLS)
    wanted = np.concatenate([exact @ weight.T + late, pull @ weight.T])
    expected = np.linalg.lstsq(np.concatenate([x, pull]), wanted, rcond=None)[0].T
    np.testing.assert_allclose(corrected(weight, met, 0.2), expected, atol=2e-5 * np.abs(expected).max())
    assert corrected(weight, inputs, 0.2) is weight


@pytest.mark.parametrize("grid", [Uniform(3, 64), Uniform(3, 32, symmetric=True), GRIDS["q2_k"]], ids=str)
def test_gptq_rounds_each_column_to_its_target(problem, grid):
    """Theorem 6 of arXiv:2307.13304 column by column, in double precision and without blocks."""
    weight, inputs, _ = problem
    solution = Gptq(sweeps=0).solve(weight, grid, inputs)
    mixing, _ = dense(*feedback(inputs.hessian, 0.01))
    stored, params = solution.weights(grid), expanded(grid, solution.params)
    errors = (weight - stored).astype(np.float64)
    wrong = 0
    for k in range(COLS):
        target = weight[:, k] + errors[:, :k] @ mixing[:k, k].astype(np.float64)
        code = grid.round(target.astype(np.float32)[:, None], params[:, k // grid.group])
        wrong += np.count_nonzero(code[:, 0] != solution.codes[:, k])
    assert wrong <= ROWS * COLS * 1e-3  # float32 sums may move a target across a boundary


def test_feedback_beats_plain_rounding_on_inputs_that_it_has_not_seen(problem):
    """Teeth: a solver that ignores the Hessian's off-diagonal, or feeds errors back wrongly, fails this."""
    weight, inputs, held = problem
    grid = Uniform(3, 32)
    by = {str(s): cost(weight, solved(s, weight, grid, inputs), held) for s in (Range(), Mse(weighted=True), Gptq())}
    assert by["gptq"] < 0.7 * by["mse(weighted=true)"] < 0.65 * by["range"]


def test_sweeps_never_raise_the_error_and_lower_it_on_other_inputs(problem):
    """Teeth: sweeps that take errors with the wrong sign, or leave out what moved, raise it."""
    weight, inputs, held = problem
    for grid in (Uniform(2, 64), Uniform(3, 32, symmetric=True), GRIDS["q3_k"], GRIDS["q2_k"]):
        stored = [solved(Gptq(sweeps=n), weight, grid, inputs) for n in range(4)]
        damped = inputs.hessian + 0.01 * np.diag(inputs.hessian).mean() * np.eye(COLS, dtype=np.float32)
        seen = [cost(weight, each, damped) for each in stored]
        assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(seen))
        assert seen[3] < 0.95 * seen[0]
        assert cost(weight, stored[3], held) < 0.97 * cost(weight, stored[0], held)


def test_weighting_serves_the_columns_that_count(problem):
    weight, inputs, _ = problem
    grid = Uniform(3, 64)
    plain, weighted = (solved(Mse(weighted=w), weight, grid, inputs) for w in (False, True))
    counted = [(inputs.squares * (weight - stored) ** 2).sum() for stored in (plain, weighted)]
    equal = [((weight - stored) ** 2).sum() for stored in (plain, weighted)]
    assert counted[1] < counted[0]
    assert equal[0] < equal[1]


def test_hqq_lowers_the_mean_magnitude_of_errors(problem):
    weight, grid = problem[0], Uniform(2, 64)
    plain, better = (np.abs(weight - solved(s, weight, grid, None)).mean() for s in (Range(), Hqq()))
    assert better < 0.97 * plain


@pytest.mark.parametrize("solver", [Range(), Mse(), Hqq(), Gptq(), Gptq(sweeps=0)], ids=str)
def test_solutions_do_not_depend_on_threads(problem, solver):
    weight, inputs, _ = problem
    results, before = [], ops.n_threads()
    for n in (1, 3):
        ops.set_threads(n)
        solution = solver.solve(weight, Uniform(4, 32), inputs)
        results.append(blocks.pack("int4_g32_asym", solution.codes, solution.params).tobytes())
    ops.set_threads(before)
    assert results[0] == results[1]


def test_without_any_input_gptq_is_the_least_error(problem):
    weight, grid = problem[0], Uniform(4, 64)
    nothing = Inputs(np.zeros(COLS, np.float32), np.zeros((COLS, COLS), np.float32))
    np.testing.assert_array_equal(solved(Gptq(sweeps=0), weight, grid, nothing), solved(Mse(), weight, grid, None))


def test_inputs_that_are_not_finite_are_refused(problem):
    weight, inputs, _ = problem
    hessian = inputs.hessian.copy()
    hessian[3, 4] = np.inf
    with pytest.raises(InvalidInput, match="not finite"):
        Gptq().solve(weight, Uniform(4, 32), Inputs(inputs.squares, hessian))


@pytest.mark.parametrize(("rows", "cols"), [(256, 1280), (4096, 512)])
def test_making_up_for_drift_takes_the_bytes_that_are_stated(rows, cols):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((256, cols), np.float32), rng.standard_normal((rows, cols), np.float32)
    hessian = x.T @ x
    inputs = Inputs(np.diag(hessian).copy(), hessian, missing=rng.standard_normal((rows, cols), np.float32))
    tracemalloc.start()
    corrected(weight, inputs, 0.3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    traced = corrected_bytes(rows, cols) - lapack_bytes(128, rows)
    assert 0.95 * traced <= peak <= traced + 65536


@pytest.mark.parametrize(("rows", "cols"), [(256, 1280), (4096, 512)])
def test_a_solve_takes_the_bytes_that_are_stated(rows, cols):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, cols), np.float32)
    inputs = Inputs(np.ones(cols, np.float32), x.T @ x)
    weight = rng.standard_normal((rows, cols), np.float32)
    grid = Uniform(4, 64)
    Gptq().solve(weight[:, :64].copy(), grid, Inputs(inputs.squares[:64], inputs.hessian[:64, :64].copy()))
    tracemalloc.start()
    solution = Gptq().solve(weight, grid, inputs)
    peak = tracemalloc.get_traced_memory()[1] - solution.params.nbytes
    tracemalloc.stop()
    stated = solve_bytes(rows, cols, grid)
    assert 0.9 * stated <= peak <= stated + 65536
