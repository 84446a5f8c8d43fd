"""The differentiable layer against the engine's own pass, for every architecture."""

from __future__ import annotations

import numpy as np
import pytest
from random_layers import CASES, RandomLayer, random_layer

from barefoot.engine.layer_pass import rotations

torch = pytest.importorskip("torch", reason="the layer is PyTorch's")

from barefoot.weights.training.layer import LayerFunction  # noqa: E402


def function(case: RandomLayer, **settings) -> LayerFunction:
    cos, sin = map(torch.from_numpy, rotations(case.spec, case.layer, len(case.x)))
    return LayerFunction(case.spec, case.layer, cos, sin, **settings)


def tensors(case: RandomLayer) -> dict[str, torch.Tensor]:
    return {role: torch.from_numpy(np.ascontiguousarray(w)) for role, w in case.weights.items()}


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_it_is_the_engines_pass(name, layer):
    case = random_layer(name, layer, n_tokens=40)
    expected = case.output()
    x = torch.from_numpy(np.stack([case.x, case.x[::-1]]))
    out = function(case)(tensors(case), x)
    # Float32 sums in other orders: what the least change of all weights at random does, a few times over.
    rng = np.random.default_rng(0)
    noisy = {r: w * (1 + 2.0**-22 * rng.choice([-1, 1], w.shape)).astype(np.float32) for r, w in case.weights.items()}
    noise = np.abs(case.output(noisy) - expected).max()
    assert np.abs(out[0].numpy() - expected).max() <= 8 * noise < 1e-3
    assert not np.allclose(out[1].numpy(), expected, atol=0.1)


def test_a_window_and_a_soft_cap_are_seen():
    """The instrument: tokens are enough that the window and the cap of these layers matter."""
    from dataclasses import replace

    case = random_layer("gemma3", 0, n_tokens=40)
    x = torch.from_numpy(case.x[None])
    plain = function(case)(tensors(case), x)
    everywhere = replace(case, layer=5)
    assert (function(everywhere)(tensors(case), x) - plain).abs().max() > 0.01
    capped = replace(case, spec=replace(case.spec, attn_softcap=2.0))
    out = function(capped)(tensors(case), x)
    assert (out - plain).abs().max() > 0.01
    assert np.abs(out[0].numpy() - capped.output()).max() < 1e-4


def test_bfloat16_products_stay_within_their_rounding():
    case = random_layer("llama")
    x = torch.from_numpy(case.x[None])
    exact = function(case)(tensors(case), x)
    rounded = function(case, compute=torch.bfloat16)(tensors(case), x)
    relative = ((rounded - exact).norm() / (exact - x).norm()).item()
    assert 2.0**-12 < relative < 2.0**-6  # seven products, each of operands rounded to 2^-9
