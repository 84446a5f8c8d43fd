"""Norms, turns and gates against PyTorch's own operations, in float64 where a difference must be rounding's."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="training is PyTorch's")

import torch.nn.functional as F  # noqa: E402

from barefoot.train.driver.elementwise import gated, rms_norm, turned  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def agrees(ours, theirs, *inputs) -> None:
    """Outputs and gradients: theirs in float64, ours in float32."""
    exact = [x.double().requires_grad_() for x in inputs]
    given = [x.clone().requires_grad_() for x in inputs]
    expected, found = theirs(*exact), ours(*given)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    expected.backward(slope.double())
    found.backward(slope)
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(given, exact, strict=True))]
    for mine, right in pairs:
        assert (mine.double() - right).norm() <= 1e-6 * right.norm()


@pytest.mark.parametrize("shape", [(1, 7, 33), (1, 5, 3, 16)])
def test_norms_are_pytorchs(shape):
    draw = torch.Generator().manual_seed(1)
    x, factors = torch.randn(shape, generator=draw), torch.randn(shape[-1], generator=draw)
    agrees(
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-5),
        x, factors,
    )  # fmt: skip


def test_a_norm_keeps_its_input_and_a_number_a_row():
    x, kept = torch.randn(1, 50, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, torch.ones(64), 1e-5)
    assert sorted(t.numel() for t in kept) == [50, 64, 50 * 64]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("still", [0, 6])
def test_pairs_are_turned_as_complex_numbers(interleaved, still):
    draw = torch.Generator().manual_seed(2)
    x, angles = torch.randn(1, 5, 3, 8 + still, generator=draw), torch.randn(9, 4, generator=draw)

    def complex_product(x):
        some, rest = x[..., :8], x[..., 8:]
        pairs = some.unflatten(-1, (4, 2)) if interleaved else some.unflatten(-1, (2, 4)).transpose(-1, -2)
        turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(5, 1, 4), angles[:5, None]).to(
            torch.complex128
        )
        parts = torch.view_as_real(turned)
        return torch.cat([(parts if interleaved else parts.transpose(-1, -2)).flatten(-2), rest], -1)

    agrees(lambda x: turned(x, angles.cos(), angles.sin(), interleaved), complex_product, x)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_are_pytorchs(activation):
    draw = torch.Generator().manual_seed(3)
    gate, up = (3 * torch.randn(1, 7, 19, generator=draw) for _ in range(2))
    act = F.silu if activation == "silu" else lambda x: F.gelu(x, approximate="tanh")
    agrees(lambda g, u: gated(g, u, activation), lambda g, u: act(g) * u, gate, up)
