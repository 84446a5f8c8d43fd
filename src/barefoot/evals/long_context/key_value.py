"""A list of keys and codes, and a key whose code is asked for: SCBench's string retrieval, for models that complete.

prompt: a line "key: code" for each pair; then a line with one of the keys, to be completed. A guess of one of the codes
is right once in as many pairs as there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from barefoot.core.errors import InvalidInput
from barefoot.evals.long_context.prompts import Form, completion, largest, words
from barefoot.evals.long_context.sessions import Session, Turn

if TYPE_CHECKING:
    from barefoot.io.tokenizer import Tokenizer

HEADING = "A list of names and their codes:\n\n"
N_DIGITS = 4


def key_value(tokenizer: Tokenizer, n_tokens: int, depths: Sequence[float], seed: int) -> Session:
    """As many pairs as a prompt of ``n_tokens`` holds; those at ``depths`` of the list are asked for.

    For :func:`.sessions.apart`, or in turn. Keys are words of one token where they stand in a text.

    Raises
    ------
    InvalidInput : a depth outside 0 to 1, or the prompt holds no pair, or the vocabulary too few words.
    """
    if not all(0 <= depth <= 1 for depth in depths):
        raise InvalidInput(f"a depth is 0 (the beginning) to 1 (the end), got {list(depths)}")
    rng = np.random.default_rng(seed)
    keys = rng.permutation([word for word, _ in words(tokenizer)]).tolist()
    first, last = 10 ** (N_DIGITS - 1), 10**N_DIGITS
    codes = map(str, rng.choice(np.arange(first, last), min(len(keys), last - first), replace=False))
    pairs = list(zip(keys, codes, strict=False))

    def prompt(n: int) -> tuple[int, ...]:
        return Form().prompt(tokenizer, HEADING + "\n".join(f"{key}: {code}" for key, code in pairs[:n]))

    n = largest(len(pairs), lambda n: len(prompt(n)) <= n_tokens)
    if n == 0:
        raise InvalidInput(f"{n_tokens} tokens hold no pair of a key and a code", cure="use a longer context")
    if n == len(pairs):
        raise InvalidInput(
            f"{n} pairs have keys of one token; they don't fill {n_tokens}", cure="use a shorter context"
        )
    asked = [(depth, pairs[round(depth * (n - 1))]) for depth in depths]
    turns = (Turn((), *completion(tokenizer, f"\n{key}: ", code), depth) for depth, (key, code) in asked)
    return Session(prompt(n), tuple(turns))
