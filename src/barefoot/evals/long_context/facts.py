"""Facts in a text: one, asked for at the end of the prompt (a needle in a haystack), or several, asked for later.

A fact is "The access code of the lantern is 4821." between two sentences of the caller's text. No code stands in the
text, none is there twice, and a guess is right once in 9,000 (four digits).

needle           prompt: text with the fact, question; then the answer's opening, the answer
shared context   prompt: text with the facts, an answer that asks for questions; then question, opening, answer, each

A cache that compresses a needle's prompt by what its end attends to has seen the question; in a shared context it has
not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from barefoot.core.errors import InvalidInput
from barefoot.evals.long_context.prompts import Form, completion, largest
from barefoot.evals.long_context.sessions import Ids, Session, Turn
from barefoot.evals.scoring import LONGEST_TOKEN

if TYPE_CHECKING:
    from barefoot.io.tokenizer import Tokenizer

# fmt: off
NOUNS = (
    "lantern", "harbor", "violin", "glacier", "orchard", "compass", "kettle", "bridge", "falcon", "cellar",
    "mirror", "tunnel", "garden", "anchor", "pillow", "ladder", "meadow", "candle", "blanket", "hammer", "canyon",
    "basket", "saddle", "walnut", "teapot", "castle", "ribbon", "chimney", "barrel", "cottage",
)
# fmt: on
NEAR = 100  # words
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*$")


@dataclass(frozen=True)
class Wording:
    """How facts are stated and asked for, ``{noun}`` and ``{code}`` standing for theirs.

    ``before`` and ``after`` the text; ``ready`` is the answer to a shared context, after which questions come.
    """

    fact: str = "The access code of the {noun} is {code}."
    question: str = "What is the access code of the {noun}?"
    opening: str = "The access code of the {noun} is "
    before: str = ""
    after: str = "\n\n"
    ready: str = "I have read the text. What do you want to know?"
    n_digits: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.n_digits <= 9:
            raise InvalidInput(f"a code has 1 to 9 digits, got {self.n_digits}")


WORDING = Wording()


@dataclass(frozen=True)
class Fact:
    noun: str
    code: str
    depth: float


def needle(
    text: str,
    tokenizer: Tokenizer,
    form: Form,
    n_tokens: int,
    depth: float,
    seed: int,
    wording: Wording = WORDING,
) -> Session:
    """A stretch of ``text`` with one fact at ``depth``, the question at the prompt's end: as many words as go into a
    prompt of ``n_tokens``.

    Raises
    ------
    InvalidInput : a depth outside 0 to 1, or the text is too short, or the prompt for any of it.
    """
    stretch, (fact,) = _draw(text, n_tokens, (depth,), seed, wording)
    question = wording.after + _fill(wording.question, fact)

    def prompt(body: str) -> Ids:
        return form.prompt(tokenizer, wording.before + body + question, "")

    return Session(_fitted(prompt, stretch, (fact,), n_tokens, wording), (_turn(tokenizer, fact, (), wording),))


def shared_context(
    text: str,
    tokenizer: Tokenizer,
    form: Form,
    n_tokens: int,
    n_facts: int,
    seed: int,
    wording: Wording = WORDING,
) -> Session:
    """A stretch of ``text`` with ``n_facts`` facts, evenly spread, each asked for in a turn of its own, in any order.

    For :func:`.sessions.in_turn` and :func:`.sessions.apart`. Errors as in :func:`needle`.
    """
    depths = tuple((i + 0.5) / n_facts for i in range(n_facts))
    stretch, facts = _draw(text, n_tokens, depths, seed, wording)

    def prompt(body: str) -> Ids:
        return form.prompt(tokenizer, wording.before + body, wording.ready)

    order = np.random.default_rng([seed, n_facts]).permutation(n_facts)
    turns = (
        _turn(tokenizer, fact, form.further(tokenizer, _fill(wording.question, fact)), wording)
        for fact in (facts[i] for i in order)
    )
    return Session(_fitted(prompt, stretch, facts, n_tokens, wording), tuple(turns))


def _draw(
    text: str, n_tokens: int, depths: Sequence[float], seed: int, wording: Wording
) -> tuple[list[str], tuple[Fact, ...]]:
    """Words from a random place of the text on, more than enough, and facts whose codes they don't hold."""
    if not all(0 <= depth <= 1 for depth in depths):
        raise InvalidInput(f"a depth is 0 (the beginning) to 1 (the end), got {list(depths)}")
    if not 1 <= len(depths) <= len(NOUNS):
        raise InvalidInput(f"1 to {len(NOUNS)} facts have names, got {len(depths)}")
    rng = np.random.default_rng(seed)
    length = LONGEST_TOKEN * n_tokens
    start = int(rng.integers(max(1, len(text) - length)))
    stretch = text[start : start + length]
    nouns = rng.choice(NOUNS, len(depths), replace=False).tolist()
    codes: list[str] = []
    while len(codes) < len(depths):
        code = str(rng.integers(10 ** (wording.n_digits - 1), 10**wording.n_digits))
        if code not in stretch and code not in codes:
            codes.append(code)
    facts = tuple(Fact(*each) for each in zip(nouns, codes, depths, strict=True))
    return _from_a_sentence(stretch.split(), at_start=start == 0), facts


def _from_a_sentence(words: list[str], *, at_start: bool) -> list[str]:
    """The words from the first that begins a sentence on; with none near, from the second, since the first may be half
    a word."""
    if at_start:
        return words
    first = next((i + 1 for i, word in enumerate(words[:NEAR]) if _SENTENCE_END.search(word)), 1)
    return words[first:]


def _fitted(
    prompt: Callable[[str], Ids], words: list[str], facts: Sequence[Fact], n_tokens: int, wording: Wording
) -> Ids:
    """The prompt with as many of the words around the facts as keep it within ``n_tokens``."""

    def ids(n: int) -> Ids:
        return prompt(_planted(words[:n], [(_fill(wording.fact, fact), fact.depth) for fact in facts]))

    n = largest(len(words), lambda n: len(ids(n)) <= n_tokens)
    if n == len(words):
        raise InvalidInput(f"the text does not fill {n_tokens} tokens", cure="use more text, or a shorter context")
    if n == 0:
        raise InvalidInput(
            f"{n_tokens} tokens hold no text beside the facts and questions", cure="use a longer context"
        )
    return ids(n)


def _planted(words: Sequence[str], facts: Sequence[tuple[str, float]]) -> str:
    """The words with each fact where the sentence ends that is nearest to its depth; between any two words of a text
    without sentences."""
    ends: Sequence[int] = [i + 1 for i, word in enumerate(words) if _SENTENCE_END.search(word)]
    ends = [0, *ends] if ends else range(len(words) + 1)
    at: dict[int, list[str]] = {}
    for sentence, depth in facts:
        at.setdefault(min(ends, key=lambda end: abs(end - depth * len(words))), []).append(sentence)
    parts: list[str] = []
    for i in range(len(words) + 1):
        parts += [*at.get(i, ()), *words[i : i + 1]]
    return " ".join(parts)


def _turn(tokenizer: Tokenizer, fact: Fact, question: Ids, wording: Wording) -> Turn:
    opening, answer = completion(tokenizer, _fill(wording.opening, fact), fact.code)
    return Turn(question, opening, answer, fact.depth)


def _fill(pattern: str, fact: Fact) -> str:
    return pattern.format(noun=fact.noun, code=fact.code)
