"""Answers summed up, beside what the full cache reaches itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from barefoot.evals.long_context.sessions import Answer

Z = 1.96  # standard deviations on each side of 95 % of a normal distribution


@dataclass(frozen=True)
class Reach:
    """What a cache answers, of all and of the *valid*: those that the full cache answers.

    Attributes
    ----------
    n, exact : answers, and the share of them that greedy decoding gives whole; ``low`` to ``high`` is its interval at
        95 % (Wilson's).
    n_tokens, tokens : tokens of all answers, and the share that were the likeliest.
    nll : nats of a token, the mean over all.
    log_probability : of a whole answer in nats, the mean.
    n_valid, exact_of_valid : answers that the full cache gives whole, and the share of them given here; None of none.
    n_valid_tokens, tokens_of_valid : the same of single tokens.
    """

    n: int
    exact: float
    low: float
    high: float
    n_tokens: int
    tokens: float
    nll: float
    log_probability: float
    n_valid: int
    exact_of_valid: float | None
    n_valid_tokens: int
    tokens_of_valid: float | None


def reach(answers: Sequence[Answer], full: Sequence[Answer]) -> Reach:
    """Sum up ``answers``, at least one, to the questions whose answers by the full cache are ``full``."""
    exact = [answer.exact for answer in answers]
    tokens = [right for answer in answers for right in answer.right]
    nlls = [nats for answer in answers for nats in answer.nlls]
    valid = [here for here, there in zip(exact, full, strict=True) if there.exact]
    there_right = [right for answer in full for right in answer.right]
    valid_tokens = [here for here, there in zip(tokens, there_right, strict=True) if there]
    low, high = wilson(sum(exact), len(exact))
    return Reach(
        n=len(exact),
        exact=sum(exact) / len(exact),
        low=low,
        high=high,
        n_tokens=len(tokens),
        tokens=sum(tokens) / len(tokens),
        nll=sum(nlls) / len(nlls),
        log_probability=-sum(nlls) / len(answers),
        n_valid=len(valid),
        exact_of_valid=sum(valid) / len(valid) if valid else None,
        n_valid_tokens=len(valid_tokens),
        tokens_of_valid=sum(valid_tokens) / len(valid_tokens) if valid_tokens else None,
    )


def wilson(n_right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of which ``n_right`` out of ``n`` were seen (Wilson, 1927)."""
    share = n_right / n
    middle = share + Z * Z / (2 * n)
    spread = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
