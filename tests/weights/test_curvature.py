"""Power iteration against dense Hessians."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from barefoot.core.errors import InvalidInput
from barefoot.weights.curvature import hessian_product, sensitivity, top_eigenvalue

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.parametrize("sign", [1, -1])
def test_the_eigenvalue_of_largest_magnitude_with_its_sign(sign):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    matrix = sign * (basis * np.linspace(-3, 5, 40)) @ basis.T
    found = top_eigenvalue(lambda v: matrix @ v, rng.standard_normal(40), tolerance=1e-7, n_iterations=400)
    assert found == pytest.approx(5 * sign, rel=1e-3)


def test_a_flat_loss_has_no_curvature():
    assert top_eigenvalue(lambda v: 0 * v, np.ones(3)) == 0


def test_a_layer_of_a_network_against_its_dense_hessian():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 3))
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))

    def loss(weight):
        hidden = nn.functional.linear(net[:2](x), weight, net[2].bias)
        return nn.functional.cross_entropy(net[3:](hidden), y)

    weight = net[2].weight
    dense = torch.autograd.functional.hessian(loss, weight.detach()).reshape(240, 240)
    values = torch.linalg.eigvalsh(dense)
    expected = float(values[values.abs().argmax()])
    product = hessian_product(loss(weight), [weight])
    v = torch.randn(240)
    torch.testing.assert_close(product(v), dense @ v, rtol=1e-4, atol=1e-6)
    assert top_eigenvalue(product, torch.randn(240)) == pytest.approx(expected, rel=0.01)


def test_several_tensors_are_one_block():
    a, b = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    loss = (a.sum() * b.sum()) ** 2 / 2
    dense = torch.autograd.functional.hessian(
        lambda w: (w[:3].sum() * w[3:].sum()) ** 2 / 2, torch.cat([a, b]).detach()
    )
    product = hessian_product(loss, [a, b])
    torch.testing.assert_close(torch.stack([product(row) for row in torch.eye(5)]), dense, rtol=1e-5, atol=1e-5)


def test_what_can_not_be_differentiated_twice_is_refused():
    w = torch.randn(3, requires_grad=True)
    with pytest.raises(InvalidInput, match="differentiated again"):
        hessian_product(w.sum(), [w])
    with pytest.raises(InvalidInput, match="differentiated again"):
        hessian_product((w**2).sum(), [w, torch.randn(2, requires_grad=True)])


def test_sensitivity_counts_the_spread():
    # The mean alone would rank the first above the second.
    assert sensitivity([2.0, 2.0, 2.0]) == 2
    assert sensitivity([-3.0, 5.0]) == pytest.approx(1 + 4)
    with pytest.raises(InvalidInput, match="spread of 1 eigenvalue"):
        sensitivity([1.0])
