"""Products of many tokens, which processors with tiles take in bfloat16, in every layout on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from barefoot import ops
from barefoot.ops import blocks, cases, lut, panels, reference
from barefoot.ops.scratch import BFLOAT16_TOKENS as MANY

QUANTIZED = [name for name in blocks.names() if not blocks.lookup(name).in_float]


def in_all_layouts(name, rows, cols, rng):
    """One random matrix as rows and, where they exist, as panels and for look-ups."""
    raw = cases.random_packed(name, rows, cols, rng)
    weights = [ops.PackedWeight(name, rows, cols, raw.reshape(-1))]
    for layout, module, pack in (("panels", panels, ops.pack_panels), ("lut", lut, ops.pack_lut)):
        if module.supports(name, rows, cols):
            packed = np.empty(raw.size, np.uint8)
            pack(name, raw, rows, cols, packed)
            weights.append(ops.PackedWeight(name, rows, cols, packed, layout))
    return weights


def products(x, weights):
    outs = [np.full((len(x), w.rows), np.float32(7)) for w in weights]
    scratch = np.empty(ops.matmul_scratch_bytes(*x.shape, looks_up=True), np.uint8)
    ops.matmul(x, weights, outs, scratch=scratch)
    return outs


def magnitudes(x, weight):
    return np.abs(x).astype(np.float64) @ np.abs(reference.decode_rows(weight, slice(None))).astype(np.float64).T


@pytest.mark.parametrize("name", QUANTIZED)
def test_products_equal_the_reference(isa, name, rng, threads):
    elements = blocks.block_elements(name)
    # Rows and tokens at and beside multiples of 16 and 32, more tokens than share their sums; one block of columns, and
    # columns whose pieces differ.
    shapes = [(1, elements, MANY), (33, 256 + elements, 25), (64, 1024 + 3 * elements, 32), (48, elements, 33)]
    shapes += [(66, 2 * elements, 47), (128, 3 * elements, 131)]
    for i, (rows, cols, n_tokens) in enumerate(shapes):
        threads(1 + i % 3)
        weights = in_all_layouts(name, rows, cols, rng)
        x = rng.standard_normal((n_tokens, cols)).astype(np.float32)
        expected = np.empty((n_tokens, rows), np.float32)
        reference.matmul(x, weights[:1], [expected], activations=reference.arithmetic(isa, n_tokens, "int8"))
        for weight, got in zip(weights, products(x, weights), strict=True):
            error = np.abs(got - expected) / magnitudes(x, weight)
            assert error.max() < 1e-6, (rows, cols, n_tokens, weight.layout)


@pytest.fixture
def use_isa():
    """``set_isa``, undone after the test."""
    before = ops.isa()
    yield ops.set_isa
    ops.set_isa(before)


@pytest.mark.skipif("amx" not in ops.available_isas(), reason="the processor has no tiles")
@pytest.mark.parametrize("name", ["q4_1", "q6_k", "int8_g128_asym"])
def test_bfloat16_errs_by_its_rounding_only(name, use_isa, rng):
    """Two factors, each rounded by at most 2^-9 of itself, and 512 sums in float32."""
    use_isa("amx")
    (weight, *_) = in_all_layouts(name, 64, 512, rng)
    x = rng.standard_normal((40, 512)).astype(np.float32)
    exact = x.astype(np.float64) @ reference.decode_rows(weight, slice(None)).astype(np.float64).T
    (got,) = products(x, [weight])
    bound = (2.0**-8 + 2.0**-18 + 512 * 2.0**-24) * magnitudes(x, weight)
    assert (np.abs(got - exact) <= bound).all()
    assert np.abs(got - exact).max() > 0.001 * bound.max()  # it did round
    use_isa("avx512-vnni")
    (integers,) = products(x, [weight])
    assert np.square(got - exact).mean() < 0.25 * np.square(integers - exact).mean()


def test_fewer_tokens_take_integers(isa, rng):
    weights = in_all_layouts("q4_0", 64, 256, rng)
    x = rng.standard_normal((MANY - 1, 256)).astype(np.float32)
    expected = np.empty((MANY - 1, 64), np.float32)
    reference.matmul(x, weights[:1], [expected], activations="int8")
    for got in products(x, weights):
        assert (np.abs(got - expected) / magnitudes(x, weights[0])).max() < 1e-6


@pytest.mark.parametrize("n_tokens", [MANY, 40, 130])
def test_add_and_dense_weights_beside(isa, n_tokens, rng):
    weights = [*in_all_layouts("int4_g64_asym", 64, 576, rng), *in_all_layouts("q5_0", 45, 576, rng)]
    weights += in_all_layouts("f16", 21, 576, rng)
    x = rng.standard_normal((n_tokens, 576)).astype(np.float32)
    outs = [np.full((n_tokens, w.rows), np.float32(100)) for w in weights]
    scratch = np.empty(ops.matmul_scratch_bytes(n_tokens, 576, looks_up=True), np.uint8)
    ops.matmul(x, weights, outs, add=True, scratch=scratch)
    for weight, out in zip(weights, outs, strict=True):
        (alone,) = products(x, [weight])
        assert np.allclose(out - 100, alone, rtol=0, atol=1e-4)
        first = x[:32]  # enough for the same kernels: tokens don't depend on each other
        assert np.array_equal(products(first, [weight])[0], alone[:32])


def test_results_do_not_depend_on_threads(isa, threads, rng):
    weights = in_all_layouts("q4_1", 448, 832, rng)
    x = rng.standard_normal((150, 832)).astype(np.float32)
    seen = []
    for n in (1, 2, 3, 3):
        threads(n)
        seen.append(b"".join(out.tobytes() for out in products(x, weights)))
    assert len(set(seen)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("token", [0, 28])
def test_a_token_with_nan_or_infinity(isa, bad, token, rng):
    weights = in_all_layouts("int4_g32_sym", 64, 640, rng)
    for weight in weights:
        weight.buffer[: weight.n_bytes // 4] = 0  # scales and codes of zero meet it too
    x = rng.standard_normal((29, 640)).astype(np.float32)
    clean = products(x, weights)
    x[token, 77] = bad
    others = np.arange(29) != token
    for before, after in zip(clean, products(x, weights), strict=True):
        assert np.isnan(after[token]).all()
        assert np.array_equal(after[others], before[others])


@pytest.mark.parametrize("largest", [0.0, 1e-44, 1e-31, 1e-20, 1e36])
def test_extreme_magnitudes_stay_finite(isa, largest, rng):
    weight = ops.PackedWeight("int8_g32_sym", 8, 64, blocks.encode("int8_g32_sym", np.eye(8, 64, dtype=np.float32)))
    (got,) = products(np.full((MANY, 64), largest, np.float32), [weight])
    smallest = 2.0**-126 if isa == "amx" else 2.0**-100
    assert np.allclose(got, largest if largest >= smallest else 0.0, rtol=1e-2, atol=0)


def test_what_rounds_to_infinity_counts_as_it(isa, rng):
    small = 1e-3 * rng.standard_normal((3, 64)).astype(np.float32)
    weight = ops.PackedWeight("int8_g32_sym", 3, 64, blocks.encode("int8_g32_sym", small).reshape(-1))
    x = np.zeros((MANY, 64), np.float32)
    x[4, 5] = 2.0**128 - 2.0**119
    x[5, 5] = np.nextafter(x[4, 5], np.float32(0))
    (got,) = products(x, [weight])
    assert np.isnan(got[4]).all() == (isa == "amx")
    assert np.isfinite(got[5]).all()
