"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.errors import InvalidInput

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn; the defaults are greedy.

    Filters apply in this order: repetition penalty, temperature, min-p, top-k, top-p.

    Attributes
    ----------
    temperature : divides the logits; 0 takes the largest and ignores the filters after it.
    min_p : tokens less probable than this fraction of the most probable one are dropped; 0 drops none.
    top_k : so many most probable tokens are kept; 0 keeps all.
    top_p : the fewest most probable tokens whose probabilities sum to at least this are kept; 1 keeps all.
    repetition_penalty : logits of tokens seen are divided by it when positive, multiplied when negative; 1 is none.
    seed : of the generator that ``rng`` makes; None draws a new one each time.
    """

    temperature: float = 0.0
    min_p: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, allowed, text in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or a positive number"),
            ("top_k", isinstance(self.top_k, int) and self.top_k >= 0, "a whole number from 0 on"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "a positive number"),
        ):
            if not allowed:
                raise InvalidInput(f"{name} must be {text}, got {getattr(self, name)!r}")

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


def sample(logits: F32, history: Sequence[int], params: SamplingParams, rng: np.random.Generator) -> int:
    """The id of the next token.

    Parameters
    ----------
    logits : float32 (vocab,); not changed.
    history : ids seen so far, for the repetition penalty.
    """
    if params.repetition_penalty != 1 and len(history):
        logits = logits.copy()
        seen = np.unique(np.asarray(history))
        picked = logits[seen]
        factor = np.float32(params.repetition_penalty)
        logits[seen] = np.where(picked > 0, picked / factor, picked * factor)
    if params.temperature == 0:
        return ops.argmax(np.ascontiguousarray(logits))
    ids, probabilities = candidates(logits, params)
    return int(ids[rng.choice(len(ids), p=probabilities)])


def candidates(logits: F32, params: SamplingParams) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """The tokens that the filters leave, most probable first, and their probabilities, which sum to 1."""
    n = len(logits)
    largest, temperature = float(logits.max()), params.temperature
    floor, total = -np.inf, None
    if params.min_p > 0:
        floor = largest + temperature * np.log(params.min_p)
    if 0 < params.top_k < n:
        floor = max(floor, float(np.partition(logits, n - params.top_k)[n - params.top_k]))
    elif params.top_p < 1 and params.min_p == 0:
        # Tokens below (1 - top_p) / n of all sum to less than 1 - top_p: never needed, so never sorted.
        weights = np.subtract(logits, np.float32(largest))
        np.divide(weights, np.float32(temperature), out=weights)
        np.exp(weights, out=weights)
        total = float(weights.sum(dtype=np.float64))
        del weights
        floor = largest + temperature * np.log(min(1.0, total * (1 - params.top_p) / n))
    ids = np.flatnonzero(logits >= np.float32(floor))
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    if params.top_k:
        ids = ids[: params.top_k]  # equal logits may let more through
    weights = np.exp((logits[ids].astype(np.float64) - largest) / temperature)
    if params.top_p < 1:
        reached = np.cumsum(weights) / (total or weights.sum())
        weights = weights[: int(np.searchsorted(reached, params.top_p)) + 1]
    return ids[: len(weights)], weights / weights.sum()
