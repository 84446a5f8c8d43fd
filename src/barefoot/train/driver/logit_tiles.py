"""Logits a tile at a time: what ``train.losses.cce`` computes, in PyTorch's own operations.

The vocabulary is the outer loop, so that each tile of a packed head is decoded once; blocks of tokens are the inner
one. All tiles share one scratch, and what is summed over tiles is summed in float32 (``Tiles.wide``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from barefoot.train import NOTHING
from barefoot.train.losses.cce import LABELS, CutCrossEntropy
from barefoot.weights.recycling import empty

Words: TypeAlias = "slice | Tensor"  # of a stretch of the vocabulary


class Head(Protocol):
    """The matrix of the logits, (rows, cols): one row for each word of the vocabulary."""

    rows: int
    cols: int

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` as numbers, (n, cols)."""

    def at(self, ids: Tensor) -> Tensor:
        """Rows by their numbers, (n, cols)."""


class Tiling(Protocol):
    """A loss that is computed by tiles."""

    def tile(self, n_predicted: int, vocab_size: int) -> tuple[int, int]:
        """Tokens and words of a tile."""


class DenseHead:
    """A matrix that lies in memory as numbers."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, (self.rows, self.cols) = weight, weight.shape

    def dense(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.weight[start:stop]

    def at(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


@dataclass(frozen=True)
class Problem:
    """
    Attributes
    ----------
    hidden : (N, d_model).
    labels : int64 (N,), or ``NOTHING``.
    bias : (vocabulary,).
    softcap : 0 where there is none.
    """

    hidden: Tensor
    head: Head
    labels: Tensor
    bias: Tensor | None
    softcap: float


def predicting(labels: Tensor) -> Tensor | None:
    """The places of tokens that have a label, int64; None where all have one."""
    has = labels != NOTHING
    return None if bool(has.all()) else has.nonzero().squeeze(1)


class Tiles:
    """Scratch for the tiles of a problem, and the tokens that predict."""

    def __init__(self, problem: Problem, loss: Tiling) -> None:
        self.problem, hidden = problem, problem.hidden
        self.kind = hidden.dtype
        self.wide = torch.promote_types(self.kind, torch.float32)
        self._wide = hidden.new_empty(0, dtype=self.wide)
        self.places = predicting(problem.labels)
        self.labels = problem.labels if self.places is None else problem.labels[self.places]
        self.n = len(self.labels)
        self.block, self.width = loss.tile(self.n, problem.head.rows)
        self._logits = self._floats(self.block * self.width)
        self._slopes = self._floats(self.block * self.width if problem.softcap else 0)
        self._products = empty((0 if self.kind == self.wide else self.block * self.width,), hidden)
        self._sums = hidden.new_empty(0)
        self._inputs = empty((0 if self.places is None else self.block * problem.head.cols,), hidden)

    def _floats(self, n: int) -> Tensor:
        return empty((n,), self._wide)

    def floats(self, *shape: int) -> Tensor:
        return empty(shape, self._wide).zero_()

    def blocks(self) -> Iterator[slice]:
        """Of the tokens that predict."""
        return (slice(at, min(at + self.block, self.n)) for at in range(0, self.n, self.block))

    def stretches(self, order: Tensor | None = None) -> Iterator[tuple[int, Words, Tensor]]:
        """Of the vocabulary, in its order or another: the first place, which words, and their rows of the head."""
        head = self.problem.head
        for start in range(0, head.rows, self.width):
            stop = min(start + self.width, head.rows)
            if order is None:
                yield start, slice(start, stop), head.dense(start, stop).to(self.kind)
            else:
                yield start, order[start:stop], head.at(order[start:stop]).to(self.kind)

    def inputs(self, block: slice) -> Tensor:
        """Hidden states of a block."""
        hidden = self.problem.hidden
        if self.places is None:
            return hidden[block]
        places = self.places[block]
        return torch.index_select(hidden, 0, places, out=_view(self._inputs, len(places), hidden.shape[1]))

    def move(self, rows: Tensor) -> None:
        """Row i of (N, d_model) to the place of the i-th token that predicts, 0 where none does, all in place.

        Rows only move back, so the last ones move first.
        """
        if self.places is None:
            return
        for block in reversed([*self.blocks()]):
            moved = _view(self._inputs, block.stop - block.start, rows.shape[1]).copy_(rows[block])
            rows[block] = 0
            rows[self.places[block]] = moved

    def of_block(self, values: Tensor, block: slice) -> Tensor:
        """Those of ``values`` (N,) that belong to a block."""
        return values[block] if self.places is None else values[self.places[block]]

    def logits(self, x: Tensor, rows: Tensor, words: Words) -> Tensor:
        """(block, width) in the scratch, of hidden states and rows of the head, which are those of ``words``."""
        out, bias, cap = _view(self._logits, len(x), len(rows)), self.problem.bias, self.problem.softcap
        if self.kind == self.wide:
            torch.mm(x, rows.T, out=out)
        else:
            out.copy_(torch.mm(x, rows.T, out=_view(self._products, *out.shape)))
        if bias is not None:
            out.add_(bias[words])
        return out.div_(cap).tanh_().mul_(cap) if cap else out

    def slopes(self, logits: Tensor) -> Tensor | None:
        """1 - (A / c)², by which gradients pass through the cap; None where there is none."""
        cap = self.problem.softcap
        if not cap:
            return None
        slopes = _view(self._slopes, *logits.shape)
        return torch.div(logits, cap, out=slopes).square_().neg_().add_(1)

    def narrow(self, tile: Tensor) -> Tensor:
        """A tile of the scratch in the type of hidden states, which products take."""
        return tile if self.kind == self.wide else _view(self._products, *tile.shape).copy_(tile)

    def add_product(self, total: Tensor, a: Tensor, b: Tensor, lost: Tensor | None = None) -> None:
        """total += a b; what rounding takes from it is kept in ``lost`` until the next product (Kahan)."""
        if lost is None and total.dtype == self.kind:
            total.addmm_(a, b)
            return
        if self._sums.numel() < total.numel():
            self._sums = empty((max(self.block, self.width) * total.shape[1],), self.problem.hidden)
        product = torch.mm(a, b, out=_view(self._sums, *total.shape))
        if lost is None:
            total.add_(product)
            return
        product.sub_(lost)
        before = total.clone()
        lost.copy_(total.add_(product)).sub_(before).sub_(product)


def _view(scratch: Tensor, rows: int, cols: int) -> Tensor:
    return scratch[: rows * cols].view(rows, cols)


def log_sums(tiles: Tiles, pulls: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """log Σ exp of the logits and the logit of the label, (n,) each.

    ``pulls`` (n, d_model), zeros of type ``tiles.wide``, becomes Σ_v p_v (1 - (A_v / c)²) C_v: attention whose keys and
    values are the head, in one pass, with a maximum that runs along.
    """
    top, sums, correct = tiles.floats(tiles.n).fill_(-torch.inf), tiles.floats(tiles.n), tiles.floats(tiles.n)
    for start, words, head in tiles.stretches():
        for block in tiles.blocks():
            logits = tiles.logits(tiles.inputs(block), head, words)
            here, at = within(tiles.labels[block] - start, len(head))
            correct[block] += logits.gather(1, at).squeeze(1).mul_(here)
            slopes = None if pulls is None else tiles.slopes(logits)
            highest = torch.maximum(top[block], logits.amax(1))
            shrunk = (top[block] - highest).exp_()
            top[block] = highest
            logits.sub_(highest[:, None]).exp_()
            sums[block].mul_(shrunk).add_(logits.sum(1))
            if pulls is not None:
                pulls[block].mul_(shrunk[:, None])
                tiles.add_product(pulls[block], tiles.narrow(_times(logits, slopes)), head)
        del head  # before the next stretch is decoded
    if pulls is not None:
        pulls /= sums[:, None]
    return top.add_(sums.log_()), correct


def one_pass(tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Losses (N,), and their gradients by the hidden states, (N, d_model)."""
    problem, wide = tiles.problem, tiles.wide
    gradient = tiles.floats(*problem.hidden.shape if tiles.kind == wide else (tiles.n, problem.head.cols))
    pulls = gradient[: tiles.n]
    sums, correct = log_sums(tiles, pulls)
    minus_labels(tiles, pulls, correct)
    return spread(tiles, sums.sub_(correct)), to_hidden(tiles, gradient)


def minus_labels(tiles: Tiles, pulls: Tensor, correct: Tensor, weight: float = 1.0) -> None:
    """Take labels' rows of the head, times ``weight``, from ``pulls`` (n, d_model); ``correct`` are their logits."""
    for at in range(0, tiles.n, LABELS):
        some = slice(at, at + LABELS)
        rows = tiles.problem.head.at(tiles.labels[some]).to(tiles.kind)  # as products met them
        pulls[some].sub_(_times(rows.to(tiles.wide), tiles.slopes(correct[some, None])), alpha=weight)
        del rows


def gradients(
    tiles: Tiles, sums: Tensor, scales: Tensor, loss: CutCrossEntropy, trains_head: bool, trains_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients by hidden states, head and bias, from logits that are computed again.

    Parameters
    ----------
    sums : log Σ exp, (n,).
    scales : the gradients by the losses, (N,).
    """
    problem, kahan = tiles.problem, loss.sums == "kahan"
    hidden, head = problem.hidden, problem.head
    order, words_of = None, tiles.labels
    if loss.filter and loss.sort:
        order = likely_last(tiles)
        words_of = order.argsort()[tiles.labels]
    own = kahan or tiles.kind == tiles.wide
    by_hidden = empty(hidden.shape, hidden).zero_() if own else tiles.floats(tiles.n, head.cols)
    lost = hidden.new_zeros(tiles.n, head.cols) if kahan else None
    by_head = _HeadGradient(tiles, order) if trains_head else None
    by_bias = tiles.floats(head.rows) if trains_bias else None
    for start, words, some in tiles.stretches(order):
        by_some = None if by_head is None else by_head.begin(words, len(some))
        for block in tiles.blocks():
            x = tiles.inputs(block)
            logits = tiles.logits(x, some, words)
            slopes = tiles.slopes(logits)
            errors = logits.sub_(sums[block, None]).exp_()
            here, at = within(words_of[block] - start, len(some))
            errors.scatter_add_(1, at, here[:, None].to(errors.dtype).neg_())
            kept = matters(errors, loss.filter)
            errors = _times(errors.mul_(tiles.of_block(scales, block)[:, None]), slopes)
            if by_bias is not None:
                by_bias[words] += errors.sum(0)
            if not kept and (by_some is None or not loss.whole_head):
                continue
            products = tiles.narrow(errors)
            if kept:
                tiles.add_product(by_hidden[block], products, some, None if lost is None else lost[block])
            if by_some is not None and (kept or loss.whole_head):
                tiles.add_product(by_some, products.T, x)
        if by_head is not None and by_some is not None:
            by_head.end(words, by_some)
        del some
    return to_hidden(tiles, by_hidden), None if by_head is None else by_head.whole, by_bias


class _HeadGradient:
    """Of the head, a stretch after the other, each summed in ``tiles.wide``: in its place, or in scratch."""

    def __init__(self, tiles: Tiles, order: Tensor | None) -> None:
        self.whole = torch.zeros_like(tiles.problem.head.dense())
        in_place = order is None and self.whole.dtype == tiles.wide
        self._scratch = None if in_place else tiles.floats(tiles.width, tiles.problem.head.cols)

    def begin(self, words: Words, n_words: int) -> Tensor:
        """Zeros (n_words, d_model) to add to."""
        return self.whole[words] if self._scratch is None else self._scratch[:n_words].zero_()

    def end(self, words: Words, sums: Tensor) -> None:
        if self._scratch is not None:
            self.whole[words] = sums.to(self.whole.dtype)


def matters(errors: Tensor, filter: float) -> bool:
    """Whether a tile of p - 1[v = x] holds one that is not below the filter, NaN among them."""
    return not filter or not bool(torch.linalg.vector_norm(errors, torch.inf) < filter)


def likely_last(tiles: Tiles) -> Tensor:
    """The vocabulary by its mean logits. Before the cap they are linear: those of the mean hidden state."""
    total = tiles.floats(tiles.problem.head.cols)
    for block in tiles.blocks():
        total += tiles.inputs(block).sum(0, dtype=tiles.wide)
    mean = total.div_(tiles.n).to(tiles.kind)
    scores = torch.cat([head @ mean for _, _, head in tiles.stretches()])
    return torch.argsort(scores if tiles.problem.bias is None else scores + tiles.problem.bias)


def _times(values: Tensor, slopes: Tensor | None) -> Tensor:
    """In place."""
    return values if slopes is None else values.mul_(slopes)


def within(words: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Whether a word lies in the tile, (block,), and the column that is it or any other, (block, 1)."""
    return (words >= 0) & (words < width), words.clamp(0, width - 1)[:, None]


def spread(tiles: Tiles, values: Tensor) -> Tensor:
    """Values of the tokens that predict, as values of all tokens (N,); 0 for the others."""
    if tiles.places is None:
        return values
    return values.new_zeros(len(tiles.problem.labels)).index_copy_(0, tiles.places, values)


def to_hidden(tiles: Tiles, rows: Tensor) -> Tensor:
    """Rows of the tokens that predict, of which (N, d_model) may be the first, as a gradient of the hidden states."""
    hidden, places = tiles.problem.hidden, tiles.places
    if rows.dtype == tiles.kind:
        tiles.move(rows)
        return rows
    gradient = hidden.new_zeros(hidden.shape)
    for block in tiles.blocks():
        gradient[block if places is None else places[block]] = rows[block].to(tiles.kind)
    return gradient
