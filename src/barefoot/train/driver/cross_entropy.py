"""The cross-entropy of next tokens by any loss of ``train.losses``, differentiable by hidden states, head and bias."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.train import NOTHING
from barefoot.train.driver.imitation import Taught, both
from barefoot.train.driver.logit_tiles import (
    DenseHead,
    Head,
    Problem,
    Tiles,
    gradients,
    log_sums,
    one_pass,
    predicting,
    spread,
)
from barefoot.train.losses import Loss
from barefoot.train.losses.cce import CutCrossEntropy
from barefoot.train.losses.lrec import LREC

Reduction = Literal["mean", "sum", "none"]


def cross_entropy(
    loss: Loss,
    hidden: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    taught: Taught | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The loss of a micro-batch, float32.

    Parameters
    ----------
    hidden : (N, d_model) or (1, N, d_model), as the head is to meet them.
    head : a matrix (vocabulary, d_model), trained if it requires a gradient, or a packed one, which stays as it is.
        The gradient of a matrix that also embeds is added to what the embedding's is.
    labels : int64 (N,), the token that each one is to predict, or ``NOTHING``.
    bias : (vocabulary,), of the logits.
    softcap : c, where logits are c tanh(logits / c).
    taught : what a teacher makes of the same tokens, for a loss that imitates one.
    reduction : over the tokens that predict; "none" gives (N,), 0 for those that don't.

    Raises
    ------
    InvalidInput : shapes that don't go together, labels outside the vocabulary, no label at all where the mean is asked
        for, an unknown reduction, a loss that imitates without a teacher, or a teacher for one that doesn't.
    Incompatible : a loss that imitates, with a head that is trained, a bias, or hidden states of 16 bits.
    """
    matrix: Head = DenseHead(head) if isinstance(head, Tensor) else head
    hidden = hidden.reshape(-1, hidden.shape[-1])
    n_predicted = _check(hidden, matrix, labels, bias)
    if reduction == "mean" and not n_predicted:
        raise InvalidInput(f"none of {len(labels)} tokens predicts anything: there is no mean of their losses")
    if reduction not in ("mean", "sum", "none"):
        raise InvalidInput(f"reduction must be mean, sum or none, got {reduction!r}")
    _check_taught(loss, matrix, taught, len(labels))
    each: Tensor
    if n_predicted:
        each = loss.per_token(hidden, matrix, labels, bias=bias, softcap=softcap, taught=taught)
    else:
        each = hidden.sum(1, dtype=torch.float32) * 0  # so that gradients are 0
    if reduction == "none":
        return each
    return each.sum() / n_predicted if reduction == "mean" else each.sum()


def _check(hidden: Tensor, head: Head, labels: Tensor, bias: Tensor | None) -> int:
    """How many tokens predict."""
    if hidden.shape[1] != head.cols:
        raise InvalidInput(f"hidden states have {hidden.shape[1]} channels, the head's rows {head.cols}")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        expected, got = f"int64 ({len(hidden)},)", f"{labels.dtype} {tuple(labels.shape)}"
        raise InvalidInput(f"labels must be {expected}, one for each hidden state, got {got}")
    if bias is not None and bias.shape != (head.rows,):
        raise InvalidInput(f"the bias must be ({head.rows},), one for each row of the head, got {tuple(bias.shape)}")
    predicting = labels != NOTHING
    wrong = labels[predicting & ((labels < 0) | (labels >= head.rows))]
    if len(wrong):
        raise InvalidInput(f"label {int(wrong[0])} lies outside the vocabulary of {head.rows}")
    return int(predicting.sum())


def _check_taught(loss: Loss, head: Head, taught: Taught | None, n_tokens: int) -> None:
    if loss.imitates != (taught is not None):
        raise InvalidInput(f"{loss} takes {'a' if loss.imitates else 'no'} teacher's hidden states")
    if taught is None:
        return
    if taught.hidden.shape != (n_tokens, taught.head.cols):
        expected = f"({n_tokens}, {taught.head.cols})"
        raise InvalidInput(f"a teacher's hidden states must be {expected}, got {tuple(taught.hidden.shape)}")
    if taught.head.rows != head.rows:
        raise InvalidInput(f"the teacher has {taught.head.rows} words, the model {head.rows}")


def plain(hidden: Tensor, head: Head, labels: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    """Losses (N,) from all logits at once."""
    places, n_tokens = predicting(labels), len(labels)
    if places is not None:
        hidden, labels = hidden.index_select(0, places), labels[places]
    losses = F.cross_entropy(_capped(F.linear(hidden, _matrix(head, hidden), bias), softcap), labels, reduction="none")
    return losses if places is None else losses.new_zeros(n_tokens).index_copy(0, places, losses)


def _matrix(head: Head, hidden: Tensor) -> Tensor:
    """The whole head in the type of the hidden states."""
    return head.dense(0, head.rows).to(hidden.dtype)


def _capped(logits: Tensor, softcap: float) -> Tensor:
    logits = logits.float() if logits.dtype != torch.float64 else logits
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def cut(
    loss: CutCrossEntropy, hidden: Tensor, head: Head, labels: Tensor, bias: Tensor | None, softcap: float
) -> Tensor:
    """Losses (N,), a tile of logits at a time."""
    weight = head.weight if isinstance(head, DenseHead) else None
    trained = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight, bias)]
    problem = Problem(hidden, head, labels, bias, softcap)
    kernels = _kernels(hidden, weight)
    each: Tensor
    if kernels is not None:
        each = _OnDevice.apply(hidden, weight, bias, labels, softcap, loss, kernels)  # type: ignore[no-untyped-call]
    elif trained[1] or trained[2]:
        each = _TwoPasses.apply(hidden, weight, bias, labels, problem, loss)  # type: ignore[no-untyped-call]
    elif trained[0]:
        each = _OnePass.apply(hidden, partial(one_pass, Tiles(problem, loss)))  # type: ignore[no-untyped-call]
    else:
        tiles = Tiles(problem, loss)
        sums, correct = log_sums(tiles)
        each = spread(tiles, sums.sub_(correct))
    return each


def imitated(
    loss: LREC, hidden: Tensor, head: Head, labels: Tensor, bias: Tensor | None, softcap: float, taught: Taught
) -> Tensor:
    """Losses (N,) beside a teacher, a tile of either's logits at a time."""
    if bias is not None or (isinstance(head, DenseHead) and head.weight.requires_grad):
        raise Incompatible(f"{loss} imitates through a frozen head without a bias")
    if hidden.dtype not in (torch.float32, torch.float64):
        raise Incompatible(f"{loss} takes hidden states of 32 bits, got {hidden.dtype}")
    tiles = Tiles(Problem(hidden, head, labels, None, softcap), loss)
    other = Tiles(Problem(taught.hidden, taught.head, labels, None, taught.softcap), loss)
    learns = hidden.requires_grad and torch.is_grad_enabled()
    compare = partial(both, loss, tiles, other, learns)
    each: Tensor = _OnePass.apply(hidden, compare) if learns else compare()[0]  # type: ignore[no-untyped-call]
    return each


class _OnePass(torch.autograd.Function):
    """The gradient by the hidden states comes with the loss; of the head there is none."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, compute: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        losses, ctx.gradient = compute()
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (by_losses,) = grads
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the gradient of this loss was handed out already: compute the loss again")
        return gradient.mul_(by_losses[:, None]), None


class _TwoPasses(torch.autograd.Function):
    """Logits are computed again for the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        labels: Tensor,
        problem: Problem,
        loss: CutCrossEntropy,
    ) -> Tensor:
        tiles = Tiles(problem, loss)
        sums, correct = log_sums(tiles)
        ctx.save_for_backward(hidden, weight, bias, labels, sums)
        ctx.head, ctx.softcap, ctx.loss = (None if weight is not None else problem.head), problem.softcap, loss
        return spread(tiles, sums - correct)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, sums = ctx.saved_tensors
        head = ctx.head or DenseHead(weight)
        tiles = Tiles(Problem(hidden, head, labels, bias, ctx.softcap), ctx.loss)
        _, trains_head, trains_bias, *_ = ctx.needs_input_grad
        by_hidden, by_head, by_bias = gradients(tiles, sums, grads[0], ctx.loss, trains_head, trains_bias)
        return by_hidden, by_head, by_bias, None, None, None


def _kernels(hidden: Tensor, weight: Tensor | None) -> Any:
    """Their module, where hidden states and a head of the same type lie on a CUDA device and Triton is installed."""
    if not hidden.is_cuda or weight is None or weight.dtype != hidden.dtype:
        return None
    try:
        from barefoot.ops.triton import cross_entropy as kernels
    except ImportError:
        return None
    return kernels


class _OnDevice(torch.autograd.Function):
    """Two passes in Triton's kernels, for frozen heads too."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        softcap: float,
        loss: CutCrossEntropy,
        kernels: Any,
    ) -> Tensor:
        places = (labels != NOTHING).nonzero().squeeze(1)
        logits = kernels.Logits(hidden.contiguous(), weight.contiguous(), labels[places], places, bias, softcap)
        sums, correct = kernels.log_sums(logits)
        ctx.save_for_backward(hidden, weight, bias, labels, sums)
        ctx.rest = softcap, loss, kernels
        return sums.new_zeros(len(labels)).index_copy_(0, places, sums - correct)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, sums = ctx.saved_tensors
        softcap, loss, kernels = ctx.rest
        places = (labels != NOTHING).nonzero().squeeze(1)
        order = None
        if loss.filter and loss.sort:
            scores = weight @ hidden[places].mean(0)
            order = (scores if bias is None else scores + bias).argsort()
        by_hidden, by_head, by_bias = kernels.gradients(
            kernels.Logits(hidden.contiguous(), weight.contiguous(), labels[places], places, bias, softcap),
            sums,
            grads[0][places],
            filter=loss.filter,
            whole_head=loss.whole_head,
            order=order,
            trains_head=ctx.needs_input_grad[1],
            trains_bias=ctx.needs_input_grad[2],
        )
        return by_hidden, by_head, by_bias, None, None, None, None
