"""The panel layout: packing, products and rows read out of it, on every instruction set of this machine."""

from __future__ import annotations

import numpy as np
import pytest

from barefoot import ops
from barefoot.core.errors import Incompatible
from barefoot.ops import blocks, cases, panels, reference

FORMATS = [name for name in blocks.names() if blocks.lookup(name).anatomy is not None]


def scratch_for(n_tokens, n_cols, activations="int8"):
    return np.empty(ops.matmul_scratch_bytes(n_tokens, n_cols, activations), np.uint8)


def both_layouts(name, rows, cols, rng):
    """The same random matrix as rows and as panels."""
    raw = cases.random_packed(name, rows, cols, rng)
    packed = np.zeros(raw.size, np.uint8)
    ops.pack_panels(name, raw, rows, cols, packed)
    return ops.PackedWeight(name, rows, cols, raw.reshape(-1)), ops.PackedWeight(name, rows, cols, packed, "panels")


def product(x, weight, **options):
    out = np.full((len(x), weight.rows), np.float32(7))
    scratch = scratch_for(*x.shape, options.get("activations", "int8"))
    ops.matmul(x, [weight], [out], scratch=scratch, **options)
    return out


def test_which_formats_and_shapes_have_panels():
    own = 4 * 3 * 2 + 3 + 3 + 3 * (1 + 5 + 2 + 4)  # 8 to 2 bits, 1 bit, ternary; NF4, minifloats, BitMoD, block float
    own += 3  # bilevel
    assert len(FORMATS) == 5 + 5 + 1 + own
    assert panels.supports("q4_0", 16, 32)
    assert not panels.supports("q4_0", 24, 32)  # half a panel
    assert not panels.supports("q4_0", 0, 32)
    assert not panels.supports("int4_g128_sym", 16, 64)  # half a group
    assert panels.supports("q4_k", 16, 256)
    assert not panels.supports("q4_k", 16, 384)  # half a super-block
    assert not panels.supports("tq1_0", 16, 256)  # codes of 1.6 bits
    assert not panels.supports("f16", 16, 32)
    assert not panels.supports("e4m3_g32", 16, 32)  # products in float32


def test_the_documented_example():
    rows = np.zeros((16, 18), np.uint8)
    rows[3, 2 + 21 - 16] = 0xB0  # column 21 of row 3: high half of nibble byte 5
    rows[3, :2] = 0x34, 0x12
    panel = panels.pack("q4_0", rows, 32)[0]
    assert panel[32 + 64 * 2 + 4 * 3 + 1] >> 4 == 0xB
    assert panel[6:8].tolist() == [0x34, 0x12]
    assert np.count_nonzero(panel) == 3


def test_the_documented_example_of_q4_k():
    """Scale 5 = 0b110110: its low half is that of byte 4 + 8 + 1 of the block, its top bits those of byte 4 + 1."""
    rows = np.zeros((16, 144), np.uint8)
    rows[3, 4 + 8 + 1], rows[3, 4 + 1] = 0b0110, 0b11 << 6
    rows[3, 16 + 32 * 2 + 7] = 0x90  # column 167 = 32 * 5 + 7: the high half of a byte
    panel = panels.pack("q4_k", rows, 256)[0]
    assert panel.size == 2304
    assert (panel[64 + 16 * 5 + 3] & 15) | (panel[64 + 16 * 9 + 3] >> 2 & 3) << 4 == 0b110110
    assert panel[64 + 192 + 5 * 256 + 64 * (7 // 8) + 4 * 3 + 7 % 4] >> 4 == 9
    assert np.count_nonzero(panel) == 3


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_where_sub_scales_lie(name, rng):
    """Blocks with all codes at 1 (or one above zero) decode to their scales, read here from the panel's bytes."""
    zero = {"q3_k": 4, "q6_k": 32}.get(name, 0)
    anatomy = blocks.lookup(name).anatomy
    raw = rng.integers(0, 256, (16, anatomy.n_bytes), dtype=np.uint8)
    _, scales, codes = anatomy.split(raw)
    ones = np.ones((16, anatomy.numbers_bytes // 2), np.float16).view(np.uint8)
    raw = anatomy.join(ones, scales, np.full_like(codes, zero + 1))
    decoded = blocks.decode(name, raw, 256).reshape(16, 16, 16)[..., 0]
    assert panels.panel_bytes(name, 256) == 16 * anatomy.n_bytes
    panel = panels.pack(name, raw, 256)[0]
    at = 16 * anatomy.numbers_bytes
    for r, j in np.ndindex(decoded.shape):
        if name in ("q2_k", "q6_k"):
            byte = int(panel[at + 16 * j + r])
            expected = (byte & 15) - (byte >> 4) if name == "q2_k" else (byte ^ 0x80) - 0x80
        else:

            def six(i, r=r):
                low, high = int(panel[at + 16 * (i % 8) + r]), int(panel[at + 16 * (8 + i % 4) + r])
                return (low >> 4 * (i // 8) & 15) | (high >> 2 * (i // 4) & 3) << 4

            expected = six(j) - 32 if name == "q3_k" else six(j // 2) - six(8 + j // 2)
        assert decoded[r, j] == expected


@pytest.mark.parametrize("name", FORMATS)
def test_packing_is_exact_and_keeps_every_byte(isa, name, rng, threads):
    elements = blocks.block_elements(name)
    for n_threads, rows, n_blocks in ((1, 16, 1), (2, 48, 7)):
        threads(n_threads)
        cols = n_blocks * elements
        raw = rng.integers(0, 256, (rows, blocks.row_bytes(name, cols)), dtype=np.uint8)
        packed = np.zeros(raw.size, np.uint8)
        ops.pack_panels(name, raw, rows, cols, packed)
        expected = panels.pack(name, raw, cols)
        assert expected.shape == (rows // 16, panels.panel_bytes(name, cols))
        assert np.array_equal(packed, expected.reshape(-1))
        assert np.array_equal(panels.unpack(name, expected, cols), raw)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("q8_0", 8),
        ("int8_g64_asym", 8),
        ("q5_1", 5),
        ("int4_g128_sym", 4),
        ("q2_k", 2),
        ("q3_k", 3),
        ("q5_k", 5),
        ("q6_k", 6),
        ("tq2_0", 2),
        ("bilevel2", 2),
        ("bilevel3", 3),
        ("e2m3_g64", 6),
        ("bitmod3_g128", 3),
        ("bfp4_g32", 4),
    ],
)
def test_where_a_code_lies(name, bits, rng):
    """The position formula of the documentation, for every code of a panel."""
    cols = 2 * blocks.block_elements(name)
    raw = rng.integers(0, 256, (16, blocks.row_bytes(name, cols)), dtype=np.uint8)
    raw[:, 0:2], raw[:, blocks.block_bytes(name) :][:, 0:2] = 0, 0
    anatomy = blocks.lookup(name).anatomy
    panel = panels.pack(name, raw, cols).reshape(2, -1)
    header, chunks = 16 * (anatomy.numbers_bytes + anatomy.scales_bytes), blocks.block_elements(name) // 32
    codes = anatomy.split(raw.reshape(32, -1))[2].reshape(16, 2, chunks, 32)
    low = {8: 8, 6: 4, 5: 4, 4: 4, 3: 2, 2: 2}[bits]
    high = bits - low
    for r, g, c, column in np.ndindex(codes.shape):
        quad, j = divmod(column, 4)
        vector, field = divmod(quad, 8 // low)
        base = header + 64 * bits * c
        code = panel[g, base + 64 * vector + 4 * r + j] >> (low * field) & ((1 << low) - 1)
        if high:
            vector, field = divmod(quad, 8 // high)
            more = panel[g, base + 64 * (low + vector) + 4 * r + j] >> (high * field) & ((1 << high) - 1)
            code |= more << low
        assert code == codes[r, g, c, column]


@pytest.mark.parametrize("activations", ["int8", "float32"])
@pytest.mark.parametrize("name", FORMATS)
def test_products_equal_the_reference(isa, name, activations, rng, threads):
    elements = blocks.block_elements(name)
    wide = 1024 + 3 * elements  # more than one tile of columns
    shapes = [(16, elements, 1), (48, wide, 1), (80, wide, 3), (16, wide, 7), (112, wide, 8), (48, elements, 19)]
    for i, (rows, cols, n_tokens) in enumerate(shapes):
        threads(1 + i % 3)
        plain, weight = both_layouts(name, rows, cols, rng)
        x = rng.standard_normal((n_tokens, cols)).astype(np.float32)
        got = product(x, weight, activations=activations)
        expected = np.empty_like(got)
        meaning = reference.arithmetic(isa, n_tokens, activations)
        reference.matmul(x, [plain], [expected], activations=meaning)
        magnitude = np.abs(x) @ np.abs(reference.decode_rows(plain, slice(None))).T
        assert (np.abs(got - expected) / magnitude).max() < 1e-6, (rows, cols, n_tokens)
        assert (np.abs(got - product(x, plain, activations=activations)) / magnitude).max() < 1e-6
        again = np.empty_like(got)
        reference.matmul(x, [weight], [again], activations=meaning)
        assert np.array_equal(again, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_embed_reads_rows_bit_for_bit(isa, name, rng):
    cols = 3 * blocks.block_elements(name)
    plain, weight = both_layouts(name, 48, cols, rng)
    ids = np.array([47, 0, 7, 7, 16, 31], np.int32)
    out, expected = np.empty((6, cols), np.float32), np.empty((6, cols), np.float32)
    ops.embed(ids, weight, out, scale=1.5)
    reference.embed(ids, plain, expected, scale=1.5)
    assert np.array_equal(out.view(np.uint32), expected.view(np.uint32))
    reference.embed(ids, weight, out, scale=1.5)
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("n_tokens", [1, 6, 9])
def test_add_and_mixed_layouts_in_one_call(isa, n_tokens, rng):
    shapes = (("q4_1", 48), ("int3_g64_sym", 64), ("q5_k", 32))
    weights = [weight for name, rows in shapes for weight in both_layouts(name, rows, 768, rng)]
    x = rng.standard_normal((n_tokens, 768)).astype(np.float32)
    alone = [product(x, w) for w in weights]
    outs = [np.full_like(a, 100) for a in alone]
    ops.matmul(x, weights, outs, add=True, scratch=scratch_for(n_tokens, 768))
    for a, out in zip(alone, outs, strict=True):
        assert np.abs(out - 100 - a).max() <= 2 * np.spacing(np.abs(out).max())


@pytest.mark.parametrize("n_tokens", [1, 5, 13, 30])
@pytest.mark.parametrize("name", ["q5_0", "q3_k", "bilevel3"])
def test_results_do_not_depend_on_threads_runs_or_alignment(isa, name, n_tokens, threads, rng):
    _, weight = both_layouts(name, 208, 768, rng)
    backing = np.zeros(weight.n_bytes + 3, np.uint8)
    backing[3:] = weight.buffer
    shifted = ops.PackedWeight(name, 208, 768, backing[3:], layout="panels")
    x = rng.standard_normal((n_tokens, 768)).astype(np.float32)
    seen = set()
    for n in (1, 2, 3, 3):
        threads(n)
        seen |= {product(x, weight).tobytes(), product(x, shifted).tobytes()}
    assert len(seen) == 1


@pytest.mark.parametrize("n_tokens", [1, 6, 11])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["int4_g32_sym", "q4_k", "q6_k", "bilevel4"])
def test_a_token_with_nan_or_infinity(isa, name, n_tokens, bad, rng):
    _, weight = both_layouts(name, 48, 256, rng)
    x = rng.standard_normal((n_tokens, 256)).astype(np.float32)
    clean = product(x, weight)
    x[n_tokens - 1, 77] = bad
    got = product(x, weight)
    assert np.isnan(got[n_tokens - 1]).all()
    assert np.array_equal(got[: n_tokens - 1], clean[: n_tokens - 1])


@pytest.mark.parametrize(
    "name",
    [
        "q8_0",
        "int8_g32_sym",
        "int8_g32_asym",
        "q5_0",
        "int2_g128_asym",
        "q3_k",
        "q5_k",
        "q6_k",
        "nf4_g32",
        "e2m3_g32",
        "e3m0_g64",
        "bitmod4_g64",
    ],
)
def test_the_largest_codes_and_activations_do_not_saturate(isa, name, rng):
    """All codes at one end and all activations at ± 127: the sums where 16-bit intermediates would clip."""
    cols = 2 * blocks.block_elements(name)
    for byte in (0x00, 0xFF, 0x80, 0x7F):
        anatomy = blocks.lookup(name).anatomy
        numbers, scales, codes = anatomy.split(np.full((32, blocks.block_bytes(name)), byte, np.uint8))
        numbers = np.full((32, numbers.shape[1] // 2), 0.5, np.float16).view(np.uint8)
        raw = anatomy.join(numbers, scales, codes).reshape(16, -1)
        packed = np.zeros(raw.size, np.uint8)
        ops.pack_panels(name, raw, 16, cols, packed)
        weight = ops.PackedWeight(name, 16, cols, packed, "panels")
        x = np.where(np.arange(cols) % 8 < 5, 127, -127).astype(np.float32)[None].repeat(9, axis=0)
        exact = x @ blocks.decode(name, raw, cols).T
        for n_tokens in (1, 9):
            assert np.allclose(product(x[:n_tokens], weight), exact[:n_tokens], rtol=1e-6, atol=0)


def test_scratch_is_not_overrun(isa, threads, rng):
    threads(3)
    _, weight = both_layouts("int2_g32_asym", 112, 2304, rng)
    for n_tokens in (1, 7, 50):
        size = ops.matmul_scratch_bytes(n_tokens, 2304)
        guarded = np.full(size + 128, 0xA5, np.uint8)
        x, out = np.ones((n_tokens, 2304), np.float32), np.empty((n_tokens, 112), np.float32)
        ops.matmul(x, [weight], [out], scratch=guarded[64 : 64 + size])
        assert (guarded[:64] == 0xA5).all()
        assert (guarded[64 + size :] == 0xA5).all()


def test_wrong_arguments_are_refused(rng):
    raw = cases.random_packed("q4_0", 24, 64, rng)
    with pytest.raises(ValueError, match=r"q4_0 \[24, 64\] weight has no layout 'panels'"):
        ops.PackedWeight("q4_0", 24, 64, raw.reshape(-1), layout="panels")
    with pytest.raises(ValueError, match="no layout 'columns'"):
        ops.PackedWeight("q4_0", 32, 64, layout="columns")
    with pytest.raises(ValueError, match="no layout 'panels'"):
        ops.PackedWeight("tq1_0", 32, 256, layout="panels")
    with pytest.raises(ValueError, match="bytes of out: expected 576, got 575"):
        ops.pack_panels("q4_0", raw[:16].copy(), 16, 64, np.zeros(575, np.uint8))
    with pytest.raises(ValueError, match="bytes of rows: expected 576, got 864"):
        ops.pack_panels("q4_0", raw, 16, 64, np.zeros(576, np.uint8))
    with pytest.raises(Incompatible, match=r"q4_0 \[24, 64\] has no panel layout"):
        panels.pack("q4_0", raw, 64)
    assert ops.PackedWeight("q4_0", 32, 64).layout == "rows"
    assert ops.PackedWeight("q4_0", 32, 64, layout="panels").layout == "panels"
