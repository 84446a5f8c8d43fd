"""A conversation with a loaded model: what has been said, what of it lies in the KV store, and one answer at a time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from barefoot.core.errors import InvalidInput

if TYPE_CHECKING:
    from barefoot.cli.progress import Report
    from barefoot.engine.runner import F32, Engine
    from barefoot.engine.sampling import Sampler
    from barefoot.io.chat import ChatTemplate
    from barefoot.io.tokenizer import Tokenizer

Message = dict[str, str]


@dataclass(frozen=True)
class Answer:
    """One answer and what it took.

    ``n_prompt`` tokens were in the context when it began, ``n_prefilled`` of them not yet in the KV store.
    ``finish_reason`` is one of stop (the model ended it, or a stop string did), length, interrupted.
    """

    text: str
    finish_reason: str
    n_prompt: int
    n_prefilled: int
    n_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.n_prefilled / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Of the tokens after the first, which belongs to the prefill."""
        return (self.n_tokens - 1) / self.decode_seconds if self.n_tokens > 1 else 0.0


def opening(system: str | None) -> list[Message]:
    """The messages that a conversation begins with."""
    return [{"role": "system", "content": system}] if system else []


def encode(tokenizer: Tokenizer, template: ChatTemplate | None, messages: Sequence[Message], context: int) -> list[int]:
    """Token ids of a conversation that the assistant is to continue; without a template, of the last text as it is.

    Raises
    ------
    InvalidInput : they leave no room for an answer in a context of that many positions.
    """
    if template is None:
        ids = tokenizer.encode(messages[-1]["content"])
    else:
        ids = tokenizer.encode_segments(template.render(messages, tokenizer), add_bos=False)
    if len(ids) >= context:
        raise InvalidInput(
            f"the conversation has {len(ids):,} tokens with this prompt, the context holds {context:,}",
            cure=f"shorten it, begin anew (/reset in a chat), or use --context {2 * len(ids)} or more",
        )
    return ids


class Conversation:
    """Turns with one engine. What two turns have in common stays in the KV store and is not computed again.

    Parameters
    ----------
    template : how messages are written; None continues plain text, without a memory of earlier turns.
    system : a first message that tells the model how to behave.
    stops : texts that end an answer; they are not part of it.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        sampler: Sampler,
        *,
        system: str | None = None,
        stops: Sequence[str] = (),
        max_tokens: int,
    ) -> None:
        self._engine, self._tokenizer, self._template, self._sampler = engine, tokenizer, template, sampler
        self._stops, self._max_tokens = tuple(filter(None, stops)), max_tokens
        self._opening = opening(system)
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._messages = list(self._opening)
        self._held: list[int] = []  # tokens whose keys and values the engine holds
        self._engine.reset()

    def ask(
        self, prompt: str, on_text: Callable[[str], None], progress: Report, *, ids: list[int] | None = None
    ) -> Answer:
        """The answer to ``prompt``; its text is given to ``on_text`` as it comes. Ctrl-C ends it early.

        ``ids`` are the tokens of the conversation with this prompt, where the caller has them already.

        Raises
        ------
        InvalidInput : the conversation with this prompt does not leave room for a token; it stays as it was.
        """
        messages = [*self._messages, {"role": "user", "content": prompt}]
        context = self._engine.config.context
        ids = encode(self._tokenizer, self._template, messages, context) if ids is None else ids
        n_kept = self._keep_common(ids)
        answer = _AnswerText(self._tokenizer, self._stops, on_text)
        start = prefilled = time.perf_counter()
        try:
            self._held.extend(ids[n_kept:])
            logits = self._engine.prefill(ids[n_kept:], lambda done, total: progress(done, total, "reading the prompt"))
            prefilled = time.perf_counter()
            finish = self._generate(logits, answer, min(self._max_tokens, context - len(ids)))
        except KeyboardInterrupt:
            del self._held[self._engine.position :]
            finish = "interrupted"
        answer.flush()
        done = time.perf_counter()
        if answer.text:
            self._messages = [*messages, {"role": "assistant", "content": answer.text}]
        return Answer(
            text=answer.text,
            finish_reason=finish,
            n_prompt=len(ids),
            n_prefilled=len(ids) - n_kept,
            n_tokens=answer.n_tokens,
            prefill_seconds=prefilled - start,
            decode_seconds=done - prefilled,
        )

    def _keep_common(self, ids: Sequence[int]) -> int:
        """Forget what the KV store holds beyond the longest common beginning with ``ids``; its length.

        At least one token is left to prefill, since the logits after it are wanted.
        """
        pairs = zip(self._held, ids[:-1], strict=False)
        n_common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        try:
            self._engine.truncate(n_common)
        except InvalidInput:  # a sliding window has overwritten what these tokens saw
            self._engine.reset()
            n_common = 0
        del self._held[n_common:]
        return n_common

    def _generate(self, logits: F32, answer: _AnswerText, max_tokens: int) -> str:
        """Sample until something ends the answer; why it ended."""
        for i in range(max_tokens):
            token = self._sampler.sample(logits, self._held)
            if token in self._tokenizer.eos_ids or answer.feed(token):
                return "stop"
            if i + 1 < max_tokens:
                self._held.append(token)
                logits = self._engine.decode(token)
        return "length"


class _AnswerText:
    """An answer's text as it grows, given out as soon as it can't be the beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], on_text: Callable[[str], None]) -> None:
        from barefoot.io.tokenizer import StreamDecoder

        self._decoder, self._stops, self._on_text = StreamDecoder(tokenizer), stops, on_text
        self._n_given = 0
        self.text, self.n_tokens = "", 0
        self._stopped = False

    def feed(self, token: int) -> bool:
        """Add a token; whether a stop string has ended the answer."""
        self.n_tokens += 1
        self.text += self._decoder.feed(token)
        ends = [at for at in (self.text.find(stop, max(0, self._n_given)) for stop in self._stops) if at >= 0]
        if ends:
            self.text, self._stopped = self.text[: min(ends)], True
        self._give(len(self.text) - (0 if ends else self._n_unsure()))
        return self._stopped

    def flush(self) -> None:
        """Give out what is left."""
        if not self._stopped:
            self.text += self._decoder.flush()
        self._give(len(self.text))

    def _n_unsure(self) -> int:
        """How many characters at the end may yet become a stop string."""
        lengths = (n for stop in self._stops for n in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:n]))
        return max(lengths, default=0)

    def _give(self, until: int) -> None:
        if until > self._n_given:
            self._on_text(self.text[self._n_given : until])
            self._n_given = until
