"""Weight formats: sizes against the gguf package, decoding bit for bit, rounding within half a step."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.ops import blocks

GGUF = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "tq1_0", "tq2_0")
INTEGER = tuple(name for name in blocks.names() if name.startswith("int"))


@pytest.mark.parametrize("name", GGUF)
def test_gguf_blocks_decode_bit_for_bit(name, rng):
    kind = gguf.GGMLQuantizationType[name.upper()]
    assert gguf.GGML_QUANT_SIZES[kind] == (blocks.block_elements(name), blocks.block_bytes(name))
    raw = rng.integers(0, 256, (64, blocks.row_bytes(name, 512)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        ours, theirs = blocks.decode(name, raw, 512), gguf.quants.dequantize(raw, kind)
    unknown = np.isnan(theirs)
    assert np.array_equal(np.isnan(ours), unknown)
    assert np.array_equal(ours[~unknown].view(np.uint32), theirs[~unknown].view(np.uint32))


@pytest.mark.parametrize(("name", "dtype"), [("f32", np.float32), ("f16", np.float16)])
def test_dense_rows_are_plain_arrays(name, dtype, rng):
    weights = rng.standard_normal((3, 7)).astype(dtype)
    packed = blocks.encode(name, weights.astype(np.float32))
    assert packed.tobytes() == weights.tobytes()
    assert np.array_equal(blocks.decode(name, packed, 7), weights.astype(np.float32))


def test_bf16_rounds_to_nearest_even():
    values = np.array([[1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-8 + 2**-20, -2.5, np.inf, np.nan]], np.float32)
    decoded = blocks.decode("bf16", blocks.encode("bf16", values), 7)[0]
    assert decoded[:6].tolist() == [1.0, 1.0, 1.0 + 2**-6, 1.0 + 2**-7, -2.5, np.inf]
    assert np.isnan(decoded[6])


@pytest.mark.parametrize("name", INTEGER)
def test_integer_groups_round_to_the_nearest_code(name, rng):
    bits, group = int(name[3]), blocks.block_elements(name)
    weights = rng.standard_normal((5, 4 * group)).astype(np.float32)
    decoded = blocks.decode(name, blocks.encode(name, weights), 4 * group)
    grouped, error = weights.reshape(-1, group), np.abs(decoded - weights).reshape(-1, group)
    if name.endswith("asym"):
        steps = (grouped.max(1) - grouped.min(1)) / (2**bits - 1)
        reached = steps * 0.5
    else:  # one code more on the side of the extreme: the other end may be clipped by up to one step
        steps = np.abs(grouped).max(1) / 2 ** (bits - 1)
        reached = steps
    assert (error.max(1) <= reached * 1.01 + 2e-3).all()
    assert np.median(error / steps[:, None]) <= 0.3
    for row in decoded.reshape(-1, group):
        assert len(np.unique(row)) <= 2**bits


@pytest.mark.parametrize("name", INTEGER)
def test_integer_groups_keep_what_they_can_hold(name, rng):
    bits, group = int(name[3]), blocks.block_elements(name)
    codes = rng.integers(0, 2**bits, (6, group))
    codes[:, :2] = 0, 2**bits - 1
    zero = 0 if name.endswith("asym") else 2 ** (bits - 1)
    weights = (0.25 * (codes - zero) + (-3.0 if zero == 0 else 0.0)).astype(np.float32)
    assert np.array_equal(blocks.decode(name, blocks.encode(name, weights), group), weights)


def test_the_documented_layout_of_int4_g32_asym():
    codes = np.arange(32) % 16
    row = blocks.encode("int4_g32_asym", (0.5 * codes + 1.0).astype(np.float32)[None])[0]
    assert row.size == 20
    assert row[:4].tobytes() == np.array([0.5, 1.0], np.float16).tobytes()
    assert [row[4 + j] & 15 for j in range(16)] == codes[:16].tolist()
    assert [row[4 + j] >> 4 for j in range(16)] == codes[16:].tolist()


def test_the_documented_layout_of_int3():
    codes = (np.arange(32) * 5) % 8
    row = blocks.encode("int3_g32_asym", codes.astype(np.float32)[None])[0]
    low, high = row[4:12], int.from_bytes(row[12:16].tobytes(), "little")
    unpacked = [(low[i % 8] >> (2 * (i // 8)) & 3) | ((high >> i & 1) << 2) for i in range(32)]
    assert unpacked == codes.tolist()


def test_columns_must_fill_whole_blocks():
    with pytest.raises(Incompatible) as refused:
        blocks.row_bytes("int4_g128_sym", 192)
    assert refused.value.cure == "use a format with groups of 32 or 64"
    with pytest.raises(Incompatible) as refused:
        blocks.row_bytes("q4_k", 33)
    assert refused.value.cure == "use f32, f16 or bf16"


def test_refusals_name_the_reason():
    with pytest.raises(Incompatible, match="carried"):
        blocks.encode("tq1_0", np.zeros((1, 256), np.float32))
    with pytest.raises(InvalidInput, match="NaN"):
        blocks.encode("int4_g32_sym", np.full((1, 32), np.nan, np.float32))
    with pytest.raises(InvalidInput, match="q4_0"):
        blocks.lookup("q4_O")


@pytest.mark.parametrize(("name", "bits"), [("int4_g32_sym", 4.5), ("int3_g64_asym", 3.5), ("q6_k", 6.5625)])
def test_bits_per_weight_count_the_scales(name, bits):
    assert blocks.bits_per_weight(name) == bits
    assert blocks.row_bytes(name, 1024) == 1024 * bits / 8


@pytest.mark.parametrize("name", ["ternary_g32", "ternary_g64", "ternary_g128"])
def test_ternary_scales_by_what_lies_beyond_its_threshold(name, rng):
    group = blocks.block_elements(name)
    weights = rng.standard_normal((5, 3 * group)).astype(np.float32)
    decoded = blocks.decode(name, blocks.encode(name, weights), 3 * group)
    for row, original in zip(decoded.reshape(-1, group), weights.reshape(-1, group), strict=True):
        magnitude = np.abs(original)
        scale = np.float32(np.float16(magnitude[magnitude > 0.7 * magnitude.mean()].mean()))
        assert np.array_equal(row, np.where(magnitude > scale / 2, np.sign(original) * scale, 0))
    assert blocks.bits_per_weight(name) == 2 + 16 / group
    exact = (0.25 * rng.integers(-1, 2, (4, 2 * group))).astype(np.float32)
    assert np.array_equal(blocks.decode(name, blocks.encode(name, exact), 2 * group), exact)
    assert not blocks.decode(name, blocks.encode(name, np.zeros((1, group), np.float32)), group).any()


def test_one_bit_stores_the_two_means(rng):
    weights = np.where(np.arange(64) % 3 == 0, 5.0, -1.0) + 0.25 * (np.arange(64) % 2)
    decoded = blocks.decode("int1_g64_asym", blocks.encode("int1_g64_asym", weights.astype(np.float32)[None]), 64)[0]
    high = weights > 2
    assert np.allclose(decoded[high], weights[high].mean(), atol=4e-3)
    assert np.allclose(decoded[~high], weights[~high].mean(), atol=4e-3)
