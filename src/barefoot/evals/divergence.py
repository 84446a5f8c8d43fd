"""Perplexity and Kullback-Leibler divergence from logits, in nats, in one pass over tiles of positions.

The convention is the field's: a text is cut into windows, and only the second half of each window is scored, so that
every scored token has at least half a window of context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """Log-probabilities along the last axis, in double precision."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def kl(reference: Floats, logits: Floats) -> NDArray[np.float64]:
    """KL(reference ‖ logits) of each position: (n, vocabulary) twice → (n,), in nats, never negative by rounding."""
    p, q = log_softmax(reference), log_softmax(logits)
    result: NDArray[np.float64] = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)
    return result


def nll(logits: Floats, targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Negative log-likelihood of each position's target: (n, vocabulary), (n,) → (n,), in nats."""
    return -np.take_along_axis(log_softmax(logits), targets[:, None], axis=-1)[:, 0]


@dataclass
class Divergence:
    """Accumulates a candidate against a reference, tile by tile."""

    kls: list[NDArray[np.float64]] = field(default_factory=list)
    nlls: list[NDArray[np.float64]] = field(default_factory=list)
    reference_nlls: list[NDArray[np.float64]] = field(default_factory=list)
    n_same_top: int = 0

    def add(self, reference: Floats, logits: Floats, targets: NDArray[np.int64]) -> None:
        """Count positions whose next tokens are ``targets``: logits (n, vocabulary), targets (n,)."""
        self.kls.append(kl(reference, logits))
        self.nlls.append(nll(logits, targets))
        self.reference_nlls.append(nll(reference, targets))
        self.n_same_top += int((reference.argmax(-1) == logits.argmax(-1)).sum())

    @property
    def summary(self) -> dict[str, float]:
        """kl_mean, kl_p99, perplexity, reference_perplexity, same_top (a fraction), n_tokens."""
        kls = np.concatenate(self.kls)
        return {
            "kl_mean": float(kls.mean()),
            "kl_p99": float(np.quantile(kls, 0.99)),
            "perplexity": float(np.exp(np.concatenate(self.nlls).mean())),
            "reference_perplexity": float(np.exp(np.concatenate(self.reference_nlls).mean())),
            "same_top": self.n_same_top / len(kls),
            "n_tokens": len(kls),
        }


def windows(tokens: Sequence[int], window: int, bos: int | None = None) -> Iterator[list[int]]:
    """Whole windows of ``window`` tokens, one after the other; with ``bos``, it takes the first place of each."""
    step = window - (bos is not None)
    for start in range(0, len(tokens) - step + 1, step):
        yield ([bos] if bos is not None else []) + list(tokens[start : start + step])
