"""Text to token ids and back, holding the vocabulary as bytes and building, for each text, the small model it needs.

``encode`` cuts the text at added tokens, finds the vocabulary entries that occur in it (see ``vocabulary``), gives
those and the merges among them to the ``tokenizers`` library, and translates the ids back: exactly what the full
tokenizer returns. Control tokens are recognised only where the caller says that the text is trusted, so a user who
types ``<|im_end|>`` gets those characters.
"""

from __future__ import annotations

import codecs
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from barefoot.core.errors import CorruptFile, InvalidInput
from barefoot.io.inventory import Checkpoint
from barefoot.io.pretokenize import SPACE, Section
from barefoot.io.tokenizer_files import (
    TokenizerParts,
    footprint_bytes,
    load_bytes,
    read_gguf_tokenizer,
    read_json_tokenizer,
)
from barefoot.io.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, merges_by_score

if TYPE_CHECKING:
    from tokenizers import Tokenizer as LibraryTokenizer

Segment = tuple[str, bool]  # a text, and whether control tokens in it are meant

WORKSPACE_BYTES_PER_TEXT_BYTE = 256  # held by encode for each byte of its text: library strings, offsets and entries
WORKSPACE_BYTES = 4 << 20  # and at any length
KEPT_BYTES_PER_TEXT_BYTE = 160  # what stays resident of that: the library leaves the heap in pieces
JSON_LOAD_BYTES = 4 << 20  # windows of tokenizer.json and the small sections, whatever its size


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer of an opened model, from GGUF metadata or from tokenizer.json beside the weights."""
    if checkpoint.kind == "gguf":
        return Tokenizer(read_gguf_tokenizer(checkpoint))
    return Tokenizer(read_json_tokenizer(checkpoint.path))


def tokenizer_bytes(checkpoint: Checkpoint) -> tuple[int, int]:
    """(bytes held, most bytes held while loading) of the tokenizer of an opened model, before it is loaded.

    Exact and closely bounded for GGUF, whose header has the counts; for tokenizer.json, which states none, bounds from
    the size of the file.
    """
    if checkpoint.kind == "gguf":
        return footprint_bytes(checkpoint.config), load_bytes(checkpoint.config)
    file = checkpoint.path / "tokenizer.json"
    n_bytes = file.stat().st_size if file.is_file() else 0
    return n_bytes, 2 * n_bytes + JSON_LOAD_BYTES


def workspace_bytes(n_text_bytes: int) -> int:
    """Bytes that ``encode`` takes and gives back, at most, for a text of that many UTF-8 bytes."""
    return WORKSPACE_BYTES + WORKSPACE_BYTES_PER_TEXT_BYTE * n_text_bytes


def kept_bytes(n_text_bytes: int) -> int:
    """Bytes that stay resident, at most, when texts of that many UTF-8 bytes have been encoded."""
    return KEPT_BYTES_PER_TEXT_BYTE * n_text_bytes


class Tokenizer:
    """See the module's docstring; made by :func:`load_tokenizer`.

    Attributes
    ----------
    n_vocab : number of ids. bos_id : id that begins a text, or None. add_bos : whether encode puts it there unasked.
    eos_ids : ids that end a text or a turn.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self._vocabulary = parts.vocabulary
        self.n_vocab = len(parts.vocabulary)
        self.bos_id = parts.bos_id
        self.eos_ids = parts.eos_ids
        self.add_bos = parts.add_bos and parts.bos_id is not None
        always = set(self._vocabulary.of_kind(BYTE).tolist())
        if parts.unk_id is not None:
            always.add(parts.unk_id)
        if parts.model == "Unigram" and self._vocabulary.scores is not None:
            always.add(int(np.argmin(self._vocabulary.scores)))  # the score of what is unknown hangs on the lowest one
        self._always = frozenset(always)  # entries that any text may need

    def resident_bytes(self) -> int:
        """Bytes of the arrays held, to compare with ``tokenizer_files.footprint_bytes``."""
        merges = self._parts.merges
        return self._vocabulary.resident_bytes() + (merges.resident_bytes() if merges else 0)

    # Text to ids

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Ids of ``text``; ``add_bos`` None means as the model was trained. See :meth:`encode_segments`."""
        return self.encode_segments([(text, parse_special)], add_bos=add_bos)

    def encode_segments(self, segments: Sequence[Segment], *, add_bos: bool | None = None) -> list[int]:
        """Ids of the joined texts. Control tokens count only inside one segment that says so; otherwise the bounds
        between segments leave no trace."""
        return self.encode_marked([(segments, ())], add_bos=add_bos)[0][0]

    def encode_marked(
        self, texts: Sequence[tuple[Sequence[Segment], Sequence[int]]], *, add_bos: bool | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """Of each text, given as segments and marks, the ids, and of each mark how many ids lie before it.

        A mark is a number of characters, and none in the middle of an added token. Before it lie the first ids that are
        also those of the text up to there: all of these, but for the last ones where characters on both sides become
        one token. Many texts at once take less time than one by one, and the memory of all of them.
        """
        use_bos = self.add_bos if add_bos is None else add_bos
        if use_bos and self.bos_id is None:
            raise InvalidInput("this tokenizer has no token that begins a text", cure="leave add_bos out")
        begin = [self.bos_id] if use_bos and self.bos_id is not None else []
        cut = [self._pieces(segments) for segments, _ in texts]
        stretches = [(piece.what, piece.begin) for pieces in cut for piece in pieces if isinstance(piece.what, str)]
        halves = [half for pieces, (_, marks) in zip(cut, texts, strict=True) for half in _halves(pieces, marks)]
        encoded = iter(list(self._encode_stretches([*stretches, *halves])))
        ids = [[next(encoded) if isinstance(p.what, str) else [p.what] for p in pieces] for pieces in cut]
        return [
            (
                [*begin, *(token for piece in found for token in piece)],
                [len(begin) + _n_before(pieces, found, mark, encoded) for mark in marks],
            )
            for pieces, found, (_, marks) in zip(cut, ids, texts, strict=True)
        ]

    def control_starts(self, text: str) -> list[int]:
        """Every position in ``text`` at which a control token's text begins, overlapping ones too."""
        entries = [i for i in self._vocabulary.added_occurring(text.encode("utf-8", "replace")) if self._is_control(i)]
        any_of = "|".join(re.escape(self._vocabulary.text(i)) for i in entries)
        return [match.start() for match in re.finditer(f"(?={any_of})", text)] if entries else []

    def control_edges(self, text: str) -> tuple[bool, bool]:
        """Whether ``text`` begins with the end of a control token's text, and whether it ends with the beginning."""
        tails, heads, longest = self._control_texts
        lengths = range(1, min(longest, len(text) + 1))
        begins = any(f"{text[:n]}\0" in tails for n in lengths)
        ends = any(f"\0{text[-n:]}" in heads for n in lengths)
        return begins, ends

    @cached_property
    def _control_texts(self) -> tuple[str, str, int]:
        """All control tokens' texts without their first character, all without their last one, each between NULs, and
        the length of the longest: searched in, they need no object of each."""
        texts = [self._vocabulary.text(i) for i in self._vocabulary.of_kind(CONTROL, UNKNOWN).tolist()]
        tails, heads = ("\0".join(["", *parts, ""]) for parts in ((t[1:] for t in texts), (t[:-1] for t in texts)))
        return tails, heads, max(map(len, texts), default=0)

    def _is_control(self, entry: int) -> bool:
        return self._vocabulary.kinds[entry] in (CONTROL, UNKNOWN)

    def _pieces(self, segments: Sequence[Segment]) -> list[_Piece]:
        # Lone surrogates become "?".
        text = "".join(part for part, _ in segments).encode("utf-8", "replace").decode()
        return [
            _Piece(what, begin, begin + len(what if isinstance(what, str) else self._vocabulary.text(what)))
            for what, begin in self._cut(text, segments)
        ]

    def _cut(self, text: str, segments: Sequence[Segment]) -> Iterator[tuple[str | int, int]]:
        """The text as stretches and added tokens' ids, each with its position: leftmost first, then longest."""
        entries = self._vocabulary.added_occurring(text.encode())
        if not any(trusted for _, trusted in segments):
            entries = [i for i in entries if not self._is_control(i)]
        texts = {i: self._vocabulary.text(i) for i in entries}
        starts = [0]
        for part, _ in segments:
            starts.append(starts[-1] + len(part))

        def allowed(entry: int, begin: int) -> bool:
            if not self._is_control(entry):
                return True
            segment = bisect_right(starts, begin) - 1
            return segments[segment][1] and begin + len(texts[entry]) <= starts[segment + 1]

        begin = done = 0
        search = re.compile("|".join(map(re.escape, texts.values()))).search if texts else None
        while search and (match := search(text, begin)):
            begin = match.start()
            entry = next((i for i in entries if text.startswith(texts[i], begin) and allowed(i, begin)), None)
            if entry is None:
                begin += 1
                continue
            left, right = self._parts.strips.get(entry, (False, False))
            stretch = text[done:begin]
            if left:
                stretch = stretch.rstrip()
            if stretch:
                yield stretch, done
            yield entry, begin
            begin += len(texts[entry])
            if right:
                begin += len(text[begin:]) - len(text[begin:].lstrip())
            done = begin
        if done < len(text):
            yield text[done:], done

    def _encode_stretches(self, stretches: Sequence[tuple[str, int]]) -> Iterator[list[int]]:
        if not stretches:
            return
        at = [position == 0 for _, position in stretches]
        kinds = {first: _pipeline(self._parts, first) for first in set(at)}
        sections = [kinds[first] for first in at]
        seen = "".join(_as_seen(s, text) for s, (text, _) in zip(sections, stretches, strict=True))
        model, ids = self._restricted(self._without_dropped(seen).encode())
        for pipeline in kinds.values():
            pipeline.model = model
        for pipeline, (text, _) in zip(sections, stretches, strict=True):
            yield [ids[i] for i in pipeline.encode(text, add_special_tokens=False).ids]

    def _without_dropped(self, seen: str) -> str:
        """Without the characters that the library leaves out for want of an entry: their neighbours may then merge."""
        if self._parts.unk_id is not None or self._parts.options.get("byte_fallback"):
            return seen
        characters = set(seen)
        found = self._vocabulary.occurring("".join(sorted(characters)).encode(), (1, 2, 3, 4))
        return seen.translate(
            dict.fromkeys(map(ord, characters.difference(map(self._vocabulary.text, found.tolist()))))
        )

    def _restricted(self, seen: bytes) -> tuple[Any, list[int]]:
        """The library's model of the entries that occur in ``seen``, and the ids of its entries."""
        from tokenizers import models

        parts, vocabulary = self._parts, self._vocabulary
        words = vocabulary.occurring(seen)
        words = words[np.isin(vocabulary.kinds[words], (NORMAL, USER_DEFINED, UNUSED))]  # what merges may make
        ids = sorted(self._always.union(words.tolist()))
        texts = [vocabulary.text(i) for i in ids]
        local = {text: i for i, text in enumerate(texts)}
        unk = None if parts.unk_id is None else vocabulary.text(parts.unk_id)
        try:
            if parts.model == "Unigram":
                assert vocabulary.scores is not None
                pairs = list(zip(texts, vocabulary.scores[ids].tolist(), strict=True))
                unk_at = None if parts.unk_id is None else ids.index(parts.unk_id)
                return models.Unigram(pairs, unk_at, bool(parts.options.get("byte_fallback"))), ids
            if parts.merges is None:
                ways = merges_by_score(vocabulary, words)
                merges = [(vocabulary.text(left), vocabulary.text(right)) for left, right in ways.tolist()]
            else:
                merges = list(parts.merges.among(vocabulary, local, words))
            return models.BPE(local, merges, unk_token=unk, **parts.options), ids
        except (ValueError, TypeError) as error:
            raise CorruptFile(f"the tokenizer's data contradicts itself: {error}") from None

    # Ids to text

    def piece(self, token_id: int) -> str:
        """The vocabulary's own text of an id, for display."""
        return self._vocabulary.text(self._checked(token_id))

    def decode_bytes(self, token_id: int) -> bytes:
        """The bytes that an id stands for; none for control tokens."""
        kind = self._vocabulary.kinds[self._checked(token_id)]
        if kind in (CONTROL, UNKNOWN):
            return b""
        raw = self._vocabulary.raw(token_id)
        if kind == USER_DEFINED and self._parts.alphabet == "bytes":
            return raw
        if kind == BYTE:
            return bytes([int(raw[3:5], 16)])
        if self._parts.alphabet == "bytes":
            table = _byte_of_character()
            return bytes(table[c] for c in raw.decode("utf-8", "replace") if c in table)
        return raw.replace(SPACE.encode(), b" ") if self._parts.alphabet == "sentencepiece" else raw

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD, and the space that encoding put in front is taken
        away."""
        raw = b"".join(map(self.decode_bytes, ids))
        if self._parts.add_space_prefix and raw.startswith(b" "):
            raw = raw[1:]
        return raw.decode("utf-8", "replace")

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < self.n_vocab:
            raise InvalidInput(f"token id {token_id}; this vocabulary has {self.n_vocab}")
        return token_id


class StreamDecoder:
    """Text of a growing sequence of ids, given out as soon as its characters are complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The characters that this id completes, perhaps none."""
        return self._decoder.decode(self._tokenizer.decode_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


class _Piece(NamedTuple):
    """A stretch of a text, or an added token's id, and the characters that it takes there."""

    what: str | int
    begin: int
    end: int


def _halves(pieces: Sequence[_Piece], marks: Iterable[int]) -> Iterator[tuple[str, int]]:
    """What of stretches lies before the marks in their middle, with its position."""
    for mark in marks:
        for what, begin, end in pieces:
            if isinstance(what, str) and begin < mark < end:
                yield what[: mark - begin], begin


def _n_before(pieces: Sequence[_Piece], ids: Sequence[list[int]], mark: int, halves: Iterator[list[int]]) -> int:
    """How many ids lie before a mark; ``halves`` are those of what :func:`_halves` gave."""
    n = 0
    for (what, begin, end), own in zip(pieces, ids, strict=True):
        if end <= mark:
            n += len(own)
        elif isinstance(what, str) and begin < mark:
            n += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(own, next(halves), strict=False)))
    return n


def _pipeline(parts: TokenizerParts, first: bool) -> LibraryTokenizer:
    """A library tokenizer with normalizer and pre-tokenizer, and no model yet; ``first``: where the text begins."""
    import json

    from tokenizers import Tokenizer as LibraryTokenizer

    cut = parts.pre_tokenizer if first else _not_first(parts.pre_tokenizer)
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    sections: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": empty}
    sections |= {"normalizer": parts.normalizer, "pre_tokenizer": cut, "post_processor": None, "decoder": None}
    try:
        return LibraryTokenizer.from_str(json.dumps(sections))
    except Exception as error:  # the library raises Exception itself
        raise CorruptFile(f"the tokenizer's normalizer or pre-tokenizer can't be read: {error}") from None


def _not_first(section: Section | None) -> Section | None:
    """The section as it acts on a text that follows another: a prefix meant for the first one only is not added."""
    if section is None:
        return None
    if section.get("type") == "Sequence":
        return section | {"pretokenizers": [_not_first(step) for step in section["pretokenizers"]]}
    return section | {"prepend_scheme": "never"} if section.get("prepend_scheme") == "first" else section


def _as_seen(pipeline: LibraryTokenizer, text: str) -> str:
    """The text as the model sees it: normalized, cut, the pieces joined again (more substrings do no harm)."""
    if pipeline.normalizer is not None:
        text = pipeline.normalizer.normalize_str(text)
    if pipeline.pre_tokenizer is not None:
        text = "".join(piece for piece, _ in pipeline.pre_tokenizer.pre_tokenize_str(text))
    return text


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """Byte-level alphabets write each byte as a printable character: itself where it is one, else from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}
