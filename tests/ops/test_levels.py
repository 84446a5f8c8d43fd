"""Grids that are not uniform: levels, rounding, the choice of special values, and blocks bit by bit."""

from __future__ import annotations

import numpy as np
import pytest

from barefoot.ops import blocks, levels
from barefoot.ops.grids import Table, Uniform, last_bit, with_last_bit

GROUP = 64
QLORA = [  # arXiv:2305.14314, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def rounded(grid, x):
    params = grid.plain(x)
    return grid.values(grid.round(x, params), params)


def squares(grid, x):
    """Mean squared error of plain rounding for each group."""
    return ((x - rounded(grid, x)) ** 2).mean(axis=1)


# --- levels ---


def test_minifloats_are_those_of_wider_formats():
    """A code of e5m2 is the upper byte of an f16 number; what f16 has as infinity and NaN is one more binade here."""
    values = np.array(levels.minifloat(5, 2), np.float32)
    halves = (np.arange(256) << 8).astype(np.uint16).view(np.float16).astype(np.float32)
    finite = np.isfinite(halves)
    assert np.array_equal(values[finite], halves[finite])
    assert values.max() == 114688
    e4m3 = levels.minifloat(4, 3)
    assert [e4m3[code] for code in (0x01, 0x08, 0x38, 0x7E, 0x7F, 0xB8)] == [2**-9, 2**-6, 1, 448, 480, -1]
    assert levels.minifloat(2, 1)[:8] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert [max(levels.minifloat(*split)) for split in ((1, 2), (2, 3), (3, 2))] == [3.5, 7.5, 28]


@pytest.mark.parametrize("bits", range(3, 9))
def test_one_exponent_bit_is_the_symmetric_integer_grid(bits):
    most, values = 2 ** (bits - 1) - 1, np.array(levels.minifloat(1, bits - 2))
    assert set(values / values[1]) == set(range(-most, most + 1))


def test_which_minifloats_have_integer_levels():
    integers = {split for split in levels.SPLITS if levels.are_integers(levels.minifloat_table(*split))}
    assert integers == {(2, 0), (2, 1), (3, 0), (2, 2), (2, 3)}
    assert set(levels.minifloat_table(2, 1)) == {s * m for s in (-1, 1) for m in (0, 1, 2, 3, 4, 6, 8, 12)}
    for split in set(levels.SPLITS) - integers:
        assert 1 <= max(levels.minifloat_table(*split)) < 2


def test_nf4_is_qloras_within_half_a_127th():
    assert np.abs(np.array(levels.nf4_table()) / 127 - QLORA).max() <= 0.5 / 127 + 3e-6


# --- rounding ---


@pytest.mark.parametrize("split", levels.SPLITS)
def test_codes_are_nearest_and_ties_even(split, rng):
    """Against all levels, for random numbers and for the points half-way between neighbours."""
    table = np.array(levels.minifloat_table(*split), np.float32)
    sorted_levels = np.unique(table)
    middles = (sorted_levels[1:] + sorted_levels[:-1]) / 2
    x = np.concatenate([rng.uniform(1.1 * table.min(), 1.1 * table.max(), 4096).astype(np.float32), table, middles])
    grid = Table(tuple(map(float, table)), x.size)
    codes = grid.round(x[None], np.ones((1, 1), np.float32))[0]
    distance = np.abs(table.astype(np.float64) - x[:, None])
    assert np.array_equal(distance[np.arange(x.size), codes], distance.min(axis=1))
    assert (codes[-middles.size :] % 2 == 0).all()
    negative_zero = table.size // 2
    assert negative_zero not in codes


@pytest.mark.parametrize(
    ("name", "decibels"),
    [("e2m1", 18.9), ("e2m3", 31.3), ("e3m2", 25.6), ("e2m5", 43.3), ("e3m4", 37.7), ("e4m3", 31.7)],
)
def test_signal_to_noise_of_normal_rows(name, decibels, rng):
    """Few exponent bits are best: e4m3 loses 11 dB to int8, which has 42.7."""
    x = rng.standard_normal((1024, 576)).astype(np.float32)
    grid = Table(blocks.lookup(f"{name}_g64").grid.table, 576)
    assert abs(10 * np.log10((x**2).mean() / squares(grid, x).mean()) - decibels) < 0.3


# --- special values ---


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("sign", [-1, 1])
def test_every_special_value_is_stored_exactly(bits, which, sign, rng):
    table, special = levels.minifloat_table(2, bits - 3), sign * levels.BITMOD_SPECIALS[bits][which]
    scale = np.uint16(0x3400 + which).view(np.float16)  # a quarter, or next to it
    x = scale.astype(np.float32) * rng.choice([*table, special], (5, 128)).astype(np.float32)
    x[:, :3] = np.float32(scale) * np.array([max(table), min(table), special], np.float32)
    name = f"bitmod{bits}_g128"
    stored = blocks.encode(name, x)
    assert np.array_equal(blocks.decode(name, stored, 128), x)
    scales = np.ascontiguousarray(stored[:, :2]).view(np.uint16)[:, 0]
    assert (scales == 0x3400 + which + 0x8000 * (sign < 0)).all()


@pytest.mark.parametrize("bits", [3, 4])
def test_the_best_special_value_is_chosen_for_each_group(bits, rng):
    """Never worse than any fixed one, which is the cheap imitation, and clearly better on average."""
    x = rng.laplace(size=(2048, 128)).astype(np.float32)
    grid = blocks.lookup(f"bitmod{bits}_g128").grid
    chosen = squares(grid, x)
    each = []
    for params in grid.kinds(x.min(axis=1), x.max(axis=1)):
        each.append(((x - grid.values(grid.round(x, params), params)) ** 2).mean(axis=1))
    assert np.allclose(chosen, np.min(each, axis=0), rtol=1e-5)
    assert all(chosen.mean() < 0.93 * fixed.mean() for fixed in each)


@pytest.mark.parametrize(("bits", "draw", "ratio"), [(3, "normal", 0.87), (3, "laplace", 0.75), (4, "laplace", 0.75)])
def test_special_values_beat_integers_and_plain_minifloats(bits, draw, ratio, rng):
    x = getattr(rng, draw)(size=(4096, 128)).astype(np.float32)
    special = squares(blocks.lookup(f"bitmod{bits}_g128").grid, x).mean()
    assert special < ratio * squares(Uniform(bits, 128), x).mean()
    assert special < 0.85 * squares(Table(levels.minifloat_table(2, bits - 3), 128), x).mean()


@pytest.mark.parametrize("bit", [0, 1])
def test_numbers_with_a_chosen_last_bit(bit, rng):
    """The nearest of all f16 numbers that have it; zero and the ends among them."""
    halves = np.arange(0x7C00, dtype=np.uint16)
    allowed = halves[halves & 1 == bit].view(np.float16).astype(np.float64)
    values = np.concatenate([np.exp(rng.uniform(-18, 11, 2000)), [0, 2.0**-24, 65504, 70000], allowed[:40]])
    values = values.astype(np.float32)
    got = with_last_bit(values, bit)
    assert (last_bit(got) == bit).all()
    clipped = np.minimum(values, 65504).astype(np.float64)
    right = np.clip(np.searchsorted(allowed, clipped), 1, len(allowed) - 1)
    nearest = np.minimum(np.abs(allowed[right] - clipped), np.abs(allowed[right - 1] - clipped))
    assert np.array_equal(np.abs(got - clipped), nearest)


# --- block floating point ---


@pytest.mark.parametrize("name", [n for n in blocks.names() if n.startswith("bfp")])
def test_block_floating_point_by_its_definition(name, rng):
    bits, group = int(name[3]), blocks.block_elements(name)
    x = (rng.standard_normal((6, 3 * group)) * np.exp2(rng.integers(-9, 9, (6, 1)))).astype(np.float32)
    x[3, :group] = 0
    step = np.zeros((6, 3, 1))
    largest = np.abs(x.reshape(6, 3, group)).max(axis=2, keepdims=True).astype(np.float64)
    np.exp2(np.floor(np.log2(largest, where=largest > 0, out=step)) - (bits - 2), where=largest > 0, out=step)
    ratio = np.divide(x.reshape(6, 3, group), step, where=step > 0, out=np.zeros((6, 3, group)))
    expected = np.clip(np.rint(ratio), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
    stored = blocks.encode(name, x)
    assert np.array_equal(blocks.decode(name, stored, 3 * group), expected.reshape(6, -1).astype(np.float32))
    assert stored.shape == (6, 3 * (1 + group * bits // 8))
    exponents = stored.reshape(6, 3, -1)[..., 0].astype(int)
    assert np.array_equal(
        exponents, np.where(step > 0, 127 + np.log2(step, where=step > 0, out=step.copy()), 0)[..., 0]
    )


# --- bytes and layouts ---


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("nf4_g64", 4.25),
        ("e2m1_g32", 4.5),
        ("e2m0_g128", 3.125),
        ("e4m3_g128", 8.125),
        ("e3m3_g64", 7.25),
        ("bitmod3_g128", 3.125),
        ("bitmod4_g128", 4.125),
        ("bfp4_g32", 4.25),
        ("bfp8_g64", 8.125),
        ("bfp6_g128", 6.0625),
    ],
)
def test_bits_per_weight(name, bits):
    assert blocks.bits_per_weight(name) == bits
    assert blocks.encode(name, np.ones((3, 256), np.float32)).nbytes == 3 * 256 * bits / 8


@pytest.mark.parametrize("name", ["e2m3_g32", "e3m3_g32", "e4m3_g32"])
def test_the_documented_layout_of_6_7_and_8_bits(name):
    """Nibbles of the low four bits, pairs of the next two, bits of the seventh; bytes."""
    table = np.array(blocks.lookup(name).grid.table, np.float32)
    bits = 1 + int(name[1]) + int(name[3])
    codes = (np.arange(32) * 37 + 5) % 2**bits
    codes[codes == 2 ** (bits - 1)] = 1  # negative zero is never made
    codes[0] = 2 ** (bits - 1) - 1  # the largest level: the scale is 1
    row = blocks.encode(name, table[codes][None])[0]
    assert row[:2].tobytes() == np.float16(1).tobytes()
    payload, i = row[2:].astype(int), np.arange(32)
    if bits == 8:
        assert payload.tolist() == codes.tolist()
        return
    got = (payload[i % 16] >> (4 * (i // 16)) & 15) | (payload[16 + i % 8] >> (2 * (i // 8)) & 3) << 4
    if bits == 7:
        got |= (payload[24 + i // 8] >> (i % 8) & 1) << 6
    assert got.tolist() == codes.tolist()


def test_the_documented_layout_of_bitmod3():
    levels_of_row = np.tile([0, 1, 2, 4, 3, -1, -2, -4], 4).astype(np.float32)
    row = blocks.encode("bitmod3_g32", 2 * levels_of_row[None])[0]
    assert row.size == 14
    assert row[:2].tobytes() == np.float16(2).tobytes()  # positive, last bit 0: the special value is +3
    low, high = row[2:10], int.from_bytes(row[10:14].tobytes(), "little")
    codes = [(low[i % 8] >> (2 * (i // 8)) & 3) | ((high >> i & 1) << 2) for i in range(32)]
    assert codes == [0, 1, 2, 3, 4, 5, 6, 7] * 4
    mirrored = blocks.encode("bitmod3_g32", -2 * levels_of_row[None])[0]
    assert mirrored[:2].tobytes() == np.float16(-2).tobytes()
    assert mirrored[2:].tobytes() == row[2:].tobytes()
