"""Generating text: tokens as they come, stop strings, and why it ended."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from barefoot.core.errors import InvalidInput
from barefoot.engine.runner import Engine
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
    covers ``n_decoded`` passes of one token; the first token comes out of prefill.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    n_prompt: int = 0
    n_decoded: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


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
    """Append ``prompt`` to the engine's sequence and yield tokens until something stops it.

    Text that could be the beginning of a stop string is held back until it is certain; stop strings and stop ids are
    not part of the text. The last token is not appended to the engine's sequence. ``result`` is filled in meanwhile.

    Raises
    ------
    InvalidInput : ``max_tokens`` below 1, an empty stop string, or a prompt that the context does not hold.
    """
    if max_tokens < 1:
        raise InvalidInput(f"max_tokens must be at least 1, got {max_tokens}")
    if not all(stop):
        raise InvalidInput("a stop string is empty")
    result = Generation() if result is None else result
    return _generate(engine, list(prompt), decoder, max_tokens, params, stop, stop_ids, result, progress)


def _generate(
    engine: Engine,
    history: list[int],
    decoder: Decoder,
    max_tokens: int,
    params: SamplingParams,
    stop: Sequence[str],
    stop_ids: Collection[int],
    result: Generation,
    progress: Progress | None,
) -> Iterator[TokenEvent]:
    rng = params.rng()
    result.n_prompt = len(history)
    started = time.perf_counter()
    logits = engine.prefill(history, progress)
    result.prefill_seconds = time.perf_counter() - started
    held, met = "", False
    while result.finish_reason is None:
        token = sample(logits, history, params, rng)
        if token in stop_ids:
            result.finish_reason = "stop"
            break
        history.append(token)
        result.ids.append(token)
        out, held, met = release(held + decoder.feed(token), stop)
        if met:
            result.finish_reason = "stop"
        elif len(result.ids) == max_tokens:
            result.finish_reason = "length"
        elif not engine.remaining:
            result.finish_reason = "context"
        result.text += out
        yield TokenEvent(token, out)
        if result.finish_reason is None:
            started = time.perf_counter()
            logits = engine.decode(token)
            result.decode_seconds += time.perf_counter() - started
            result.n_decoded += 1
    if not met:
        rest, _, met = release(held + decoder.flush(), stop, final=True)
        if met:
            result.finish_reason = "stop"
        result.text += rest
        if rest:
            yield TokenEvent(None, rest)


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
