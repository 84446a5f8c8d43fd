"""Files as documents: one pass finds where each lies and how many tokens it has; then they are read as they are due.

What stays in memory is a table (``ENTRY``) of 23 bytes a document, whatever the files hold. Files are JSONL, a record
in a line (:mod:`barefoot.train.formats`), or plain text (:mod:`barefoot.train.plain`); a text longer than a document
may be is cut into several.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from barefoot.core.errors import InvalidInput, SourceNotFound, unknown_name
from barefoot.io.files import WINDOW_BYTES, BinaryFile
from barefoot.train.encoding import Document, Encoder, Prepared, beginning
from barefoot.train.formats import Shape, Text, is_object, parse_line, text_of
from barefoot.train.index import ENTRY, MAX_LINE_BYTES, Entries, Statistics, read_index, write_index
from barefoot.train.plain import MARK, SPLITS, Split, windows

MAX_FILES = 1 << 16

_GROWTH = 1 << 12  # entries

Progress = Callable[[int, int], None]  # bytes read, bytes to read
_Found = tuple[int, int, int, bool, Document]  # start, size, begin, ends


class Documents:
    """
    Parameters
    ----------
    paths : files, each JSONL or plain text.
    encoder : makes documents of records.
    split : what a document of a plain text is: the ``"file"``, or one of its ``"paragraphs"`` or ``"lines"``.
    progress : is told how far the pass has come.
    index : a file that :meth:`keep` may have written, with which there is no pass over what has not changed.
    model : tells the tokenizer from others, for that.

    Attributes
    ----------
    entries : ``ENTRY`` (n,), in the order of the files.
    statistics : see :class:`Statistics`.

    Raises
    ------
    SourceNotFound : a file is not there.
    InvalidInput : a file can't be read as what it begins as, with its name and line; or nothing is to be learned.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        encoder: Encoder,
        *,
        split: Split = "file",
        progress: Progress | None = None,
        index: Path | None = None,
        model: str = "",
    ) -> None:
        if split not in SPLITS:
            raise unknown_name("way to split a text", split, SPLITS)
        if not 0 < len(paths) <= MAX_FILES:
            raise InvalidInput(f"{len(paths)} files of data, expected 1 to {MAX_FILES}")
        self.paths, self.encoder, self.split = tuple(paths), encoder, split
        self.statistics, self._model = Statistics(), model
        for path in self.paths:
            if not path.is_file():
                raise SourceNotFound(f"no data file {path}", cure="name JSONL or text files")
        self._is_jsonl = [_is_jsonl(path) for path in self.paths]
        known = None if index is None or not index.is_file() else self._known(index)
        if known is not None:
            self.entries, self.statistics = known
        else:
            self.entries = self._index(progress or (lambda done, total: None))
        if not len(self.entries):
            names = ", ".join(path.name for path in self.paths)
            raise InvalidInput(f"{names}: nothing to learn in {self.statistics.n_records} records")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> Document:
        """A document, read and encoded anew.

        Raises
        ------
        InvalidInput : the file is not what it was.
        """
        entry = self.entries[i]
        path = self.paths[entry["file"]]
        start, begin = int(entry["start"]), int(entry["begin"])
        where = f"{path.name}, from byte {start}"
        with BinaryFile(path) as file:
            raw = file.window(start, int(entry["size"]))
        if self._is_jsonl[entry["file"]]:
            record, _ = parse_line(bytes(raw), where, start)
            if isinstance(record, Text):
                document = self.encoder.text(
                    record.text.rstrip()[begin : self._end_of_window(i)], ends=bool(entry["ends"])
                )
            else:
                document = self.encoder.encode(record)
        else:
            document = self.encoder.text(text_of(raw, where, start), ends=bool(entry["ends"]))
        if len(document.ids) != entry["tokens"]:
            raise InvalidInput(
                f"{where}: has {len(document.ids)} tokens and had {entry['tokens']}: the file was changed"
            )
        return document

    def fingerprint(self) -> str:
        """Of the files' bytes and of how documents are made of them: a run goes on only with the same one."""
        found = hashlib.blake2b(digest_size=16)
        template = self.encoder.template
        found.update(repr((self.encoder.length, self.encoder.train_on, self.split, template)).encode())
        for path in self.paths:
            with BinaryFile(path) as file:
                found.update(file.n_bytes.to_bytes(8, "little"))
                for at in range(0, file.n_bytes, WINDOW_BYTES):
                    found.update(file.window(at))
        return found.hexdigest()

    def keep(self, path: Path) -> None:
        """Write the table, for the next time."""
        write_index(path, self._key, self.entries, self.statistics)

    def _known(self, index: Path) -> tuple[Entries, Statistics] | None:
        return read_index(index, self._key, [path.stat().st_size for path in self.paths], self.encoder.length)

    @property
    def _key(self) -> str:
        return f"{self.fingerprint()} {self._model}"

    def _end_of_window(self, i: int) -> int | None:
        """Where the next window of the same text begins."""
        following = self.entries[i + 1 : i + 2]
        same = len(following) and all(following[name][0] == self.entries[name][i] for name in ("file", "start"))
        return int(following["begin"][0]) if same else None

    def _index(self, progress: Progress) -> Entries:
        entries: Entries = np.empty(_GROWTH, ENTRY)
        n, seen = 0, self.statistics
        done, total = 0, sum(path.stat().st_size for path in self.paths)
        for i, path in enumerate(self.paths):
            for start, size, begin, ends, document in (self._lines if self._is_jsonl[i] else self._windows)(path):
                seen.longest_bytes = max(seen.longest_bytes, size)
                seen.n_records += ends
                seen.n_cut += document.is_cut
                progress(done + start + size, total)
                if not document.n_learned and not begin:  # without its last window a text would not end where it does
                    seen.n_dropped += 1
                    continue
                if n == len(entries):
                    entries.resize(n + max(_GROWTH, n // 8), refcheck=False)
                entries[n] = (start, size, begin, len(document.ids), i, ends)
                n += 1
                seen.n_tokens += len(document.ids)
                seen.n_learned += document.n_learned
                seen.longest = max(seen.longest, len(document.ids))
            done += path.stat().st_size
        entries.resize(n, refcheck=False)
        seen.n_documents = n
        return entries

    def _windows(self, path: Path) -> Iterator[_Found]:
        with BinaryFile(path) as file:
            for start, size, ends, ids in windows(file, self.encoder, self.split):
                yield start, size, 0, ends, self.encoder.window(ids, ends=ends)

    def _lines(self, path: Path) -> Iterator[_Found]:
        shape: Shape | None = None
        waiting: list[tuple[_Line, Prepared]] = []
        n_waiting = 0
        for number, start, raw in _read_lines(path):
            line = _Line(f"{path.name}, line {number}", start, len(raw))
            record, shape = parse_line(raw, line.where, start, shape)
            if isinstance(record, Text):
                yield from self._windows_of_line(line, record.text.rstrip())
                continue
            with line.named():
                prepared = self.encoder.prepare(record)
            if n_waiting + prepared.n_bytes > self.encoder.reach:
                yield from self._together(waiting)
                waiting, n_waiting = [], 0
            waiting.append((line, prepared))
            n_waiting += prepared.n_bytes
        yield from self._together(waiting)

    def _windows_of_line(self, line: _Line, text: str) -> Iterator[_Found]:
        begin = 0
        while begin < len(text):
            n, ids = self.encoder.fit(beginning(text[begin : begin + self.encoder.reach], self.encoder.reach))
            ends = begin + n == len(text)
            yield line.start, line.size, begin, ends, self.encoder.window(ids, ends=ends)
            begin += n

    def _together(self, waiting: Sequence[tuple[_Line, Prepared]]) -> Iterator[_Found]:
        encoded = self.encoder.ids([prepared for _, prepared in waiting])
        for (line, prepared), (ids, n_before) in zip(waiting, encoded, strict=True):
            with line.named():
                document = self.encoder.document(prepared, ids, n_before)
            yield line.start, line.size, 0, True, document


class _Line(NamedTuple):
    where: str
    start: int
    size: int

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors inside say which line they are about."""
        try:
            yield
        except InvalidInput as error:
            raise InvalidInput(f"{self.where}: {error}", cure=error.cure) from None


def _is_jsonl(path: Path) -> bool:
    """By its name, or else by its first line.

    Raises
    ------
    InvalidInput : it is one JSON array.
    """
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson", ".txt", ".md"):
        return suffix in (".jsonl", ".ndjson")
    with open(path, "rb") as file:
        line = next((line for line in iter(lambda: file.readline(MAX_LINE_BYTES), b"") if line.strip()), b"")
    if suffix == ".json" and line.lstrip().startswith(b"["):
        raise InvalidInput(
            f"{path.name} is one JSON array, expected an object in each line",
            cure=f"jq -c '.[]' {path.name} > {path.stem}.jsonl",
        )
    return suffix == ".json" or is_object(line.removeprefix(MARK))


def _read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, first byte, bytes) of each line that is not blank.

    Raises
    ------
    InvalidInput : a line of more than ``MAX_LINE_BYTES``.
    """
    number, at = 0, 0
    with open(path, "rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise InvalidInput(f"{path.name}, line {number}: more than {MAX_LINE_BYTES} bytes", cure="cut it up")
            if line.strip():
                mark = len(MARK) if at == 0 and line.startswith(MARK) else 0
                yield number, at + mark, line[mark:]
            at += len(line)
