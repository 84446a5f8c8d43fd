"""A conversation with a loaded model: what has been said, what of it lies in the KV store, and one answer at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from barefoot.core.errors import InvalidInput

if TYPE_CHECKING:
    from barefoot.cli.progress import Report
    from barefoot.engine.generate import Generation, TokenEvent
    from barefoot.engine.runner import Engine
    from barefoot.engine.sampling import SamplingParams
    from barefoot.io.chat import ChatTemplate
    from barefoot.io.tokenizer import Tokenizer

Message = dict[str, str]


@dataclass(frozen=True)
class Answer:
    """One answer and what it took.

    ``index`` numbers the prompts of a batch and the turns of a chat. ``n_prompt`` tokens were in the context when it
    began, ``n_prefilled`` of them not yet in the KV store; ``n_decoded`` passes of one token followed, since the first
    token comes out of the prefill. ``finish_reason`` is one of stop (the model or a stop string ended it), length,
    context (it is full), interrupted. Seconds are its own share of a batch's, so that those of all answers add up.
    """

    index: int
    text: str
    finish_reason: str
    n_prompt: int
    n_prefilled: int
    n_tokens: int
    n_decoded: int
    prefill_seconds: float
    decode_seconds: float

    @classmethod
    def of(cls, made: Generation, *, index: int, n_kept: int = 0, interrupted: bool = False) -> Answer:
        """What came of a generation whose engine held ``n_kept`` tokens of the context already."""
        return cls(
            index=index,
            text=made.text,
            finish_reason="interrupted" if interrupted else made.finish_reason or "length",
            n_prompt=n_kept + made.n_prompt,
            n_prefilled=made.n_prompt,
            n_tokens=len(made.ids),
            n_decoded=made.n_decoded,
            prefill_seconds=made.prefill_seconds,
            decode_seconds=made.decode_seconds,
        )


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
        sampling: SamplingParams,
        *,
        system: str | None = None,
        stops: Sequence[str] = (),
        max_tokens: int,
    ) -> None:
        self._engine, self._tokenizer, self._template, self._sampling = engine, tokenizer, template, sampling
        self._stops, self._max_tokens = tuple(stops), max_tokens
        self._opening = opening(system)
        self._n_answers = 0
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
        from barefoot.engine.generate import Generation

        messages = [*self._messages, {"role": "user", "content": prompt}]
        if ids is None:
            ids = encode(self._tokenizer, self._template, messages, self._engine.config.context)
        made = Generation()
        interrupted = False
        try:
            for event in self._continue(ids, made, progress):
                on_text(event.text)
        except KeyboardInterrupt:
            interrupted = True
        self._held = [*ids, *made.ids][: self._engine.position]
        if made.text:
            self._messages = [*messages, {"role": "assistant", "content": made.text}]
        self._n_answers += 1
        n_kept = len(ids) - made.n_prompt
        return Answer.of(made, index=self._n_answers - 1, n_kept=n_kept, interrupted=interrupted)

    def _continue(self, ids: list[int], made: Generation, progress: Report) -> Iterator[TokenEvent]:
        """What comes behind ``ids``, of which the engine keeps what it has, unless there is no room for the rest then:
        a cache that quantizes for good makes none, but a prompt that begins anew is compressed as a whole."""
        n_kept = self._keep_common(ids)
        try:
            yield from self._generate(ids[n_kept:], made, progress)
        except InvalidInput:
            if made.ids or not n_kept:
                raise
            self._engine.reset()
            yield from self._generate(ids, made, progress)

    def _generate(self, ids: list[int], made: Generation, progress: Report) -> Iterator[TokenEvent]:
        from barefoot.engine.generate import generate
        from barefoot.io.tokenizer import StreamDecoder

        return generate(
            self._engine,
            ids,
            StreamDecoder(self._tokenizer),
            max_tokens=self._max_tokens,
            params=self._sampling,
            stop=self._stops,
            stop_ids=self._tokenizer.eos_ids,
            result=made,
            progress=lambda done, total: progress(done, total, "reading the prompt"),
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
        return n_common
