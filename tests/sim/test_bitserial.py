"""The bit-serial accelerator's model: terms against an exhaustive search, cycles against the paper's arithmetic."""

from __future__ import annotations

import itertools

import pytest

from barefoot.ops.levels import BITMOD, BITMOD_SPECIALS, minifloat_table
from barefoot.sim import bitserial
from barefoot.sim.bitserial import DECODE, FLOAT, PREFILL, product, signed_terms, steps

# LLaMA-2-7B: outputs, inputs
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (32000, 4096)]


def test_terms_are_the_fewest():
    powers = [sign << shift for shift in range(9) for sign in (1, -1)]
    fewest = {0: 0}
    for n in range(1, 5):
        for chosen in itertools.combinations(powers, n):
            fewest.setdefault(sum(chosen), n)
    for value in range(-128, 129):
        assert signed_terms(value) == fewest[value], value


@pytest.mark.parametrize("bits", [3, 4])
def test_every_level_of_bitmod_takes_two_steps(bits):
    levels = {int(level) for level in minifloat_table(*BITMOD[bits])}
    specials = {int(sign * special) for special in BITMOD_SPECIALS[bits] for sign in (1, -1)}
    assert steps(levels | specials) == 2


@pytest.mark.parametrize(("bits", "expected"), [(4, 2), (6, 3), (8, 4)])
def test_integers_take_a_step_for_two_bits(bits, expected):
    assert steps(range(-(1 << (bits - 1)), 1 << (bits - 1))) == expected


def test_arrays_take_about_the_same_area():
    assert FLOAT.area == pytest.approx(PREFILL.area, rel=0.03)
    assert PREFILL.area == DECODE.area


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_decoding_waits_for_memory_and_gains_the_ratio_of_bits(n, k):
    ours, theirs = product(DECODE, n, k, 1, 3.0625, 2), product(FLOAT, n, k, 1, 16)
    assert ours.memory > ours.compute
    assert theirs.memory > theirs.compute
    assert theirs.total / ours.total == pytest.approx(16 / 3.0625, rel=0.1)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_prompts_gain_what_the_elements_do_more(n, k):
    ours, theirs = product(PREFILL, n, k, 256, 4.0625, 2), product(FLOAT, n, k, 256, 16)
    # 1,024 elements of four lanes and two steps against 768: 2.67, and 2.75 as 256 tokens fill 11 columns of 24.
    assert theirs.compute / ours.compute == 2.75
    # 256 inputs of 11,008 numbers are 11 buffers, and read again for every buffer of weights.
    waits = k == 11008
    for cycles in (ours, theirs):
        assert (cycles.memory > cycles.compute) == waits


def test_cycles_and_energy_counted_by_hand():
    # 33 outputs need two rows of elements, 5 inputs two steps of four lanes, 40 tokens two columns, two steps each.
    cycles = product(PREFILL, 33, 5, 40, 4, 2)
    assert cycles.compute == 2 * 2 * 2 * 2
    assert cycles.memory == -(-(33 * 5 * 4 + 40 * 5 * 16 + 40 * 33 * 16) // 256)
    assert cycles.joules == pytest.approx(16 * 1024 * 0.56e-12 * 1.5)


def test_what_fits_no_buffer_is_read_again():
    n, k, tokens = 4096, 4096, 1024
    weights, inputs, outputs = n * k * 4, tokens * k * 16, tokens * n * 16
    buffer = 8 * bitserial.BUFFER_BYTES
    # 16 buffers of either: the smaller is read 16 times. Inputs of one buffer are read once.
    assert inputs == weights == 16 * buffer
    assert product(PREFILL, n, k, tokens, 4, 2).memory == (weights + 16 * inputs + outputs) // 256
    assert product(PREFILL, n, k, 64, 4, 2).memory == (weights + 64 * k * 16 + 64 * n * 16) // 256
