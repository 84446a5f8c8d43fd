"""Files as documents: nothing is lost, everything is found again, and bad data is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest

from barefoot.core.errors import CorruptFile, InvalidInput, SourceNotFound
from barefoot.core.measure import TracedPeak
from barefoot.io.chat import ChatTemplate
from barefoot.io.safetensors import array_entry, write_safetensors
from barefoot.io.tokenizer import Tokenizer, workspace_bytes
from barefoot.train import documents as module
from barefoot.train.data import LINE_BYTES, terms
from barefoot.train.documents import Documents
from barefoot.train.encoding import Encoder
from barefoot.train.formats import Completion, parse_line
from barefoot.train.index import KEY, write_index

END = 257
ENGLISH = "\n\n".join(topics[name] for name in sorted(topics))
MIXED = "grüße 日本語 😀\r\n  x = 1\r\n\r\n\n\nhe said: the end of the line, the end\n" * 40


def texts_of(documents: Documents) -> list[str]:
    """The text of each document that ends, windows joined."""
    found, text = [], ""
    for i in range(len(documents)):
        ids = documents[i].ids.tolist()
        text += documents.encoder.tokenizer.decode(ids)
        if ids[-1] == END:
            found.append(text)
            text = ""
    assert text == ""
    return found


@pytest.mark.parametrize("text", [ENGLISH[:6000], MIXED, "x" * 3000, "  \n\n a \n", "é" * 2999 + "\n"])
@pytest.mark.parametrize("length", [16, 61, 256])
def test_the_windows_of_a_text_are_all_of_it(tokenizer: Tokenizer, tmp_path: Path, text: str, length: int):
    path = tmp_path / "book.txt"
    path.write_bytes(text.encode())
    documents = Documents([path], Encoder(tokenizer, None, length))
    blank = len(text) - len(text.lstrip("\n"))
    lines = text[blank:].replace("\r\n", "\n")
    lines = "\n".join(lines.split("\n")[next(i for i, line in enumerate(lines.split("\n")) if line.strip()) :])
    assert texts_of(documents) == [lines.rstrip()]
    assert documents.entries["tokens"].max() <= length
    assert documents.statistics.n_tokens == documents.entries["tokens"].sum()
    assert documents.statistics.n_records == 1


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("file", ["one\ntwo\n \nthree\n\n\n\nfour"]),
        ("paragraphs", ["one\ntwo", "three", "four"]),
        ("lines", ["one", "two", "three", "four"]),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_documents_of_a_text(
    tokenizer: Tokenizer, tmp_path: Path, split: Any, expected: list[str], newline: str, mark: bytes
):
    path = tmp_path / "notes.md"
    path.write_bytes(mark + "\n \none\ntwo\n \nthree\n\n\n\nfour\n\n".replace("\n", newline).encode())
    documents = Documents([path], Encoder(tokenizer, None, 64), split=split)
    assert texts_of(documents) == expected
    assert documents.statistics.n_records == len(expected)


@pytest.mark.parametrize("split", ["paragraphs", "lines"])
def test_long_documents_of_a_text_are_cut_into_windows(tokenizer: Tokenizer, tmp_path: Path, split: Any):
    path = tmp_path / "notes"
    path.write_text(ENGLISH[:8000])
    documents = Documents([path], Encoder(tokenizer, None, 40), split=split)
    between = "\n\n" if split == "paragraphs" else "\n"
    lines = [line if line.strip() else "" for line in ENGLISH[:8000].split("\n")]
    expected = [each.rstrip() for each in "\n".join(lines).split(between)]
    assert [t.strip() for t in texts_of(documents)] == [t.strip() for t in expected if t.strip()]


def test_texts_of_lines_are_cut_into_windows_too(tokenizer: Tokenizer, jsonl: Callable[..., Path]):
    long = ENGLISH[:5000]
    path = jsonl({"text": long}, {"text": "short"}, {"text": ""}, {"text": "a \n"}, {"text": MIXED})
    documents = Documents([path], Encoder(tokenizer, None, 64))
    assert texts_of(documents) == [long.rstrip(), "short", "a", MIXED.replace("\r\n", "\n").rstrip()]
    seen = documents.statistics
    assert (seen.n_records, seen.n_dropped, seen.n_cut) == (4, 0, 0)
    starts, counts = np.unique(documents.entries["start"], return_counts=True)
    assert len(starts) == 4
    assert counts[0] >= 5000 / 64


def test_a_last_window_of_one_token_is_kept(tokenizer: Tokenizer, jsonl: Callable[..., Path]):
    """Nothing of it is learned where no token ends a text, but the window before ends where it begins."""
    encoder = Encoder(tokenizer, None, 16)
    encoder._end = []
    documents = Documents([jsonl({"text": "a" * 17}, {"text": "b"})], encoder)
    assert [documents[i].ids.tolist() for i in range(2)] == [documents[0].ids[:1].tolist() * n for n in (16, 1)]
    assert (len(documents), documents.statistics.n_records, documents.statistics.n_dropped) == (2, 2, 1)


def test_blank_lines_in_front_are_no_part_of_a_text(tokenizer: Tokenizer, tmp_path: Path):
    path = tmp_path / "late.txt"
    path.write_text(" \n" * 5000 + "  here\n")
    assert texts_of(Documents([path], Encoder(tokenizer, None, 16))) == ["  here"]


def test_every_record_of_every_shape_is_a_document(encoder: Encoder, jsonl: Callable[..., Path]):
    chat = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "a" * i}]} for i in range(9)
    ]
    instructions = [{"instruction": "do", "input": "it", "output": f"{i}"} for i in range(5)]
    paths = [
        jsonl(*chat, name="chat.jsonl"),
        jsonl(*instructions, name="alpaca.json"),
        jsonl(b"", b"a b", name="c.txt"),
    ]
    documents = Documents(paths, encoder)
    records = [parse_line(line, "") for path in paths[:2] for line in path.read_bytes().splitlines()]
    expected = [encoder.encode(record) for record, _ in records] + [encoder.text("a b", ends=True)]
    assert len(documents) == len(expected) == 15
    for i, document in enumerate(expected):
        assert documents[i].ids.tolist() == document.ids.tolist()
        assert documents[i].learned.tolist() == document.learned.tolist()
    seen = documents.statistics
    assert (seen.n_records, seen.n_documents, seen.n_dropped) == (15, 15, 0)
    assert seen.n_tokens == sum(len(d.ids) for d in expected)
    assert seen.n_learned == sum(d.n_learned for d in expected)
    assert seen.longest == max(len(d.ids) for d in expected)
    assert seen.longest_bytes == max(len(line) + 1 for line in paths[0].read_bytes().splitlines())


def test_what_is_cut_and_what_is_dropped(tokenizer: Tokenizer, jsonl: Callable[..., Path]):
    rows = [("ask", "tell"), ("ask", "t" * 100), ("a" * 100, "tell"), ("ask", "tell")]
    path = jsonl(*({"prompt": p, "completion": c} for p, c in rows))
    documents = Documents([path], Encoder(tokenizer, None, 32))
    seen = documents.statistics
    assert (seen.n_records, seen.n_documents, seen.n_cut, seen.n_dropped) == (4, 3, 2, 1)
    assert documents.entries["tokens"].tolist() == [8, 32, 8]


BAD_UTF8 = b'{"text": "caf\xe9"}'


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"txt": "b"}\n',
            r"a\.jsonl, line 3: expected messages, .*; got an object with 'txt'",
        ),
        ("a.jsonl", b'{"text": "a"}\nb\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"prompt": "a", "completion": "b"}\n', r"line 2: expected 'text' as in"),
        ("a.jsonl", b'{"text": "a"}\n' + BAD_UTF8, r"a\.jsonl, line 2: not UTF-8 at byte 27"),
        ("a.jsonl", b'{"text": "' + b"a" * 3000 + b'"}', r"a\.jsonl, line 1: more than 2048 bytes"),
        ("a", b'{"text": "a"}\n{"text": "b\0"}', r"a, line 2: expected text, got a NUL at byte 25"),
        ("a.json", b' [{"text": "a"}]', r"a\.json is one JSON array, expected an object in each line"),
        ("a.json", b'{\n "text": "a"}', r"a\.json, line 1: not JSON"),
        ("a.txt", b"abc\n" * 900 + b"\xff", r"a\.txt: not UTF-8 at byte 3600"),
        ("a.txt", b"abc\n" * 900 + b"d\0", r"a\.txt: expected text, got a NUL at byte 3601"),
        ("a.txt", "é".encode() * 2000 + b"\xc3", r"a\.txt: not UTF-8 at byte 4000"),
        ("a.parquet", b"PAR1\x15\x04\x15\x00", r"a\.parquet: expected text, got a NUL at byte 7"),
        ("a.jsonl", b"\n", r"a\.jsonl: nothing to learn in 0 records"),
        ("a.txt", b"", r"a\.txt: nothing to learn in 0 records"),
        ("a.txt", b" \n" * 9000, r"a\.txt: nothing to learn in 0 records"),
    ],
)
def test_bad_data_is_named(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, says: str
):
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 2048)
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=says):
        Documents([path], Encoder(tokenizer, None, 64))


def test_a_conversation_that_a_template_refuses_is_named(tokenizer: Tokenizer, jsonl: Callable[..., Path]):
    only_short = ChatTemplate(
        "{{ raise_exception('too many') if messages | length > 2 }}{{ messages[0].content }}", True
    )
    fine = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = jsonl({"messages": fine}, {"messages": fine * 2})
    with pytest.raises(InvalidInput, match=r"data\.jsonl, line 2: the chat template rejects these messages: too many"):
        Documents([path], Encoder(tokenizer, only_short, 64, "all"))


def test_files_that_are_not_there(encoder: Encoder, tmp_path: Path):
    with pytest.raises(SourceNotFound, match="no data file"):
        Documents([tmp_path / "nothing.jsonl"], encoder)
    with pytest.raises(SourceNotFound, match="no data file"):
        Documents([tmp_path], encoder)
    with pytest.raises(InvalidInput, match="0 files of data"):
        Documents([], encoder)
    with pytest.raises(InvalidInput, match="unknown way to split a text 'words'"):
        Documents([tmp_path], encoder, split="words")  # type: ignore[arg-type]


def test_a_file_that_changed_is_noticed(tokenizer: Tokenizer, jsonl: Callable[..., Path]):
    path = jsonl({"text": "abc"}, {"text": "def"})
    documents = Documents([path], Encoder(tokenizer, None, 64))
    before = documents.fingerprint()
    assert before == Documents([path], Encoder(tokenizer, None, 64)).fingerprint()
    assert before != Documents([path], Encoder(tokenizer, None, 65)).fingerprint()
    jsonl({"text": "abc"}, {"text": "deX"})
    assert documents.fingerprint() != before
    jsonl({"text": "abc"}, {"text": "d  "})
    with pytest.raises(InvalidInput, match=r"data\.jsonl, from byte 16: has 2 tokens and had 4: the file was changed"):
        documents[1]
    jsonl({"text": "abc"})
    with pytest.raises(InvalidInput, match=r"data\.jsonl, from byte 16: not JSON"):
        documents[1]


def test_the_table_has_the_bytes_that_are_stated(tokenizer: Tokenizer, jsonl: Callable[..., Path]):
    path = jsonl(*({"text": "ab"} for _ in range(1001)))
    documents = Documents([path], Encoder(tokenizer, None, 64))
    assert documents.entries.nbytes == 1001 * 23
    assert documents.entries.base is None, "it is not a part of something larger"
    stated = {term.name: term for term in terms(documents, 64)}
    assert stated["documents of the data"].count == 1001


def test_memory_does_not_grow_with_the_file(tokenizer: Tokenizer, tmp_path: Path):
    """A file larger than all that is stated for one of its kind."""
    path = tmp_path / "data.jsonl"
    line = b'{"prompt": "ask", "completion": "tell", "other": "' + b"x" * 60_000 + b'"}\n'
    with open(path, "wb") as file:
        for _ in range(200):
            file.write(line)
    encoder = Encoder(tokenizer, None, 64)
    encoder.text("what is imported and kept", ends=True)
    with TracedPeak() as meter:
        documents = Documents([path], encoder)
        for i in range(0, 200, 40):
            documents[i]
    assert meter.result is not None
    held = sum(term.bytes for term in terms(documents, 64) if term.name != "encoding a document")
    assert 2 * len(line) < meter.result.added < held + workspace_bytes(len("asktell")) < path.stat().st_size


def test_what_a_line_takes_at_most(tokenizer: Tokenizer, template: ChatTemplate, jsonl: Callable[..., Path]):
    """Messages with nothing in them."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": ""} for i in range(1000)]
    path = jsonl(json.dumps({"conversations": turns}, separators=(",", ":")).encode())
    encoder = Encoder(tokenizer, template, 64, "all")
    encoder.encode(Completion("what is imported", "and kept"))
    with TracedPeak() as meter:
        documents = Documents([path], encoder)
    assert meter.result is not None
    stated = {term.name: term.bytes for term in terms(documents, 64)}["a line and what it says"]
    assert stated == LINE_BYTES * path.stat().st_size
    assert 0.8 * stated < meter.result.added < stated


# --- the table that is kept -----------------------------------------------------------------------------------------


@pytest.fixture
def kept(encoder: Encoder, jsonl: Callable[..., Path], tmp_path: Path) -> tuple[Documents, Path, Path]:
    long = ({"prompt": f"say {i}", "completion": "x" * (300 + i)} for i in range(9))
    data = jsonl(*long, {"prompt": "a", "completion": "b"})
    documents, table = Documents([data], encoder, model="m"), tmp_path / "table"
    documents.keep(table)
    return documents, data, table


def no_pass(*_: object) -> None:
    raise AssertionError("a pass over the data")


def test_a_table_that_is_kept_spares_the_pass(kept, encoder: Encoder, monkeypatch: pytest.MonkeyPatch):
    documents, data, table = kept
    with monkeypatch.context() as patched:
        patched.setattr(Documents, "_index", no_pass)
        again = Documents([data], encoder, index=table, model="m")
    assert again.entries.tobytes() == documents.entries.tobytes()
    assert again.statistics == documents.statistics
    assert again.statistics.n_cut == 9
    assert [again[i].ids.tolist() for i in range(10)] == [documents[i].ids.tolist() for i in range(10)]
    assert again.fingerprint() == documents.fingerprint()


def test_a_table_of_something_else_is_not_used(kept, tokenizer: Tokenizer, template: ChatTemplate):
    """Another tokenizer, length or part to learn, other bytes of the same number: each is read anew."""
    documents, data, table = kept
    others = (
        ("another", Encoder(tokenizer, template, 256)),
        ("m", Encoder(tokenizer, template, 128)),
        ("m", Encoder(tokenizer, template, 256, "all")),
    )
    for model, encoder in others:
        found, anew = Documents([data], encoder, index=table, model=model), Documents([data], encoder)
        assert found.entries.tobytes() == anew.entries.tobytes()
        assert found.statistics == anew.statistics
    data.write_bytes(data.read_bytes().replace(b'"a"', b'"h"').replace(b'"b"', b'" "').replace(b"say 0", b"hehe0"))
    changed = Documents([data], documents.encoder, index=table, model="m")
    assert changed.statistics != documents.statistics
    assert changed.statistics == Documents([data], documents.encoder).statistics


def write_table(table: Path, documents: Documents, **changes: int) -> None:
    entries = documents.entries.copy()
    for name, value in changes.items():
        entries[name][3] = value
    write_index(table, f"{documents.fingerprint()} m", entries, documents.statistics)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("start", -1), ("start", 1 << 40), ("start", (1 << 63) - 1), ("size", 0), ("size", -5), ("size", 1 << 30)),
        *(("begin", -1), ("tokens", 0), ("tokens", 257), ("file", 1)),
    ],
)
def test_places_that_are_not_in_the_data_are_refused(kept, encoder: Encoder, field: str, value: int):
    documents, data, table = kept
    write_table(table, documents)
    assert len(Documents([data], encoder, index=table, model="m")) == 10
    write_table(table, documents, **{field: value})
    with pytest.raises(CorruptFile, match="documents that are not in the data"):
        Documents([data], encoder, index=table, model="m")


def test_a_file_that_is_no_table_is_refused(kept, encoder: Encoder):
    documents, data, table = kept
    facts = {"key": f"{documents.fingerprint()} m", "statistics": {}}
    for name, array in (("entries", np.zeros(22, "u1")), ("entries", np.zeros(23, "i1")), ("x", np.zeros(23, "u1"))):
        write_safetensors(table, [array_entry(name, array)], {KEY: json.dumps(facts)})
        with pytest.raises(CorruptFile, match="no table"):
            Documents([data], encoder, index=table, model="m")
    raw = array_entry("entries", documents.entries.view(np.uint8))
    for statistics in ({}, [], {"n_records": -1}):
        write_safetensors(table, [raw], {KEY: json.dumps(facts | {"statistics": statistics})})
        with pytest.raises(CorruptFile):
            Documents([data], encoder, index=table, model="m")
