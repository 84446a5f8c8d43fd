"""Learned steps: gradients against the paper's, stored bytes against what is multiplied, and that they learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from barefoot.core.errors import InvalidInput
from barefoot.weights.training.lsq import Bits, Steps, rounding, stored

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))


def images(n=384):
    """Squares whose brightest quadrant, of three, is the label."""
    rng = np.random.default_rng(1)
    x, labels = rng.standard_normal((n, 1, 6, 6)), rng.integers(0, 3, n)
    for i, label in enumerate(labels):
        x[i, 0, 3 * (label // 2) :, 3 * (label % 2) : 3 + 3 * (label % 2)] += 0.7
    return torch.from_numpy(x).float(), torch.from_numpy(labels)


def train(net, n_steps, rate, frozen=()):
    x, labels = images()
    optimizer = torch.optim.Adam([p for p in net.parameters() if not any(p is f for f in frozen)], rate)
    for _ in range(n_steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()


def loss(net):
    with torch.no_grad():
        return float(nn.functional.cross_entropy(net(images()[0]), images()[1]))


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (3, True), (4, False), (1, False)])
def test_gradients_are_the_paper_s(bits, signed):
    rng = np.random.default_rng(bits)
    x = torch.tensor(rng.standard_normal((3, 40)), dtype=torch.float32, requires_grad=True)
    steps = Steps(bits, signed, torch.tensor([[0.5], [0.25], [1.0]]))
    g = torch.tensor(rng.standard_normal((3, 40)), dtype=torch.float32)
    (steps(x) * g).sum().backward()

    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    u = x.detach().numpy().astype(np.float64) / np.array([[0.5], [0.25], [1.0]])
    inside = (u >= least - 0.5) & (u <= most + 0.5)
    level = np.clip(np.round(u), least, most)
    np.testing.assert_allclose(steps(x).detach(), level * np.array([[0.5], [0.25], [1.0]]))
    np.testing.assert_array_equal(x.grad, np.where(inside, g, 0))
    of_steps = (g.numpy() * np.where(inside, level - u, level)).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(steps.growth.grad, of_steps * np.array([[0.5], [0.25], [1.0]]), rtol=1e-4, atol=1e-5)


def test_learned_steps_beat_rounding_afterwards_and_frozen_steps():
    results = {}
    for name in ("learned", "frozen"):
        net = small_net()
        train(net, 200, 1e-2)
        plain = loss(net)
        with rounding({net[0]: Bits(2, 2), net[3]: Bits(2, 2)}, lambda net=net: net(images()[0])):
            rounded = loss(net)
            frozen = [p for n, p in net.named_parameters() if n.endswith("growth")] if name == "frozen" else []
            assert len(frozen) == (4 if name == "frozen" else 0)
            train(net, 200, 3e-3, frozen)
            results[name] = loss(net)
    assert rounded > plain + 0.2
    assert results["learned"] < 0.5 * rounded
    assert results["learned"] < results["frozen"]


def test_what_is_stored_is_what_is_multiplied_and_masters_come_back():
    net = small_net()
    train(net, 20, 1e-2)
    modules = {net[0]: Bits(3, None), net[3]: Bits(2, 4)}
    with rounding(modules, lambda: net(images()[0])):
        train(net, 20, 1e-3)
        masters = {m: m.parametrizations.weight.original.detach().clone() for m in modules}
        for module, bits in modules.items():
            encoded = stored(module)
            rows = module.weight.detach().reshape(len(module.weight), -1)
            np.testing.assert_array_equal(encoded.decode(), rows)
            assert encoded.n_bytes == -(-rows.numel() * bits.weight // 8) + 2 * len(rows)
        inputs = []
        net[3].register_forward_hook(lambda _, seen, __: inputs.append(seen[0].detach()))
        net(images()[0])
        assert len(inputs[0].unique()) == 16  # behind a ReLU: no level is wasted below 0
        assert not hasattr(net[0], "input_steps")
    for module, master in masters.items():
        torch.testing.assert_close(module.weight.detach(), master, rtol=0, atol=0)
        assert not hasattr(module, "input_steps")
        assert not module._forward_pre_hooks


def test_all_calls_of_a_calibration_count_and_other_arguments_pass():
    bilinear = nn.Bilinear(4, 4, 3)
    quiet, loud = torch.full((2, 4), 0.1), torch.tensor([[-3.0, 0.0, 1.0, 3.0]] * 2)

    def calibrate():
        bilinear(quiet, quiet)
        bilinear(loud, quiet)

    with rounding({bilinear: Bits(8, 4)}, calibrate):
        assert bilinear(loud, loud).shape == (2, 3)
        steps = bilinear.input_steps
        assert steps.levels.values[0] == -8  # negatives came in the second call only
        assert float(steps(loud).detach().min()) == pytest.approx(-3, rel=0.1)


def test_other_types_are_rounded_in_float32():
    net, x = nn.Linear(16, 4).bfloat16(), torch.randn(5, 16).bfloat16()
    with rounding({net: Bits(4, 8)}, lambda: net(x)):
        y = net(x)
        assert y.dtype == torch.bfloat16
        np.testing.assert_allclose(stored(net).decode(), net.weight.detach().float(), rtol=2**-8)


def test_bad_input_is_named():
    net = small_net()
    for bits in (Bits(1), Bits(9), Bits(4, 9)):
        with pytest.raises(InvalidInput, match="bits"), rounding({net[3]: bits}, lambda: net(images()[0])):
            pass
    with pytest.raises(InvalidInput, match="no input of Linear"), rounding({net[3]: Bits(4)}, lambda: None):
        pass
    with (
        pytest.raises(InvalidInput, match="no level below 0"),
        rounding({net[0]: Bits(4, 1)}, lambda: net(images()[0])),
    ):
        pass
    assert not net[0]._forward_pre_hooks
    assert not net[3]._forward_pre_hooks
