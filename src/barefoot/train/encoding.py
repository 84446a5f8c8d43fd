"""Records as documents: tokens, and which of them are to be learned.

Of a conversation these are the assistant's answers, each from behind the template's generation prompt up to the token
that ends the turn, which is learned too. Where an answer lies is found by rendering: the conversation up to the answer
(with the generation prompt) and up to behind it must begin as the whole conversation does. A template that writes an
earlier turn otherwise once another follows, such as one that drops what was thought, is refused for conversations
with several answers.

Of a prompt and its completion it is the completion and the end. A model with a chat template gets the two as the turns
of a conversation, as ``barefoot run`` puts a prompt to it. In a text everything is learned.

A document longer than ``length`` tokens loses its end; a text is cut into windows beforehand (:meth:`Encoder.fit`). No
more of a text is encoded than such a document may hold, so what that takes does not grow with the record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import BarefootError, InvalidInput, unknown_name
from barefoot.train import I64, NOTHING
from barefoot.train.formats import ASSISTANT, Completion, Conversation, Message, Record, Text

if TYPE_CHECKING:
    from barefoot.io.chat import ChatTemplate
    from barefoot.io.tokenizer import Segment, Tokenizer

TrainOn = Literal["answers", "all"]
BYTES_PER_TOKEN = 16  # of UTF-8, at most, of the text that a document is made of; few tokens are as long
MIN_LENGTH = 16

_LIKELY_CHARACTERS = 5  # of a token: what is tried first

I32 = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Document:
    """
    Attributes
    ----------
    ids : int32 (n,).
    learned : bool (n,), of each token whether it is to be predicted; never the first one.
    is_cut : whether its end was lost.
    """

    ids: I32
    learned: Bools
    is_cut: bool

    @property
    def n_learned(self) -> int:
        return int(self.learned.sum())

    def labels(self) -> I64:
        """Of each token the next one where that is learned, else ``NOTHING``; int64 (n,)."""
        found: I64 = np.full(len(self.ids), NOTHING, np.int64)
        np.copyto(found[:-1], self.ids[1:], where=self.learned[1:])
        return found


@dataclass(frozen=True)
class _Answer:
    """Of message number ``message``: it begins behind ``begin`` characters of the conversation, of which the first
    ``same`` don't depend on what follows; settled when all that is rendered up to it is among these."""

    message: int
    begin: int
    same: int
    is_settled: bool


@dataclass(frozen=True)
class Prepared:
    """A record that has yet to be encoded: its text as ``segments``, and the tokens around it."""

    segments: list[Segment]
    answers: list[_Answer]
    is_cut: bool
    begin: Sequence[int] = ()
    end: Sequence[int] = ()

    @property
    def marks(self) -> list[int]:
        return [mark for answer in self.answers for mark in (answer.begin, answer.same)]

    @property
    def n_bytes(self) -> int:
        return sum(_n_bytes(text) for text, _ in self.segments)


class Encoder:
    """
    Parameters
    ----------
    tokenizer : the model's.
    template : puts conversations and prompts into the model's format; None takes prompts as they stand and refuses
        conversations.
    length : tokens of a document, at most.
    train_on : ``"answers"`` learns answers and completions, ``"all"`` prompts as well.

    Raises
    ------
    InvalidInput : ``length`` is too small, or ``train_on`` unknown.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None, length: int, train_on: TrainOn = "answers"
    ) -> None:
        if length < MIN_LENGTH:
            raise InvalidInput(f"documents of at most {length} tokens: expected {MIN_LENGTH} or more")
        if train_on not in ("answers", "all"):
            raise unknown_name("part to train on", train_on, ("answers", "all"))
        self.tokenizer, self.template = tokenizer, template
        self.length, self.train_on = length, train_on
        self.reach = BYTES_PER_TOKEN * length  # bytes of text that a document is made of, at most
        self._begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        self._end = [min(tokenizer.eos_ids)] if tokenizer.eos_ids else []

    def encode(self, record: Record) -> Document:
        """The document of a record; of a :class:`Text`, of its whole text.

        Raises
        ------
        InvalidInput : as :meth:`prepare` and :meth:`document`.
        """
        if isinstance(record, Text):
            return self.text(record.text, ends=True)
        prepared = self.prepare(record)
        return self.document(prepared, *self.ids([prepared])[0])

    def prepare(self, record: Conversation | Completion) -> Prepared:
        """What is to be encoded of a record.

        Raises
        ------
        InvalidInput : a conversation without a template, or one whose turns the template writes in several ways.
        """
        if isinstance(record, Conversation):
            return self._conversation(record.messages)
        if self.template is not None:
            user: Message = {"role": "user", "content": record.prompt}
            return self._conversation([user, {"role": ASSISTANT, "content": record.completion}])
        prompt = record.prompt + record.between
        whole = prompt + record.completion
        kept = beginning(whole, self.reach)
        is_cut = len(kept) < len(whole)
        answer = _Answer(1, min(len(prompt), len(kept)), len(kept), True)
        return Prepared([(kept, False)], [answer], is_cut, self._begin, [] if is_cut else self._end)

    def ids(self, prepared: Sequence[Prepared]) -> list[tuple[list[int], list[int]]]:
        """The ids of each, and how many lie before each of its marks; quickest where many come together."""
        return self.tokenizer.encode_marked([(each.segments, each.marks) for each in prepared], add_bos=False)

    def document(self, prepared: Prepared, ids: Sequence[int], n_before: Sequence[int]) -> Document:
        """The document of what was prepared, and what :meth:`ids` gave for it.

        Raises
        ------
        InvalidInput : an answer that the template writes in several ways.
        """
        n_begin = len(prepared.begin)
        spans = []
        for answer, begin, same in zip(prepared.answers, n_before[::2], n_before[1::2], strict=True):
            end = next((i + 1 for i in range(begin, same) if ids[i] in self.tokenizer.eos_ids), None)
            if end is None and not answer.is_settled and begin < self.length:
                raise _rewritten(answer.message)
            spans.append((n_begin + begin, n_begin + (same if end is None else end)))
        if prepared.end:
            spans.append((n_begin + len(ids), n_begin + len(ids) + 1))
        return self._document([*prepared.begin, *ids, *prepared.end], spans, prepared.is_cut)

    def text(self, text: str, *, ends: bool) -> Document:
        """A text, or a window of one; with the token that ends a text where it ``ends``."""
        return self.window(self._text_ids(text), ends=ends)

    def window(self, ids: Sequence[int], *, ends: bool) -> Document:
        """A text, or a window of one, of these ids."""
        found = [*self._begin, *ids, *(self._end if ends else ())]
        return self._document(found, [(0, len(found))])

    def fit(self, text: str) -> tuple[int, list[int]]:
        """Characters of the longest beginning of ``text``, up to white space, that makes a document, and their ids."""
        room = self.length - len(self._begin) - len(self._end)
        end = min(len(text), _LIKELY_CHARACTERS * room)
        while len(ids := self._text_ids(text[:end])) <= room and end < len(text):
            end = min(len(text), 2 * end)
        while len(ids) > room and end > 1:
            end = _before_space(text, min(len(self.tokenizer.decode(ids[:room])), end - 1))
            ids = self._text_ids(text[:end])
        return end, ids

    def _text_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text.replace("\r\n", "\n"), add_bos=False)

    def _conversation(self, messages: Sequence[Message]) -> Prepared:
        segments = self._render(messages, prompts=False)
        whole = _joined(segments)
        kept = _first(segments, self.reach)
        n_kept = len(_joined(kept))
        answers = []
        if self.train_on == "answers":
            answers = [
                replace(answer, begin=min(answer.begin, n_kept), same=min(answer.same, n_kept))
                for answer in self._answers(messages, whole)
            ]
        return Prepared(kept, answers, n_kept < len(whole))

    def _answers(self, messages: Sequence[Message], whole: str) -> Iterator[_Answer]:
        for i, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            prompt = _joined(self._render(messages[:i], prompts=True))
            if not whole.startswith(prompt):
                raise _rewritten(i)
            if len(prompt) >= self.reach:
                return
            last = i + 1 == len(messages)
            answered = whole if last else _joined(self._render(messages[: i + 1], prompts=False))
            same = _n_common(whole, answered)
            yield _Answer(i, len(prompt), same, same == len(answered))

    def _render(self, messages: Sequence[Message], *, prompts: bool) -> list[Segment]:
        if self.template is None:
            raise InvalidInput(
                "a conversation needs a chat template, and the model has none",
                cure="tune a model for chats, or give prompts and completions",
            )
        try:
            return self.template.render(messages, self.tokenizer, add_generation_prompt=prompts)
        except BarefootError as error:
            raise InvalidInput(str(error), cure=error.cure) from None

    def _document(self, ids: Sequence[int], spans: Sequence[tuple[int, int]], is_cut: bool = False) -> Document:
        learned = np.zeros(len(ids), bool)
        for begin, end in [(0, len(ids))] if self.train_on == "all" else spans:
            learned[begin:end] = True
        learned[:1] = False  # nothing comes before
        is_cut = is_cut or len(ids) > self.length
        return Document(np.array(ids[: self.length], np.int32), learned[: self.length], is_cut)


def beginning(text: str, n_bytes: int) -> str:
    """As many whole characters as have room in ``n_bytes`` bytes of UTF-8."""
    if 4 * len(text) <= n_bytes:
        return text
    return text[:n_bytes].encode("utf-8", "replace")[:n_bytes].decode("utf-8", "ignore")


def _rewritten(i: int) -> InvalidInput:
    return InvalidInput(
        f"message {i}: the model's chat template writes this answer, or what comes before it, otherwise when the "
        "conversation goes on, so what the model would learn is not what it will be asked",
        cure="cut the conversation behind each answer, or train on all tokens",
    )


def _joined(segments: Sequence[Segment]) -> str:
    return "".join(text for text, _ in segments)


def _n_common(a: str, b: str) -> int:
    """Characters of the longest common beginning."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


def _n_bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _first(segments: Sequence[Segment], n_bytes: int) -> list[Segment]:
    """The segments' beginning of at most that many bytes."""
    kept = []
    for text, trusted in segments:
        part = beginning(text, n_bytes)
        kept.append((part, trusted))
        n_bytes -= _n_bytes(part)
        if len(part) < len(text):
            break
    return kept


def _before_space(text: str, end: int) -> int:
    """The last place up to ``end`` where white space begins; ``end`` itself where there is none in the half before."""
    for i in range(min(end, len(text) - 1), max(1, end // 2), -1):
        if text[i].isspace() and not text[i - 1].isspace():
            return i
    return max(1, end)
