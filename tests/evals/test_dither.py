import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from barefoot.evals.dither import dither, steps
from barefoot.ops import blocks

QUANTIZED = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]


@pytest.mark.parametrize("name", QUANTIZED)
def test_step_is_the_blocks_own_scale(name):
    weights = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    rows = quants.quantize(weights, GGMLQuantizationType[name.upper()])
    scale = np.abs(rows.reshape(6, 2, -1)[..., :2].copy().view(np.float16).astype(np.float32))
    assert steps(name, rows, 64).reshape(6, 2, 32) == pytest.approx(np.broadcast_to(scale, (6, 2, 32)), rel=1e-3)


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_step_of_super_blocks_divides_every_difference(name):
    """Within a group of 16 weights all differences are whole multiples of the step."""
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 256, (4, blocks.row_bytes(name, 256)), np.uint8)
    for at in {"q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}[name]:
        rows[:, at : at + 2] = np.full(1, 0.01, np.float16).view(np.uint8)
    step = steps(name, rows, 256).reshape(-1, 16)
    assert np.ptp(step, axis=1).max() < 1e-5
    weights = blocks.decode(name, rows, 256).reshape(-1, 16)
    moving = step[:, 0] > 0
    multiples = (weights - weights[:, :1])[moving] / step[moving]
    assert np.abs(multiples - np.rint(multiples)).max() < 0.02
    assert np.abs(multiples).max() > 1


def test_noise_is_uniform_within_half_a_step_and_repeats_with_its_seed():
    weights = np.random.default_rng(2).normal(size=(64, 256)).astype(np.float32)
    rows = quants.quantize(weights, GGMLQuantizationType.Q4_1)
    moved = dither("q4_1", rows, 256, np.random.default_rng(5))
    ratio = (moved - blocks.decode("q4_1", rows, 256)) / steps("q4_1", rows, 256)
    assert np.abs(ratio).max() <= 0.5001
    assert np.std(ratio) == pytest.approx(1 / np.sqrt(12), rel=0.02)
    assert (moved == dither("q4_1", rows, 256, np.random.default_rng(5))).all()


def test_floats_are_not_dithered():
    weights = np.random.default_rng(3).normal(size=(2, 32)).astype(np.float32)
    assert (dither("f32", weights.view(np.uint8), 32, np.random.default_rng(0)) == weights).all()
