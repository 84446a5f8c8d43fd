"""What a line says, and what is said about a bad one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from barefoot.core.errors import InvalidInput
from barefoot.train.formats import MAX_PARTS, Completion, Conversation, Text, is_object, parse_line, text_of

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def parsed(fields: Any) -> Any:
    return parse_line(json.dumps(fields).encode(), "x.jsonl, line 1")[0]


@pytest.mark.parametrize(
    ("fields", "record"),
    [
        ({"messages": [USER, ANSWER]}, Conversation([USER, ANSWER])),
        ({"messages": [USER | {"name": "me"}, ANSWER], "id": 7, "text": "x"}, Conversation([USER, ANSWER])),
        (
            {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
            Conversation([USER, ANSWER]),
        ),
        ({"prompt": "a", "completion": "b"}, Completion("a", "b")),
        ({"instruction": "a", "output": "b"}, Completion("a", "b", "\n\n")),
        ({"instruction": "a", "input": "", "output": "b"}, Completion("a", "b", "\n\n")),
        ({"instruction": "a", "input": "c", "output": "b"}, Completion("a\n\nc", "b", "\n\n")),
        ({"text": "schön\u0000"}, Text("schön\u0000")),
    ],
)
def test_shapes(fields: Any, record: Any):
    assert parsed(fields) == record


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"hello", "not JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b"{}", "expected messages, a prompt and a completion, or a text; got an object with nothing"),
        (b'{"prompt": "a"}', "got an object with 'prompt'"),
        (b'{"prompt": "a", "completion": 3}', "'completion' must be a text, got a number"),
        (b'{"instruction": "a", "input": [1], "output": "b"}', "'input' must be a text, got a list"),
        (b'{"text": null}', "'text' must be a text, got null"),
        (b'{"messages": []}', "'messages' must be a list of messages, got an empty list"),
        (b'{"messages": [{"role": "user"}]}', r"messages\[0\] must have the texts 'role' and 'content'"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
        (
            b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}',
            r"messages\[0\] has 'tool_calls'",
        ),
        (b'{"conversations": [{"from": "tool", "value": "a"}]}', "'from' must be one of human, user, .*; got 'tool'"),
        (b'{"text": "a", "text": "b"}', "key 'text' occurs twice"),
        (b'{"text": NaN}', "NaN is not a JSON number"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"text": ' + b'{"a":' * 4000 + b"1" + b"}" * 4001, "not JSON"),
        (b'{"text": [' + b"[]," * MAX_PARTS + b"[]]}", f"{MAX_PARTS + 3} objects and lists, at most {MAX_PARTS}"),
        (b'{"text": "a\0"}', "expected text, got a NUL at byte 1011"),
        (b'{"text": "\xe9"}', "not UTF-8 at byte 1010"),
        (b'{"' + b"k" * 9000 + b'": 1, "' + b"k" * 9000 + b'": 2}', "k…$"),
        (b'{"conversations": [{"from": "' + b"k" * 9000 + b'", "value": "a"}]}', "k…'$"),
    ],
)
def test_a_bad_line_is_named_with_what_was_expected(line: bytes, says: str):
    with pytest.raises(InvalidInput, match=says) as caught:
        parse_line(line, "x.jsonl, line 3", 1000)
    assert str(caught.value).startswith("x.jsonl, line 3: ")
    assert len(str(caught.value)) < 500


def test_lines_keep_the_shape_of_the_first():
    _, shape = parse_line(b'{"text": "a"}', "x.jsonl, line 1")
    assert parse_line(b'{"text": "b"}', "x.jsonl, line 2", 0, shape) == (Text("b"), shape)
    with pytest.raises(InvalidInput, match="line 3: expected 'text' as in the lines before, got 'prompt' and 'compl"):
        parse_line(b'{"prompt": "a", "completion": "b"}', "x.jsonl, line 3", 0, shape)


def test_what_begins_a_jsonl_file():
    assert is_object(b'{"text": "a"}\n')
    assert not is_object(b"{not json}")
    assert not is_object(b"# Title")


def test_the_place_of_a_byte_counts_from_the_file():
    assert text_of(b"sch\xc3\xb6n", "x.txt", 50) == "schön"
    with pytest.raises(InvalidInput, match=r"x\.txt: not UTF-8 at byte 53: unexpected end"):
        text_of(b"sch\xc3", "x.txt", 50)
