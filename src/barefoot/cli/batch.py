"""The prompts of ``barefoot run --prompts``: read from a file, answered several at once, written as they end."""

from __future__ import annotations

import argparse
import contextlib
import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from barefoot.cli.conversation import Answer, Message, encode, opening
from barefoot.core.errors import InvalidInput
from barefoot.core.ledger import Footprint, Phase, Term, entry

if TYPE_CHECKING:
    from barefoot.cli.progress import Report
    from barefoot.engine.generate import Limits
    from barefoot.engine.runner import Engine
    from barefoot.io.chat import ChatTemplate
    from barefoot.io.tokenizer import Tokenizer
    from barefoot.plan.job import RunJob

STDIN = "-"
LINE_KEYS = ("index", "text", "finish_reason", "prompt_tokens", "decode_tokens")

Messages = list[Message]

_ID_BYTES = 4  # of a token in an array
_TOKEN_BYTES = 8 + 32  # of a token in a list: the reference and the number
_TEXT_BYTES = 8  # of a token of text that is kept; more than any tokenizer's mean
_RUN_PHASES: tuple[Phase, ...] = ("load", "prefill", "decode")


def is_asked(args: argparse.Namespace) -> bool:
    """Whether the arguments speak of many prompts."""
    return args.prompts is not None or args.batch not in (None, 1)


def read(args: argparse.Namespace, piped: Callable[[], str]) -> list[Messages]:
    """The conversations of ``--prompts``, or of the lines of standard input.

    Raises
    ------
    InvalidInput : there are none, a line can't be read, or PROMPT is there as well.
    """
    if args.prompt is not None:
        raise InvalidInput(
            "PROMPT is one prompt, --prompts and --batch take many",
            cure="leave one of them out, or pipe the prompts in",
        )
    if args.prompts in (None, STDIN):
        text, name = piped(), "standard input"
    else:
        text, name = Path(args.prompts).read_text(encoding="utf-8", errors="replace"), args.prompts
    found = parse(text, name)
    if not found:
        raise InvalidInput(f"{name} holds no prompts", cure="--prompts FILE, one prompt in a line")
    return found


def parse(text: str, name: str) -> list[Messages]:
    """One conversation for each line that is not empty: its messages.

    When the first line is a JSON object all are: ``{"prompt": TEXT}`` or ``{"messages": [{"role": …, "content": …}]}``;
    other keys are ignored. Otherwise every line is a prompt as it stands.

    Raises
    ------
    InvalidInput : a line is neither; says which.
    """
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines or not lines[0][1].startswith("{"):
        return [[_user(line)] for _, line in lines]
    return [_from_json(line, f"{name}, line {n}") for n, line in lines]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _from_json(line: str, where: str) -> Messages:
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise InvalidInput(f"{where} is no JSON: {error}") from None
    if isinstance(found, dict) and isinstance(found.get("prompt"), str):
        return [_user(found["prompt"])]
    messages = found.get("messages") if isinstance(found, dict) else None
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return [{"role": m["role"], "content": m["content"]} for m in messages]
    raise InvalidInput(
        f"{where} holds neither a prompt nor messages",
        cure='write {"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}',
    )


def _is_message(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(key), str) for key in ("role", "content"))


def text_bytes(conversations: Iterable[Messages]) -> list[int]:
    """Bytes of the text of each conversation."""
    return [sum(len(message["content"].encode()) for message in messages) for messages in conversations]


def footprint(conversations: Sequence[Messages], job: RunJob, *, keeps_texts: bool) -> Footprint:
    """At most, beside the engine: all prompts' tokens (never more than bytes), those of the answers in the making, and
    the text of all answers where it is kept.
    """
    terms = [
        Term("tokens of prompts", sum(text_bytes(conversations)), _ID_BYTES),
        Term("tokens in use", job.batch * job.context, _ID_BYTES),
        Term("tokens of answers", job.batch * job.max_tokens, _TOKEN_BYTES),
        Term("answers", len(conversations) * job.max_tokens if keeps_texts else 0, _TEXT_BYTES),
    ]
    return entry("prompts", "workspace", terms, phases=_RUN_PHASES)


def encode_all(
    conversations: Sequence[Messages],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    system: str | None,
    context: int,
) -> list[array[int]]:
    """The tokens of each conversation.

    Raises
    ------
    InvalidInput : one of them leaves no room for an answer; says which.
    """
    encoded = []
    for i, messages in enumerate(conversations):
        first = [] if messages[0]["role"] == "system" else opening(system)
        try:
            ids = encode(tokenizer, template, [*first, *messages], context)
        except InvalidInput as error:
            raise InvalidInput(f"prompt {i}: {error}", cure=error.cure) from None
        encoded.append(array("i", ids))
    return encoded


def answer_all(
    engine: Engine,
    prompts: Sequence[array[int]],
    tokenizer: Tokenizer,
    limits: Limits,
    write: Callable[[str], None],
    report: Report,
    *,
    keeps_texts: bool,
) -> list[Answer]:
    """The answers by index; as soon as one ends it is given to ``write`` as a line of JSON with ``LINE_KEYS``.

    Their texts are kept beyond that only with ``keeps_texts``. Ctrl-C ends it early: unfinished answers are left out.
    """
    from barefoot.engine.generate import Generation, generate_batch
    from barefoot.io.tokenizer import StreamDecoder

    answers: dict[int, Answer] = {}
    with contextlib.suppress(KeyboardInterrupt):
        for index, event in generate_batch(engine, prompts, lambda: StreamDecoder(tokenizer), limits):
            if isinstance(event, Generation):
                answers[index] = Answer.of(event, index=index)
                values = (index, event.text, event.finish_reason, event.n_prompt, len(event.ids))
                write(json.dumps(dict(zip(LINE_KEYS, values, strict=True)), ensure_ascii=False) + "\n")
                if not keeps_texts:
                    answers[index] = replace(answers[index], text="")
            report(len(answers), len(prompts), f"{len(answers)} of {len(prompts)} answers")
    return [answers[index] for index in sorted(answers)]
