"""NF4 with scales that are quantized a second time: QLoRA's numbers, its bytes, and products over what was rounded."""

from __future__ import annotations

import math

import numpy as np
import pytest
from random_files import LLAMA

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.engine.specs import spec_from_config
from barefoot.ops import blocks
from barefoot.weights import double_quantization as double
from barefoot.weights.formats.nf4 import NormalFloat

# As printed in QLoRA's appendix E.
TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def plain(weights: np.ndarray, group: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the nearest levels, and float32 scales: the format before its scales are quantized."""
    flat = weights.reshape(-1)
    padded = np.pad(flat, (0, -len(flat) % group)).reshape(-1, group)
    scales = np.abs(padded).max(axis=1)
    distances = np.abs(padded[..., None] / np.maximum(scales, 1e-30)[:, None, None] - np.array(TABLE))
    return distances.argmin(axis=-1), scales


def once(weights: np.ndarray) -> np.ndarray:
    indices, scales = plain(weights)
    return (np.array(TABLE, np.float32)[indices] * scales[:, None]).reshape(-1)[: weights.size]


def both_ways(weights: np.ndarray, group: int = 64) -> np.ndarray:
    stored = double.encode([weights], weights.size, group)
    return double.decode(stored, weights.size, group, 0, weights.size).reshape(weights.shape)


def relative(error: np.ndarray, weights: np.ndarray) -> float:
    return float(np.sqrt((error**2).mean() / (weights**2).mean()))


@pytest.fixture(scope="module")
def normal() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1000, 1000), np.float32)


def test_levels_are_the_papers():
    assert np.abs(double.levels() - TABLE).max() < 1e-6


def test_steps_are_floats_of_a_movable_fraction():
    """In each decade below 1 twice as many as in the one below, at equal distances; both signs, zero, and one."""
    steps = double.steps().astype(np.float64)
    assert len(steps) == 256
    assert (np.diff(steps) > 0).all()
    assert np.allclose(steps[:127], -steps[128:255][::-1])
    assert steps[127] == 0
    assert steps[255] == 1
    for e in range(7):
        decade = steps[(steps > 10.0 ** (e - 7)) & (steps < 10.0 ** (e - 6))]
        assert len(decade) == 2**e
        assert np.allclose(np.diff(decade), 0.9 * 10.0 ** (e - 6) / 2**e, rtol=1e-3)
        assert decade.mean() == pytest.approx(0.55 * 10.0 ** (e - 6), rel=1e-6)


def test_errors_on_normal_weights_are_the_formats_own(normal):
    """Below those of FP4, which are 0.106 with its subnormal numbers (0.122 with bitsandbytes' table without them)."""
    found = relative(both_ways(normal) - normal, normal)
    assert found == pytest.approx(0.092, rel=0.02)
    fp4 = blocks.decode("e2m1_g64", blocks.encode("e2m1_g64", normal[:, :960]), 960)
    assert relative(fp4 - normal[:, :960], normal[:, :960]) > 1.1 * found
    single = relative(once(normal[:200]) - normal[:200].reshape(-1), normal[:200])
    assert relative(both_ways(normal[:200]) - normal[:200], normal[:200]) == pytest.approx(single, rel=0.01)


def test_scales_keep_more_than_those_of_signed_bytes_without_the_mean(normal):
    some = normal[:500, :960]
    _, scales = plain(some)
    stored = double.encode([some], some.size, 64)
    ones = double.decode(stored, some.size, 64, 0, some.size).reshape(-1, 64)
    found = np.abs(ones).max(axis=1)  # the largest of each block has the level 1 or −1
    rest = np.pad(scales, (0, -len(scales) % 256)).reshape(-1, 256)
    unit = rest.max(axis=1, keepdims=True) / 127
    imitation = (np.round(rest / unit) * unit).reshape(-1)[: len(scales)]
    assert np.sqrt(((found - scales) ** 2).mean()) < 0.6 * np.sqrt(((imitation - scales) ** 2).mean())


@pytest.mark.parametrize(("rows", "cols"), [(8, 64), (33, 50), (7, 35), (1, 1), (300, 63)])
def test_codes_are_the_nearest_and_rows_are_decoded_alone(rows, cols):
    """Also where blocks span rows, and a byte belongs to two."""
    weights = np.random.default_rng(rows).standard_normal((rows, cols), np.float32)
    stored = double.encode([weights[:3], weights[3:4], weights[4:]], weights.size, 64)
    assert np.array_equal(stored, double.encode([weights], weights.size, 64))
    indices, scales = plain(weights)
    codes = stored[-math.ceil(weights.size / 2) :]
    assert np.array_equal(codes >> 4, indices.reshape(-1)[: weights.size : 2])
    assert np.array_equal(codes[: weights.size // 2] & 15, indices.reshape(-1)[1 : weights.size : 2])
    whole = double.decode(stored, weights.size, 64, 0, weights.size)
    near = np.array(TABLE)[indices] * scales[:, None]
    # A scale is off by half a step at most: 0.45 / 64 of the largest distance from the mean.
    bound = 0.0075 * np.abs(scales - scales.mean()).max() + 1e-6
    assert np.abs(whole - near.reshape(-1)[: weights.size]).max() <= bound
    for first in range(rows):
        for stop in {first, first + 1, rows}:
            part = double.decode(stored, weights.size, 64, first * cols, stop * cols)
            assert np.array_equal(part, whole[first * cols : stop * cols])


def test_zeros_stay_and_what_is_no_number_is_refused():
    weights = np.zeros((4, 64), np.float32)
    weights[2] = 3.0
    assert np.array_equal(both_ways(weights)[[0, 1, 3]], weights[[0, 1, 3]])
    assert both_ways(weights)[2] == pytest.approx(3.0, rel=0.01)
    with pytest.raises(InvalidInput, match="NaN"):
        both_ways(np.full((1, 64), np.nan, np.float32))
    with pytest.raises(InvalidInput, match="expected 65"):
        double.encode([weights], 65, 64)


def test_smollm2s_matrices_take_what_the_formula_says():
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    spec = spec_from_config(LLAMA | sizes | {"num_hidden_layers": 30, "vocab_size": 49152}, "smol")
    matrices = [w for w in spec.weights if w.group in ("attn", "ffn")]
    fmt = NormalFloat(double=True)
    found = sum(term.bytes for w in matrices for term in fmt.terms(w.name, w.rows, w.cols, w.format))
    blocks_of = {w.name: -(-w.n_elements // 64) for w in matrices}
    assert found == 54_770_040
    assert found == sum(w.n_elements // 2 + blocks_of[w.name] + 4 * -(-blocks_of[w.name] // 256) + 4 for w in matrices)


def test_only_the_frozen_base_holds_it():
    with pytest.raises(Incompatible, match="only the frozen base") as refusal:
        NormalFloat(double=True).layout("f32")
    assert "attn=nf4(double=true)" in str(refusal.value.cure)


class TestLinear:
    torch = pytest.importorskip("torch", reason="the modules are PyTorch's")

    def packed(self, rows: int, cols: int):
        layer = NormalFloat(double=True).linear(rows, cols, "f32")
        weight = np.random.default_rng(rows).standard_normal((rows, cols), np.float32)
        layer.pack(self.torch.from_numpy(weight))
        return layer, self.torch.from_numpy(both_ways(weight))

    @pytest.mark.parametrize("tile_rows", [1, 5, 1000])
    def test_products_and_gradients_are_those_of_the_decoded_matrix(self, tile_rows, monkeypatch):
        from barefoot.weights import module

        monkeypatch.setattr(module, "TILE_BYTES", 4 * 50 * tile_rows)
        layer, weight = self.packed(33, 50)
        x, grad = self.torch.randn(2, 7, 50, requires_grad=True), self.torch.randn(2, 7, 33)
        y = layer(x)
        y.backward(grad)
        for found, expected in ((y, x @ weight.T), (x.grad, grad @ weight)):
            assert ((found - expected).norm() / expected.norm()).item() < 1e-5

    @pytest.mark.parametrize(("rows", "cols"), [(33, 192), (7, 35), (257, 128)])
    def test_bytes_are_the_storages(self, rows, cols):
        layer, _ = self.packed(rows, cols)
        n_blocks = math.ceil(rows * cols / 64)
        expected = math.ceil(rows * cols / 2) + n_blocks + 4 * math.ceil(n_blocks / 256) + 4
        assert sum(b.untyped_storage().nbytes() for b in layer.buffers()) == layer.n_bytes == expected
        again = NormalFloat(double=True).linear(rows, cols, "f32")
        again.load_state_dict(layer.state_dict())
        assert self.torch.equal(again.dense(), layer.dense())
