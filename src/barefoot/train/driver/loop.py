"""The training loop: micro-batches, a step of the optimizer behind them, evaluation, a state that survives a kill."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from barefoot.optim import Optimizer
from barefoot.optim.adamw import Adam
from barefoot.train import MicroBatch
from barefoot.train.driver import state
from barefoot.train.losses import Loss
from barefoot.weights.recycling import Recycler, recycled


class Data(Protocol):
    """Where micro-batches come from."""

    def step(self) -> Sequence[MicroBatch]:
        """Those of the next step."""

    @property
    def place(self) -> Mapping[str, int]:
        """From which the next step's begin."""


class Learner(Protocol):
    """What is trained: a ``Decoder`` or a ``SideDecoder``."""

    @property
    def recycler(self) -> Recycler | None:
        """Lends what a pass allocates, where all of that asks for it."""

    def loss(self, batch: MicroBatch, loss: Loss) -> torch.Tensor:
        """The mean over the tokens that predict something."""

    def adapters(self) -> dict[str, torch.nn.Parameter]:
        """What learns, by name."""

    def settled(self) -> dict[str, torch.Tensor]:
        """What has learned, and no longer does; by the same names."""

    def advance(self, step: int, steps: int) -> dict[str, slice]:
        """Have only that learn which is to behind ``step`` of ``steps``: what rows are left of those that lost some."""

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...


@dataclass(frozen=True)
class Settings:
    """
    Attributes
    ----------
    steps : of the optimizer, in all.
    rate : the learning rate of a step, counted from 0.
    clip : the largest norm of all gradients together; 0 for any.
    evaluate_every, save_every : steps between evaluations, and between states that are written; 0 for never.
    seed : of what dropout draws.
    """

    steps: int
    rate: Callable[[int], float]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    evaluate_every: int = 0
    save_every: int = 50
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """What a step was. ``loss`` : nats a predicted token, before it; ``held_out`` : behind it, where there is one. One
    whose ``norm`` or loss is not finite has changed nothing."""

    step: int
    loss: float
    rate: float
    norm: float
    n_tokens: int
    seconds: float
    held_out: float | None = None


class Trainer:
    """
    Parameters
    ----------
    identity : tells this training from another; a state of another is refused.
    folder : where the state is kept, which is made; a state that is there is gone on from.
    optimizer : a state goes on with any that remembers the same.
    keep_best : called when the held-out loss is lower than ever.
    """

    def __init__(
        self,
        decoder: Learner,
        loss: Loss,
        settings: Settings,
        identity: str,
        folder: Path,
        *,
        optimizer: Optimizer | None = None,
        keep_best: Callable[[], None] | None = None,
    ) -> None:
        self.decoder, self.loss, self.settings = decoder, loss, settings
        self._identity, self._path = identity, folder / state.NAME
        self._keep_best = keep_best
        decoder.advance(0, settings.steps)
        self.learned = decoder.adapters()
        folder.mkdir(parents=True, exist_ok=True)
        rule = {"betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
        self._optimizer = (optimizer or Adam()).over(list(self.learned.values()), folder, **rule)
        self.progress = state.Progress()
        torch.manual_seed(settings.seed)
        if self._path.is_file():
            file = state.StateFile(self._path, identity)
            self.progress = file.progress
            self._advance()
            file.restore(self.learned, decoder.settled(), self._optimizer)

    def run(self, data: Data, held_out: Iterable[MicroBatch] = ()) -> Iterator[Step]:
        """Train to the last step; ``data`` begins at ``progress.data``.

        ``held_out`` is gone through at each evaluation, and once before the first step.
        """
        progress, settings = self.progress, self.settings
        held = list(held_out) if settings.evaluate_every else []
        while progress.step < settings.steps:
            started = time.perf_counter()
            batches, rate = data.step(), settings.rate(progress.step)
            loss, norm = self._step(batches, rate)
            seconds = time.perf_counter() - started
            progress.step, progress.data = progress.step + 1, dict(data.place)
            self._advance()
            last = progress.step == settings.steps
            judged = None
            if held and (last or progress.step % settings.evaluate_every == 0):
                judged = self.evaluate(held)
                if progress.best is None or judged < progress.best:
                    progress.best, progress.best_step = judged, progress.step
                    if self._keep_best is not None:
                        self._keep_best()
            n_tokens = sum(len(batch.ids) for batch in batches)
            yield Step(progress.step, loss, rate, norm, n_tokens, seconds, judged)
            if last or (settings.save_every and progress.step % settings.save_every == 0):
                self.save()

    def _step(self, batches: Sequence[MicroBatch], rate: float) -> tuple[float, float]:
        """The mean loss over all predicted tokens of the step, and the norm of its gradient."""
        self.decoder.train()
        total, loss = sum(batch.n_predicted for batch in batches), 0.0
        for batch in batches:
            if batch.n_predicted:
                with recycled(self.decoder.recycler):
                    part = self.decoder.loss(batch, self.loss) * (batch.n_predicted / total)
                    part.backward()
                    loss += float(part.detach())
        norm = self._clip()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if math.isfinite(norm) and math.isfinite(loss):
            self._optimizer.step()
        else:
            self.progress.skipped += 1
        self._optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def _clip(self) -> float:
        """Scale all gradients down together where their norm is larger than it may be; the norm before."""
        grads = [p.grad for p in self.learned.values() if p.grad is not None]
        norm = float(torch.stack([grad.norm() for grad in grads]).norm()) if grads else 0.0
        if self.settings.clip and self.settings.clip < norm < math.inf:
            for grad in grads:
                grad.mul_(self.settings.clip / norm)
        return norm

    def _advance(self) -> None:
        """Let go of what doesn't learn any more from here on, and of its moments."""
        for name, rows in self.decoder.advance(self.progress.step, self.settings.steps).items():
            self._optimizer.keep(self.learned[name], rows)
        still = self.decoder.adapters()
        for name in self.learned.keys() - still.keys():
            self._optimizer.forget(self.learned[name])
        self.learned = still

    def evaluate(self, batches: Iterable[MicroBatch]) -> float:
        """The mean loss over all predicted tokens; the random state doesn't change."""
        self.decoder.eval()
        total, loss = 0, 0.0
        with torch.no_grad():
            for batch in batches:
                if batch.n_predicted:
                    with recycled(self.decoder.recycler):
                        loss += float(self.decoder.loss(batch, self.loss)) * batch.n_predicted
                    total += batch.n_predicted
        return loss / total if total else float("nan")

    def save(self) -> None:
        """Write the state."""
        if self.decoder.recycler is not None:
            self.decoder.recycler.clear()
        settled = self.decoder.settled()
        state.save(self._path, self._identity, self.progress, self.learned, settled, self._optimizer)
