"""A model's logits beside its teacher's, a tile of each at a time: what ``train.losses.lrec`` computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from barefoot.train.driver.logit_tiles import Head, Tiles, minus_labels, spread, to_hidden, within
from barefoot.train.losses.lrec import LREC


@dataclass(frozen=True)
class Taught:
    """
    Attributes
    ----------
    hidden : what meets the teacher's head, float32 (N, its d_model).
    head : its matrix of the logits.
    softcap : 0 where there is none.
    """

    hidden: Tensor
    head: Head
    softcap: float = 0.0


class _Softmax:
    """Sums of exp over tiles of logits, of n tokens, with a maximum that runs along."""

    def __init__(self, tiles: Tiles) -> None:
        self.top, self.sums = tiles.floats(tiles.n).fill_(-torch.inf), tiles.floats(tiles.n)

    def add(self, block: slice, logits: Tensor) -> Tensor:
        """Logits become their exp less the maximum so far; what earlier sums shrink by, (block,)."""
        highest = torch.maximum(self.top[block], logits.amax(1))
        shrunk = (self.top[block] - highest).exp_()
        self.top[block] = highest
        logits.sub_(highest[:, None]).exp_()
        self.sums[block].mul_(shrunk).add_(logits.sum(1))
        return shrunk

    def log(self) -> Tensor:
        """log Σ exp, (n,), in the place of the maxima."""
        return self.top.add_(self.sums.log())


def both(loss: LREC, tiles: Tiles, teacher: Tiles, learns: bool) -> tuple[Tensor, Tensor]:
    """Losses (N,), and where it ``learns`` their gradients by the hidden states (N, d_model), else nothing."""
    hidden = tiles.problem.hidden
    gradient = tiles.floats(*(hidden.shape if learns else (0, hidden.shape[1])))
    by_own, by_taught = gradient[: tiles.n], tiles.floats(tiles.n if learns else 0, hidden.shape[1])
    own, taught = _Softmax(tiles), _Softmax(teacher)
    correct, apart = tiles.floats(tiles.n), tiles.floats(tiles.n)
    scratch = tiles.floats(tiles.block * tiles.width)
    theirs = teacher.stretches()  # not zipped, which would hold a pair until the next one is there
    for start, words, head in tiles.stretches():
        _, _, other = next(theirs)
        for block in tiles.blocks():
            logits = tiles.logits(tiles.inputs(block), head, words)
            said = teacher.logits(teacher.inputs(block), other, words)
            here, at = within(tiles.labels[block] - start, len(head))
            correct[block] += logits.gather(1, at).squeeze(1).mul_(here)
            slopes = tiles.slopes(logits) if learns else None
            difference = torch.sub(said, logits, out=scratch[: logits.numel()].view_as(logits))
            shrunk = taught.add(block, said)
            apart[block].mul_(shrunk).add_(difference.mul_(said).sum(1))
            if learns:
                by_taught[block].mul_(shrunk[:, None])
                tiles.add_product(by_taught[block], said if slopes is None else said.mul_(slopes), head)
            shrunk = own.add(block, logits)
            if learns:
                by_own[block].mul_(shrunk[:, None])
                tiles.add_product(by_own[block], logits if slopes is None else logits.mul_(slopes), head)
        del head, other  # before the next stretches are decoded
    if learns:
        by_own.mul_((1 + loss.ce) / own.sums[:, None]).sub_(by_taught.div_(taught.sums[:, None]))
        del by_taught
        minus_labels(tiles, by_own, correct, loss.ce)
    log_sums = own.log()
    losses = apart.div_(taught.sums).add_(log_sums).sub_(taught.log())
    losses.add_(log_sums.sub_(correct), alpha=loss.ce)
    return spread(tiles, losses), to_hidden(tiles, gradient) if learns else gradient
