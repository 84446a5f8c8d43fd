"""Random words, then the same words again: each is where the one before it stood, and nowhere else (induction).

prompt   "Words:" and N different words of one token each
turn     "Words:" and the first of them; the others are foreseen

Nothing but the far context tells them, so every word that a cache has lost is a word that is missed. The heading takes
the place of the first token, on which models rest their attention: without it SmolLM2-135M copies a third of the words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from barefoot.core.errors import InvalidInput
from barefoot.evals.long_context.prompts import PLAIN, words
from barefoot.evals.long_context.sessions import Session, Turn

if TYPE_CHECKING:
    from barefoot.io.tokenizer import Tokenizer

HEADING = "Words:"


def copying(tokenizer: Tokenizer, n_words: int, seed: int) -> Session:
    """``n_words`` words, and the N - 1 of their second copy that follow from the one before, as one answer.

    Raises
    ------
    InvalidInput : fewer than two words, or more than the vocabulary has as single tokens.
    """
    known = [token for _, token in words(tokenizer, n_words)]
    if not 2 <= n_words <= len(known):
        raise InvalidInput(f"2 to {len(known)} words can be copied with this vocabulary, got {n_words}")
    ids = tuple(np.random.default_rng(seed).choice(known, n_words, replace=False).tolist())
    again = tuple(tokenizer.encode(f"\n\n{HEADING}", add_bos=False))
    return Session(PLAIN.prompt(tokenizer, HEADING) + ids, (Turn((), again + ids[:1], ids[1:], 0.0),))
