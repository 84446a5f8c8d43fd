"""Losses against cross-entropy in float64, and their bytes against what PyTorch allocates."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="losses compute in PyTorch")

import torch.nn.functional as F  # noqa: E402
from allocations import Allocations  # noqa: E402

from barefoot.core.errors import InvalidInput  # noqa: E402
from barefoot.core.registry import techniques  # noqa: E402
from barefoot.train import NOTHING  # noqa: E402
from barefoot.train.driver import logit_tiles  # noqa: E402
from barefoot.train.driver.cross_entropy import cross_entropy  # noqa: E402
from barefoot.train.losses import LossShape, total  # noqa: E402
from barefoot.train.losses.cce import CutCrossEntropy  # noqa: E402
from barefoot.train.losses.plain import Plain  # noqa: E402
from barefoot.weights.module import PackedEmbedding, PackedLinear  # noqa: E402

N, D, V = 37, 24, 131
SMALL = {"tile_tokens": 16, "tile_vocab": 32}  # blocks of 16, 16 and 5 tokens, a last stretch of 3 words
EXACT = [Plain(), CutCrossEntropy(**SMALL), CutCrossEntropy(**SMALL, sums="kahan"), CutCrossEntropy()]
CASES = list(itertools.product((0.0, 3.0), (False, True), (False, True), (False, True)))


@pytest.fixture(autouse=True)
def _seed(one_torch_thread):
    torch.manual_seed(5)


def labels_of(n, vocab, left_out=True):
    labels = torch.randint(0, vocab, (n,))
    labels[0], labels[1] = vocab - 1, 0  # the corners of the tiles
    if left_out:
        labels[2::3] = NOTHING
    return labels


def problem(dtype=torch.float32, bias=False, trained=True, left_out=True):
    """Hidden states, head, bias, labels; the first three with gradients where asked for."""
    hidden = torch.randn(N, D, dtype=dtype).requires_grad_()
    head = torch.randn(V, D, dtype=dtype).requires_grad_(trained)
    shift = torch.randn(V, dtype=dtype).requires_grad_(trained) if bias else None
    return hidden, head, shift, labels_of(N, V, left_out)


def plain64(hidden, head, bias, labels, softcap=0.0, reduction="mean"):
    """The loss in float64, with copies of the arguments as its leaves: (loss, leaves)."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, head, bias)]
    logits = leaves[0] @ leaves[1].T
    if bias is not None:
        logits = logits + leaves[2]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, ignore_index=NOTHING, reduction=reduction), leaves


def apart(ours, exact):
    """Relative distance in the Frobenius norm."""
    return float((ours.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("loss", EXACT, ids=str)
@pytest.mark.parametrize(("softcap", "bias", "trained", "left_out"), CASES)
def test_loss_and_gradients_are_those_of_float64(loss, softcap, bias, trained, left_out):
    """Sums of 131 and 37 products in float32, and exponents of logits up to 25: below 25 * 131 roundings."""
    hidden, head, shift, labels = problem(bias=bias, trained=trained, left_out=left_out)
    ours = cross_entropy(loss, hidden[None], head, labels, bias=shift, softcap=softcap)
    ours.backward()
    exact, leaves = plain64(hidden, head, shift, labels, softcap)
    exact.backward()
    assert apart(ours, exact) < 2e-6
    assert apart(hidden.grad, leaves[0].grad) < 2e-6
    for x, leaf in zip((head, shift), leaves[1:], strict=True):
        if x is not None and trained:
            assert apart(x.grad, leaf.grad) < 2e-6
    assert not hidden.grad[labels == NOTHING].any()


@pytest.mark.parametrize("loss", EXACT, ids=str)
def test_gradients_are_those_of_differences(loss):
    """In float64, which the tiles sum in float64."""
    hidden, head, bias, labels = problem(torch.float64, bias=True)
    hidden, labels = hidden[:7].detach().requires_grad_(), labels[:7]

    def value(*x):
        return cross_entropy(loss, x[0], x[1], labels, bias=x[2], softcap=4.0)

    assert torch.autograd.gradcheck(value, (hidden, head, bias), fast_mode=True)  # along one random direction
    frozen = head.detach(), bias.detach()
    if not isinstance(loss, Plain):  # its gradient is handed out once, and gradcheck asks more often
        x = hidden.detach().requires_grad_()
        value(x, *frozen).backward()
        exact, leaves = plain64(x, *frozen, labels, 4.0)
        exact.backward()
        assert apart(x.grad, leaves[0].grad) < 1e-13


@pytest.mark.parametrize("loss", EXACT[:3], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_reductions(loss, trained):
    hidden, head, _, labels = problem(trained=trained)
    exact, leaves = plain64(hidden, head, None, labels, reduction="none")
    weights = torch.rand(N)
    exact.backward(weights.double())
    each = cross_entropy(loss, hidden, head, labels, reduction="none")
    each.backward(weights)
    assert each.shape == (N,)
    assert apart(each, exact) < 2e-6
    assert not each[labels == NOTHING].any()
    assert apart(hidden.grad, leaves[0].grad) < 2e-6
    whole = cross_entropy(loss, hidden, head, labels, reduction="sum")
    mean = cross_entropy(loss, hidden, head, labels)
    assert float(whole.detach()) == pytest.approx(float(exact.detach().sum()), rel=2e-6)
    assert float(mean.detach()) == pytest.approx(float(exact.detach().sum()) / int((labels != NOTHING).sum()), rel=2e-6)


@pytest.mark.parametrize("loss", EXACT[:3], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_bfloat16_errs_no_more_than_plain_bfloat16(loss, trained):
    """What the paper holds its kernels to."""
    hidden, head, _, labels = problem(torch.bfloat16, trained=trained)
    exact, leaves = plain64(hidden, head, None, labels)
    exact.backward()
    naive = [x.detach().requires_grad_() for x in (hidden, head)]
    F.cross_entropy(naive[0] @ naive[1].T, labels, ignore_index=NOTHING).backward()
    cross_entropy(loss, hidden, head, labels).backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert apart(hidden.grad, leaves[0].grad) < 1.2 * apart(naive[0].grad, leaves[0].grad)
    if trained:
        assert head.grad.dtype == torch.bfloat16
        assert apart(head.grad, leaves[1].grad) < 1.2 * apart(naive[1].grad, leaves[1].grad)


@pytest.mark.parametrize("trained", [False, True])
def test_a_token_that_is_certain_pulls_at_nothing(trained):
    """In bfloat16, from a head in float32: rounded as logits have met it, it cancels with itself."""
    head = torch.randn(V, D).mul_(3).requires_grad_(trained)
    labels = torch.tensor([5, 77])
    hidden = head.detach()[labels].bfloat16().requires_grad_()
    cross_entropy(CutCrossEntropy(**SMALL), hidden, head, labels, reduction="sum").backward()
    assert hidden.grad.float().norm(dim=1).max() < 1e-6 * head.detach().norm(dim=1).max()


def test_kahan_sums_keep_what_bfloat16_loses():
    """Many stretches of one word each: their products reach a sum in bfloat16 that rounds most of each away."""
    rows, like = torch.rand(1500, 16).bfloat16(), torch.zeros(4, 16).bfloat16()
    tiles = logit_tiles.Tiles(
        logit_tiles.Problem(like, logit_tiles.DenseHead(rows), torch.zeros(4, dtype=torch.int64), None, 0.0),
        CutCrossEntropy(tile_tokens=4, tile_vocab=1),
    )
    kahan, lost, cheap = like.clone(), like.clone(), like.clone()
    ones = torch.ones(4, 1).bfloat16()
    for row in rows:
        tiles.add_product(kahan, ones, row[None], lost)
        cheap += ones @ row[None]
    exact = rows.double().sum(0).expand(4, 16)
    assert apart(kahan, exact) < 2**-8
    assert apart(cheap, exact) > 0.3


@pytest.mark.parametrize("loss", EXACT[:2], ids=str)
def test_a_tied_head_gets_both_gradients(loss):
    table = torch.randn(V, D).requires_grad_()
    ids, labels = torch.randint(0, V, (N,)), labels_of(N, V)
    cross_entropy(loss, torch.tanh(F.embedding(ids, table)), table, labels).backward()
    leaf = table.detach().double().requires_grad_()
    F.cross_entropy(torch.tanh(F.embedding(ids, leaf)) @ leaf.T, labels, ignore_index=NOTHING).backward()
    assert apart(table.grad, leaf.grad) < 2e-6


@pytest.mark.parametrize("kind", [PackedEmbedding, PackedLinear])
@pytest.mark.parametrize("format", ["q4_0", "q8_0", "int4_g32_asym"])
@pytest.mark.parametrize("loss", EXACT[:2], ids=str)
def test_a_packed_head_is_met_as_it_is_stored(loss, format, kind, monkeypatch):
    packed = kind(format, *((V, 32) if kind is PackedEmbedding else (32, V)))
    packed.pack(torch.randn(V, 32))
    hidden, labels = torch.randn(N, 32).requires_grad_(), labels_of(N, V)
    seen, decode = [], type(packed).dense

    def dense(self, start=0, stop=None):
        seen.append((start, stop))
        return decode(self, start, stop)

    monkeypatch.setattr(kind, "dense", dense)
    ours = cross_entropy(loss, hidden, packed, labels, softcap=20.0)
    ours.backward()
    if isinstance(loss, CutCrossEntropy):
        assert seen == [(at, min(at + 32, V)) for at in range(0, V, 32)]  # once for all tokens, and in both passes
    exact, leaves = plain64(hidden, decode(packed), None, labels, 20.0)
    exact.backward()
    assert apart(ours, exact) < 2e-6
    assert apart(hidden.grad, leaves[0].grad) < 2e-6


def test_rows_of_a_packed_matrix_by_their_numbers():
    packed = PackedLinear("q4_0", 32, 48)
    packed.pack(torch.randn(48, 32))
    ids = torch.tensor([47, 0, 0, 13])
    assert torch.equal(packed.at(ids), packed.dense()[ids])


def test_the_gradient_of_a_frozen_head_is_handed_out_once():
    hidden, head, _, labels = problem(trained=False)
    ours = cross_entropy(CutCrossEntropy(), hidden, head, labels)
    ours.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out already"):
        ours.backward()


def test_losses_without_gradients_compute_none(monkeypatch):
    hidden, head, _, labels = problem()
    monkeypatch.setattr(logit_tiles.Tiles, "add_product", None)
    with torch.no_grad():
        ours = cross_entropy(CutCrossEntropy(**SMALL), hidden, head, labels)
    assert apart(ours, plain64(hidden, head, None, labels)[0]) < 2e-6


def test_large_logits_neither_overflow_nor_vanish():
    """exp(200) is no float32, and neither is exp(-200): the running maximum must move with the tiles."""
    hidden, labels = torch.eye(4, 8).mul(200).requires_grad_(), torch.tensor([0, 50, 100, 3])
    head = torch.zeros(V, 8)
    head[0, 0], head[50, 1], head[100, 2], head[5, 3] = 1, 1, -1, 1  # likely, likely, unlikely, elsewhere
    ours = cross_entropy(CutCrossEntropy(**SMALL), hidden, head, labels, reduction="none")
    ours.sum().backward()
    exact, leaves = plain64(hidden, head, None, labels, reduction="sum")
    exact.backward()
    expected = torch.tensor([0, 0, 200 + np.log(V - 1), 200]).float()
    assert torch.allclose(ours.detach(), expected, atol=1e-4)
    assert apart(hidden.grad, leaves[0].grad) < 2e-6


@pytest.mark.parametrize("trained", [False, True])
def test_nan_stays_in_its_row(trained):
    hidden, head, _, labels = problem(trained=trained)
    with torch.no_grad():
        hidden[4, 3] = torch.nan
    each = cross_entropy(CutCrossEntropy(**SMALL), hidden, head, labels, reduction="none")
    each.sum().backward()
    assert each.isnan().nonzero().flatten().tolist() == [4]
    assert hidden.grad.isnan().any(1).nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("loss", EXACT[:2], ids=str)
def test_tokens_that_all_predict_nothing(loss):
    hidden, head, _, labels = problem()
    labels.fill_(NOTHING)
    cross_entropy(loss, hidden, head, labels, reduction="sum").backward()
    assert torch.equal(hidden.grad, torch.zeros(N, D))
    with pytest.raises(InvalidInput, match="none of 37 tokens predicts"):
        cross_entropy(loss, hidden, head, labels)


def test_what_does_not_go_together_is_refused():
    hidden, head, bias, labels = problem(bias=True)
    for match, changed in {
        "24 channels, the head's rows 23": {"head": head[:, 1:]},
        r"int64 \(37,\), one for each hidden state, got torch.int64 \(36,\)": {"labels": labels[1:]},
        "got torch.int32": {"labels": labels.int()},
        r"bias must be \(131,\), one for each row of the head, got \(130,\)": {"bias": bias[1:]},
        "label 131 lies outside the vocabulary of 131": {"labels": labels.clamp(min=V)},
        "label -1 lies outside": {"labels": labels.clamp(max=-1)},
        "reduction must be mean, sum or none, got 'max'": {"reduction": "max"},
    }.items():
        with pytest.raises(InvalidInput, match=match):
            cross_entropy(Plain(), **({"hidden": hidden, "head": head, "labels": labels, "bias": bias} | changed))
    for match, knobs in {
        "filter must lie between 0 and 1, got 1": {"filter": 1},
        "sums must be float32 or kahan, got 'f64'": {"sums": "f64"},
        "tile_tokens must be 1 or more, got 0": {"tile_tokens": 0},
        "tile_vocab must be 1 or more, got -5": {"tile_vocab": -5},
    }.items():
        with pytest.raises(InvalidInput, match=match):
            CutCrossEntropy(**knobs)


# --- the filter ---


def filtered64(hidden, head, labels, loss):
    """Gradients of the summed loss in float64, with every tile below the filter left out, by loops."""
    logits = hidden.detach().double() @ head.detach().double().T
    errors = logits.softmax(1)
    rows = torch.arange(len(labels))
    errors[rows, labels] -= 1
    mean = logits.mean(0)
    order = mean.argsort() if loss.sort else torch.arange(len(head))
    kept, n_kept = errors.clone(), 0
    for i in range(0, len(rows), loss.tile_tokens):
        for v in range(0, len(head), loss.tile_vocab):
            tile = torch.meshgrid(rows[i : i + loss.tile_tokens], order[v : v + loss.tile_vocab], indexing="ij")
            if errors[tile].abs().max() < loss.filter:
                kept[tile] = 0
            else:
                n_kept += 1
    for_head = errors if loss.whole_head else kept
    return kept @ head.detach().double(), for_head.T @ hidden.detach().double(), n_kept


def peaked(likely=9, spread=6.0):
    """Hidden states of which a few scattered words are likely, and labels among these."""
    head = torch.randn(V, D)
    words = torch.randperm(V)[:likely]
    labels = words[torch.randint(0, likely, (N,))]
    head[words] += spread * torch.ones(D) / D**0.5
    hidden = torch.randn(N, D) * 0.3 + 1.5 * torch.ones(D) / D**0.5
    return hidden.requires_grad_(), head.requires_grad_(), labels


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("whole_head", [False, True])
def test_the_filter_leaves_out_whole_tiles(sort, whole_head, monkeypatch):
    hidden, head, labels = peaked()
    loss = CutCrossEntropy(filter=0.004, sort=sort, whole_head=whole_head, tile_tokens=8, tile_vocab=16)
    counted, matters = [], logit_tiles.matters
    monkeypatch.setattr(logit_tiles, "matters", lambda *args: counted.append(matters(*args)) or counted[-1])
    cross_entropy(loss, hidden, head, labels, reduction="sum").backward()
    by_hidden, by_head, n_kept = filtered64(hidden, head, labels, loss)
    assert apart(hidden.grad, by_hidden) < 2e-6
    assert apart(head.grad, by_head) < 2e-6
    assert sum(counted) == n_kept
    assert 0 < n_kept < len(counted) == 5 * 9
    # Not by elements: some that are kept are below the filter.
    errors = (hidden.detach() @ head.detach().T).softmax(1)
    errors[torch.arange(N), labels] -= 1
    by_elements = torch.where(errors.abs() < loss.filter, 0, errors) @ head.detach()
    assert apart(hidden.grad, by_elements.double()) > 1e-4


def test_sorting_leaves_out_more_tiles():
    hidden, head, labels = peaked()
    kept = [
        filtered64(hidden, head, labels, CutCrossEntropy(filter=0.004, sort=sort, tile_tokens=8, tile_vocab=16))[2]
        for sort in (False, True)
    ]
    assert kept[1] < 0.6 * kept[0]


def test_mean_logits_are_those_of_the_mean_hidden_state():
    hidden, head, bias, labels = problem(torch.float64, bias=True)
    tiles = logit_tiles.Tiles(
        logit_tiles.Problem(hidden, logit_tiles.DenseHead(head), labels, bias, 0.0), CutCrossEntropy(**SMALL)
    )
    means = (hidden @ head.T + bias)[labels != NOTHING].mean(0)
    with torch.no_grad():
        assert torch.equal(logit_tiles.likely_last(tiles), means.argsort())


def test_a_model_that_knows_nothing_must_not_filter_its_head():
    """Where training starts p is 1 / V: of the words that no label names, a filtered head learns nothing."""
    vocab, n = 8192, 64
    hidden, labels = torch.randn(n, D) * 0.1, torch.randint(0, 64, (n,))  # the labels lie in the first stretches
    found = {}
    for name, whole in (("filtered", False), ("whole", True)):
        head = (torch.randn(vocab, D, generator=torch.Generator().manual_seed(1)) * 0.02).requires_grad_()
        loss = CutCrossEntropy(filter=2**-12, sort=False, whole_head=whole, tile_tokens=32, tile_vocab=256)
        cross_entropy(loss, hidden, head, labels).backward()
        found[name] = head.grad
    exact, leaves = plain64(hidden, head, None, labels)
    exact.backward()
    assert apart(found["whole"], leaves[1].grad) < 2e-6
    rare = slice(1024, None)
    assert not found["filtered"][rare].any()
    assert apart(found["filtered"][rare], leaves[1].grad[rare]) == 1.0
    assert CutCrossEntropy(filter=2**-12).whole_head  # unless it is asked for


# --- bytes ---


def measured(loss, shape):
    """Peak of the forward pass, what stays, and the peak of the backward pass beside that, in bytes."""
    kinds = {4: torch.float32, 2: torch.bfloat16}
    hidden = torch.randn(shape.n_tokens, shape.d_model).to(kinds[shape.hidden_bytes]).requires_grad_()
    if shape.head_bytes:
        weight = torch.randn(shape.vocab_size, shape.d_model) * 0.05
        head = weight.to(kinds[shape.head_bytes]).requires_grad_(shape.trains_head)
        stored = head
    else:
        head = PackedEmbedding("q8_0", shape.vocab_size, shape.d_model)
        head.pack(torch.randn(shape.vocab_size, shape.d_model))
        stored = head.weight
    bias = torch.zeros(shape.vocab_size).requires_grad_() if shape.trains_bias else None
    labels = labels_of(shape.n_tokens, shape.vocab_size, False)
    labels[shape.n_predicted :] = NOTHING
    held = [hidden, stored, labels, *([] if bias is None else [bias])]
    with Allocations(held) as seen:
        value = cross_entropy(loss, hidden, head, labels, bias=bias, softcap=9.0 if shape.softcap else 0.0)
        forward, saved = seen.peak, seen.live
        seen.mark()
        value.backward()
    return forward, saved, seen.peak - saved


SHAPES = {
    "frozen": {},
    "trained": {"trains_head": True},
    "packed": {"head_bytes": 0},
    "capped": {"softcap": True},
    "capped, trained": {"softcap": True, "trains_head": True},
    "left out": {"n_predicted": 300},
    "left out, trained": {"n_predicted": 300, "trains_head": True},
    "bfloat16": {"hidden_bytes": 2, "head_bytes": 2},
    "bfloat16, trained": {"hidden_bytes": 2, "head_bytes": 2, "trains_head": True},
    "bfloat16, packed": {"hidden_bytes": 2, "head_bytes": 0},
    "bfloat16, trained in float32": {"hidden_bytes": 2, "trains_head": True},
    "bfloat16, left out": {"hidden_bytes": 2, "head_bytes": 2, "n_predicted": 300},
    "with a bias": {"trains_head": True, "trains_bias": True},
}
LOSSES = {
    "plain": Plain(),
    "cce": CutCrossEntropy(tile_tokens=128, tile_vocab=256),
    "large tiles": CutCrossEntropy(),
    "filtered": CutCrossEntropy(filter=2**-12, tile_tokens=128, tile_vocab=256),
    "unsorted": CutCrossEntropy(filter=2**-12, sort=False, tile_tokens=128, tile_vocab=256),
    "kahan": CutCrossEntropy(sums="kahan", tile_tokens=128, tile_vocab=256),
}


def test_every_loss_is_measured():
    plain = {cls for cls in techniques("train.losses").values() if not cls.imitates}  # test_imitation has the others
    assert {type(loss) for loss in LOSSES.values()} == plain


@pytest.mark.parametrize("loss", list(LOSSES.values()), ids=list(LOSSES))
@pytest.mark.parametrize("changed", list(SHAPES.values()), ids=list(SHAPES))
def test_bytes_are_those_that_are_allocated(loss, changed):
    shape = LossShape(**({"n_tokens": 512, "n_predicted": 512, "d_model": 96, "vocab_size": 3001} | changed))
    stated = [total(terms(shape)) for terms in (loss.forward_terms, loss.saved_terms, loss.backward_terms)]
    found = measured(loss, shape)
    print(stated, found)
    for most, got in zip(stated, found, strict=True):
        assert 0.98 * most - 4096 <= got <= most + 64
