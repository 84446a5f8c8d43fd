"""JSON read in windows, so that a vocabulary of 30 MB never becomes ten times that in Python objects.

A cursor: the caller walks objects and arrays, takes small values whole and large ones member by member.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any

from barefoot.core.errors import CorruptFile
from barefoot.io.files import WINDOW_BYTES, BinaryFile

MAX_VALUE_CHARS = 8 << 20  # the largest value taken whole
_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


class JsonStream:
    """A cursor over the JSON document in ``file``; every malformed byte raises CorruptFile."""

    def __init__(self, file: BinaryFile) -> None:
        self._file = file
        self._offset = 0
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._at = 0

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._fill():
                return self._text[self._at : self._at + 1]

    def members(self) -> Iterator[str]:
        """The keys of an object; the caller takes each key's value before asking for the next."""
        self._expect("{")
        if self._skip("}"):
            return
        while True:
            key = self.string()
            self._expect(":")
            yield key
            if not self._skip(","):
                break
        self._expect("}")

    def items(self) -> Iterator[None]:
        """One turn for each element of an array; the caller takes the element in its turn."""
        self._expect("[")
        if self._skip("]"):
            return
        while True:
            yield
            if not self._skip(","):
                break
        self._expect("]")

    def string(self) -> str:
        if self.peek() != '"':
            raise self._wrong("a string")
        value: str
        while True:
            try:
                value, end = scanstring(self._text, self._at + 1)
            except ValueError:
                if len(self._text) - self._at > MAX_VALUE_CHARS or not self._fill():
                    raise self._wrong("a string") from None
                continue
            self._at = end
            return value

    def number(self) -> float:
        self.peek()
        if len(self._text) - self._at < 64:
            self._fill()
        match = _NUMBER.match(self._text, self._at)
        if match is None:
            raise self._wrong("a number")
        self._at = match.end()
        value = float(match.group())
        if not math.isfinite(value):
            raise self._wrong("a finite number")
        return value

    def count(self) -> int:
        """A whole number from 0 to 2^31 - 1."""
        value = self.number()
        if not value.is_integer() or not 0 <= value < 1 << 31:
            raise self._wrong(f"a count, not {value}")
        return int(value)

    def value(self) -> Any:
        """Any value of at most ``MAX_VALUE_CHARS`` characters, whole."""
        self.peek()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._text, self._at)
                if end < len(self._text) or not self._fill():  # a number may go on in the next window
                    self._at = end
                    return value
            except RecursionError:
                raise self._wrong("less nesting") from None
            except ValueError:
                if len(self._text) - self._at > MAX_VALUE_CHARS or not self._fill():
                    raise self._wrong("a JSON value") from None

    def _fill(self) -> bool:
        """Forget what was read, add one window; False at the end of the file."""
        if self._offset >= self._file.n_bytes:
            return False
        raw = self._file.read_at(self._offset, min(WINDOW_BYTES, self._file.n_bytes - self._offset))
        self._offset += len(raw)
        try:
            more = self._decode.decode(raw, final=self._offset >= self._file.n_bytes)
        except UnicodeDecodeError as error:
            raise CorruptFile(f"{self._file.path.name}: not UTF-8 text: {error.reason}") from None
        self._text = self._text[self._at :] + more
        self._at = 0
        return True

    def _skip(self, mark: str) -> bool:
        if self.peek() != mark:
            return False
        self._at += 1
        return True

    def _expect(self, mark: str) -> None:
        if not self._skip(mark):
            raise self._wrong(repr(mark))

    def _wrong(self, expected: str) -> CorruptFile:
        got = self._text[self._at : self._at + 20]
        return CorruptFile(f"{self._file.path.name}: expected {expected} near byte {self._offset}, got {got!r}")
