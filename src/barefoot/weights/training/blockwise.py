"""The loop: one layer's parameters against what the layer should have made of the text.

Following OmniQuant (Shao et al. 2024, arXiv:2308.13137, equation 1) with two streams: the inputs are what the layers
before, as they are stored now, make of the text; the targets are what the layer of full precision makes of what the
layers of full precision made of it. So a layer also learns to undo the errors that reach it.

    minimize over θ   mean of (F(W, X) − F(Q_θ(W), X_q))² / mean of (F(W, X) − X_q)²

AdamW without decay, rates by group falling along a cosine to a twentieth, minibatches of whole windows in an order that
the seed decides. Some windows are held out; the parameters that were best on them, at the start or at the end, win.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Progress = Callable[[int, int], None]  # steps done, in all


class Student(Protocol):
    """What is learned: parameters by learning rate, and the weights that follow from them."""

    def groups(self) -> Sequence[tuple[list[Tensor], float]]: ...

    def weights(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Schedule:
    """``epochs`` over the text in minibatches of ``batch`` windows; one window in ``held_out`` is not trained on."""

    epochs: int
    batch: int
    held_out: int = 8
    seed: int = 0

    def n_steps(self, n_windows: int) -> int:
        return self.epochs * math.ceil(len(self.split(n_windows)[0]) / self.batch)

    def split(self, n_windows: int) -> tuple[list[int], list[int]]:
        """Windows to train on, and windows to judge by; of fewer than two, the same for both."""
        judged = list(range(self.held_out - 1, n_windows, self.held_out)) if self.held_out else []
        trained = [i for i in range(n_windows) if i not in set(judged)]
        return (trained, judged or trained) if trained else (judged, judged)


def train(
    function: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    student: Student,
    inputs: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    schedule: Schedule,
    progress: Progress | None = None,
) -> tuple[float, float]:
    """Train in place; the relative loss on the held-out windows before and after.

    inputs, targets : windows float32 (n, d_model), all of one length
    """
    x, y = (torch.from_numpy(np.stack(windows)) for windows in (inputs, targets))
    trained, judged = schedule.split(len(x))
    scale = float((y - x).square().mean()) or 1.0
    parameters = [p for group, _ in student.groups() for p in group]

    def judge() -> float:
        with torch.no_grad():
            weights = student.weights()
            losses = [(function(weights, x[i : i + 1]) - y[i]).square().mean() for i in judged]
        return float(torch.stack(losses).mean()) / scale

    before, start = judge(), [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": rate} for group, rate in student.groups()], weight_decay=0.0, betas=(0.9, 0.95), fused=True
    )
    n_steps, step = schedule.n_steps(len(x)), 0
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(t / n_steps, 1)))
    )
    rng = np.random.default_rng(schedule.seed)
    for _ in range(schedule.epochs):
        order = rng.permutation(trained)
        for first in range(0, len(order), schedule.batch):
            some = torch.from_numpy(order[first : first + schedule.batch])
            loss = (function(student.weights(), x[some]) - y[some]).square().mean() / scale
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            decay.step()
            step += 1
            if progress is not None:
                progress(step, n_steps)
    after = judge()
    if not after < before:
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
    return before, after
