"""Products against the numpy reference, on every instruction set of this machine."""

from __future__ import annotations

import numpy as np
import pytest

from barefoot import ops
from barefoot.ops import blocks, cases, reference


def scratch_for(n_tokens, n_cols, activations="int8"):
    return np.empty(ops.matmul_scratch_bytes(n_tokens, n_cols, activations), np.uint8)


def native(x, weights, **options):
    outs = [np.full((len(x), w.rows), np.float32(7)) for w in weights]
    activations = options.get("activations", "int8")
    ops.matmul(x, weights, outs, scratch=scratch_for(*x.shape, activations), **options)
    return outs


def packed(name, rows, cols, rng):
    return ops.PackedWeight(name, rows, cols, cases.random_packed(name, rows, cols, rng).reshape(-1))


def test_kernels_are_built():
    assert ops.backend().startswith("native:")
    assert ops.available_isas()[0] == "portable"


def test_block_sizes_of_the_kernels_are_those_of_the_formats():
    listed = [line.split() for line in ops._native.formats()]
    assert [name for name, _, _ in listed] == list(blocks.names())
    assert all((int(e), int(b)) == (blocks.block_elements(n), blocks.block_bytes(n)) for n, e, b in listed)


@pytest.mark.parametrize("activations", ["int8", "float32"])
@pytest.mark.parametrize("name", blocks.names())
def test_matmul_equals_the_reference(isa, name, activations, rng, threads):
    for i, case in enumerate(c for c in cases.MATMUL if c.format == name):
        threads(1 + i % 3)
        weight = packed(name, case.rows, case.cols, rng)
        x = rng.standard_normal((case.n_tokens, case.cols)).astype(np.float32)
        (got,) = native(x, [weight], activations=activations)
        expected = np.empty_like(got)
        reference.matmul(x, [weight], [expected], activations=reference.arithmetic(isa, len(x), activations))
        magnitude = np.abs(x) @ np.abs(reference.decode_rows(weight, slice(None))).T
        assert (np.abs(got - expected) <= 1e-6 * magnitude).all(), case


@pytest.mark.parametrize("name", ["f16", "q4_1", "q6_k", "int3_g64_sym"])
def test_float32_activations_are_exact_to_1e_5(isa, name, rng):
    weight = packed(name, 65, 1536, rng)
    x = rng.standard_normal((7, 1536)).astype(np.float32)
    exact = x.astype(np.float64) @ reference.decode_rows(weight, slice(None)).astype(np.float64).T
    (got,) = native(x, [weight], activations="float32")
    assert np.abs(got - exact).max() <= 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("n_tokens", [1, 5])
def test_int8_activations_err_by_their_rounding_only(isa, n_tokens, rng):
    weight = packed("int8_g32_sym", 64, 512, rng)
    x = rng.standard_normal((n_tokens, 512)).astype(np.float32)
    w = reference.decode_rows(weight, slice(None)).astype(np.float64)
    (got,) = native(x, [weight])
    step = np.abs(x.reshape(n_tokens, -1, 32)).max(2).repeat(32, axis=1) / 127
    error, bound = np.abs(got - x @ w.T), (step / 2) @ np.abs(w).T
    assert (error <= bound).all()
    assert error.max() > 0.01 * bound.max()  # it did round


@pytest.mark.parametrize("name", blocks.names())
def test_embed_is_bit_for_bit(isa, name, rng):
    elements = blocks.block_elements(name)
    cols = 3 * elements if elements > 1 else 45
    weight = packed(name, 50, cols, rng)
    ids = np.array([49, 0, 7, 7, 31], np.int32)
    out = np.empty((5, cols), np.float32)
    ops.embed(ids, weight, out)
    expected = blocks.decode(name, weight.buffer.reshape(50, -1), cols)[ids]
    assert np.array_equal(out.view(np.uint32), expected.view(np.uint32))
    ops.embed(ids, weight, out, scale=2.5)
    assert np.array_equal(out, expected * np.float32(2.5))


@pytest.mark.parametrize("n_tokens", [1, 9])
def test_several_weights_share_one_input(isa, n_tokens, rng):
    weights = [packed(n, r, 512, rng) for n, r in (("q4_k", 40), ("f16", 3), ("int4_g64_asym", 129), ("q8_0", 1))]
    x = rng.standard_normal((n_tokens, 512)).astype(np.float32)
    together = native(x, weights)
    for weight, out in zip(weights, together, strict=True):
        assert np.array_equal(native(x, [weight])[0], out)


@pytest.mark.parametrize(("n_tokens", "activations"), [(1, "int8"), (6, "int8"), (1, "float32"), (6, "float32")])
def test_add_accumulates(isa, n_tokens, activations, rng):
    weight = packed("q5_1", 37, 2048, rng)
    x = rng.standard_normal((n_tokens, 2048)).astype(np.float32)
    (plain,) = native(x, [weight], activations=activations)
    out = np.full_like(plain, 100)
    scratch = scratch_for(n_tokens, 2048, activations)
    ops.matmul(x, [weight], [out], activations=activations, add=True, scratch=scratch)
    assert np.allclose(out - 100, plain, rtol=0, atol=1e-4)


def test_results_do_not_depend_on_threads_or_runs(isa, threads, rng):
    weights = [packed("q4_1", 200, 576, rng), packed("f32", 90, 576, rng)]
    for n_tokens in (1, 13):
        x = rng.standard_normal((n_tokens, 576)).astype(np.float32)
        seen = []
        for n in (1, 2, 3, 3):
            threads(n)
            seen.append(b"".join(out.tobytes() for out in native(x, weights)))
        assert len(set(seen)) == 1


@pytest.mark.parametrize("n_tokens", [1, 6])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_with_nan_or_infinity(isa, n_tokens, bad, rng):
    weight = packed("int4_g32_sym", 40, 128, rng)
    x = rng.standard_normal((n_tokens, 128)).astype(np.float32)
    (clean,) = native(x, [weight])
    x[n_tokens - 1, 77] = bad
    (got,) = native(x, [weight])
    assert np.isnan(got[n_tokens - 1]).all()
    assert np.array_equal(got[: n_tokens - 1], clean[: n_tokens - 1])
    (kept,) = native(x, [weight], activations="float32")
    assert not np.isfinite(kept[n_tokens - 1]).any()
    assert np.isfinite(kept[: n_tokens - 1]).all()


@pytest.mark.parametrize("largest", [0.0, 1e-44, 1e-31, 1e36])
def test_extreme_magnitudes_stay_finite(isa, largest, rng):
    weight = ops.PackedWeight("int8_g32_sym", 8, 64, blocks.encode("int8_g32_sym", np.eye(8, 64, dtype=np.float32)))
    x = np.full((5, 64), largest, np.float32)
    (got,) = native(x, [weight])
    assert np.allclose(got, largest if largest > 2.0**-100 else 0.0, rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["q4_0", "q6_k", "f32", "f16"])
def test_buffers_of_any_alignment(isa, name, rng):
    rows = cases.random_packed(name, 33, 256, rng).reshape(-1)
    backing = np.zeros(rows.size + 3, np.uint8)
    backing[3:] = rows
    aligned, shifted = ops.PackedWeight(name, 33, 256, rows), ops.PackedWeight(name, 33, 256, backing[3:])
    for n_tokens in (1, 5):
        x = rng.standard_normal((n_tokens, 256)).astype(np.float32)
        assert np.array_equal(native(x, [aligned])[0], native(x, [shifted])[0])


def test_bind_points_at_another_buffer(rng):
    first, second = (cases.random_packed("q8_0", 4, 64, rng).reshape(-1) for _ in range(2))
    weight = ops.PackedWeight("q8_0", 4, 64)
    assert (weight.format, weight.rows, weight.cols, weight.n_bytes) == ("q8_0", 4, 64, 4 * 2 * 34)
    x = np.ones((1, 64), np.float32)
    with pytest.raises(ValueError, match="no buffer"):
        native(x, [weight])
    results = []
    for buffer in (first, second):
        weight.bind(buffer)
        assert weight.buffer.ctypes.data == buffer.ctypes.data
        results.append(native(x, [weight])[0])
    assert np.allclose(results[0], blocks.decode("q8_0", first.reshape(4, -1), 64).sum(1), rtol=1e-3)
    assert not np.array_equal(*results)


@pytest.mark.parametrize(("n_tokens", "n_cols"), [(1, 32), (3, 45), (24, 32), (17, 1331), (64, 4096), (200, 576)])
@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_the_stated_scratch_is_exactly_what_is_used(n_tokens, n_cols, activations, threads, rng):
    threads(2)
    weight = packed("f32", 3, n_cols, rng)
    x, out = np.zeros((n_tokens, n_cols), np.float32), np.empty((n_tokens, 3), np.float32)
    scratch = scratch_for(n_tokens, n_cols, activations)
    ops.matmul(x, [weight], [out], activations=activations, scratch=scratch)
    with pytest.raises(ValueError, match=f"scratch: expected {scratch.size}, got {scratch.size - 1}"):
        ops.matmul(x, [weight], [out], activations=activations, scratch=scratch[1:])
    assert ops.matmul_scratch_bytes(n_tokens, n_cols, activations, n_threads=2) == scratch.size


def test_scratch_is_not_overrun(isa, threads, rng):
    threads(3)
    few, many = ((1, 2304, "f32"), (1, 2304, "q4_0")), ((50, 2304, "q2_k"), (50, 2304, "bf16"))
    for n_tokens, n_cols, name in (*few, *many, (131, 64, "q4_0"), (257, 576, "q8_0")):
        weight = packed(name, 100, n_cols, rng)
        size = ops.matmul_scratch_bytes(n_tokens, n_cols)
        guarded = np.full(size + 128, 0xA5, np.uint8)
        x, out = np.ones((n_tokens, n_cols), np.float32), np.empty((n_tokens, 100), np.float32)
        ops.matmul(x, [weight], [out], scratch=guarded[64 : 64 + size])
        assert (guarded[:64] == 0xA5).all()
        assert (guarded[64 + size :] == 0xA5).all()


def test_wrong_arguments_are_refused(rng):
    weight = packed("q4_0", 8, 64, rng)
    x, out, scratch = np.zeros((2, 64), np.float32), np.zeros((2, 8), np.float32), scratch_for(2, 64)

    def refused(error, match, **changed):
        arguments = {"x": x, "weights": [weight], "outs": [out], "scratch": scratch} | changed
        with pytest.raises(error, match=match):
            ops.matmul(**arguments)

    refused(TypeError, "incompatible", x=x.astype(np.float64))
    refused(TypeError, "incompatible", x=np.zeros((2, 128), np.float32)[:, ::2])
    refused(ValueError, "columns of the weight: expected 32, got 64", x=x[:, :32].copy())
    refused(ValueError, "tokens of the output", outs=[out[:1]])
    refused(ValueError, "columns of the output: expected 8, got 7", outs=[out[:, :7].copy()])
    refused(TypeError, "float32", outs=[out.astype(np.float64)])
    refused(ValueError, "number of outs", outs=[])
    refused(ValueError, "activations", activations="int4")
    with pytest.raises(ValueError, match="bytes of the weight's buffer: expected 288, got 287"):
        weight.bind(np.zeros(287, np.uint8))
    with pytest.raises(ValueError, match="unknown weight format 'q4_7'"):
        ops.PackedWeight("q4_7", 1, 32)
    with pytest.raises(ValueError, match="blocks of 32 columns"):
        ops.PackedWeight("q4_0", 1, 33)
    with pytest.raises(ValueError, match="0 to 7, got 8"):
        ops.embed(np.array([8], np.int32), weight, np.zeros((1, 64), np.float32))
    with pytest.raises(ValueError, match="0 to 7, got -1"):
        ops.embed(np.array([-1], np.int32), weight, np.zeros((1, 64), np.float32))
