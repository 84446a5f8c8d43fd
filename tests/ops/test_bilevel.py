"""Bilevel groups: bytes, the meaning of every code, and what encoding loses."""

from __future__ import annotations

import numpy as np
import pytest

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.ops import bilevel, blocks

FORMATS = [form.name for form in bilevel.FORMATS]


def relative_error(name, weights):
    decoded = blocks.decode(name, blocks.encode(name, weights), weights.shape[1])
    return np.square(decoded - weights).mean() / np.square(weights).mean()


def test_the_documented_example():
    row = np.zeros((1, 29), np.uint8)
    row[0, 0], row[0, 1] = 0b01111100, 0x2F
    row[0, 5 + 3], row[0, 5 + 8] = 0b11, 1 << 3  # code 7 of element 3: its pair, then its high bit
    weights = blocks.decode("bilevel3", row, 64)[0]
    assert weights[3] == 1.5 / 256 * 15 * (7 - 1.75)
    assert weights[0] == weights[15] == 1.5 / 256 * 15 * -1.75
    assert not weights[16:].any()  # a = 0


@pytest.mark.parametrize(("name", "bits"), list(zip(FORMATS, bilevel.BITS, strict=True)))
def test_bytes_are_those_of_the_papers_formula(name, bits):
    """b + (b_s + b_z) / beta_1 + 64 / (beta_1 beta_2), statistics of 3 bits and groups of 16 and 16."""
    assert blocks.bits_per_weight(name) == bits + (3 + 3) / 16 + 64 / 16**2
    assert blocks.encode(name, np.zeros((5, 576), np.float32)).nbytes == 5 * 576 * (bits + 0.625) / 8


@pytest.mark.parametrize(("name", "bits"), list(zip(FORMATS, bilevel.BITS, strict=True)))
def test_every_code_means_what_its_equation_says(name, bits, rng):
    """In exact rationals: d from its bits, a (q - z) in whole 64ths."""
    raw = rng.integers(0, 256, (50, blocks.block_bytes(name)), dtype=np.uint8)
    raw[:, 0] = np.arange(50) * 5  # up to 245: all finite
    codes = blocks.lookup(name).anatomy.split(raw)[2].astype(int)
    decoded = blocks.decode(name, raw, 64)
    for block in range(50):
        exponent, mantissa = divmod(int(raw[block, 0]), 8)
        d = 2.0**-17 * mantissa if exponent == 0 else 2.0 ** (exponent - 15) * (1 + mantissa / 8)
        for i in range(64):
            a, j = int(raw[block, 1 + i // 16]) % 16, int(raw[block, 1 + i // 16]) // 16
            in_64ths = 64 * codes[block, i] - 2**bits * (8 + 3 * j)
            assert decoded[block, i] == d / 256 * a * in_64ths / 64


def test_units_round_to_the_nearest():
    units = bilevel.step_of(np.arange(248, dtype=np.uint8))
    assert np.array_equal(bilevel.nearest_step(units), np.arange(248))
    between = units[:-1] + np.diff(units) * np.float32(0.4)
    assert np.array_equal(bilevel.nearest_step(between), np.arange(247))
    assert bilevel.nearest_step(np.float32([1e9])) == 247


@pytest.mark.parametrize(
    ("name", "coarser"), [("bilevel2", "int2_g32"), ("bilevel3", "int3_g32"), ("bilevel4", "int4_g32")]
)
def test_small_groups_hold_more_in_fewer_bytes(name, coarser, rng):
    """Than groups of 32 with f16 scales; and where magnitudes differ from group to group, far more."""
    weights = rng.standard_normal((64, 576)).astype(np.float32)
    assert blocks.bits_per_weight(name) < blocks.bits_per_weight(coarser + "_asym")
    assert relative_error(name, weights) < 0.7 * relative_error(coarser + "_asym", weights)
    uneven = weights * np.repeat(rng.uniform(0.3, 2, (64, 36)), 16, axis=1).astype(np.float32)
    assert relative_error(name, uneven) < 0.7 * relative_error(coarser + "_asym", uneven)


@pytest.mark.parametrize("name", FORMATS)
def test_encoding_finds_about_the_best_codes(name, rng):
    """Every pair of a and j, for the same d: the search leaves little."""
    form = blocks.lookup(name).anatomy
    weights = rng.standard_normal((40, 64)).astype(np.float32)
    encoded = blocks.encode(name, weights)
    x = np.ascontiguousarray(weights[:, :16].T)
    unit, alike = bilevel.step_of(encoded[:, 0]), np.ones((16, 1), np.float32)
    every = np.stack(
        [
            form.errors(x, alike, unit * np.float32(a), np.broadcast_to(form.zero_of(np.uint8(j)), 40))
            for a in range(1, 16)
            for j in range(16)
        ]
    )
    found = np.square(blocks.decode(name, encoded, 64)[:, :16] - weights[:, :16]).sum(axis=1)
    assert (found >= every.min(axis=0) * 0.999).all()
    assert found.mean() <= 1.03 * every.min(axis=0).mean()


def test_groups_without_spread_or_far_from_zero():
    assert not blocks.decode("bilevel3", blocks.encode("bilevel3", np.zeros((1, 64), np.float32)), 64).any()
    for low, high in ((0.3, 0.3), (1.0, 1.1), (-9.0, -8.0), (-1e-4, 1e-4)):
        weights = np.linspace(low, high, 64, dtype=np.float32)[None]
        decoded = blocks.decode("bilevel3", blocks.encode("bilevel3", weights), 64)
        assert np.abs(decoded - weights).max() <= max(abs(low), abs(high)) / 10


def test_refusals():
    with pytest.raises(Incompatible, match="blocks of 64"):
        blocks.encode("bilevel3", np.zeros((1, 96), np.float32))
    with pytest.raises(InvalidInput, match="NaN"):
        blocks.encode("bilevel3", np.full((1, 64), np.nan, np.float32))
