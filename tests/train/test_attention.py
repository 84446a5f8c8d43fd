"""Attention in training against PyTorch's own, and its bytes against what is allocated."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from barefoot import ops  # noqa: E402
from barefoot.core.measure import storage_bytes  # noqa: E402
from barefoot.train.attention import AttentionShape  # noqa: E402
from barefoot.train.driver import attention as driver  # noqa: E402
from barefoot.train.driver.attention import attend, computed_by  # noqa: E402

SHAPES = (((40, 1, 130), 9, 3, 64), ((257,), 4, 1, 80), ((30, 0, 70), 2, 2, 34))
CUTS = ((0, 0.0), (33, 0.0), (0, 5.0), (50, 50.0))
needs_kernels = pytest.mark.skipif(ops.isa() == "numpy", reason="no compiled kernels here")


def inputs(lengths, n_heads, n_kv_heads, head_dim, dtype=torch.float32):
    """q, k, v, which want gradients, and the gradient of what they give."""
    torch.manual_seed(head_dim)
    n = sum(lengths)
    given = [torch.randn(n, h, head_dim, dtype=dtype).requires_grad_() for h in (n_heads, n_kv_heads, n_kv_heads)]
    return given, torch.randn(n, n_heads, head_dim, dtype=dtype)


def outcome(given, d_out, lengths, **options):
    out = attend(*given, lengths, scale=d_out.shape[2] ** -0.5, **options)
    return out.detach(), *torch.autograd.grad(out, given, d_out)


@needs_kernels
@pytest.mark.parametrize(("window", "softcap"), CUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_are_those_of_float64(shape, window, softcap):
    """Those of PyTorch's operations, document by document. A sum of n numbers rounds n times."""
    given, d_out = inputs(*shape)
    exact = [x.detach().double().requires_grad_() for x in given]
    assert computed_by(given[0]) == "native"
    assert computed_by(exact[0]) == "torch"
    lengths, n_heads, n_kv_heads, _ = shape
    rounding = max(lengths) * (n_heads // n_kv_heads) * 2.0**-24
    options = {"window": window, "softcap": softcap}
    right = outcome(exact, d_out.double(), lengths, **options)
    for got, expected in zip(outcome(given, d_out, lengths, **options), right, strict=True):
        assert got.dtype == torch.float32
        assert (got - expected).abs().max() < rounding * expected.abs().max()


@pytest.mark.parametrize(("window", "softcap"), CUTS)
def test_without_kernels_the_function_is_the_reference_and_differentiable(window, softcap):
    lengths = (11, 13)
    given, d_out = inputs(lengths, 4, 2, 6, torch.float64)
    options = {"scale": 0.4, "window": window and 5, "softcap": softcap and 2.0}
    assert torch.autograd.gradcheck(lambda *x: attend(*x, lengths, **options), given)
    found = attend(*given, lengths, **options)
    arrays = [x.detach().numpy() for x in given]
    out, lse = np.empty_like(arrays[0]), np.empty((4, 24))
    from barefoot.ops import reference

    reference.flash_forward(*arrays, np.array(lengths), out, lse, **options)
    assert np.allclose(found.detach().numpy(), out, atol=1e-12)
    gradients = [np.empty_like(x) for x in arrays]
    reference.flash_backward(d_out.numpy(), *arrays, out, lse, np.array(lengths), *gradients, **options)
    for got, right in zip(torch.autograd.grad(found, given, d_out), gradients, strict=True):
        assert np.allclose(got.numpy(), right, atol=1e-12)


class Peak(TorchDispatchMode):
    """The most bytes of storages alive at once; those of ``given`` tensors are not counted."""

    def __init__(self, given):
        super().__init__()
        self.given, self.alive, self.peak = {x.untyped_storage().data_ptr() for x in given}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, result)):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.alive[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        self.alive = {ref: n_bytes for ref, n_bytes in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def saved_bytes(function):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        function()
    return storage_bytes(kept)


def n_bytes(terms):
    return sum(term.bytes for term in terms)


@needs_kernels
@pytest.mark.parametrize("shape", [*SHAPES, ((1500,), 3, 1, 16)], ids=str)
def test_bytes_are_those_of_the_storages(shape):
    given, d_out = inputs(*shape)
    lengths, n_heads, n_kv_heads, head_dim = shape
    stated = AttentionShape(n_heads, n_kv_heads, head_dim, lengths)
    n, heads = sum(lengths), n_heads + n_kv_heads
    assert n_bytes(stated.saved_terms()) == 8 * heads * head_dim * n + 4 * n_heads * n
    assert saved_bytes(lambda: attend(*given, lengths, scale=0.1)) == n_bytes(stated.saved_terms())
    with Peak(given) as forward:
        out = attend(*given, lengths, scale=0.1)
    assert forward.peak == n_bytes(stated.forward_terms())
    with Peak([*given, d_out, out, *out.grad_fn.saved_tensors]) as backward:
        gradients = torch.autograd.grad(out, given, d_out)
    assert backward.peak == n_bytes(stated.backward_terms())
    assert storage_bytes(gradients) == n_bytes(stated.backward_terms()[:3])


@needs_kernels
def test_attention_that_autograd_writes_out_keeps_far_more(monkeypatch):
    """The cheap way to be differentiable, whose probabilities are kept, whether by rows or by tiles."""
    shape = (1024,), 3, 1, 16
    given, _ = inputs(*shape)
    stated = n_bytes(AttentionShape(3, 1, 16, (1024,)).saved_terms())
    assert saved_bytes(lambda: attend(*given, (1024,), scale=0.1, window=400)) == stated
    monkeypatch.setattr(driver, "computed_by", lambda q: "torch")
    assert saved_bytes(lambda: attend(*given, (1024,), scale=0.1, window=400)) > 4 * 3 * 1024**2 > 10 * stated


@needs_kernels
def test_eight_thousand_tokens_take_a_twentieth_of_their_scores():
    given, d_out = inputs((8192,), 1, 1, 32)
    with Peak([*given, d_out]) as whole:
        out = attend(*given, (8192,), scale=0.2)
        gradients = torch.autograd.grad(out, given, d_out)
    assert whole.peak - storage_bytes([out, *gradients]) < 0.05 * 4 * 8192**2


@needs_kernels
def test_views_and_gradients_that_nobody_wants():
    lengths = (50, 20)
    (q, k, v), d_out = inputs(lengths, 4, 2, 32)
    right = outcome((q, k, v), d_out, lengths)
    across = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (q, k, v)]
    turned = d_out.transpose(0, 1).contiguous().transpose(0, 1)
    assert not across[0].is_contiguous()
    for got, expected in zip(outcome(across, turned, lengths), right, strict=True):
        assert torch.equal(got, expected)
    (only,) = torch.autograd.grad(attend(q, k.detach(), v.detach(), lengths, scale=32**-0.5), q, d_out)
    assert torch.equal(only, right[1])


def test_lengths_must_be_those_of_the_stream():
    (q, k, v), _ = inputs((5,), 2, 1, 8)
    for lengths in ((4,), (3, 3), (6, -1), ()):
        with pytest.raises(ValueError, match="lengths must be 5 in all"):
            attend(q, k, v, lengths, scale=1.0)
