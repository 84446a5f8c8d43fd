"""Folds on a random layer of every architecture: the function stays, and does not when a rule is broken."""

from __future__ import annotations

import numpy as np
import pytest
from random_layers import CASES, random_layer

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.weights import folds
from barefoot.weights.folds import Heads

EPS = 2.0**-24  # rounding of one float32 operation


def powers_of_two(rng, *shape) -> np.ndarray:
    return np.exp2(rng.integers(-3, 4, shape)).astype(np.float32)


def scaled(layer, heads: Heads, rng, factors) -> dict[str, dict[str, np.ndarray]]:
    """Each fold of factors by its name, and all of them one after the other."""
    n_rows = 1 if "q_norm" in layer else heads.n_kv_heads
    d_model, d_ff = layer["attn_norm"].size, len(layer["up"])
    apply = {
        "attn_norm": lambda x: folds.norm_to_matrices(x, "attn_norm", factors(rng, d_model)),
        "ffn_norm": lambda x: folds.norm_to_matrices(x, "ffn_norm", factors(rng, d_model)),
        "values": lambda x: folds.values_to_output(x, heads, factors(rng, heads.n_kv_heads, heads.head_dim)),
        "keys": lambda x: folds.queries_to_keys(x, heads, factors(rng, n_rows, heads.n_free)),
        "up": lambda x: folds.up_to_down(x, factors(rng, d_ff)),
    }
    found, together = {name: fold(layer) for name, fold in apply.items()}, layer
    for fold in apply.values():
        together = fold(together)
    return found | {"all": together}


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_powers_of_two_change_weights_but_no_bit_of_the_output(name, layer):
    """Multiplying by a power of two rounds nothing, so the folded layer computes the same numbers, scaled."""
    case, rng = random_layer(name, layer), np.random.default_rng(1)
    expected = case.output()
    for what, folded in scaled(case.weights, Heads.of(case.spec, layer), rng, powers_of_two).items():
        changed = [role for role in folded if not np.array_equal(folded[role], case.weights[role])]
        assert changed, what
        assert folded.keys() == case.weights.keys()
        assert np.array_equal(case.output(folded), expected), what


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_any_factors_change_the_output_by_rounding_alone(name, layer):
    """Two roundings a weight: no more than what twice as large changes of all weights at random do to the output."""
    case, rng = random_layer(name, layer), np.random.default_rng(2)
    expected = case.output()
    noisy = {r: w * (1 + 4 * EPS * rng.choice([-1, 1], w.shape)).astype(np.float32) for r, w in case.weights.items()}
    noise = np.abs(case.output(noisy) - expected).max()
    assert 0 < noise < 1e-4
    drawn = lambda rng, *shape: np.exp(rng.uniform(-1, 1, shape)).astype(np.float32)  # noqa: E731
    for what, folded in scaled(case.weights, Heads.of(case.spec, layer), rng, drawn).items():
        assert np.abs(case.output(folded) - expected).max() <= 8 * noise, what


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_orders_change_the_output_by_the_order_of_sums_alone(name, layer):
    case, rng = random_layer(name, layer), np.random.default_rng(4)
    heads, expected = Heads.of(case.spec, layer), case.output()
    orders = np.stack([rng.permutation(heads.head_dim) for _ in range(heads.n_kv_heads)])
    order = rng.permutation(case.spec.d_ff)
    folded = folds.permute_ffn(folds.permute_values(case.weights, heads, orders), order)
    assert np.array_equal(folded["down"], case.weights["down"][:, order])
    assert np.array_equal(folded["v"][0], case.weights["v"][orders[0, 0]])
    # Sums of at most d_ff products in another order, through two more sums and norms of factors about 1.
    bound = 8 * case.spec.d_ff * EPS * np.abs(expected).max()
    assert np.abs(case.output(folded) - expected).max() <= bound


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_breaking_a_rule_changes_the_function(name, layer):
    """The instrument: what the folds refuse to express is seen at once in the output."""
    case, spec = random_layer(name, layer), random_layer(name, layer).spec
    heads, expected, weights = Heads.of(spec, layer), case.output(), case.weights
    broken = {}
    one = np.ones(heads.head_dim, np.float32)
    one[0] = 4  # one channel of the first pair without the other
    if "q_norm" in weights:
        broken["a pair's halves"] = {"q_norm": weights["q_norm"] / one, "k_norm": weights["k_norm"] * one}
    else:
        rows_q, rows_k = np.tile(one, heads.n_heads), np.tile(one, heads.n_kv_heads)
        pair = {"q": weights["q"] / rows_q[:, None], "k": weights["k"] * rows_k[:, None]}
        if "q_bias" in weights:
            pair |= {"q_bias": weights["q_bias"] / rows_q, "k_bias": weights["k_bias"] * rows_k}
        broken["a pair's halves"] = pair
    if heads.n_heads > heads.n_kv_heads:  # factors of o for each query head instead of each key-value head
        factors = np.exp2(np.arange(heads.n_heads)).repeat(heads.head_dim).astype(np.float32)
        shared = factors[: heads.n_kv_heads * heads.head_dim]
        broken["shared heads"] = {"v": weights["v"] / shared[:, None], "o": weights["o"] * factors}
    turned = np.arange(heads.head_dim)
    turned[[0, heads.rot_dim - 1]] = turned[[heads.rot_dim - 1, 0]]
    rows = (turned + heads.head_dim * np.arange(heads.n_heads)[:, None]).reshape(-1)
    both = {"q": weights["q"][rows], "k": weights["k"][rows[: heads.n_kv_heads * heads.head_dim]]}
    broken["an order of turning channels"] = both
    for what, changed in broken.items():
        assert np.abs(case.output({**weights, **changed}) - expected).max() > 1e-3, what


def test_factors_for_each_head_are_refused_where_one_norm_serves_all():
    case = random_layer("qwen3")
    heads = Heads.of(case.spec, 0)
    with pytest.raises(Incompatible, match="one norm serves all heads"):
        folds.queries_to_keys(case.weights, heads, np.ones((2, heads.n_free), np.float32))


def test_wrong_shapes_and_orders_are_refused():
    case = random_layer("llama")
    heads = Heads.of(case.spec, 0)
    with pytest.raises(InvalidInput, match=r"\(48,\), got \(47,\)"):
        folds.norm_to_matrices(case.weights, "attn_norm", np.ones(47, np.float32))
    with pytest.raises(InvalidInput, match=r"\(2, 6\), got \(2, 12\)"):
        folds.queries_to_keys(case.weights, heads, np.ones((2, 12), np.float32))
    with pytest.raises(InvalidInput, match="each of them once"):
        folds.permute_ffn(case.weights, np.zeros(80, np.int64))


def test_pairs_share_a_factor_in_both_conventions():
    assert Heads(1, 1, 6, 4, interleaved=True).factor_of_channel.tolist() == [0, 0, 1, 1, 2, 3]
    assert Heads(1, 1, 6, 4, interleaved=False).factor_of_channel.tolist() == [0, 1, 0, 1, 2, 3]
