"""Questions on a context: asked in turn, each after the answers to those before, or each on the context alone.

What SCBench (Li et al., 2024, arXiv:2412.10319) calls multi-turn and multi-request. Here as there the right answer, not
the model's, is what the next turn sees, so that errors don't add up; other than there a turn's answer is opened for the
model ("The access code of the lantern is ") and the rest teacher-forced. Greedy decoding gives the right answer exactly
where each of its tokens is the likeliest after those before, so one pass gives the verdict and the likelihood.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from barefoot.evals.divergence import nll
from barefoot.evals.long_context.drivers import Driver, Floats, Fork, feed
from barefoot.evals.scoring import COMPARE_ROWS

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """A question, the answer's opening words and the answer, in token ids; at least one of the first two has some.

    ``depth`` is where in the context the answer stands: 0 its beginning, 1 its end.
    """

    question: Ids
    opening: Ids
    answer: Ids
    depth: float


@dataclass(frozen=True)
class Session:
    """A context, which is prefilled at once, and what is asked about it."""

    prompt: Ids
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Answer:
    """How the tokens of a right answer were foreseen: nats of each, and whether it was the likeliest one."""

    nlls: tuple[float, ...]
    right: tuple[bool, ...]

    @property
    def exact(self) -> bool:
        """Whether greedy decoding gives this answer."""
        return all(self.right)

    @property
    def log_probability(self) -> float:
        """Of the whole answer, in nats."""
        return -sum(self.nlls)


def in_turn(driver: Driver, session: Session, *, stepwise: bool = True) -> list[Answer]:
    """The answers when each turn follows those before it. ``stepwise`` as in :func:`.drivers.feed`, for the answers."""
    driver.reset()
    driver.prefill(session.prompt)
    answers: list[Answer] = []
    unseen: Ids = ()  # the last token of an answer is foreseen, and fed with what follows it
    for turn in session.turns:
        answers.append(_ask(driver, turn, unseen, stepwise=stepwise))
        unseen = turn.answer[-1:]
    return answers


def apart(driver: Driver, session: Session, fork: Fork | None = None, *, stepwise: bool = True) -> list[Answer]:
    """The answers when each turn follows the context alone: by a ``fork`` of it, or else by a prefill for each."""
    if fork is None:
        alone = (Session(session.prompt, (turn,)) for turn in session.turns)
        return [in_turn(driver, each, stepwise=stepwise)[0] for each in alone]
    driver.reset()
    driver.prefill(session.prompt)
    answers: list[Answer] = []
    for turn in session.turns:
        with fork(driver, len(session.prompt)) as branch:
            answers.append(_ask(branch, turn, (), stepwise=stepwise))
    return answers


def generate(driver: Driver, session: Session, n_tokens: int, stops: frozenset[int]) -> list[int]:
    """What greedy decoding says to the first turn when nothing opens its answer: at most ``n_tokens`` ids, none of
    ``stops``, which end it."""
    driver.reset()
    logits = driver.prefill(session.prompt)
    if session.turns[0].question:
        logits = driver.prefill(session.turns[0].question)
    said: list[int] = []
    while len(said) < n_tokens and (token := int(logits.argmax())) not in stops:
        said.append(token)
        logits = driver.decode(token)
    return said


def _ask(driver: Driver, turn: Turn, unseen: Ids, *, stepwise: bool) -> Answer:
    targets = np.asarray(turn.answer, np.int64)
    nlls: list[float] = []
    right: list[bool] = []
    first = driver.prefill([*unseen, *turn.question, *turn.opening])
    _foresee(targets, nlls, right, 0, first[None])
    feed(driver, turn.answer[:-1], functools.partial(_foresee, targets[1:], nlls, right), stepwise=stepwise)
    return Answer(tuple(nlls), tuple(right))


def _foresee(targets: NDArray[np.int64], nlls: list[float], right: list[bool], start: int, logits: Floats) -> None:
    for row in range(0, len(logits), COMPARE_ROWS):
        some = logits[row : row + COMPARE_ROWS]
        there = targets[start + row : start + row + len(some)]
        nlls.extend(nll(some, there).tolist())
        right.extend((some.argmax(-1) == there).tolist())
