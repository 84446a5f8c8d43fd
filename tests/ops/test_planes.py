"""Bit planes: the layout, conversions into it, and products against int64, on every instruction set of this machine."""

from __future__ import annotations

import numpy as np
import pytest

from barefoot import ops
from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.measure import PhaseMeter, TracedPeak
from barefoot.ops import blocks, cases, planes
from barefoot.ops.planes import PlaneFormat, PlaneWeight

FORMATS = [n for n in blocks.names() if (group := blocks.lookup(n).group) is not None and group.is_affine]
EPS = 2.0**-24


def scratch_for(x, weight, bits):
    return np.empty(ops.plane_scratch_bytes(*x.shape, bits, weight.format.group), np.uint8)


def product(x, weight, bits, **options):
    out = np.full((len(x), weight.rows), np.float32(7))
    ops.plane_matmul(x, weight, out, activation_bits=bits, scratch=scratch_for(x, weight, bits), **options)
    return out


def random_weight(fmt, rows, cols, rng):
    codes = rng.integers(0, fmt.levels + 1, (rows, cols), dtype=np.uint8)
    shape = (rows, fmt.n_groups(cols))
    steps = (0.02 * rng.standard_normal(shape)).astype(np.float16)
    minimums = rng.standard_normal(shape).astype(np.float16) if fmt.has_minimum else None
    return planes.pack(fmt, codes, steps, minimums)


def odd_integers(n_tokens, cols, bits, group, rng):
    """Values that ``bits`` bits hold exactly: odd integers, the largest of which occurs in every group."""
    levels = (1 << bits) - 1
    x = 2 * rng.integers(0, levels + 1, (n_tokens, cols)) - levels
    x[:, ::group] = levels * rng.choice([-1, 1], x[:, ::group].shape)
    return x.astype(np.float32)


def magnitudes(x, weight):
    """What the terms of each output sum to at most, before signs: what rounding errors are relative to."""
    _, steps, minimums = planes.unpack(weight)
    fmt = weight.format
    offsets = steps.astype(np.float64) * (fmt.levels / 2 - fmt.zero)
    if minimums is not None:
        offsets = np.abs(offsets) + np.abs(minimums)
    largest = np.abs(steps) * (fmt.levels / 2) + np.abs(offsets)
    return np.abs(x).astype(np.float64) @ np.repeat(largest, fmt.group, axis=1)[:, : weight.cols].T


# --- layout and conversions ---


def test_the_documented_example():
    fmt = PlaneFormat(2, 64, 0, has_minimum=True)
    codes, numbers = np.zeros((16, 96), np.uint8), np.zeros((16, 2), np.float16)
    codes[3, 70] = 2
    steps, minimums = numbers.copy(), numbers.copy()
    steps.view(np.uint16)[3, 1], minimums.view(np.uint16)[3, 1] = 0x1234, 0x5678
    buffer = planes.pack(fmt, codes, steps, minimums).buffer
    assert buffer.size == fmt.n_bytes(16, 96) == 512
    at = (64 + 2 * 128) + 64 + 64 * 1 + 4 * 3
    assert buffer[at : at + 4].view("<u4")[0] == 1 << 6
    assert buffer[320 + 6 : 320 + 8].tolist() == [0x34, 0x12]
    assert buffer[352 + 6 : 352 + 8].tolist() == [0x78, 0x56]
    assert np.count_nonzero(buffer) == 5


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_are_those_of_the_paper(bits, rng):
    """N nw K / 8 of planes, 2 N G of steps and as much of minimums, where K and N need no padding."""
    for n, k, group in ((64, 512, 128), (16, 11008, 128), (4096, 1024, 1024)):
        code_bytes, n_groups = n * bits * (k // 128) * 16, k // group
        assert PlaneFormat.bipolar(bits, group).n_bytes(n, k) == code_bytes + 2 * n * n_groups
        assert PlaneFormat(bits, group, 0, has_minimum=True).n_bytes(n, k) == code_bytes + 4 * n * n_groups


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_exact(bits, rng):
    shapes = ((1, 1, 32, False), (16, 96, 64, True), (37, 333, 128, True), (20, 64, 512, False))
    for rows, cols, group, has_minimum in shapes:
        fmt = PlaneFormat(bits, group, 0.5, has_minimum)
        codes = rng.integers(0, fmt.levels + 1, (rows, cols), dtype=np.uint8)
        numbers = rng.standard_normal((2, rows, fmt.n_groups(cols))).astype(np.float16)
        weight = planes.pack(fmt, codes, numbers[0], numbers[1] if has_minimum else None)
        assert weight.buffer.size == fmt.n_bytes(rows, cols)
        found, steps, minimums = planes.unpack(weight)
        assert np.array_equal(found, codes)
        assert np.array_equal(steps, numbers[0])
        assert np.array_equal(minimums, numbers[1]) if has_minimum else minimums is None
        words = weight.buffer.view("<u4")[-16 * bits :].reshape(bits, 16)[
            :, (rows - 1) % 16
        ]  # the last of the last row
        for plane, word in enumerate(words.tolist()):
            assert word >> (cols - 1) % 32 == codes[-1, -1] >> plane & 1  # and nothing beyond the last column


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_become_planes_and_come_back(name, rng):
    for rows, n_blocks in ((16, 1), (21, 5)):
        cols = n_blocks * blocks.block_elements(name)
        raw = cases.random_packed(name, rows, cols, rng)
        weight = planes.from_blocks(name, raw, cols)
        assert np.array_equal(planes.to_blocks(name, weight), raw)
        assert np.array_equal(planes.decode(weight), blocks.decode(name, raw, cols))


def test_a_signed_integer_is_half_a_bipolar_one():
    """Offset binary: x^ in -2^(n-1) .. 2^(n-1) - 1 has the bits of x^ + 2^(n-1), whose value is 2 x^ + 1."""
    for bits in range(1, 9):
        signed = np.arange(-(1 << bits >> 1), 1 << bits >> 1)
        codes = (signed + (1 << bits >> 1)).astype(np.uint8)
        assert np.array_equal(planes.values(codes, bits), 2 * signed + 1)
        by_bits = sum((2 * (codes >> i & 1).astype(int) - 1) << i for i in range(bits))
        assert np.array_equal(planes.values(codes, bits), by_bits)


@pytest.mark.parametrize("bits", range(1, 9))
def test_weights_are_rounded_to_the_nearest_odd_multiple(bits, rng):
    weights = rng.standard_normal((5, 300)).astype(np.float32)
    weight = planes.quantize(weights, bits, 128)
    codes, steps, _ = planes.unpack(weight)
    odd = planes.decode(weight) / (np.repeat(steps.astype(np.float32), 128, axis=1)[:, :300] / 2)
    assert np.array_equal(np.rint(odd) % 2, np.ones_like(odd))
    for g, start in enumerate((0, 128, 256)):
        group = weights[:, start : start + 128]
        s = np.abs(group).max(axis=1, keepdims=True) / (2**bits - 1)
        assert np.allclose(steps[:, g : g + 1].astype(np.float32), 2 * s, rtol=2**-11)
        error = np.abs(planes.decode(weight)[:, start : start + 128] - group)
        assert (error <= s * (1 + 2**bits * 2.0**-11)).all()  # half a step, and the largest by the rounding of the step
    assert (planes.values(codes, bits).max(), planes.values(codes, bits).min()) == (2**bits - 1, 1 - 2**bits)


def test_weights_that_planes_cannot_hold():
    with pytest.raises(InvalidInput, match="NaN or infinity"):
        planes.quantize(np.array([[1, np.inf]], np.float32), 2, 32)
    with pytest.raises(InvalidInput, match="1 to 8 bits, got 9"):
        PlaneFormat.bipolar(9, 32)
    with pytest.raises(InvalidInput, match="whole words of 32, got 48"):
        PlaneFormat.bipolar(2, 48)
    with pytest.raises(InvalidInput, match="32 to 32768 columns, whole words of 32, got 65536") as caught:
        PlaneFormat.bipolar(8, 65536)
    assert "overflow" in caught.value.cure
    with pytest.raises(Incompatible, match="nf4_g64 has no planes"):
        PlaneFormat.of_blocks("nf4_g64")
    with pytest.raises(Incompatible, match="q4_k has no planes"):
        PlaneFormat.of_blocks("q4_k")
    with pytest.raises(ValueError, match=r"planes \[16, 96\] need 416 bytes, got 415"):
        PlaneWeight(PlaneFormat.bipolar(2, 128), 16, 96, np.zeros(415, np.uint8))


# --- products ---


@pytest.mark.parametrize("weight_bits", range(1, 9))
def test_every_pair_of_bits_is_exact(isa, weight_bits, rng, threads):
    """Steps of 2 and scales of 1: outputs are the integers themselves, here all below 2^24."""
    for bits in range(1, 9):
        threads(1 + bits % 3)
        group = int(rng.choice([32, 64, 128, 512, 4096]))
        rows, cols, n_tokens = (int(rng.integers(1, most)) for most in (70, 1300, 12))
        fmt = PlaneFormat.bipolar(weight_bits, group)
        codes = rng.integers(0, fmt.levels + 1, (rows, cols), dtype=np.uint8)
        weight = planes.pack(fmt, codes, np.full((rows, fmt.n_groups(cols)), 2, np.float16))
        x = odd_integers(n_tokens, cols, bits, group, rng)
        exact = x.astype(np.int64) @ planes.values(codes, weight_bits).T
        assert np.abs(exact).max() < 2**24
        assert np.array_equal(product(x, weight, bits).astype(np.int64), exact)
        assert np.array_equal(planes.product(x, weight, bits).astype(np.int64), exact)


@pytest.mark.parametrize(("weight_code", "sign"), [(255, 1), (255, -1), (0, 1), (0, -1)])
def test_the_largest_sums_fit_int32(isa, weight_code, sign):
    """32,768 columns of +-255 by +-255 come to 2^31 - 16,744,448; a word more starts another group."""
    cols = 32768 + 32
    fmt = PlaneFormat.bipolar(8, 32768)
    weight = planes.pack(fmt, np.full((2, cols), weight_code, np.uint8), np.array([[2, 0], [2, 2]], np.float16))
    x = np.full((3, cols), sign * 255, np.float32)
    whole = sign * (255 if weight_code else -255) * 255
    assert abs(32768 * whole) < 2**31 < abs(cols * whole) + 2**24
    got = product(x, weight, 8)
    assert (got[:, 0] == np.float32(32768 * whole)).all()
    assert np.allclose(got[:, 1], cols * whole, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_integer_groups_equal_their_float_product(isa, name, rng):
    """x is exact in 5 bits, so that the only rounding is that of float32 sums: a few a group."""
    group = blocks.block_elements(name)
    cols = 5 * group
    raw = cases.random_packed(name, 24, cols, rng)
    weight = planes.from_blocks(name, raw, cols)
    x = np.float32(0.25) * odd_integers(5, cols, 5, group, rng)
    exact = x.astype(np.float64) @ blocks.decode(name, raw, cols).astype(np.float64).T
    assert (np.abs(product(x, weight, 5) - exact) <= (4 + 2 * 5) * EPS * magnitudes(x, weight)).all()


@pytest.mark.parametrize("name", ["int2_g64_sym", "ternary_g64", "int3_g64_asym", "int4_g64_asym"])
def test_offsets_and_their_sums_are_needed(name, rng, monkeypatch):
    raw = cases.random_packed(name, 24, 256, rng)
    weight = planes.from_blocks(name, raw, 256)
    x = odd_integers(2, 256, 3, 64, rng) + np.float32(0)
    exact = x.astype(np.float64) @ blocks.decode(name, raw, 256).astype(np.float64).T
    assert np.abs(planes.product(x, weight, 3) - exact).max() <= 1e-6 * np.abs(exact).max()
    found = planes.quantize_activations
    monkeypatch.setattr(planes, "quantize_activations", lambda *a: (*found(*a)[:2], np.zeros_like(found(*a)[2])))
    assert np.abs(planes.product(x, weight, 3) - exact).max() > 1e-2 * np.abs(exact).max()


@pytest.mark.parametrize("bits", range(1, 9))
def test_gaussian_activations_are_rounded_as_the_reference_rounds_them(isa, bits, rng):
    for fmt in (PlaneFormat.bipolar(3, 32), PlaneFormat(2, 64, 0.25, has_minimum=True)):
        weight = random_weight(fmt, 35, 90, rng)
        x = rng.standard_normal((6, 90)).astype(np.float32)
        # Two roundings a group, and those of sums of x in 8 parts. A code that differs would change most outputs more.
        bound = (4 + fmt.group // 8 + 2 * fmt.n_groups(90)) * EPS * magnitudes(np.full_like(x, np.abs(x).max()), weight)
        assert (np.abs(product(x, weight, bits) - planes.product(x, weight, bits)) <= bound).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_activations_are_within_s_of_their_codes(bits, rng):
    x = rng.standard_normal((3, 300)).astype(np.float32)
    codes, scales, sums = planes.quantize_activations(x, bits, 128)
    s = np.repeat(scales, 128, axis=1)[:, :300]
    assert (np.abs(planes.values(codes, bits) * s - x) <= s * (1 + 2**bits * EPS * 4)).all()
    for g in range(3):
        group = x[:, 128 * g : 128 * (g + 1)]
        assert np.allclose(scales[:, g] * (2**bits - 1), np.abs(group).max(axis=1))
        assert np.allclose(sums[:, g], group.astype(np.float64).sum(axis=1), atol=1e-4)


@pytest.mark.parametrize("n_tokens", [1, 7])
def test_results_do_not_depend_on_threads_runs_or_alignment(isa, n_tokens, threads, rng):
    fmt = PlaneFormat(3, 64, 0, has_minimum=True)
    weight = random_weight(fmt, 333, 1100, rng)
    backing = np.zeros(weight.buffer.size + 3, np.uint8)
    backing[3:] = weight.buffer
    shifted = PlaneWeight(fmt, 333, 1100, backing[3:])
    x = rng.standard_normal((n_tokens, 1100)).astype(np.float32)
    seen = set()
    for n in (1, 2, 3, 3):
        threads(n)
        seen |= {product(x, weight, 4).tobytes(), product(x, shifted, 4).tobytes()}
    assert len(seen) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_with_nan_or_infinity(isa, bad, rng):
    for fmt in (PlaneFormat.bipolar(2, 64), PlaneFormat(2, 64, 0, has_minimum=True)):
        weight = random_weight(fmt, 20, 200, rng)
        x = rng.standard_normal((6, 200)).astype(np.float32)
        clean = product(x, weight, 3)
        x[4, 77] = bad
        got = product(x, weight, 3)
        assert np.isnan(got[4]).all()
        assert np.array_equal(np.delete(got, 4, axis=0), np.delete(clean, 4, axis=0))
        assert np.isnan(planes.product(x, weight, 3)[4]).all()


@pytest.mark.parametrize("largest", [0.0, 1e-44, 1e-31, 1e37])
@pytest.mark.parametrize("bits", [1, 4])
def test_extreme_magnitudes(isa, largest, bits):
    weight = planes.quantize(np.linspace(-1, 1, 64, dtype=np.float32).repeat(16).reshape(64, 16).T.copy(), 4, 32)
    x = np.full((2, 64), largest, np.float32)
    used = largest if largest > 2.0**-100 else 0.0  # below, a group counts as zero
    expected = used * planes.decode(weight).astype(np.float64).sum(axis=1)
    assert np.allclose(product(x, weight, bits), expected, rtol=0, atol=16 * EPS * used * 64)


def test_add(isa, rng):
    weight = random_weight(PlaneFormat.bipolar(2, 32), 18, 96, rng)
    x = rng.standard_normal((3, 96)).astype(np.float32)
    alone, out = product(x, weight, 2), np.full((3, 18), np.float32(100))
    ops.plane_matmul(x, weight, out, activation_bits=2, add=True, scratch=scratch_for(x, weight, 2))
    assert np.allclose(out - 100, alone, rtol=0, atol=1e-4)


# --- memory and arguments ---


def unfused(x_codes, w_codes, x_bits, w_bits):
    """One product per pair of planes, each written to memory, then joined: what fusing saves."""
    n_cols = x_codes.shape[1]
    partial = np.empty((w_bits, x_bits, len(x_codes), len(w_codes)), np.int32)
    for i in range(w_bits):
        for j in range(x_bits):
            w, x = (w_codes >> i & 1).astype(np.float32), (x_codes >> j & 1).astype(np.float32)
            differing = x.sum(axis=1)[:, None] + w.sum(axis=1) - 2 * (x @ w.T)
            partial[i, j] = n_cols - 2 * differing
    return sum(partial[i, j] << (i + j) for i in range(w_bits) for j in range(x_bits))


def test_only_the_planes_of_the_activations_reach_memory(rng, threads):
    threads(2)
    w_bits, x_bits, n_tokens, rows, cols = 4, 8, 8, 64 * 1024, 64
    codes = rng.integers(0, 16, (rows, cols), dtype=np.uint8)
    weight = planes.pack(PlaneFormat.bipolar(w_bits, cols), codes, np.full((rows, 1), 2, np.float16))
    x = odd_integers(n_tokens, cols, x_bits, cols, rng)
    with TracedPeak() as traced:
        expected = unfused(planes.quantize_activations(x, x_bits, cols)[0], codes, x_bits, w_bits)
    written = w_bits * x_bits * rows * n_tokens * 4
    assert traced.result.added >= written == 64 << 20
    out, scratch = np.zeros((n_tokens, rows), np.float32), scratch_for(x, weight, x_bits)
    assert scratch.size == 64 + 4 * n_tokens * x_bits * cols // 32 + 2 * 64  # whatever the number of rows
    ops.plane_matmul(x[:1], weight, out[:1], activation_bits=x_bits, scratch=scratch)  # starts the threads
    with PhaseMeter() as process, TracedPeak() as traced:
        ops.plane_matmul(x, weight, out, activation_bits=x_bits, scratch=scratch)
    assert np.array_equal(out, expected)
    assert traced.result.added < 64 << 10
    assert process.result is None or process.result.added < written // 16  # None where the system keeps no peak


def test_the_stated_scratch_is_exactly_what_is_used(isa, threads, rng):
    threads(3)
    weight = random_weight(PlaneFormat(2, 128, 0, has_minimum=True), 50, 777, rng)
    for n_tokens, bits in ((1, 1), (3, 8)):
        size = ops.plane_scratch_bytes(n_tokens, 777, bits, 128)
        guarded = np.full(size + 128, 0xA5, np.uint8)
        x, out = np.ones((n_tokens, 777), np.float32), np.empty((n_tokens, 50), np.float32)
        ops.plane_matmul(x, weight, out, activation_bits=bits, scratch=guarded[64 : 64 + size])
        assert (guarded[:64] == 0xA5).all()
        assert (guarded[64 + size :] == 0xA5).all()
        with pytest.raises(ValueError, match=f"scratch: expected {size}, got {size - 1}"):
            ops.plane_matmul(x, weight, out, activation_bits=bits, scratch=guarded[: size - 1])


def test_wrong_arguments_are_refused(rng):
    weight = random_weight(PlaneFormat.bipolar(2, 32), 18, 96, rng)
    x, out, scratch = np.zeros((2, 96), np.float32), np.zeros((2, 18), np.float32), np.zeros(4096, np.uint8)

    def refused(error, match, **changed):
        arguments = {"x": x, "weight": weight, "out": out, "activation_bits": 2, "scratch": scratch} | changed
        with pytest.raises(error, match=match):
            ops.plane_matmul(**arguments)

    refused(ValueError, r"take x \[n_tokens, 96\] .* got \(2, 95\)", x=x[:, :95].copy())
    refused(ValueError, r"out \[n_tokens, 18\], got .*\(2, 17\)", out=out[:, :17].copy())
    refused(ValueError, "1 to 8 bits, got weights of 2 and activations of 9", activation_bits=9)
    refused(TypeError, "incompatible", x=x.astype(np.float64))
    refused(TypeError, "incompatible", out=np.zeros((18, 2), np.float32).T)
