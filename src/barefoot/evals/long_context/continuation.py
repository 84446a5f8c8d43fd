"""Real text that goes on behind a compressed prompt: divergence from the full cache, and likelihood, token by token.

The full cache's distributions are computed once and kept for all arms as *log-probabilities* in float16: 2 × vocabulary
bytes a position, 24 MiB for 256 positions of 49,152 tokens (:func:`reference_bytes`); arrays that are too large can be
saved and mapped. Rounding changes a logarithm by at most 2^-11 of itself, so what is likely is kept best, and the
divergence that it feigns, E[(2^-11 log p)²] / 2, is below 1e-6 nats for text; logits in float16 would feign 1e-5.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from barefoot.evals.divergence import Divergence, log_softmax
from barefoot.evals.long_context.drivers import Driver, Floats, feed
from barefoot.evals.long_context.sessions import Ids
from barefoot.evals.scoring import COMPARE_ROWS, spread_windows

if TYPE_CHECKING:
    from barefoot.io.tokenizer import Tokenizer

Halves = NDArray[np.float16]
LEAST = float(np.finfo(np.float16).min)


@dataclass(frozen=True)
class Passage:
    """A text cut in two. The first token of ``continuation`` is fed but not scored, since what foresees it is the
    prompt's own pass, before the cache was compressed."""

    prompt: Ids
    continuation: Ids

    @property
    def n_scored(self) -> int:
        return len(self.continuation) - 1


def passages(text: str, tokenizer: Tokenizer, n_prompt: int, n_scored: int, n: int) -> list[Passage]:
    """At most ``n`` passages from all over the text.

    Raises
    ------
    InvalidInput : the text does not fill one.
    """
    found = spread_windows(text, tokenizer, n_prompt + n_scored + 1, n).tolist()
    return [Passage(tuple(ids[:n_prompt]), tuple(ids[n_prompt:])) for ids in found]


def reference_bytes(n_scored: int, vocab_size: int) -> int:
    """What :func:`reference` returns for a passage."""
    return n_scored * vocab_size * 2


def reference(driver: Driver, passage: Passage, *, stepwise: bool = True) -> Halves:
    """The log-probabilities, float16 (n_scored, vocabulary), that the full cache gives along the continuation."""
    found: Halves = np.empty((passage.n_scored, driver.spec.vocab_size), np.float16)
    _continue(driver, passage, functools.partial(_keep, found), stepwise=stepwise)
    return found


def diverge(
    driver: Driver, texts: Sequence[Passage], references: Iterable[Halves], *, stepwise: bool = True
) -> dict[str, float]:
    """A cache along passages whose :func:`reference` by the full cache is given, taken up one at a time.

    Returns what :class:`~barefoot.evals.divergence.Divergence` sums up, with ``nll`` and ``reference_nll``, nats of a
    token. ``stepwise`` decodes the continuation, as generating would; else it is one prefill.
    """
    divergence = Divergence()
    for passage, expected in zip(texts, references, strict=True):
        targets = np.asarray(passage.continuation[1:], np.int64)
        _continue(driver, passage, functools.partial(_compare, divergence, expected, targets), stepwise=stepwise)
    summary = divergence.summary
    summary["nll"] = math.log(summary["perplexity"])
    summary["reference_nll"] = math.log(summary["reference_perplexity"])
    return summary


def _continue(driver: Driver, passage: Passage, take: functools.partial[None], *, stepwise: bool) -> None:
    driver.reset()
    driver.prefill(passage.prompt)
    feed(driver, passage.continuation[:-1], take, stepwise=stepwise)


def _keep(found: Halves, start: int, logits: Floats) -> None:
    for row in range(0, len(logits), COMPARE_ROWS):
        some = logits[row : row + COMPARE_ROWS]
        found[start + row : start + row + len(some)] = np.maximum(log_softmax(some), LEAST)


def _compare(divergence: Divergence, expected: Halves, targets: NDArray[np.int64], start: int, logits: Floats) -> None:
    for row in range(0, len(logits), COMPARE_ROWS):
        some = logits[row : row + COMPARE_ROWS]
        rows = slice(start + row, start + row + len(some))
        divergence.add(expected[rows].astype(np.float32), some, targets[rows])
