"""The look-up layout: packing, tables, products and rows read out of it, on every instruction set of this machine."""

from __future__ import annotations

import numpy as np
import pytest

from barefoot import ops
from barefoot.core.errors import Incompatible
from barefoot.ops import blocks, cases, lut, reference

FORMATS = [n for n in blocks.names() if lut.supports(n, lut.ROWS, 4 * blocks.block_elements(n))]


def scratch_for(n_tokens, n_cols, activations="int8"):
    return np.empty(ops.matmul_scratch_bytes(n_tokens, n_cols, activations, looks_up=True), np.uint8)


def both_layouts(name, rows, cols, rng):
    """The same random matrix as rows and for look-ups."""
    raw = cases.random_packed(name, rows, cols, rng)
    packed = np.zeros(raw.size, np.uint8)
    ops.pack_lut(name, raw, rows, cols, packed)
    return ops.PackedWeight(name, rows, cols, raw.reshape(-1)), ops.PackedWeight(name, rows, cols, packed, "lut")


def product(x, weight, **options):
    out = np.full((len(x), weight.rows), np.float32(7))
    scratch = scratch_for(*x.shape, options.get("activations", "int8"))
    ops.matmul(x, [weight], [out], scratch=scratch, **options)
    return out


def exact_integers(n_tokens, cols, rng):
    """Integers whose tables are exact: in each 32, one run of magnitudes that sum to 127, and none of more."""
    x = rng.integers(-31, 32, (n_tokens, cols // 32, 8, 4))
    x[:, :, 3] = np.array([100, -20, 5, -2]) * rng.choice([-1, 1], (n_tokens, cols // 32, 4))
    return x.reshape(n_tokens, cols).astype(np.float32)


def test_which_formats_and_shapes():
    assert len(FORMATS) == 2 + 3 * 3 * 2 + 3 + 3  # q4_0 and q4_1, int4 to int2, int1, ternary
    assert lut.supports("int2_g32_sym", 64, 32)
    assert not lut.supports("int2_g32_sym", 96, 32)  # a panel and a half
    assert not lut.supports("int2_g128_sym", 64, 64)  # half a group
    assert not lut.supports("int8_g32_sym", 64, 32)
    assert not lut.supports("q2_k", 64, 256)  # scales within scales
    assert not lut.supports("f16", 64, 32)


def test_the_documented_example():
    rows = np.zeros((64, 12), np.uint8)
    rows[3, :4] = 0x34, 0x12, 0x78, 0x56
    rows[3, 4 + 13 % 8] = 2 << 2 * (13 // 8)  # code 2 in column 13
    panel = lut.pack("int2_g32_asym", rows, 32)[0]
    assert panel[256 + 128 * 1 + 2 * 3 + 1] == 1 << 5
    assert panel[6:8].tolist() == [0x34, 0x12]
    assert panel[128 + 6 : 128 + 8].tolist() == [0x78, 0x56]
    assert np.count_nonzero(panel) == 5


@pytest.mark.parametrize("name", FORMATS)
def test_packing_is_exact_and_keeps_every_byte(isa, name, rng, threads):
    elements = blocks.block_elements(name)
    for n_threads, rows, n_blocks in ((1, 64, 1), (2, 192, 5)):
        threads(n_threads)
        cols = n_blocks * elements
        raw = rng.integers(0, 256, (rows, blocks.row_bytes(name, cols)), dtype=np.uint8)
        packed = np.zeros(raw.size, np.uint8)
        ops.pack_lut(name, raw, rows, cols, packed)
        expected = lut.pack(name, raw, cols)
        assert expected.shape == (rows // 64, lut.panel_bytes(name, cols))
        assert np.array_equal(packed, expected.reshape(-1))
        assert np.array_equal(lut.unpack(name, expected, cols), raw)


def test_tables_are_the_signed_sums_and_mirror_themselves(rng):
    x = rng.standard_normal((2, 64)).astype(np.float32)
    computed = lut.exact_tables(x)
    for t, run, j in np.ndindex(computed.shape):
        expected = sum((1 if j >> i & 1 else -1) * float(x[t, 4 * run + i]) for i in range(4))
        assert computed[t, run, j] == pytest.approx(expected, abs=1e-5)
    codes, scales, sums = lut.tables(x)
    assert np.array_equal(codes, -codes[..., ::-1])
    assert codes.max() == 127  # the longest run of each 32 uses the whole range
    step = np.repeat(scales, 8, axis=1)[..., None]
    assert (np.abs(codes * step - computed) <= 0.5001 * step).all()
    assert np.allclose(sums, x.reshape(2, 2, 32).sum(2), atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_products_are_exact_when_the_tables_are(isa, name, rng, threads):
    elements = blocks.block_elements(name)
    for n_threads, rows, n_blocks, n_tokens in ((1, 64, 1, 1), (2, 320, 5, 3), (3, 192, 9, 8)):
        threads(n_threads)
        plain, weight = both_layouts(name, rows, n_blocks * elements, rng)
        x = exact_integers(n_tokens, n_blocks * elements, rng)
        exact = x.astype(np.float64) @ reference.decode_rows(plain, slice(None)).astype(np.float64).T
        assert np.abs(product(x, weight) - exact).max() <= 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("name", FORMATS)
def test_products_of_gaussians(isa, name, rng):
    cols = 1024 + blocks.block_elements(name)
    plain, weight = both_layouts(name, 128, cols, rng)
    x = rng.standard_normal((2, cols)).astype(np.float32)
    exact = x.astype(np.float64) @ reference.decode_rows(plain, slice(None)).astype(np.float64).T
    got = product(x, weight)
    error = ((got - exact) ** 2).mean() / (exact**2).mean()
    assert 1e-9 < error <= 5e-4  # rounded, within the paper's budget
    expected = lut.product(x, weight)  # and by the tables' rounding alone
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(exact).max()


@pytest.mark.parametrize("name", ["int2_g32_sym", "int3_g64_asym", "int4_g128_sym", "ternary_g64", "int1_g32_asym"])
def test_the_sum_of_x_is_needed(name, rng, monkeypatch):
    """Without the term of the sum, the reference fails the comparison above."""
    plain, weight = both_layouts(name, 64, 256, rng)
    x = exact_integers(1, 256, rng)
    exact = x.astype(np.float64) @ reference.decode_rows(plain, slice(None)).astype(np.float64).T
    assert np.abs(lut.product(x, weight) - exact).max() <= 1e-5 * np.abs(exact).max()
    tables = lut.tables
    monkeypatch.setattr(lut, "tables", lambda x: (*tables(x)[:2], np.zeros_like(tables(x)[2])))
    assert np.abs(lut.product(x, weight) - exact).max() > 1e-2 * np.abs(exact).max()


@pytest.mark.parametrize(("clean", "bound"), [(True, 1.0), (False, 0.5)])
def test_rounded_sums_err_less_than_rounded_activations(clean, bound, rng):
    """Against int8 activations with one scale a token: better, and far better where some channels are 20 times as
    large. (With Gaussians the expected ratio is 0.83: each plane rounds anew.)"""
    _, weight = both_layouts("int2_g64_sym", 128, 1024, rng)
    x = rng.standard_normal((4, 1024)).astype(np.float32)
    if not clean:
        x[:, rng.choice(1024, 10, replace=False)] *= 20
    w = reference.decode_rows(weight, slice(None)).astype(np.float64)
    exact = x.astype(np.float64) @ w.T
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    rounded = np.rint(x / step) * step
    ours, theirs = (np.sqrt(((y - exact) ** 2).mean()) for y in (lut.product(x, weight), rounded @ w.T))
    assert ours <= bound * theirs


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_many_tokens_and_float_activations_multiply(isa, name, activations, rng, threads):
    threads(2)
    n_tokens = 19 if activations == "int8" else 3
    cols = 1024 + blocks.block_elements(name)
    plain, weight = both_layouts(name, 128, cols, rng)
    x = rng.standard_normal((n_tokens, cols)).astype(np.float32)
    got, expected = product(x, weight, activations=activations), product(x, plain, activations=activations)
    magnitude = np.abs(x) @ np.abs(reference.decode_rows(plain, slice(None))).T
    assert (np.abs(got - expected) / magnitude).max() < 1e-6


@pytest.mark.parametrize("name", FORMATS)
def test_embed_reads_rows_bit_for_bit(isa, name, rng):
    cols = 3 * blocks.block_elements(name)
    plain, weight = both_layouts(name, 128, cols, rng)
    ids = np.array([127, 0, 7, 7, 64, 31], np.int32)
    out, expected = np.empty((6, cols), np.float32), np.empty((6, cols), np.float32)
    ops.embed(ids, weight, out, scale=1.5)
    reference.embed(ids, plain, expected, scale=1.5)
    assert np.array_equal(out.view(np.uint32), expected.view(np.uint32))
    reference.embed(ids, weight, out, scale=1.5)
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("n_tokens", [1, 6, 9])
def test_add_and_mixed_layouts_in_one_call(isa, n_tokens, rng):
    weights = [*both_layouts("q4_1", 64, 576, rng), *both_layouts("int3_g64_sym", 192, 576, rng)]
    x = rng.standard_normal((n_tokens, 576)).astype(np.float32)
    alone = [product(x, w) for w in weights]
    outs = [np.full_like(a, 100) for a in alone]
    ops.matmul(x, weights, outs, add=True, scratch=scratch_for(n_tokens, 576))
    for a, out in zip(alone, outs, strict=True):
        assert np.allclose(out - 100, a, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_tokens", [1, 5, 13])
def test_results_do_not_depend_on_threads_runs_or_alignment(isa, n_tokens, threads, rng):
    _, weight = both_layouts("int3_g32_asym", 448, 1088, rng)
    backing = np.zeros(weight.n_bytes + 3, np.uint8)
    backing[3:] = weight.buffer
    shifted = ops.PackedWeight("int3_g32_asym", 448, 1088, backing[3:], layout="lut")
    x = rng.standard_normal((n_tokens, 1088)).astype(np.float32)
    seen = set()
    for n in (1, 2, 3, 3):
        threads(n)
        seen |= {product(x, weight).tobytes(), product(x, shifted).tobytes()}
    assert len(seen) == 1


@pytest.mark.parametrize("n_tokens", [1, 6, 11])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_with_nan_or_infinity(isa, n_tokens, bad, rng):
    _, weight = both_layouts("int2_g32_sym", 64, 128, rng)
    x = rng.standard_normal((n_tokens, 128)).astype(np.float32)
    clean = product(x, weight)
    x[n_tokens - 1, 77] = bad
    got = product(x, weight)
    assert np.isnan(got[n_tokens - 1]).all()
    assert np.array_equal(got[: n_tokens - 1], clean[: n_tokens - 1])
    assert np.isnan(lut.product(x[-1:], weight)).all()


@pytest.mark.parametrize("largest", [0.0, 1e-44, 1e-31, 1e36])
def test_extreme_magnitudes_stay_finite(isa, largest, rng):
    plain, weight = both_layouts("ternary_g32", 64, 64, rng)
    x = np.full((2, 64), largest, np.float32)
    w = reference.decode_rows(plain, slice(None)).astype(np.float64)
    used = largest if 4 * largest > 2.0**-100 else 0.0
    step = 4 * used / 127  # every table entry errs by half of it at most; two planes, 8 runs a group
    bound = np.abs(w).reshape(64, 2, 32).max(2).sum(1) * 8 * (1 + 2) / 2 * step / 2
    assert (np.abs(product(x, weight) - used * w.sum(1)) <= 1.001 * bound).all()


@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_sums_do_not_wrap(isa, name):
    """All codes at one end and every run at 127: where 16-bit sums come nearest to their limits."""
    cols = 2 * blocks.block_elements(name)
    for byte in (0x00, 0xFF):
        if byte and name.startswith("ternary"):
            continue  # code 3 is not one of its codes
        raw = np.full((64, blocks.row_bytes(name, cols)), byte, np.uint8)
        header = blocks.lookup(name).group.header_bytes
        for at in range(0, raw.shape[1], blocks.block_bytes(name)):
            raw[:, at : at + header] = np.tile(np.array([0.5], np.float16).view(np.uint8), header // 2)
        packed = np.zeros(raw.size, np.uint8)
        ops.pack_lut(name, raw, 64, cols, packed)
        weight = ops.PackedWeight(name, 64, cols, packed, "lut")
        for sign in (1, -1):
            x = (sign * np.tile(np.array([40, 40, 40, 7]), cols // 4)).astype(np.float32)[None]
            exact = x @ blocks.decode(name, raw, cols).T
            assert np.allclose(product(x, weight), exact, rtol=1e-6, atol=1e-3)


def test_the_stated_scratch_is_exactly_what_is_used(isa, threads, rng):
    threads(3)
    _, weight = both_layouts("int2_g32_asym", 128, 2304, rng)
    for n_tokens in (1, 8, 9):
        size = ops.matmul_scratch_bytes(n_tokens, 2304, looks_up=True)
        guarded = np.full(size + 128, 0xA5, np.uint8)
        x, out = np.ones((n_tokens, 2304), np.float32), np.empty((n_tokens, 128), np.float32)
        ops.matmul(x, [weight], [out], scratch=guarded[64 : 64 + size])
        assert (guarded[:64] == 0xA5).all()
        assert (guarded[64 + size :] == 0xA5).all()
        with pytest.raises(ValueError, match=f"scratch: expected {size}, got {size - 1}"):
            ops.matmul(x, [weight], [out], scratch=guarded[: size - 1])


def test_wrong_arguments_are_refused(rng):
    raw = cases.random_packed("q4_0", 96, 64, rng)
    with pytest.raises(ValueError, match=r"q4_0 \[96, 64\] weight has no layout 'lut'"):
        ops.PackedWeight("q4_0", 96, 64, raw.reshape(-1), layout="lut")
    with pytest.raises(ValueError, match="no layout 'lut'"):
        ops.PackedWeight("q8_0", 64, 256, layout="lut")
    with pytest.raises(ValueError, match="bytes of out: expected 2304, got 2303"):
        ops.pack_lut("q4_0", raw[:64].copy(), 64, 64, np.zeros(2303, np.uint8))
    with pytest.raises(Incompatible, match=r"q4_0 \[96, 64\] has no look-up layout"):
        lut.pack("q4_0", raw, 64)
    assert ops.PackedWeight("q4_0", 64, 64, layout="lut").layout == "lut"
