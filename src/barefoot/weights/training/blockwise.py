"""The loop: one layer's parameters against what the layer should have made of the text.

Following OmniQuant (Shao et al. 2024, arXiv:2308.13137, equation 1) with two streams: the inputs are what the layers
before, as they are stored now, make of the text; the targets are what the layer of full precision makes of what the
layers of full precision made of it. So a layer also learns to undo the errors that reach it.

    minimize over θ   the mean over tokens of ‖F(W, X) − F(Q_θ(W), X_q)‖² / ‖F(W, X)‖²

Not in the paper: errors count relative to the token's own length. A norm is what every token meets next; and without
it, the few tokens of massive activations that language models have would be all that a layer learns.

AdamW without decay, rates by group falling along a cosine to a twentieth, minibatches of whole windows in an order that
the seed decides. Every eighth window is held out; the parameters that are better on these, at the start or at the end,
win, so a layer is never worse than it started, as far as they can tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from barefoot.weights.solvers import LayerProblem, Steps
from barefoot.weights.training.layer import Rounding, layer_function, unchanged

HELD_OUT = 8  # every eighth window
LAST_RATE = 0.05  # of the first
BETAS = (0.9, 0.95)


class Student(Protocol):
    """What is learned: parameters by learning rate, and the weights by role that follow from them."""

    def groups(self) -> Sequence[tuple[list[Tensor], float]]: ...

    def weights(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Those that are rounded may come as ``dtype``."""
        ...


@dataclass(frozen=True)
class Schedule:
    """``epochs`` over the text in minibatches of ``batch`` windows."""

    epochs: int
    batch: int
    seed: int = 0

    def split(self, n_windows: int) -> tuple[list[int], list[int]]:
        """Windows to train on and windows to judge by; the same where there are too few."""
        judged = list(range(HELD_OUT - 1, n_windows, HELD_OUT))
        trained = sorted(set(range(n_windows)) - set(judged))
        return trained, judged or trained

    def n_steps(self, n_windows: int) -> int:
        return self.epochs * math.ceil(len(self.split(n_windows)[0]) / self.batch)

    def rate(self, step: int, n_steps: int) -> float:
        """What the learning rates are multiplied by."""
        return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * min(step / n_steps, 1.0))) / 2


def learn(
    problem: LayerProblem,
    student: Student,
    schedule: Schedule,
    steps: Steps | None = None,
    *,
    compute: torch.dtype = torch.float32,
    rounding: Rounding = unchanged,
) -> tuple[float, float]:
    """Train ``student`` in place. Returns the error on the held-out windows at the start and at the end; whatever was
    better is kept.

    compute, rounding : as in :class:`~barefoot.weights.training.layer.LayerFunction`.
    """
    function = layer_function(problem, compute, rounding)
    x, y = torch.from_numpy(problem.inputs), torch.from_numpy(problem.targets)
    trained, judged = schedule.split(len(x))
    share = 1 / y.square().mean(dim=-1, keepdim=True).clamp(min=1e-20)

    def relative_error(weights: Mapping[str, Tensor], windows: Tensor) -> Tensor:
        return ((function(weights, x[windows]) - y[windows]).square() * share[windows]).mean()

    def judge() -> float:
        with torch.no_grad():
            weights = student.weights(compute)
            errors = [relative_error(weights, torch.tensor([i])) for i in judged]
        return float(torch.stack(errors).mean())

    parameters = [p for group, _ in student.groups() for p in group]
    before, start = judge(), [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": rate} for group, rate in student.groups()], betas=BETAS, weight_decay=0.0, fused=True
    )
    n_steps, step, rng = schedule.n_steps(len(x)), 0, np.random.default_rng(schedule.seed)
    for _ in range(schedule.epochs):
        order = rng.permutation(trained)
        for first in range(0, len(order), schedule.batch):
            some = torch.from_numpy(order[first : first + schedule.batch])
            for group, (_, rate) in zip(optimizer.param_groups, student.groups(), strict=True):
                group["lr"] = rate * schedule.rate(step, n_steps)
            loss = relative_error(student.weights(compute), some)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step += 1
            if steps is not None:
                steps(step, n_steps)
    after = judge()
    if not after < before:
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
    return before, after
