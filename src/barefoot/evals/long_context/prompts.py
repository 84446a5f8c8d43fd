"""What the tasks' prompts are made of: turns of a conversation, words of one token, and as much as fits a length."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from barefoot.core.errors import InvalidInput

if TYPE_CHECKING:
    from barefoot.evals.long_context.sessions import Ids
    from barefoot.io.chat import ChatTemplate
    from barefoot.io.tokenizer import Segment, Tokenizer

COMMON_WORDS = 1024
_WORD = re.compile(rb" [a-z]{4,}")
_FIRST, _SECOND, _THIRD = "first message", "second message", "third message"


@dataclass(frozen=True)
class Form:
    """What a model is used to see around messages: ``before`` the first one, to ``ask`` for an answer to a message, and
    to go on to the ``next`` one after an answer. Plain text, the default, is for models without a template."""

    before: str = ""
    ask: str = "\n"
    next: str = "\n\n"
    templated: bool = False

    def prompt(self, tokenizer: Tokenizer, message: str, answer: str | None = None) -> Ids:
        """Ids of what a text begins with: a first message; with an ``answer``, that too."""
        parts: list[Segment] = [(self.before, True), (message, False)]
        if answer is not None:
            parts += [(self.ask, True), (answer, False)]
        return tuple(tokenizer.encode_segments(parts, add_bos=False if self.templated else None))

    def further(self, tokenizer: Tokenizer, message: str) -> Ids:
        """Ids of a message after an answer, up to where its own answer begins."""
        parts: list[Segment] = [(self.next, True), (message, False), (self.ask, True)]
        return tuple(tokenizer.encode_segments(parts, add_bos=False))


PLAIN = Form()


def chat_form(template: ChatTemplate | None, tokenizer: Tokenizer) -> Form:
    """The form that a chat template gives to messages; without a template, plain text.

    Raises
    ------
    InvalidInput : the template does not write messages one after the other.
    CorruptFile : as ``ChatTemplate.render``.
    """
    if template is None:
        return PLAIN
    roles = (("user", _FIRST), ("assistant", _SECOND), ("user", _THIRD))
    segments = template.render([{"role": role, "content": content} for role, content in roles], tokenizer)
    text = "".join(part for part, _ in segments)
    found = re.fullmatch(f"(.*){_FIRST}.*{_SECOND}(.*){_THIRD}(.*)", text, re.DOTALL)
    if found is None:
        raise InvalidInput("the chat template does not write messages one after the other", cure="leave it out")
    before, following, ask = found.groups()
    return Form(before, ask, following, templated=True)


def words(tokenizer: Tokenizer, n: int) -> list[tuple[str, int]]:
    """(word, id) of tokens that are a space and at least four small letters, no word twice: those of lowest id, which
    in vocabularies made by merging are the most common. ``n`` of them, or ``COMMON_WORDS`` if that is more; fewer where
    the vocabulary has no more."""
    found: dict[str, int] = {}
    for token in range(tokenizer.n_vocab):
        text = tokenizer.decode_bytes(token)
        if _WORD.fullmatch(text):
            found.setdefault(text[1:].decode(), token)
            if len(found) >= max(n, COMMON_WORDS):
                break
    return list(found.items())


def completion(tokenizer: Tokenizer, opening: str, answer: str) -> tuple[Ids, Ids]:
    """Ids of an opening and of the answer that goes on from it. What both texts share as tokens is the opening."""
    alone = tokenizer.encode(opening, add_bos=False)
    both = tokenizer.encode(opening + answer, add_bos=False)
    shared = next((i for i, (a, b) in enumerate(zip(alone, both, strict=False)) if a != b), len(alone))
    return tuple(both[:shared]), tuple(both[shared:])


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n up to ``most`` that fits, where all below one that fits do; 0 where none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
