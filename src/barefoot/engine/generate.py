"""Generating text: tokens as they come, stop strings, and why it ended; of one prompt, or of many in a batch."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from barefoot.core.errors import InvalidInput
from barefoot.engine.runner import F32, Engine
from barefoot.engine.sampling import SamplingParams, sample
from barefoot.engine.weights import Progress

FinishReason = Literal["stop", "length", "context"]


class Decoder(Protocol):
    """Turns ids into text piece by piece; a piece may be empty until a character is whole."""

    def feed(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True)
class TokenEvent:
    """One generated token and the text that it lets out; ``id`` is None for text that was held back to the end."""

    id: int | None
    text: str


@dataclass
class Generation:
    """What a generation did, filled in while it runs.

    ``finish_reason``: a stop id or string was met, ``max_tokens`` were made, or the context is full. ``decode_seconds``
    covers ``n_decoded`` passes; the first token comes out of prefill. A pass of a batch counts in each generation that
    takes part, its seconds by equal shares, so that seconds add up.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    n_prompt: int = 0
    n_decoded: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class Limits:
    """How tokens are chosen, and what ends an answer.

    Raises
    ------
    InvalidInput : ``max_tokens`` below 1, or an empty stop string.
    """

    max_tokens: int
    params: SamplingParams = SamplingParams()  # noqa: RUF009 - frozen
    stop: Sequence[str] = ()
    stop_ids: Collection[int] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidInput(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not all(self.stop):
            raise InvalidInput("a stop string is empty")


class _Answer:
    """An answer in the making: chooses its tokens and lets its text out."""

    def __init__(self, prompt: Sequence[int], decoder: Decoder, limits: Limits, made: Generation) -> None:
        self.made = made
        made.n_prompt = len(prompt)
        self._history, self._decoder, self._limits = array("i", prompt), decoder, limits
        self._rng = limits.params.rng()
        self._held = ""

    @property
    def last(self) -> int:
        """The latest token, which the engine has not seen yet."""
        return self._history[-1]

    @property
    def is_finished(self) -> bool:
        return self.made.finish_reason is not None

    def extend(self, logits: F32, *, is_full: bool) -> Iterator[TokenEvent]:
        """The token after ``logits``, and the text that it lets out. ``is_full``: the context has no room for it."""
        limits, made = self._limits, self.made
        token = sample(logits, self._history, limits.params, self._rng)
        met = False
        if token in limits.stop_ids:
            made.finish_reason = "stop"
        else:
            self._history.append(token)
            made.ids.append(token)
            out, self._held, met = release(self._held + self._decoder.feed(token), limits.stop)
            if met:
                made.finish_reason = "stop"
            elif len(made.ids) == limits.max_tokens:
                made.finish_reason = "length"
            elif is_full:
                made.finish_reason = "context"
            made.text += out
            yield TokenEvent(token, out)
        if made.finish_reason is not None and not met:
            rest, _, met = release(self._held + self._decoder.flush(), limits.stop, final=True)
            if met:
                made.finish_reason = "stop"
            made.text += rest
            if rest:
                yield TokenEvent(None, rest)


def generate(
    engine: Engine,
    prompt: Sequence[int],
    decoder: Decoder,
    *,
    max_tokens: int,
    params: SamplingParams = SamplingParams(),  # noqa: B008 - frozen
    stop: Sequence[str] = (),
    stop_ids: Collection[int] = (),
    result: Generation | None = None,
    progress: Progress | None = None,
) -> Iterator[TokenEvent]:
    """Append ``prompt`` to the engine's first sequence and yield tokens until something stops it.

    Text that could be the beginning of a stop string is held back until it is certain; stop strings and stop ids are
    not part of the text. The last token is not appended to the engine's sequence. ``result`` is filled in meanwhile.

    Raises
    ------
    InvalidInput : ``max_tokens`` below 1, an empty stop string, or a prompt that the context does not hold.
    """
    limits = Limits(max_tokens, params, stop, stop_ids)
    result = Generation() if result is None else result
    return _generate(engine, list(prompt), _Answer(prompt, decoder, limits, result), progress)


def _generate(engine: Engine, prompt: list[int], answer: _Answer, progress: Progress | None) -> Iterator[TokenEvent]:
    made = answer.made
    started = time.perf_counter()
    logits = engine.prefill(prompt, progress)
    made.prefill_seconds = time.perf_counter() - started
    while True:
        yield from answer.extend(logits, is_full=not engine.remaining)
        if answer.is_finished:
            return
        started = time.perf_counter()
        logits = engine.decode(answer.last)
        made.decode_seconds += time.perf_counter() - started
        made.n_decoded += 1


def generate_batch(
    engine: Engine, prompts: Sequence[Sequence[int]], decoder: Callable[[], Decoder], limits: Limits
) -> Iterator[tuple[int, TokenEvent | Generation]]:
    """Answer every prompt, as many at once as the engine has sequences; when one ends, the next prompt takes its place.

    Yields (index of the prompt, event): the tokens of an answer as they come, and last, once, its generation. All
    answers share ``limits``, but answer i draws from a generator of its own, seeded with ``params.seed + i``.
    ``decoder`` makes a new decoder for each. The engine's sequences are reset first.

    Raises
    ------
    InvalidInput : a prompt that is empty or that the context does not hold; nothing was generated.
    """
    context = engine.config.context
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= context:
            raise InvalidInput(f"prompt {index} has {len(prompt)} tokens, expected 1 to {context}")
    return _generate_batch(engine, prompts, decoder, limits)


def _generate_batch(
    engine: Engine, prompts: Sequence[Sequence[int]], decoder: Callable[[], Decoder], limits: Limits
) -> Iterator[tuple[int, TokenEvent | Generation]]:
    waiting = iter(range(len(prompts)))
    running: dict[int, tuple[int, _Answer]] = {}  # by sequence: index and answer

    def extend(sequence: int, logits: F32) -> Iterator[tuple[int, TokenEvent | Generation]]:
        index, answer = running[sequence]
        for event in answer.extend(logits, is_full=engine.positions[sequence] == engine.config.context):
            yield index, event
        if answer.is_finished:
            del running[sequence]
            yield index, answer.made

    def admit(sequence: int) -> Iterator[tuple[int, TokenEvent | Generation]]:
        """Give the sequence to waiting prompts until one of them is not finished by its first token."""
        while sequence not in running and (index := next(waiting, None)) is not None:
            made = Generation()
            running[sequence] = index, _Answer(prompts[index], decoder(), _of_answer(limits, index), made)
            engine.reset(sequence)
            started = time.perf_counter()
            logits = engine.prefill(prompts[index], sequence=sequence)
            made.prefill_seconds = time.perf_counter() - started
            yield from extend(sequence, logits)

    for sequence in range(engine.config.n_sequences):
        yield from admit(sequence)
    while running:
        started = time.perf_counter()
        rows = engine.decode_batch({sequence: answer.last for sequence, (_, answer) in running.items()})
        share = (time.perf_counter() - started) / len(running)
        free = []
        for sequence, logits in zip(list(running), rows, strict=True):
            made = running[sequence][1].made
            made.decode_seconds += share
            made.n_decoded += 1
            yield from extend(sequence, logits)
            if sequence not in running:
                free.append(sequence)
        for sequence in free:  # only now: a prefill overwrites the logits
            yield from admit(sequence)


def _of_answer(limits: Limits, index: int) -> Limits:
    seed = limits.params.seed
    return replace(limits, params=replace(limits.params, seed=None if seed is None else seed + index))


def release(text: str, stop: Sequence[str], *, final: bool = False) -> tuple[str, str, bool]:
    """(text to let out, text to hold back, whether a stop string was met) of text not yet let out.

    The earliest stop string ends it; what could be the beginning of one is held back unless ``final``.
    """
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    if found:
        return text[: min(found)], "", True
    if final:
        return text, "", False
    longest = max((len(s) for s in stop), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-n:]) for s in stop):
            return text[:-n], text[-n:], False
    return text, "", False
