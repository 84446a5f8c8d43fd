"""A JSON object of keys and codes, and a key whose code is asked for: SCBench's string retrieval, for small models.

prompt   a line ``"key": "code",`` for each pair, in braces
turn     the line of one of the keys, up to its code

A guess of one of the codes is right once in as many pairs as there are. In other forms ("key: code" without quotes,
sentences) SmolLM2-135M looks up half as many or fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from barefoot.core.errors import InvalidInput
from barefoot.evals.long_context.prompts import PLAIN, completion, largest, words
from barefoot.evals.long_context.sessions import Ids, Session, Turn

if TYPE_CHECKING:
    from barefoot.io.tokenizer import Tokenizer

FIRST_CODE, LAST_CODE = 1000, 9999
TOKENS_OF_A_PAIR = 8  # no fewer


def key_value(tokenizer: Tokenizer, n_tokens: int, depths: Sequence[float], seed: int) -> Session:
    """As many pairs as a prompt of ``n_tokens`` holds; those at ``depths`` of the list are asked for.

    For :func:`.sessions.apart`, or in turn. No key and no code is there twice.

    Raises
    ------
    InvalidInput : a depth outside 0 to 1, or the prompt holds no pair, or the vocabulary has too few words to fill it.
    """
    if not all(0 <= depth <= 1 for depth in depths):
        raise InvalidInput(f"a depth is 0 (the beginning) to 1 (the end), got {list(depths)}")
    rng = np.random.default_rng(seed)
    keys = rng.permutation([word for word, _ in words(tokenizer, n_tokens // TOKENS_OF_A_PAIR)]).tolist()
    codes = map(str, rng.permutation(np.arange(FIRST_CODE, LAST_CODE + 1)))
    pairs = list(zip(keys, codes, strict=False))

    def prompt(n: int) -> Ids:
        lines = ",\n".join(f' "{key}": "{code}"' for key, code in pairs[:n])
        return PLAIN.prompt(tokenizer, f"JSON data:\n{{\n{lines}\n}}\n")

    n = largest(len(pairs), lambda n: len(prompt(n)) <= n_tokens)
    if n == 0:
        raise InvalidInput(f"{n_tokens} tokens hold no pair of a key and a code", cure="use a longer context")
    if n == len(pairs):
        raise InvalidInput(
            f"{n} pairs are all there are, and {n_tokens} tokens hold more", cure="use a shorter context"
        )
    asked = [(depth, pairs[round(depth * (n - 1))]) for depth in depths]
    turns = (Turn((), *completion(tokenizer, f'\n"{key}": "', code), depth) for depth, (key, code) in asked)
    return Session(prompt(n), tuple(turns))
