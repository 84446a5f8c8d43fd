"""What a line of training data says: a conversation, a prompt with its completion, or a text.

All lines of a file have the shape of its first one. What a line holds beside the keys of its shape is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from barefoot.core.errors import BarefootError, InvalidInput
from barefoot.io.strict_json import parse_object

ASSISTANT = "assistant"
MAX_PARTS = 1 << 12  # objects and lists of a line: each takes Python some hundred bytes, and a file only two
MAX_QUOTED = 200  # characters of a file in an error

_SPEAKERS = {"human": "user", "user": "user", "gpt": ASSISTANT, "assistant": ASSISTANT, "system": "system"}
_WRITE = (
    'write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}, '
    '{"prompt": "…", "completion": "…"} or {"text": "…"}, one object in a line'
)

Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """Messages with ``role`` and ``content``, of which at least one is the assistant's."""

    messages: list[Message]


@dataclass(frozen=True)
class Completion:
    """A prompt, and the text that is to follow it; what stands between the two where no chat template is used."""

    prompt: str
    completion: str
    between: str = ""


@dataclass(frozen=True)
class Text:
    text: str


Record = Conversation | Completion | Text
_Fields = Mapping[str, Any]


def _from_messages(fields: _Fields) -> Conversation:
    return _conversation(fields["messages"], "messages", "role", "content", None)


def _from_turns(fields: _Fields) -> Conversation:
    return _conversation(fields["conversations"], "conversations", "from", "value", _SPEAKERS)


def _from_instruction(fields: _Fields) -> Completion:
    prompt = _text(fields, "instruction")
    if fields.get("input"):
        prompt += "\n\n" + _text(fields, "input")
    return Completion(prompt, _text(fields, "output"), between="\n\n")


# By the keys that a line of this shape has; of two shapes that a line could have, the upper one.
_SHAPES: dict[tuple[str, ...], Callable[[_Fields], Record]] = {
    ("messages",): _from_messages,
    ("conversations",): _from_turns,
    ("prompt", "completion"): lambda fields: Completion(_text(fields, "prompt"), _text(fields, "completion")),
    ("instruction", "output"): _from_instruction,
    ("text",): lambda fields: Text(_text(fields, "text")),
}

Shape = tuple[str, ...]


def parse_line(line: bytes, where: str, offset: int = 0, shape: Shape | None = None) -> tuple[Record, Shape]:
    """What a line says, and its shape, which must be ``shape`` where one is given.

    Parameters
    ----------
    line : UTF-8.
    where : file and line, for errors.
    offset : of the line in its file, for errors.

    Raises
    ------
    InvalidInput : the line is not UTF-8, no JSON object, or of another shape; with ``where`` and what was expected.
    """
    text_of(line, where, offset)
    n_parts = line.count(b"{") + line.count(b"[")
    if n_parts > MAX_PARTS:
        raise InvalidInput(f"{where}: {n_parts} objects and lists, at most {MAX_PARTS} are read", cure="cut it up")
    try:
        fields = parse_object(line, where)
    except BarefootError as error:
        raise InvalidInput(_short(str(error)), cure=_WRITE) from None
    found = next((keys for keys in _SHAPES if all(key in fields for key in keys)), None)
    if found is None:
        expected = "messages, a prompt and a completion, or a text"
        raise InvalidInput(f"{where}: expected {expected}; got {_kind(fields)}", cure=_WRITE)
    if shape not in (None, found):
        raise InvalidInput(
            f"{where}: expected {_named(shape)} as in the lines before, got {_named(found)}",
            cure="give each kind a file of its own",
        )
    try:
        return _SHAPES[found](fields), found
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}", cure=error.cure) from None


def is_object(line: bytes) -> bool:
    """Whether a file that begins with this line is JSONL."""
    try:
        parse_object(line, "")
    except BarefootError:
        return False
    return True


def text_of(raw: bytes | bytearray, where: str, offset: int = 0) -> str:
    """The text of some bytes of a file, which begin at ``offset``.

    Raises
    ------
    InvalidInput : they are not UTF-8, or hold a NUL; with the place of the first such byte.
    """
    cure = "save it as UTF-8 text"
    if (at := raw.find(0)) >= 0:
        raise InvalidInput(f"{where}: expected text, got a NUL at byte {offset + at}", cure=cure)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{where}: not UTF-8 at byte {offset + error.start}: {error.reason}", cure=cure) from None


def _named(shape: Shape | None) -> str:
    return " and ".join(map(repr, shape or ()))


def _conversation(found: Any, key: str, role: str, content: str, speakers: Mapping[str, str] | None) -> Conversation:
    if not isinstance(found, list) or not found:
        raise InvalidInput(f"{key!r} must be a list of messages, got {_kind(found)}")
    messages: list[Message] = []
    for i, each in enumerate(found):
        if not isinstance(each, dict) or not isinstance(each.get(role), str) or not isinstance(each.get(content), str):
            raise InvalidInput(f"{key}[{i}] must have the texts {role!r} and {content!r}, got {_kind(each)}")
        if each.get("tool_calls"):
            raise InvalidInput(f"{key}[{i}] has 'tool_calls', which are not read", cure="write them into the content")
        if speakers is not None and each[role] not in speakers:
            raise InvalidInput(f"{key}[{i}]: {role!r} must be one of {', '.join(speakers)}; got {_short(each[role])!r}")
        messages.append({"role": speakers[each[role]] if speakers else each[role], "content": each[content]})
    if not any(message["role"] == ASSISTANT for message in messages):
        raise InvalidInput(f"{key!r} has no message of the assistant, so there is nothing to learn")
    return Conversation(messages)


def _text(fields: _Fields, key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        raise InvalidInput(f"{key!r} must be a text, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    """A short name for what a value of JSON is."""
    if isinstance(value, dict):
        return "an object with " + (_short(", ".join(map(repr, sorted(value)))) or "nothing")
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    if value == []:
        return "an empty list"
    return names.get(type(value), "a number")


def _short(text: str) -> str:
    """A text as long as errors may quote it."""
    return text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "…"
