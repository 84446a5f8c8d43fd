"""SpQR on matrices: bytes, what outliers are, and that neither magnitudes nor missing feedback do as well."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.registry import techniques
from barefoot.core.spec import format_technique, parse_composition
from barefoot.ops import blocks, csr, parts
from barefoot.weights.solvers import Inputs
from barefoot.weights.structures import Structure
from barefoot.weights.structures.spqr import Spqr

ROWS, COLS = 96, 192


@pytest.fixture(scope="module")
def matrix():
    """A heavy-tailed weight and correlated inputs; columns with larger inputs have smaller weights, as behind norms."""
    rng = np.random.default_rng(11)
    scales = rng.lognormal(0, 1, COLS)
    weight = (0.03 * rng.standard_t(4, (ROWS, COLS)) / np.sqrt(scales)).astype(np.float32)
    mixed = rng.standard_normal((2000, COLS)) @ (np.eye(COLS) + 0.15 * rng.standard_normal((COLS, COLS)))
    x = (mixed * scales).astype(np.float32)
    hessian = x.T @ x / np.float32(len(x))
    return weight, Inputs(np.diag(hessian).copy(), hessian)


def decoded(matrix, cols=COLS):
    dense = blocks.decode(matrix.format, matrix.rows, cols)
    for kind, data in matrix.parts.values():
        dense = dense + parts.lookup(kind).decode(len(matrix.rows), cols, data)
    return dense


def loss(weight, stored, inputs):
    """Mean squared error of the product, tr((W - W^) H (W - W^)ᵀ), relative to that of storing nothing."""
    error, h = (weight - stored).astype(np.float64), inputs.hessian.astype(np.float64)
    return np.einsum("rc,cd,rd->", error, h, error) / np.einsum("rc,cd,rd->", weight, h, weight)


def n_outliers(matrix):
    return 0 if not matrix.parts else matrix.parts["outliers"][1].size // 4 - len(matrix.rows) - 1


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("outliers", [0.0, 0.005, 0.01, 0.03])
def test_bytes_are_the_papers_bits_and_the_share_that_was_asked_for(bits, outliers, matrix):
    """bits + 6 / 16 + 64 / 256 + 32 r, and 32 / cols of row offsets; never more than what is stated beforehand."""
    technique = Spqr(bits=bits, outliers=outliers)
    solved = technique.solve(*matrix)
    n, size = n_outliers(solved), ROWS * COLS
    stored = solved.rows.nbytes + sum(data.nbytes for _, data in solved.parts.values())
    offsets = 32 * (ROWS + 1) / size if outliers else 0
    assert 8 * stored / size == pytest.approx(bits + 6 / 16 + 64 / 256 + 32 * n / size + offsets, abs=1e-12)
    assert stored == solved.n_bytes <= technique.most(ROWS, COLS).n_bytes
    assert technique.most(ROWS, COLS).n_bytes - stored <= 4 * 0.2 * outliers * size + 4
    assert 0.8 * outliers * size <= n <= outliers * size


def test_three_bits_and_one_percent_are_the_papers_figure():
    """3.945 bits a weight for r = 1 % (section 4.2's formula), where rows are long."""
    n_weights = 4096 * 65536
    assert Spqr(bits=3).most(4096, 65536).n_bytes * 8 / n_weights == pytest.approx(3.945 + 32 / 65536, abs=1e-3)


def test_outliers_are_kept_to_f16_of_what_their_codes_miss(matrix):
    weight, inputs = matrix
    alone = Inputs(inputs.squares, np.diag(inputs.squares))  # no feedback: targets are the weights
    solved = Spqr(outliers=0.02).solve(weight, alone)
    base = blocks.decode(solved.format, solved.rows, COLS)
    rest = csr.decode(ROWS, COLS, solved.parts["outliers"][1])
    at = rest != 0
    assert np.array_equal(rest[at], (weight - base)[at].astype(np.float16).astype(np.float32))
    assert np.abs(weight - base)[at].mean() > 3 * np.abs(weight - base)[~at].mean()


def test_losses_of_weights_below_the_threshold_stay(matrix):
    """Without feedback the definition can be checked: D_k (w - ŵ)² > τ exactly where outliers are."""
    weight, inputs = matrix
    alone = Inputs(inputs.squares, np.diag(inputs.squares))
    technique = Spqr(outliers=0.25, tau=0.2)
    solved = technique.solve(weight, alone)
    base = blocks.decode(solved.format, solved.rows, COLS)
    damped = inputs.squares + np.float32(technique.damp) * inputs.squares.mean()
    threshold = 0.2 * (weight.var(axis=0) * damped).mean()
    losses = damped * (weight - base) ** 2
    expected = losses > threshold
    near = np.abs(losses / threshold - 1) < 1e-4
    assert 10 < expected.sum() < 0.2 * weight.size
    assert np.array_equal((csr.decode(ROWS, COLS, solved.parts["outliers"][1]) != 0)[~near], expected[~near])


def test_a_lower_threshold_never_costs_accuracy(matrix):
    """The brief's single-layer check, to within one part in fifty of what is left."""
    losses = [
        loss(matrix[0], decoded(Spqr(outliers=0.25, tau=tau).solve(*matrix)), matrix[1]) for tau in (4, 1, 0.3, 0.1)
    ]
    assert all(after <= 1.02 * before for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]


def magnitude_picked(weight, inputs, bits, n):
    """The cheap imitation: as many outliers, the largest magnitudes; the rest solved as before, with their places
    filled by the means of their groups, outside the range of which they are."""
    mask = np.zeros(weight.size, np.bool_)
    mask[np.argsort(-np.abs(weight).reshape(-1))[:n]] = True
    mask = mask.reshape(weight.shape)
    kept = (~mask).reshape(len(weight), -1, 16)
    means = (weight.reshape(kept.shape) * kept).sum(2) / np.maximum(kept.sum(2), 1)
    filled = np.where(mask, np.repeat(means, 16, axis=1).astype(np.float32), weight)
    base = decoded(Spqr(bits=bits, outliers=0).solve(filled, inputs))
    return base + np.where(mask, (weight - filled).astype(np.float16).astype(np.float32), 0)


def test_sensitivity_beats_magnitude_and_missing_feedback(matrix):
    """Teeth: at the same bytes, outliers by magnitude, outliers without GPTQ, and rounding lose."""
    (weight, inputs), bits = matrix, 3
    solved = Spqr(bits=bits, outliers=0.01).solve(weight, inputs)
    ours = loss(weight, decoded(solved), inputs)
    by_magnitude = loss(weight, magnitude_picked(weight, inputs, bits, n_outliers(solved)), inputs)
    alone = Inputs(inputs.squares, np.diag(inputs.squares))
    without_feedback = loss(weight, decoded(Spqr(bits=bits, outliers=0.01).solve(weight, alone)), inputs)
    no_outliers = loss(weight, decoded(Spqr(bits=bits, outliers=0).solve(weight, inputs)), inputs)
    form = f"bilevel{bits}"
    rounded = loss(weight, blocks.decode(form, blocks.encode(form, weight), COLS), inputs)
    assert ours < 0.9 * by_magnitude
    assert ours < 0.8 * without_feedback
    assert ours < 0.8 * no_outliers
    assert no_outliers < rounded


def test_without_outliers_and_feedback_it_is_plain_rounding_weighted_by_nothing(matrix):
    """With inputs that are white, columns count alike and errors don't mix: the blocks that ``encode`` makes."""
    weight = matrix[0]
    white = Inputs(np.ones(COLS, np.float32), np.eye(COLS, dtype=np.float32))
    assert np.array_equal(Spqr(outliers=0).solve(weight, white).rows, blocks.encode("bilevel3", weight))


def test_the_same_input_gives_the_same_bytes(matrix):
    first, second = Spqr().solve(*matrix), Spqr().solve(*matrix)
    assert np.array_equal(first.rows, second.rows)
    assert np.array_equal(first.parts["outliers"][1], second.parts["outliers"][1])


def test_matrices_of_zeros_and_inputs_that_never_come():
    zeros = np.zeros((16, 64), np.float32)
    dead = Inputs(np.zeros(64, np.float32), np.zeros((64, 64), np.float32))
    solved = Spqr().solve(zeros, dead)
    assert not decoded(solved, 64).any()
    assert n_outliers(solved) == 0


def test_what_can_not_be_is_refused():
    for knobs, message in (
        ({"bits": 5}, "bits must be one of 2, 3, 4, got 5"),
        ({"outliers": 0.3}, "outliers must lie between 0 and 0.25"),
        ({"tau": -1.0}, "tau must lie between 0 and 1000"),
        ({"damp": 0.0}, "damp must lie between 0 and 10"),
    ):
        with pytest.raises(InvalidInput, match=message):
            Spqr(**knobs)
    with pytest.raises(Incompatible, match="96 columns are not a multiple"):
        Spqr().most(8, 96)


def test_its_spec_string_round_trips():
    known = techniques("weights.structures")
    for technique in (Spqr(), Spqr(bits=4, outliers=0.003), Spqr(tau=0.2)):
        assert isinstance(technique, Structure)
        assert parse_composition(format_technique(technique), known, "weights.structures") == (technique,)
