"""The survey's space: what holds for every combination of its axes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from barefoot.core.errors import CorruptFile, InvalidInput
from barefoot.weights import levels
from barefoot.weights.codebooks.clusters import clusters
from barefoot.weights.taxonomy import Encoded, Quantizer

BLOCKS = ((None, None), (1, None), (4, None), (1, 16))
CALIBRATIONS = ("extremes", "percentile", "error", "entropy")
UNIFORM = [
    Quantizer(bits, "uniform", symmetry, block, calibration)
    for bits, symmetry, block, calibration in itertools.product(
        (2, 4, 8), ("asymmetric", "restricted", "full"), BLOCKS, CALIBRATIONS
    )
]
OTHERS = [
    Quantizer(bits, kind, "full", block, calibration)
    for bits, kind, block, calibration in itertools.product(
        (3, 5), ("powers", "sums", "clusters"), BLOCKS, CALIBRATIONS
    )
]
# A histogram of 16 elements says nothing.
ALL = [q for q in UNIFORM + OTHERS if (q.block, q.calibration) != ((1, 16), "entropy")]
SHAPE = (10, 50)  # whole groups neither of 4 rows nor of 16 columns


def matrix(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).standard_t(5, shape).astype(np.float32)


def test_the_product_of_axes_is_large():
    assert len(ALL) >= 200


@pytest.mark.parametrize("quantizer", ALL, ids=str)
def test_every_combination(quantizer):
    x = matrix()
    x[3, 7] = 0
    stored = quantizer.encode(x)
    assert stored.n_bytes == quantizer.n_bytes(SHAPE)
    values = stored.decode()
    assert values.shape == SHAPE
    assert values.dtype == np.float32
    if quantizer.levels != "clusters":
        assert values[3, 7] == 0
    # Better than no information: what is left of the variance, by what the fewest levels leave.
    assert ((x - values) ** 2).mean() < (1.0 if quantizer.bits == 2 else 0.5) * x.var()
    again = Encoded(quantizer, SHAPE, stored.codes, stored.scales, stored.zeros, stored.table).decode()
    np.testing.assert_array_equal(again, values)


def test_bytes_of_a_small_matrix_counted_by_hand():
    # 500 codes of 3 bits are 1500 bits in 188 bytes; 3 x 1 groups of 4 rows, the last of 2.
    assert Quantizer(3, "uniform", "full", (4, None)).n_bytes(SHAPE) == 188 + 3 * 2
    assert Quantizer(3, "uniform", "asymmetric", (4, None)).n_bytes(SHAPE) == 188 + 3 * 3
    assert Quantizer(3, "clusters", "full", (4, None)).n_bytes(SHAPE) == 188 + 3 * 2 + 8 * 2


def test_levels_of_the_tables():
    np.testing.assert_allclose(levels.powers(3), [-1, -0.5, -0.25, 0, 0.25, 0.5, 1])
    # Sums of {0, 1, 1/4, 1/16} and {0, 1/2, 1/8, 1/32}, scaled by 2/3.
    magnitudes = sorted({a + b for a in (0, 1, 1 / 4, 1 / 16) for b in (0, 1 / 2, 1 / 8, 1 / 32)})
    np.testing.assert_allclose(levels.sums(5), [*(-m / 1.5 for m in magnitudes[:0:-1]), *(m / 1.5 for m in magnitudes)])
    assert len(levels.powers(4)) == 15


def test_nearest_level_is_nearest():
    table, x = levels.sums(5), np.linspace(-1.2, 1.2, 999).astype(np.float32)
    found = table[levels.nearest(x, table)]
    np.testing.assert_allclose(np.abs(found - x), np.abs(table[None] - x[:, None]).min(axis=1), atol=1e-7)


def lloyd(x, start):
    """Lloyd's iteration as it is usually written."""
    centres = start.copy()
    for _ in range(200):
        owner = np.abs(x[:, None] - centres).argmin(axis=1)
        centres = np.array([x[owner == k].mean() if (owner == k).any() else centres[k] for k in range(len(centres))])
    return centres


def test_clusters_are_those_of_lloyd_s_iteration():
    x = matrix((1, 700))[0]
    expected = lloyd(x.astype(np.float64), np.quantile(x, (np.arange(6) + 0.5) / 6))
    np.testing.assert_allclose(clusters(x, 6), expected, rtol=1e-5, atol=1e-6)


def test_clusters_beat_every_fixed_table_and_weigh_what_is_important():
    x = matrix((64, 256))
    error = {
        kind: ((x - Quantizer(3, kind, "full", (None, None)).encode(x).decode()) ** 2).mean()
        for kind in ("uniform", "powers", "sums", "clusters")
    }
    assert error["clusters"] < 0.7 * min(error[kind] for kind in ("uniform", "powers", "sums"))
    values = np.array([0.0, 1.0, 10.0], np.float32)
    np.testing.assert_allclose(clusters(values, 2, np.array([1, 3, 1], np.float32)), [0.75, 10])


def test_bad_input_is_named():
    with pytest.raises(InvalidInput, match="'odd' is not one of uniform"):
        Quantizer(levels="odd")
    with pytest.raises(InvalidInput, match="symmetrically"):
        Quantizer(4, "powers")
    with pytest.raises(InvalidInput, match="2 to 6 bits, got 7"):
        Quantizer(7, "powers", "full")
    with pytest.raises(InvalidInput, match="finite"):
        clusters(np.array([np.nan], np.float32), 2)
    stored = Quantizer(3, "powers", "full").encode(matrix())
    full = Encoded(stored.quantizer, SHAPE, stored.codes | 255, stored.scales, None, None)
    with pytest.raises(CorruptFile, match="code 7 of 7 levels"):
        full.decode()
    with pytest.raises(CorruptFile, match="bytes, got"):
        Encoded(stored.quantizer, SHAPE, stored.codes[:-1], stored.scales, None, None).decode()
