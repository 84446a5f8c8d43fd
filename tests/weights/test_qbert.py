"""Q-BERT: groups, bytes, widths by curvature, fine-tuning while rounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from barefoot.core.errors import CorruptFile, InvalidInput, OverBudget
from barefoot.weights.qbert import QBert, choose_widths, rounding, store

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def weights(shape, seed=0):
    """Rows of different size, as of heads that learned different things."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * rng.lognormal(0, 0.7, (shape[0], 1))).astype(np.float32)


def test_bytes_of_the_paper_s_matrices():
    # BERT-base: 768 x 768 at 2 bits, 128 groups of 6 rows, each with 3 bytes.
    assert QBert().n_bytes((768, 768), 2) == 768 * 768 // 4 + 128 * 3
    # 1000 rows in runs of 8 make 125 groups; 1000 x 3 x 5 bits are 1875 bytes.
    assert QBert().n_bytes((1000, 5), 3) == 1875 + 125 * 3


@pytest.mark.parametrize(("shape", "bits", "n"), [((64, 40), 2, 8), ((13, 7), 3, 5), ((5, 9), 4, 128), ((6, 6), 1, 1)])
def test_what_is_stored_is_what_was_rounded_and_takes_the_stated_bytes(shape, bits, n):
    knobs, w = QBert(n_groups=n), weights(shape)
    stored = store(knobs, w, bits)
    np.testing.assert_array_equal(stored.weights(), knobs.rounded(w, bits))
    assert stored.n_bytes == knobs.n_bytes(shape, bits)
    for group in np.array_split(stored.weights(), range(knobs.block(shape[0])[0], shape[0], knobs.block(shape[0])[0])):
        assert len(np.unique(group)) <= 1 << bits


def test_groups_run_along_the_outputs():
    w = weights((12, 20))
    w[:6] *= 1000
    rounded = QBert(n_groups=2).rounded(w, 8)
    # Large rows are another group: small ones keep a step of their own.
    assert np.abs(rounded[6:] - w[6:]).max() <= (w[6:].max() - w[6:].min()) / 255


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_more_groups_less_error(bits):
    errors = [
        ((QBert(n_groups=n).rounded(weights((96, 64)), bits) - weights((96, 64))) ** 2).sum() for n in (1, 12, 96)
    ]
    assert errors[2] < 0.8 * errors[1] < 0.8 * errors[0]


def test_widths_follow_curvature_and_not_the_size_of_the_weights():
    layers = {name: [weights((32, 32), seed=i)] for i, name in enumerate("abc")}
    layers["c"][0] *= 1.5  # more error to save here, were all layers equal
    knobs = QBert(widths=(2, 4))
    budget = 2 * knobs.n_bytes((32, 32), 2) + knobs.n_bytes((32, 32), 4)
    omega = {"a": 1.0, "b": 9.0, "c": 1.0}
    assert choose_widths(knobs, layers, omega, budget) == {"a": 2, "b": 4, "c": 2}
    assert choose_widths(knobs, layers, dict.fromkeys(omega, 1.0), budget) == {"a": 2, "b": 2, "c": 4}
    with pytest.raises(OverBudget):
        choose_widths(knobs, layers, omega, 100)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))


def task():
    ids = torch.randint(0, 50, (512,), generator=torch.Generator().manual_seed(1))
    return ids, (ids * 7) % 4


def train(net, n_steps, rate):
    ids, labels = task()
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    for _ in range(n_steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(ids), labels).backward()
        optimizer.step()


def loss(net):
    with torch.no_grad():
        return float(nn.functional.cross_entropy(net(task()[0]), task()[1]))


def test_fine_tuning_while_rounded_beats_rounding_what_was_trained():
    knobs = QBert(n_groups=8)
    net = small_net()
    train(net, 150, 1e-2)
    plain = loss(net)
    modules = {net[0]: 8, net[1]: 2, net[3]: 2}
    with rounding(knobs, modules):
        post_training = loss(net)
        train(net, 150, 2e-3)
        tuned = loss(net)
    assert plain < 0.05
    assert post_training > 3 * tuned


def test_the_rounded_model_is_the_model_of_the_stored_bytes():
    knobs, net = QBert(n_groups=8), small_net()
    train(net, 30, 1e-2)
    masters = [net[i].weight.detach().clone() for i in (1, 3)]
    with rounding(knobs, {net[1]: 3, net[3]: 2}):
        seen = [net[i].weight.detach().clone() for i in (1, 3)]
        grads = torch.autograd.grad(net(task()[0]).sum(), net[1].parametrizations.weight.original)[0]
    assert grads.abs().min() > 0  # straight through: every master learns
    for i, bits, master, rounded in zip((1, 3), (3, 2), masters, seen, strict=True):
        torch.testing.assert_close(net[i].weight.detach(), master, rtol=0, atol=0)  # given back
        stored = torch.from_numpy(store(knobs, master.numpy(), bits).weights())
        torch.testing.assert_close(stored, rounded, rtol=0, atol=1e-6 * float(master.abs().max()))
    assert not net[1]._forward_pre_hooks


def test_inputs_of_linear_modules_are_rounded():
    net = nn.Linear(3, 1, bias=False)
    nn.init.ones_(net.weight)
    x = torch.tensor([[0.0, 0.3, 3.0]])
    with rounding(QBert(activation_bits=2), {net: 8}):
        assert float(net(x).detach()) == pytest.approx(3.0, rel=0.02)  # levels 0, 1, 2, 3: the 0.3 is lost


def test_bad_input_is_named():
    with pytest.raises(InvalidInput, match="1 to 8 bits, got 9"):
        QBert(widths=(2, 9))
    with pytest.raises(InvalidInput, match="at least one width"):
        QBert(widths=())
    stored = store(QBert(), weights((4, 4)), 2)
    object.__setattr__(stored, "scales", stored.scales[:2])
    with pytest.raises(CorruptFile, match="4 groups"):
        stored.weights()
