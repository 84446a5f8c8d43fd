"""A vocabulary as flat arrays, and the one question asked of it: which entries occur in this text?

A merge can only make a token that is a substring of the text, out of tokens that are substrings too; a unigram lattice
holds only substrings. So tokenizing needs those entries alone, a few thousand instead of a few hundred thousand, and
the rest may stay bytes: 262,144 entries take 8 MiB here and 290 MiB as a hash map of strings with its merges.

Entries are found by hashes of their bytes. The hash of ``b_0 … b_(n-1)`` is ``Σ (b_j + 1) P^j mod 2^32``: those of all
substrings of one length follow from prefix sums at once. Two entries, or an entry and a substring, may share a hash;
both are then reported, and a reported entry that does not occur is harmless, since no text can lead to it.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Sequence

import numpy as np

from barefoot.core.errors import CorruptFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of entries, numbered as in GGUF

_P32, _P64 = 0x9E3779B1, 0x9E3779B97F4A7C15  # odd, so that powers can be undone
_BYTE_TEXT = re.compile(rb"<0x[0-9A-Fa-f]{2}>")
_CHUNK, _HASHED = 1 << 16, 1 << 10  # text positions, and entries, hashed at a time
_CUT = 1 << 12  # entries cut in two at a time
_MAX_ENTRIES = 1 << 24


class Vocabulary:
    """Entries by id.

    Parameters
    ----------
    blob : (text_bytes,) uint8, all entries' UTF-8 text one after the other.
    offsets : (n + 1,) uint32, where each begins.
    kinds : (n,) uint8, NORMAL … BYTE.
    scores : (n,) float32 or float64 for SentencePiece and unigram models, else None.
    """

    def __init__(self, blob: np.ndarray, offsets: np.ndarray, kinds: np.ndarray, scores: np.ndarray | None) -> None:
        n = len(offsets) - 1
        if not 0 < n <= _MAX_ENTRIES or len(kinds) != n or (scores is not None and len(scores) != n):
            n_scores = "no" if scores is None else len(scores)
            raise CorruptFile(f"vocabulary of {n} entries with {len(kinds)} kinds and {n_scores} scores")
        if kinds.dtype.kind not in "iu" or kinds.min() < 0 or kinds.max() > 255:
            raise CorruptFile(f"kinds of entries must be small counts, got {kinds.dtype}")
        if scores is not None and (scores.dtype.kind != "f" or not np.isfinite(scores).all()):
            raise CorruptFile(f"scores of entries must be finite fractions, got {scores.dtype}")
        self.blob, self.offsets, self.scores = blob, offsets, scores
        self.kinds = kinds.astype(np.uint8)
        wrong = next((i for i in self.of_kind(BYTE).tolist() if not _BYTE_TEXT.fullmatch(self.raw(i))), None)
        if wrong is not None:
            raise CorruptFile(f"entry {wrong} stands for a byte, but is {self.raw(wrong)!r}, not of the form <0x0A>")
        lengths = np.diff(offsets)
        hashes = hash_segments(blob, offsets[:-1], offsets[1:], np.uint32)
        self._ids, self._hashes = np.empty(n, np.uint32), np.empty(n, np.uint32)
        self._buckets: dict[int, tuple[int, int]] = {}  # by length; within each, sorted by hash
        end = 0
        for length in np.unique(lengths).tolist():
            ids = np.flatnonzero(lengths == length).astype(np.uint32)
            ids = ids[np.argsort(hashes[ids])]
            begin, end = end, end + len(ids)
            self._ids[begin:end], self._hashes[begin:end] = ids, hashes[ids]
            self._buckets[length] = (begin, end)
        added = self.of_kind(UNKNOWN, CONTROL, USER_DEFINED)
        self._added_lengths = sorted({int(x) for x in lengths[added]} - {0})
        self._added_first = np.zeros(256, bool)
        self._added_first[blob[offsets[:-1][added][lengths[added] > 0]]] = True

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @staticmethod
    def footprint_bytes(n_entries: int, text_bytes: int, score_bytes: int) -> int:
        """Resident bytes before loading: text, offsets, kinds, scores of ``score_bytes`` each, hashes and their ids."""
        return text_bytes + 4 * (n_entries + 1) + n_entries * (1 + score_bytes + 4 + 4) + 256

    def resident_bytes(self) -> int:
        arrays = [self.blob, self.offsets, self.kinds, self._ids, self._hashes, self._added_first]
        return sum(a.nbytes for a in arrays) + (0 if self.scores is None else self.scores.nbytes)

    def raw(self, entry: int) -> bytes:
        """The entry's text as UTF-8."""
        return self.blob[self.offsets[entry] : self.offsets[entry + 1]].tobytes()

    def text(self, entry: int) -> str:
        return self.raw(entry).decode("utf-8", "replace")

    def repeated(self) -> np.ndarray:
        """Sorted ids of the entries whose text an earlier one has too."""
        hashes = _hashes(self, np.arange(len(self)))
        order = np.argsort(hashes, kind="stable")
        again = np.flatnonzero(np.diff(hashes[order]) == 0) + 1
        return np.sort(order[again])

    def of_kind(self, *kinds: int) -> np.ndarray:
        """Sorted ids of the entries of these kinds."""
        table = np.zeros(256, bool)
        table[list(kinds)] = True
        return np.flatnonzero(table[self.kinds])

    def find(self, text: str) -> int | None:
        """The id of the entry with exactly this text; the lowest when several have it."""
        raw = text.encode()
        return next((int(i) for i in self.occurring(raw, [len(raw)]) if self.raw(int(i)) == raw), None)

    def occurring(self, text: bytes, lengths: Sequence[int] | None = None) -> np.ndarray:
        """Sorted ids of all entries that occur in ``text`` (UTF-8), and perhaps a few that do not."""
        return self._search(text, self._buckets if lengths is None else lengths, None)

    def added_occurring(self, text: bytes) -> list[int]:
        """Ids of the control, unknown and user-defined entries that occur in ``text``, longest first."""
        found = self._search(text, self._added_lengths, self._added_first)
        kept = [int(i) for i in found if self.kinds[i] in (UNKNOWN, CONTROL, USER_DEFINED)]
        return sorted((i for i in kept if self.raw(i) in text), key=lambda i: -len(self.raw(i)))

    def _search(self, text: bytes, lengths: Iterable[int], first: np.ndarray | None) -> np.ndarray:
        data = np.frombuffer(text, np.uint8)
        wanted = sorted(n for n in lengths if n in self._buckets and 0 < n <= len(data))
        found: list[np.ndarray] = []
        for begin in range(0, len(data) if wanted else 0, _CHUNK):
            part = data[begin : begin + _CHUNK + wanted[-1]]
            prefix, undo = _prefix_sums(part, np.uint32)
            head = part[:_CHUNK]
            starts = np.flatnonzero((head & 0xC0) != 0x80 if first is None else first[head])
            for n in wanted:
                starts = starts[: np.searchsorted(starts, len(part) - n, "right")]
                hashes = np.sort(
                    (prefix[starts + n] - prefix[starts]) * undo[starts]
                )  # sorted ones are looked up faster
                low, high = self._buckets[n]
                bucket = self._hashes[low:high]
                left, right = np.searchsorted(bucket, hashes), np.searchsorted(bucket, hashes, "right")
                while len(left):  # mostly one round; more where entries share a hash
                    hit = left < right
                    left, right = left[hit], right[hit]
                    found.append(self._ids[low + left])
                    left = left + 1
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.uint32)


class Merges:
    """Ranked merges, each as the entry that it makes and the length of its left part: 6 bytes a merge."""

    BYTES_EACH = 6

    def __init__(self, vocabulary: Vocabulary, blob: np.ndarray, offsets: np.ndarray, splits: np.ndarray) -> None:
        """``blob`` and ``offsets`` hold each merge's two parts joined, ``splits`` the bytes of the left one."""
        if len(splits) and int(splits.max()) >= 1 << 16:
            raise CorruptFile(f"a merge has a left part of {int(splits.max())} bytes")
        known = hash_segments(vocabulary.blob, vocabulary.offsets[:-1], vocabulary.offsets[1:], np.uint64)
        order = np.argsort(known)
        self.results = np.empty(len(splits), np.uint32)
        self.splits = splits.astype(np.uint16)
        for begin in range(0, len(splits), _CHUNK):
            some = offsets[begin : begin + _CHUNK + 1]
            made = hash_segments(blob, some[:-1], some[1:], np.uint64)
            at = np.minimum(np.searchsorted(known, made, sorter=order), len(order) - 1)
            self.results[begin : begin + _CHUNK] = order[at]
            wrong = np.flatnonzero(known[order[at]] != made)
            if len(wrong):
                text = blob[some[wrong[0]] : some[wrong[0] + 1]].tobytes().decode("utf-8", "replace")
                raise CorruptFile(f"merge {begin + wrong[0]} makes {text!r}, which is not in the vocabulary")

    def resident_bytes(self) -> int:
        return self.results.nbytes + self.splits.nbytes

    def among(self, vocabulary: Vocabulary, kept: Container[str], words: np.ndarray) -> Iterator[tuple[str, str]]:
        """The merges that make one of the entries ``words`` out of texts in ``kept``, best rank first."""
        is_word = np.zeros(len(vocabulary), bool)
        is_word[words] = True
        for rank in np.flatnonzero(is_word[self.results]).tolist():
            raw, split = vocabulary.raw(int(self.results[rank])), int(self.splits[rank])
            left, right = raw[:split].decode("utf-8", "replace"), raw[split:].decode("utf-8", "replace")
            if left in kept and right in kept:
                yield left, right


def split_at_space(blob: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merges written as ``"left right"`` to ``(blob without the spaces, offsets, bytes of the left parts)``.

    Raises
    ------
    CorruptFile : a merge without two parts.
    """
    spaces = np.flatnonzero(blob == 0x20)
    starts = offsets[:-1].astype(np.int64)
    at = np.searchsorted(spaces, starts + 1)
    separators = spaces[np.minimum(at, len(spaces) - 1)] if len(spaces) else starts
    bad = np.flatnonzero((separators <= starts) | (separators >= offsets[1:].astype(np.int64) - 1))
    if len(bad):
        text = blob[offsets[bad[0]] : offsets[bad[0] + 1]].tobytes().decode("utf-8", "replace")
        raise CorruptFile(f"merge {int(bad[0])} is {text!r}, expected two parts and a space between them")
    joined = np.delete(blob, separators)
    return joined, (offsets - np.arange(len(offsets), dtype=np.uint32)).astype(np.uint32), separators - starts


def merges_by_score(vocabulary: Vocabulary, entries: np.ndarray) -> np.ndarray:
    """SentencePiece BPE: every way to make one of ``entries`` (rising ids) out of two others, int32 (n, 2), best score
    first.

    Ties as in transformers' conversion: in the order of the ids of left and right part within an entry, of ids between
    entries, after longer left and right parts. Of entries with one text the last one counts.
    """
    assert vocabulary.scores is not None
    hashes = _hashes(vocabulary, entries)
    order = np.argsort(hashes, kind="stable")
    last = np.append(np.diff(hashes[order]) != 0, True)[: len(order)]
    known, by_hash = hashes[order][last], entries[order][last].astype(np.int32)
    entries = np.sort(by_hash)
    cuts = [_cuts(vocabulary, entries[begin : begin + _CUT], known) for begin in range(0, max(1, len(entries)), _CUT)]
    whole, head, tail, n_left, n_right = (np.concatenate(each) for each in zip(*cuts, strict=True))
    left, right = by_hash[head], by_hash[tail]
    best = np.lexsort((right, left, whole, -n_right, -n_left, -np.asarray(vocabulary.scores)[whole]))
    return np.stack([left[best], right[best]], axis=1)


def _hashes(vocabulary: Vocabulary, entries: np.ndarray) -> np.ndarray:
    blob, ends = _gathered(vocabulary, entries)
    return hash_segments(blob, ends[:-1], ends[1:], np.uint64)


def _gathered(vocabulary: Vocabulary, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The texts of ``entries`` one after the other, and where each begins, int64 (n + 1,)."""
    starts = vocabulary.offsets[entries].astype(np.int64)
    ends = np.zeros(len(entries) + 1, np.int64)
    np.cumsum(vocabulary.offsets[1:][entries] - starts, out=ends[1:])
    return vocabulary.blob[np.repeat(starts - ends[:-1], np.diff(ends)) + np.arange(ends[-1])], ends


def _cuts(vocabulary: Vocabulary, entries: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, ...]:
    """All ways to cut ``entries`` between characters into two texts whose hashes are ``known`` (sorted): the entry, the
    places of its parts' hashes, and the characters of its parts, int32 each."""
    blob, ends = _gathered(vocabulary, entries)
    at = np.flatnonzero((blob & 0xC0) != 0x80)  # a character begins
    owner = np.searchsorted(ends, at, "right") - 1
    inside = at > ends[owner]
    at, owner = at[inside], owner[inside]
    n_cuts = np.bincount(owner, minlength=len(entries))
    n_left = np.arange(len(owner)) - (np.cumsum(n_cuts) - n_cuts)[owner] + 1
    found = np.ones(len(owner), bool)
    places = []
    for low, high in ((ends[owner], at), (at, ends[owner + 1])):
        hashes = hash_segments(blob, low, high, np.uint64)
        place = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        found &= known[place] == hashes
        places.append(place)
    n_right = n_cuts[owner] + 1 - n_left
    return tuple(each[found].astype(np.int32) for each in (entries[owner], *places, n_left, n_right))


def hash_segments(blob: np.ndarray, starts: np.ndarray, ends: np.ndarray, dtype: type) -> np.ndarray:
    """The hash of each ``blob[starts[i]:ends[i]]``, for segments in rising order; chunks keep it from taking memory."""
    hashes: np.ndarray = np.empty(len(starts), dtype)
    for begin in range(0, len(starts), _HASHED):
        some = slice(begin, begin + _HASHED)
        base = int(starts[begin])
        prefix, undo = _prefix_sums(blob[base : int(ends[some][-1])], dtype)
        low, high = starts[some].astype(np.int64) - base, ends[some].astype(np.int64) - base
        hashes[some] = (prefix[high] - prefix[low]) * undo[low]
    return hashes


def _prefix_sums(data: np.ndarray, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """``Σ_(j<i) (b_j + 1) P^j`` and ``P^-i`` for i from 0 to len(data), both modulo the width of ``dtype``."""
    base, bits = (_P32, 32) if dtype is np.uint32 else (_P64, 64)
    n = len(data)
    sums: np.ndarray = np.zeros(n + 1, dtype)
    np.cumsum((data.astype(dtype) + dtype(1)) * _powers(base, n, dtype)[:n], dtype=dtype, out=sums[1:])
    return sums, _powers(pow(base, -1, 1 << bits), n, dtype)


def _powers(base: int, n: int, dtype: type) -> np.ndarray:
    powers: np.ndarray = np.full(n + 1, base, dtype)
    powers[0] = 1
    return np.multiply.accumulate(powers, dtype=dtype)  # otherwise numpy widens it
