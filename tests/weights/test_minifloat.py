"""Minifloats against all their levels and torch's 8-bit types; post-training steps on their grids; what they cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from barefoot.core.errors import InvalidInput
from barefoot.sim.fpga import Operand, multiply_accumulate
from barefoot.weights import bitstream
from barefoot.weights.integers import network
from barefoot.weights.minifloat import Minifloat, formats, rounded_rows
from barefoot.weights.ptq.correction import corrected
from barefoot.weights.ptq.equalization import equalized
from barefoot.weights.ptq.rounding import learn_rounding, neighbours

pytestmark = pytest.mark.usefixtures("one_torch_thread")

ALL = [f for bits in range(3, 9) for f in formats(bits)] + [
    f for bits in range(3, 9) for f in formats(bits, unsigned=True)
]
ALL += [Minifloat(2, 1, bias=3), Minifloat(3, 2, bias=0), Minifloat(2, 3, bias=-2, unsigned=True)]


def by_definition(fmt, code):
    """The value of a code, bit by bit."""
    sign = 0 if fmt.unsigned else code >> (fmt.exponent_bits + fmt.mantissa_bits)
    exponent = (code >> fmt.mantissa_bits) & ((1 << fmt.exponent_bits) - 1)
    fraction = (code & ((1 << fmt.mantissa_bits) - 1)) / 2**fmt.mantissa_bits
    bias = 2 ** (fmt.exponent_bits - 1) - 1 if fmt.bias is None else fmt.bias
    magnitude = 2.0 ** (exponent - bias) * (1 + fraction) if exponent else 2.0 ** (1 - bias) * fraction
    return -magnitude if sign else magnitude


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_every_code_there_and_back(fmt):
    codes = np.arange(1 << fmt.bits)
    values = fmt.table()
    assert values.tolist() == [by_definition(fmt, int(code)) for code in codes]
    assert values.max() == fmt.largest
    expected = np.where(values == 0, 0, codes)  # minus zero comes back as zero
    np.testing.assert_array_equal(fmt.encode(values), expected)
    np.testing.assert_array_equal(fmt.rounded(values), values)


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_rounding_is_to_the_nearest_level_and_ties_to_the_even_mantissa(fmt):
    levels = np.unique(fmt.table().astype(np.float64))
    rng = np.random.default_rng(0)
    y = np.concatenate([rng.normal(0, fmt.largest / 2, 3000), rng.normal(0, levels[levels > 0][0] * 3, 1000)])
    y = y.astype(np.float32)
    distance = np.abs(levels[None] - y[:, None].astype(np.float64))
    np.testing.assert_array_equal(np.abs(fmt.rounded(y) - y.astype(np.float64)), distance.min(axis=1))
    middles = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    chosen = fmt.encode(fmt.rounded(middles))
    assert np.all(chosen & 1 == 0) or fmt.mantissa_bits == 0
    tensor = torch.from_numpy(y)
    np.testing.assert_array_equal(fmt.rounded(tensor).numpy(), fmt.rounded(y))


def test_one_exponent_bit_is_an_integer():
    for bits in range(3, 9):
        levels = np.unique(formats(bits)[0].table())
        top = 2 ** (bits - 1) - 1
        np.testing.assert_allclose(levels / levels[-1] * top, np.arange(-top, top + 1), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype", "largest"), [("E4M3", torch.float8_e4m3fn, 448), ("E5M2", torch.float8_e5m2, 57344)]
)
def test_torch_rounds_alike_below_the_levels_that_it_gives_up_for_infinity_and_nan(name, dtype, largest):
    y = torch.from_numpy(np.random.default_rng(0).lognormal(0, 4, 20000).astype(np.float32)).clip(max=largest)
    np.testing.assert_array_equal(Minifloat.named(name).rounded(y).numpy(), y.to(dtype).float().numpy())


@pytest.mark.parametrize(("name", "largest"), [("E2M1", 6), ("E1M2", 3.5), ("E2M3", 7.5), ("E3M2", 28), ("E4M3", 480)])
def test_saturation_comes_after_rounding(name, largest):
    fmt = Minifloat.named(name)
    assert fmt.largest == largest
    assert fmt.rounded(np.array([1e9, -1e9], np.float32)).tolist() == [largest, -largest]


SQNR = {  # dB, of Gaussian rows of 576 at the rows' own scale
    "E1M2": 17.5, "E2M1": 18.9, "E1M4": 30.4, "E2M3": 31.3, "E3M2": 25.6, 
    "E1M6": 42.7, "E2M5": 43.3, "E3M4": 37.7, "E4M3": 31.7,
}  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), SQNR.items())
def test_few_exponent_bits_are_best_for_weights(name, expected):
    x = np.random.default_rng(0).standard_normal((800, 576)).astype(np.float32)
    y = rounded_rows(x, Minifloat.named(name))
    assert 10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()) == pytest.approx(expected, abs=0.3)


def test_bytes_of_a_matrix():
    fmt, x = Minifloat.named("E2M1"), np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    codes = fmt.encode(x / fmt.scale(np.abs(x).max(axis=1))[:, None])
    stream = bitstream.pack(codes, fmt.bits)
    assert fmt.n_bytes((5, 7)) == stream.nbytes + 5 * 2 == 18 + 10
    back = fmt.decode(bitstream.unpack(stream, 4, 35).reshape(5, 7)) * fmt.scale(np.abs(x).max(axis=1))[:, None]
    np.testing.assert_array_equal(back, rounded_rows(x, fmt))


def test_bad_formats_are_named():
    for bad in ((0, 3), (6, 1), (5, 3), (1, 0, None, True)):
        with pytest.raises(InvalidInput, match="1 to 5 exponent bits and 2 to 8 in all"):
            Minifloat(*bad)
    with pytest.raises(InvalidInput, match="E2M1 or UE2M2, got 'fp4'"):
        Minifloat.named("fp4")


# Post-training steps


def chain(seed=0):
    """Expand, depthwise, project and a sum, the channels of very different size."""
    rng = np.random.default_rng(seed)

    def product(name, source, shape, spread, **kwargs):
        weight = rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape) * rng.lognormal(0, spread, (shape[0], 1, 1, 1))
        return network.Product(
            name, source, weight.astype(np.float32), rng.normal(0, 0.3, shape[0]).astype(np.float32), **kwargs
        )

    return (
        product("expand", "input", (24, 1, 1, 6), 1.0, cap=6.0),
        product("depth", "expand", (24, 3, 3, 1), 1.0, depthwise=True, cap=np.inf),
        product("project", "depth", (6, 1, 1, 24), 0.3),
        network.Sum("add", ("project", "input")),
        product("last", "add", (4, 1, 1, 6), 0.3),
    )


def images(n=40, seed=1):
    return np.random.default_rng(seed).standard_normal((n, 5, 5, 6)).astype(np.float32)


def test_equalization_preserves_the_function_and_evens_the_ranges():
    nodes = chain()
    even = equalized(nodes)
    np.testing.assert_allclose(network.run(even, images()), network.run(nodes, images()), rtol=1e-4, atol=1e-4)
    ranges = [np.abs(n.weight).max(axis=(1, 2, 3)) for n in (nodes[1], even[1])]
    assert ranges[1].std() / ranges[1].mean() < 0.5 * ranges[0].std() / ranges[0].mean()
    np.testing.assert_array_equal(even[4].weight, nodes[4].weight)  # what a sum reads can't be scaled alone


def rounded_nodes(nodes, fmt):
    def rows(w):
        return rounded_rows(w.reshape(len(w), -1), fmt).reshape(w.shape)

    return tuple(
        network.Product(n.name, n.source, rows(n.weight), n.bias, n.stride, n.depthwise, n.cap)
        if isinstance(n, network.Product)
        else n
        for n in nodes
    )


def test_bias_correction_restores_the_means_of_a_layer_and_lowers_the_error():
    nodes = chain()
    rounded = rounded_nodes(nodes, Minifloat.named("E2M1"))
    fixed = corrected(nodes, rounded, images(200) + 0.5)
    held_out = images(200, 2) + 0.5
    real, before, after = (network.run(n, held_out) for n in (nodes, rounded, fixed))
    assert np.abs((after - real).mean(axis=(0, 1, 2))).max() < 0.3 * np.abs((before - real).mean(axis=(0, 1, 2))).max()
    assert ((after - real) ** 2).mean() < ((before - real) ** 2).mean()


@pytest.mark.parametrize("name", ["E1M2", "E2M1", "E3M0", "UE2M2"])
def test_neighbours_are_the_levels_on_both_sides(name):
    fmt = Minifloat.named(name)
    levels = np.unique(fmt.table())
    y = np.linspace(levels[0] - 1, levels[-1] + 1, 1777).astype(np.float32)
    low, high = neighbours(y, fmt)
    inside = np.clip(y, levels[0], levels[-1])
    np.testing.assert_array_equal(low, levels[np.searchsorted(levels, inside, side="right") - 1])
    np.testing.assert_array_equal(high, levels[np.searchsorted(levels, inside)])


def test_learned_rounding_on_a_float_grid_beats_nearest_and_a_constant_gap():
    rng = np.random.default_rng(0)
    fmt = Minifloat.named("E2M1")
    w = rng.standard_normal((12, 24)).astype(np.float32)
    mix = rng.standard_normal((24, 24)).astype(np.float32)
    x = torch.from_numpy(rng.standard_normal((600, 24)).astype(np.float32) @ mix)
    targets = x @ torch.from_numpy(w).T
    scale = fmt.scale(np.abs(w).max(axis=1))[:, None]
    low, high = (side * scale for side in neighbours(w / scale, fmt))

    def forward(weight, inputs):
        return inputs @ weight.T

    found = learn_rounding(low, high, w, forward, x[:500], targets[:500], n_steps=300)
    assert np.all((found == low) | (found == high))

    def error(weight):
        return float(((x[500:] @ torch.from_numpy(weight).T - targets[500:]) ** 2).mean())

    nearest = error(rounded_rows(w, fmt))
    assert error(found) < 0.8 * nearest
    # The imitation: candidates of an integer grid with the same number of levels, a gap that is everywhere the same.
    step = np.abs(w).max(axis=1)[:, None] / 7
    flat = learn_rounding(np.floor(w / step) * step, np.ceil(w / step) * step, w, forward, x[:500], targets[:500], 300)
    assert error(found) < error(rounded_rows(flat, fmt))


# The cost model


def test_units_counted_by_hand():
    # 8 x 8 bits: 32 LUTs of product; 16 bits and 10 for 1,024 products accumulate without shifting.
    luts = multiply_accumulate(Operand(1, 6), Operand(1, 6), 1024)
    assert (luts.product, luts.exponents, luts.shifter, luts.accumulator) == (32, 0, 0, 26)
    # E2M1 x E2M1: 3-bit integers with signs; 3 + 3 - 1 = 5 shifts in 3 stages, which are 2 LUTs a bit.
    luts = multiply_accumulate(Operand(2, 1), Operand(2, 1), 1024)
    assert (luts.product, luts.exponents, luts.shifter, luts.accumulator) == (5, 3, 2 * 20, 3 + 3 + 4 + 10)


def test_exponents_cost_more_than_they_save():
    cost = {f: multiply_accumulate(Operand(f, 7 - f), Operand(f, 7 - f), 512).total for f in range(1, 6)}
    assert cost[1] < cost[2] < cost[3] < cost[4] < cost[5]
    # A float that meets an integer is cheaper than two floats.
    assert (
        multiply_accumulate(Operand(3, 2), Operand(1, 4), 512).total
        < multiply_accumulate(Operand(3, 2), Operand(3, 2), 512).total
    )
