"""Plain text files: where a document begins and ends, and its windows, found without ever holding the file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from barefoot.io.files import BinaryFile
from barefoot.train.encoding import Encoder
from barefoot.train.formats import text_of

Split = Literal["file", "paragraphs", "lines"]
SPLITS: dict[Split, re.Pattern[str] | None] = {
    "file": None,
    "paragraphs": re.compile(r"\n[^\S\n]*\n"),
    "lines": re.compile(r"\n"),
}

_BLANK = re.compile(r"(?:[^\S\n]*\n)*")  # lines in front of a document
MARK = b"\xef\xbb\xbf"  # some editors write this in front of UTF-8


def windows(file: BinaryFile, encoder: Encoder, split: Split) -> Iterator[tuple[int, int, bool, list[int]]]:
    """(first byte, number of bytes, whether the document ends there, ids) of each window of a file.

    The windows of a document follow each other without a gap; each begins with the white space in front of its first
    word.

    Raises
    ------
    InvalidInput : the file is not UTF-8, or holds a NUL.
    """
    at = len(MARK) if bytes(file.window(0, len(MARK))) == MARK else 0
    is_new = True
    while at < file.n_bytes:
        raw = file.window(at, encoder.reach)
        is_last = at + len(raw) == file.n_bytes
        text = text_of(raw if is_last else _whole_characters(raw), file.path.name, at)
        begin = _BLANK.match(text).end() if is_new else 0  # type: ignore[union-attr]
        between = SPLITS[split]
        found = between.search(text, begin) if between else None
        body, next_at = text[begin : found.start() if found else len(text)], found.end() if found else len(text)
        is_whole = is_last or found is not None
        if is_whole:
            body = body.rstrip()
        n, ids = encoder.fit(body)
        ends = is_whole and n == len(body)
        if body.strip():
            yield at + _n_bytes(text[:begin]), _n_bytes(body[:n]), ends, ids
        is_new = ends or not body
        at += _n_bytes(text[: next_at if is_new else begin + n])


def _whole_characters(raw: bytearray) -> bytearray:
    """Without the beginning of a character that goes on behind."""
    for n in range(1, min(4, len(raw)) + 1):
        first = raw[-n]
        if first >= 0xC0:
            return raw[:-n] if n < (2 if first < 0xE0 else 3 if first < 0xF0 else 4) else raw
    return raw


def _n_bytes(text: str) -> int:
    return len(text.encode())
