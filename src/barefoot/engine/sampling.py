"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.core.ledger import Footprint, Term, entry

F32 = npt.NDArray[np.float32]

BYTES_PER_TOKEN = 17  # of the vocabulary: two copies of the logits, running sums in float64, a mask
FEW = 0.25  # of the vocabulary: up to so many tokens are picked without sorting the others


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
    seed : of the generator that ``rng`` makes; None takes a new one each time.
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
            ("seed", self.seed is None or self.seed >= 0, "a whole number from 0 on"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "a positive number"),
        ):
            if not allowed:
                raise InvalidInput(f"{name} must be {text}, got {getattr(self, name)!r}")

    def rng(self) -> np.random.Generator | None:
        """A new generator; None for a temperature of 0, since numpy.random takes 3 MiB when it is first used."""
        return np.random.default_rng(self.seed) if self.temperature > 0 else None

    def footprint(self, vocab_size: int) -> Footprint:
        """The passing arrays of drawing a token; none when greedy and unpenalized."""
        if self.temperature == 0 and self.repetition_penalty == 1:
            return Footprint()
        return entry("sampling", "workspace", [Term("arrays", vocab_size, BYTES_PER_TOKEN)], phases=("decode",))


def sample(logits: F32, history: Sequence[int], params: SamplingParams, rng: np.random.Generator | None) -> int:
    """The id of the next token.

    A rank among the sorted logits is drawn. Where the whole vocabulary was sorted, the token of that rank is looked up:
    no array of its ids is needed.

    Parameters
    ----------
    logits : float32 (vocab,); not changed.
    history : ids seen so far, for the repetition penalty.
    rng : where randomness comes from; None is enough for a temperature of 0.
    """
    if params.repetition_penalty != 1 and len(history):
        logits = penalized(logits, history, params.repetition_penalty)
    if params.temperature == 0:
        return ops.argmax(np.ascontiguousarray(logits))
    assert rng is not None
    values, cumulative, ids = kept(logits, params)
    rank = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    if ids is not None:
        return int(ids[rank])
    equal_before = int(np.count_nonzero(values[:rank] == values[rank]))
    return int(np.flatnonzero(logits == values[rank])[equal_before])


def penalized(logits: F32, history: Sequence[int], penalty: float) -> F32:
    """A copy in which tokens of ``history`` are less likely."""
    logits = logits.copy()
    seen = np.unique(np.asarray(history))
    picked, factor = logits[seen], np.float32(penalty)
    logits[seen] = np.where(picked > 0, picked / factor, picked * factor)
    return logits


def kept(logits: F32, params: SamplingParams) -> tuple[F32, npt.NDArray[np.float64], npt.NDArray[np.int32] | None]:
    """What the filters leave: logits, largest first, and the running sums of exp((logit - largest) / temperature).

    The third are the ids of these tokens, and maybe of more after them; None unless ``top_k`` kept few.
    """
    values, largest, ids = logits, float(logits.max()), None
    if 0 < params.top_k <= FEW * len(logits):
        values, ids = np.empty(params.top_k, np.float32), np.empty(params.top_k, np.int32)
        ops.top_k(np.ascontiguousarray(logits), values, ids)
    if params.min_p > 0:
        values = values[values >= np.float32(largest + params.temperature * np.log(params.min_p))]
    if ids is None:
        values = np.sort(values)[::-1][: params.top_k or None]
    cumulative = values.astype(np.float64)
    cumulative -= largest
    cumulative /= params.temperature
    np.exp(cumulative, out=cumulative)
    np.cumsum(cumulative, out=cumulative)
    if params.top_p < 1:
        n_kept = int(np.searchsorted(cumulative, params.top_p * cumulative[-1])) + 1
        values, cumulative = values[:n_kept], cumulative[:n_kept]
    return values, cumulative, ids
