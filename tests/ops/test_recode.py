"""Weights in another block format: bit for bit the same, or refused."""

import numpy as np
import pytest

from barefoot.core.errors import Incompatible
from barefoot.ops import blocks, recode

GGUF = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
EXPECTED = {
    "int4_g32_asym": "q4_1",
    "int4_g128_asym": "q4_1",
    "int3_g64_asym": "q4_1",
    "int1_g32_asym": "q4_1",
    "int4_g32_sym": "q4_0",
    "int3_g128_sym": "q4_0",
    "int2_g32_sym": "q4_0",
    "ternary_g64": "q4_0",
    "int8_g32_sym": "q8_0",
    "int8_g128_sym": "q8_0",
}


def random_rows(format_id: str, n_rows: int, cols: int) -> np.ndarray:
    """Rows with every code and with scales of all magnitudes and signs."""
    rng = np.random.default_rng(len(format_id))
    weights = rng.standard_normal((n_rows, cols), np.float32) * np.exp2(rng.integers(-12, 12, (n_rows, 1)))
    return blocks.encode(format_id, weights.astype(np.float32))


@pytest.mark.parametrize("source", EXPECTED)
@pytest.mark.parametrize("n_rows", [1, 7])
def test_the_same_weights(source, n_rows):
    target = recode.target_for(source, GGUF)
    assert target == EXPECTED[source]
    rows = random_rows(source, n_rows, 384)
    made = recode.recode(target, source, rows)
    assert made.shape == (n_rows, blocks.row_bytes(target, 384))
    there, here = blocks.decode(source, rows, 384), blocks.decode(target, made, 384)
    assert np.array_equal(there.view(np.uint32), here.view(np.uint32))


def test_layouts_that_are_the_same_bytes():
    rows = random_rows("int4_g32_asym", 3, 96)
    assert np.array_equal(recode.recode("q4_1", "int4_g32_asym", rows), rows)
    rows = random_rows("int4_g32_sym", 3, 96)
    assert np.array_equal(recode.recode("q4_0", "int4_g32_sym", rows), rows)


def test_holding_is_decided_by_levels_groups_and_minimums():
    assert recode.holds("int8_g32_sym", "q4_0")
    assert recode.holds("int4_g64_sym", "int4_g128_sym")
    assert not recode.holds("int4_g128_sym", "int4_g64_sym")
    assert not recode.holds("q4_0", "q4_1")
    assert not recode.holds("q4_0", "q5_0")
    assert not recode.holds("q4_1", "int8_g32_asym")
    assert not recode.holds("q4_k", "q4_0")
    assert recode.holds("q4_k", "q4_k")
    assert recode.holds("ternary_g32", "ternary_g32")
    assert not recode.holds("ternary_g32", "int2_g32_sym")  # whose code 3 ternary has no level for


def test_a_refusal_names_what_can_be_held():
    with pytest.raises(Incompatible, match=r"int8_g32_asym without loss.*int4_g32_asym"):
        recode.target_for("int8_g32_asym", GGUF)
