"""A loss that imitates: against PyTorch's own divergence in float64, in bytes, and where sums might overflow."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch", reason="losses compute in PyTorch")

import torch.nn.functional as F  # noqa: E402
from allocations import Allocations  # noqa: E402

from barefoot.core.errors import Incompatible, InvalidInput  # noqa: E402
from barefoot.train import NOTHING  # noqa: E402
from barefoot.train.driver.cross_entropy import cross_entropy  # noqa: E402
from barefoot.train.driver.imitation import Taught  # noqa: E402
from barefoot.train.driver.logit_tiles import DenseHead  # noqa: E402
from barefoot.train.losses import LossShape, total  # noqa: E402
from barefoot.train.losses.cce import CutCrossEntropy  # noqa: E402
from barefoot.train.losses.lrec import LREC  # noqa: E402
from barefoot.train.losses.plain import Plain  # noqa: E402
from barefoot.weights.module import PackedEmbedding  # noqa: E402

N, D, V, THEIRS = 37, 24, 131, 40
SMALL = {"tile_tokens": 16, "tile_vocab": 32}  # blocks of 16, 16 and 5 tokens, a last stretch of 3 words
LOSSES = [LREC(**SMALL), LREC(ce=0.0, **SMALL), LREC(ce=2.5)]


@pytest.fixture(autouse=True)
def _seed(one_torch_thread):
    torch.manual_seed(5)


def problem(dtype=torch.float32, left_out=True, softcap=0.0):
    """Hidden states that learn, a frozen head, labels, and a teacher of another width."""
    hidden, head = torch.randn(N, D, dtype=dtype).requires_grad_(), torch.randn(V, D, dtype=dtype)
    labels = torch.randint(0, V, (N,))
    labels[0], labels[1] = V - 1, 0  # the corners of the tiles
    if left_out:
        labels[2::3] = NOTHING
    taught = Taught(torch.randn(N, THEIRS, dtype=dtype), DenseHead(torch.randn(V, THEIRS, dtype=dtype) / 2), softcap)
    return hidden, head, labels, taught


def logits64(hidden, head, softcap):
    logits = hidden.double() @ head.double().T
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def exact(loss, hidden, head, labels, taught, softcap=0.0):
    """Losses of the tokens that predict, in float64, by PyTorch's own functions, and the leaf."""
    leaf = hidden.detach().double().requires_grad_()
    own, theirs = logits64(leaf, head, softcap), logits64(taught.hidden, taught.head.dense(), taught.softcap)
    apart = F.kl_div(own.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="none").sum(1)
    has = labels != NOTHING
    return (apart[has] + loss.ce * F.cross_entropy(own[has], labels[has], reduction="none")), leaf


def apart(ours, other):
    """Relative distance in the Frobenius norm."""
    return float((ours.detach().double() - other.detach()).norm() / other.detach().norm())


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize(("softcap", "left_out"), list(itertools.product((0.0, 3.0), (False, True))))
def test_loss_and_gradient_are_those_of_float64(loss, softcap, left_out):
    hidden, head, labels, taught = problem(left_out=left_out, softcap=softcap)
    weights = torch.rand(N)
    each = cross_entropy(loss, hidden, head, labels, softcap=softcap, taught=taught, reduction="none")
    each.backward(weights)
    expected, leaf = exact(loss, hidden, head, labels, taught, softcap)
    has = labels != NOTHING
    expected.backward(weights[has].double())
    assert apart(each[has], expected) < 2e-6
    assert apart(hidden.grad, leaf.grad) < 2e-6
    assert not each[~has].any()
    assert not hidden.grad[~has].any()
    mean = cross_entropy(loss, hidden.detach(), head, labels, softcap=softcap, taught=taught)
    assert float(mean) == pytest.approx(float(expected.detach().mean()), rel=2e-6)


def test_in_float64_nothing_is_lost():
    hidden, head, labels, taught = problem(torch.float64)
    loss = LREC(**SMALL)
    cross_entropy(loss, hidden, head, labels, taught=taught, reduction="sum").backward()
    expected, leaf = exact(loss, hidden, head, labels, taught)
    expected.sum().backward()
    assert apart(hidden.grad, leaf.grad) < 1e-13


def test_the_teacher_is_what_is_weighed_by():
    """Of two words, p = (0.9, 0.1) and q = (0.5, 0.5): Σ p log p/q = 0.3681, and the other way round 0.5108."""
    probabilities = torch.tensor([[0.9, 0.1]])
    taught = Taught(probabilities.log(), DenseHead(torch.eye(2)))
    found = cross_entropy(LREC(ce=0), torch.zeros(1, 2), torch.eye(2), torch.tensor([0]), taught=taught)
    assert float(found) == pytest.approx(0.36806, abs=1e-5)


def test_a_model_that_is_its_teacher_has_nothing_to_learn():
    """Though labels would have it learn: cross-entropy alone pulls, imitation doesn't."""
    hidden, head, labels, _ = problem()
    taught = Taught(hidden.detach().clone(), DenseHead(head))
    found = cross_entropy(LREC(ce=0, **SMALL), hidden, head, labels, taught=taught)
    found.backward()
    imitating = hidden.grad.clone()
    hidden.grad = None
    cross_entropy(CutCrossEntropy(), hidden, head, labels).backward()
    assert abs(float(found.detach())) < 2e-6
    assert float(imitating.norm()) < 1e-6 * float(hidden.grad.norm())


def test_large_logits_neither_overflow_nor_vanish():
    """exp(200) is no float32, and neither is exp(-200), of either model."""
    hidden, labels = torch.eye(4, 8).mul(200).requires_grad_(), torch.tensor([0, 50, 100, 3])
    head, theirs = torch.zeros(V, 8), torch.zeros(V, 8)
    head[0, 0], head[50, 1], head[100, 2], head[5, 3] = 1, 1, -1, 1
    theirs[0, 0], theirs[7, 1], theirs[100, 2], theirs[130, 3] = 1, 1, 1, -1
    taught, loss = Taught(hidden.detach().clone(), DenseHead(theirs)), LREC(**SMALL)
    each = cross_entropy(loss, hidden, head, labels, taught=taught, reduction="none")
    each.sum().backward()
    expected, leaf = exact(loss, hidden, head, labels, taught)
    expected.sum().backward()
    assert float(expected.detach()[1]) > 199  # the teacher is certain of what the model holds impossible
    assert torch.allclose(each.detach().double(), expected.detach(), rtol=2e-6, atol=1e-4)
    assert apart(hidden.grad, leaf.grad) < 2e-6


def test_nan_stays_in_its_row():
    hidden, head, labels, taught = problem(left_out=False)
    taught.hidden[4, 3] = torch.nan
    each = cross_entropy(LREC(**SMALL), hidden, head, labels, taught=taught, reduction="none")
    each.sum().backward()
    assert each.isnan().nonzero().flatten().tolist() == [4]
    assert hidden.grad.isnan().any(1).nonzero().flatten().tolist() == [4]


def test_what_does_not_go_together_is_refused():
    hidden, head, labels, taught = problem()
    narrow = Taught(taught.hidden[:, 1:], taught.head)
    few = Taught(taught.hidden, DenseHead(taught.head.dense()[1:]))
    for loss, other, match in (
        (LREC(), None, "takes a teacher's hidden states"),
        (Plain(), taught, "plain takes no teacher's"),
        (LREC(), narrow, r"must be \(37, 40\), got \(37, 39\)"),
        (LREC(), few, "the teacher has 130 words, the model 131"),
    ):
        with pytest.raises(InvalidInput, match=match):
            cross_entropy(loss, hidden, head, labels, taught=other)
    for changed in ({"head": head.clone().requires_grad_()}, {"bias": torch.zeros(V)}, {"hidden": hidden.bfloat16()}):
        with pytest.raises(Incompatible):
            cross_entropy(LREC(), **({"hidden": hidden, "head": head, "labels": labels} | changed), taught=taught)
    for knobs in ({"ce": -0.1}, {"ce": float("nan")}, {"tile_tokens": 0}, {"tile_vocab": 0}):
        with pytest.raises(InvalidInput, match=f"lrec: {next(iter(knobs))}"):
            LREC(**knobs)


def packed(rows, cols):
    made = PackedEmbedding("q8_0", rows, cols)
    made.pack(torch.randn(rows, cols))
    return made


@pytest.mark.parametrize("loss", [LREC(tile_tokens=128, tile_vocab=256), LREC()], ids=["small tiles", "large tiles"])
@pytest.mark.parametrize("changed", [{}, {"softcap": True}, {"n_predicted": 300}], ids=["all", "capped", "left out"])
def test_bytes_are_those_that_are_allocated(loss, changed):
    sizes = {"n_tokens": 512, "n_predicted": 512, "d_model": 96, "vocab_size": 3001, "head_bytes": 0}
    shape = LossShape(**(sizes | changed), taught_width=160)
    hidden = torch.randn(shape.n_tokens, shape.d_model).requires_grad_()
    labels = torch.randint(0, shape.vocab_size, (shape.n_tokens,))
    labels[shape.n_predicted :] = NOTHING
    head, cap = packed(shape.vocab_size, shape.d_model), 9.0 if shape.softcap else 0.0
    taught = Taught(torch.randn(shape.n_tokens, 160), packed(shape.vocab_size, 160), cap)
    with Allocations([hidden, head.weight, labels, taught.hidden, taught.head.weight]) as seen:
        value = cross_entropy(loss, hidden, head, labels, softcap=cap, taught=taught)
        found = [seen.peak, seen.live]
        seen.mark()
        value.backward()
    found.append(seen.peak - found[1])
    stated = [total(terms(shape)) for terms in (loss.forward_terms, loss.saved_terms, loss.backward_terms)]
    print(stated, found)
    for most, got in zip(stated, found, strict=True):
        assert 0.98 * most - 4096 <= got <= most + 64
    assert stated[0] < 2 * 4 * shape.n_predicted * shape.vocab_size  # all logits of both
