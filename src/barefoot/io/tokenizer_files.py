"""What a tokenizer is made of, read from GGUF metadata or from a Hugging Face folder."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from barefoot.core.errors import CorruptFile, SourceNotFound, UnsupportedFormat
from barefoot.io.files import BinaryFile
from barefoot.io.gguf import GGUFArray, read_numbers, read_strings
from barefoot.io.inventory import Checkpoint
from barefoot.io.json_stream import JsonStream
from barefoot.io.pretokenize import SPACE, Section, byte_level_sections, sentencepiece_normalizer
from barefoot.io.strict_json import read_object
from barefoot.io.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Merges, Vocabulary, split_at_space

Alphabet = Literal["bytes", "sentencepiece", "plain"]

END_OF_TURN = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endofturn|>")


@dataclass(frozen=True)
class TokenizerParts:
    """The data of one tokenizer.

    ``model`` is "BPE" or "Unigram"; ``merges`` None for a BPE whose merges follow from scores. ``options`` are the
    model's own (byte_fallback, …). ``alphabet`` says how an entry's text stands for bytes: "bytes" for byte-level,
    "sentencepiece" for ▁ and <0x0A>, "plain" for neither. ``strips`` holds (left, right) for the added tokens that
    swallow the white space beside them.
    """

    vocabulary: Vocabulary
    merges: Merges | None
    model: Literal["BPE", "Unigram"]
    alphabet: Alphabet
    normalizer: Section | None
    pre_tokenizer: Section | None
    options: Mapping[str, Any]
    unk_id: int | None
    bos_id: int | None
    eos_ids: frozenset[int]
    add_bos: bool
    add_space_prefix: bool = False
    strips: Mapping[int, tuple[bool, bool]] = field(default_factory=dict)


# While loading, beyond what stays: sorting and hashing an entry, splitting and finding a merge, windows of the file.
LOAD_BYTES_PER_ENTRY, LOAD_BYTES_PER_MERGE, LOAD_BYTES = 20, 60, 1 << 20
EXPORT_BYTES_PER_ENTRY = 190  # while it is written: the set of all texts, or the ways to cut them


def footprint_bytes(metadata: Mapping[str, Any]) -> int:
    """Resident bytes of the tokenizer that this GGUF metadata describes, from the header's counts alone."""
    tokens, n_merges, scored = _counts(metadata)
    vocabulary = Vocabulary.footprint_bytes(tokens.count, tokens.text_bytes, 4 if scored else 0)
    return vocabulary + n_merges * Merges.BYTES_EACH


def load_bytes(metadata: Mapping[str, Any]) -> int:
    """The most that is held while that tokenizer loads, its resident bytes included."""
    tokens, n_merges, _ = _counts(metadata)
    loading = tokens.count * LOAD_BYTES_PER_ENTRY + n_merges * LOAD_BYTES_PER_MERGE + LOAD_BYTES
    return footprint_bytes(metadata) + loading


def export_bytes(metadata: Mapping[str, Any]) -> int:
    """The most that is held while that tokenizer is written as files, what loading it leaves included."""
    return footprint_bytes(metadata) + _counts(metadata)[0].count * EXPORT_BYTES_PER_ENTRY


def _counts(metadata: Mapping[str, Any]) -> tuple[GGUFArray, int, bool]:
    """(the array of entries, number of merges, whether entries have scores)."""
    scored = metadata.get("tokenizer.ggml.model") != "gpt2"
    merges = metadata.get("tokenizer.ggml.merges")
    n_merges = merges.count if isinstance(merges, GGUFArray) and not scored else 0
    return _string_array(metadata, "tokenizer.ggml.tokens"), n_merges, scored


def _string_array(metadata: Mapping[str, Any], key: str) -> GGUFArray:
    found = metadata.get(key)
    if not isinstance(found, GGUFArray) or found.element != "string":
        raise CorruptFile(f"metadata {key!r}: expected an array of strings, got {found!r}")
    return found


def read_gguf_tokenizer(checkpoint: Checkpoint) -> TokenizerParts:
    """The tokenizer of a GGUF file.

    Raises
    ------
    UnsupportedFormat : a tokenizer model or pre-tokenizer that is not known.
    CorruptFile : counts that contradict each other, ids outside the vocabulary, merges that make no entry.
    """
    data = checkpoint.config
    model = data.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama", "t5"):
        raise UnsupportedFormat(f"tokenizer model {model!r} is not known; known: gpt2, llama, t5")
    normalizer: Section | None
    pre_tokenizer: Section | None = None
    options: dict[str, Any] = {}
    with BinaryFile(checkpoint.path) as file:
        blob, offsets = read_strings(file, _string_array(data, "tokenizer.ggml.tokens"))
        kinds = _optional_numbers(file, data, "tokenizer.ggml.token_type")
        scores = _optional_numbers(file, data, "tokenizer.ggml.scores") if model != "gpt2" else None
        vocabulary = Vocabulary(blob, offsets, np.ones(len(offsets) - 1, np.uint8) if kinds is None else kinds, scores)
        merges = None
        if model == "gpt2":
            joined = split_at_space(*read_strings(file, _string_array(data, "tokenizer.ggml.merges")))
            merges = Merges(vocabulary, *joined)
        elif scores is None:
            raise CorruptFile(f"tokenizer model {model!r} needs tokenizer.ggml.scores")
        charsmap = data.get("tokenizer.ggml.precompiled_charsmap")
        charsmap = read_numbers(file, charsmap).tobytes() if isinstance(charsmap, GGUFArray) else b""

    pre = data.get("tokenizer.ggml.pre", "default")
    prefix = bool(data.get("tokenizer.ggml.add_space_prefix", model != "gpt2"))
    if model == "gpt2":
        normalizer, pre_tokenizer, whole_words = byte_level_sections(pre)
        options = {"ignore_merges": whole_words}
    elif model == "llama":
        normalizer = sentencepiece_normalizer(prefix)
        options = {"byte_fallback": bool((vocabulary.kinds == BYTE).any()), "fuse_unk": True}
    else:
        steps: list[Section] = []
        if charsmap:
            steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
        if data.get("tokenizer.ggml.remove_extra_whitespaces", False):
            steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
            steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        normalizer = {"type": "Sequence", "normalizers": steps} if steps else None
        scheme = "always" if prefix else "never"
        pre_tokenizer = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": True}
        options = {"byte_fallback": bool((vocabulary.kinds == BYTE).any())}

    ends = (_id(data.get(f"tokenizer.ggml.{name}_token_id"), vocabulary) for name in ("eos", "eot", "eom"))
    return TokenizerParts(
        vocabulary=vocabulary,
        merges=merges,
        model="Unigram" if model == "t5" else "BPE",
        alphabet="bytes" if model == "gpt2" else "sentencepiece",
        normalizer=normalizer,
        pre_tokenizer=pre_tokenizer,
        options=options,
        unk_id=_id(data.get("tokenizer.ggml.unknown_token_id"), vocabulary) if model != "gpt2" else None,
        bos_id=_id(data.get("tokenizer.ggml.bos_token_id"), vocabulary),
        eos_ids=frozenset(i for i in ends if i is not None) | _turn_ends(vocabulary),
        add_bos=bool(data.get("tokenizer.ggml.add_bos_token", model == "llama" or pre in ("llama-bpe", "llama3"))),
        add_space_prefix=prefix and model != "gpt2",
    )


def _optional_numbers(file: BinaryFile, metadata: Mapping[str, Any], key: str) -> np.ndarray | None:
    found = metadata.get(key)
    if found is None:
        return None
    if not isinstance(found, GGUFArray):
        raise CorruptFile(f"metadata {key!r}: expected an array, got {found!r}")
    return read_numbers(file, found)


def _id(value: Any, vocabulary: Vocabulary) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < len(vocabulary):
        raise CorruptFile(f"token id {value!r} lies outside the vocabulary of {len(vocabulary)}")
    return value


def _turn_ends(vocabulary: Vocabulary) -> frozenset[int]:
    found = (vocabulary.find(text) for text in END_OF_TURN)
    return frozenset(i for i in found if i is not None and vocabulary.kinds[i] in (CONTROL, USER_DEFINED))


class _Texts:
    """Texts gathered from JSON without keeping an object for each."""

    def __init__(self) -> None:
        self.blob, self.lengths = bytearray(), array("I")

    def add(self, text: str) -> None:
        raw = text.encode("utf-8", "replace")
        self.blob += raw
        self.lengths.append(len(raw))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(blob, offsets) in the order of adding."""
        offsets = np.zeros(len(self.lengths) + 1, np.uint32)
        np.cumsum(np.frombuffer(self.lengths, np.uint32), out=offsets[1:])
        return np.frombuffer(self.blob, np.uint8), offsets


class _Entries(_Texts):
    """Vocabulary entries: texts in any order, with ids, of which some may be missing, and perhaps with scores."""

    def __init__(self) -> None:
        super().__init__()
        self.ids, self.scores = array("i"), array("d")

    def add_entry(self, text: str, entry: int, score: float | None = None) -> None:
        self.add(text)
        self.ids.append(entry)
        if score is not None:
            self.scores.append(score)

    def by_id(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(blob, offsets, scores) in the order of ids; ids that no entry has become empty texts."""
        ids = np.array(self.ids, np.int64)
        low, high = min(self.ids, default=0), max(self.ids, default=0)
        if not len(ids) or low < 0 or high > 2 * len(ids) + 65536:
            raise CorruptFile(f"a vocabulary of {len(ids)} entries has ids from {low} to {high}")
        blob, starts = self.arrays()
        scores = np.array(self.scores, np.float64) if self.scores else None
        if np.array_equal(ids, np.arange(high + 1)):
            return blob.copy(), starts, scores
        last = np.full(high + 1, -1)  # of entries with one id, the last one counts
        last[ids] = np.arange(len(ids))
        texts = [blob[starts[k] : starts[k + 1]] if k >= 0 else blob[:0] for k in last.tolist()]
        offsets = np.zeros(high + 2, np.uint32)
        np.cumsum([len(text) for text in texts], out=offsets[1:], dtype=np.uint32)
        return np.concatenate(texts), offsets, scores


def read_json_tokenizer(folder: Path) -> TokenizerParts:
    """The tokenizer of a Hugging Face folder: tokenizer.json, with ids from the configurations beside it.

    tokenizer.json is read in windows: besides the result, loading holds about as many bytes as the result.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise SourceNotFound(f"{folder} has no tokenizer.json", cure="save it with a fast tokenizer of transformers")
    entries, merged, splits = _Entries(), _Texts(), array("H")
    sections: dict[str, Any] = {}
    options: dict[str, Any] = {}
    with BinaryFile(path) as file:
        stream = JsonStream(file)
        for key in stream.members():
            if key != "model":
                sections[key] = stream.value()
                continue
            for part in stream.members():
                if part == "vocab":
                    _read_vocab(stream, entries)
                elif part == "merges":
                    _read_merges(stream, merged, splits)
                else:
                    options[part] = stream.value()
    return _assemble(folder, sections, options, entries, merged, splits)


def _read_vocab(stream: JsonStream, entries: _Entries) -> None:
    if stream.peek() == "{":
        for text in stream.members():
            entries.add_entry(text, stream.count())
        return
    for position, _ in enumerate(stream.items()):
        pair = stream.items()
        next(pair)
        text = stream.string()
        next(pair)
        entries.add_entry(text, position, stream.number())
        for _ in pair:
            raise CorruptFile("a unigram entry has more than a text and a score")


def _read_merges(stream: JsonStream, merged: _Texts, splits: array[int]) -> None:
    for position, _ in enumerate(stream.items()):
        pair = stream.string().split(" ") if stream.peek() == '"' else stream.value()
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) and p for p in pair):
            raise CorruptFile(f"merge {position} is {pair!r}, expected two texts")
        left = len(pair[0].encode("utf-8", "replace"))
        if left >= 1 << 16:
            raise CorruptFile(f"merge {position} has a left part of {left} bytes")
        merged.add(pair[0] + pair[1])
        splits.append(left)


def _assemble(
    folder: Path,
    sections: dict[str, Any],
    options: dict[str, Any],
    entries: _Entries,
    merged: _Texts,
    splits: array[int],
) -> TokenizerParts:
    # Old files leave the type out; the members tell.
    model = options.get("type") or ("Unigram" if entries.scores else "BPE")
    if model not in ("BPE", "Unigram"):
        raise UnsupportedFormat(f"tokenizer model {model!r} is not known; known: BPE, Unigram")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if options.get(name):
            raise UnsupportedFormat(f"tokenizer with {name} {options[name]!r} is not supported")

    n_model = len(entries.ids)
    added = sections.get("added_tokens") or []
    if not isinstance(added, list):
        raise CorruptFile(f"added_tokens must be a list, got {type(added).__name__}")
    in_model: dict[int, dict[str, Any]] = {}
    for token in added:
        if (
            not isinstance(token, dict)
            or not isinstance(token.get("id"), int)
            or not isinstance(token.get("content"), str)
        ):
            raise CorruptFile(f"added token {token!r}: expected an id and a content")
        in_model[token["id"]] = token
    added_ids = np.array(sorted(in_model), np.int64)
    for token_id in added_ids[~np.isin(added_ids, np.array(entries.ids))].tolist():
        entries.add_entry(in_model[token_id]["content"], token_id, 0.0 if entries.scores else None)
    blob, offsets, scores = entries.by_id()
    n = len(offsets) - 1
    if scores is not None and len(scores) != n:
        raise CorruptFile(f"a unigram vocabulary of {n_model} entries has added tokens with ids up to {n - 1}")
    kinds = np.full(n, NORMAL, np.uint8)
    for token_id, token in in_model.items():
        kinds[token_id] = CONTROL if token.get("special") else USER_DEFINED
    vocabulary = Vocabulary(blob, offsets, kinds, scores)
    unk = options.get("unk_id") if model == "Unigram" else options.get("unk_token")
    unk_id = vocabulary.find(unk) if isinstance(unk, str) else _id(unk, vocabulary)
    if unk_id is not None and kinds[unk_id] == NORMAL:
        vocabulary.kinds[unk_id] = UNKNOWN
    if options.get("byte_fallback"):
        for byte in (vocabulary.find(f"<0x{value:02X}>") for value in range(256)):
            if byte is not None:
                vocabulary.kinds[byte] = BYTE
    merges = None
    if model == "BPE":
        merges = Merges(vocabulary, *merged.arrays(), np.array(splits, np.uint16))
    config = read_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    bos_id = _named_id(config.get("bos_token"), vocabulary)
    try:
        first = _id(_first_special(sections.get("post_processor")), vocabulary)
    except (AttributeError, LookupError, TypeError) as error:
        raise CorruptFile(f"{folder / 'tokenizer.json'}: post_processor can't be read: {error}") from None
    flat = str([sections.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")])
    alphabet: Alphabet = "bytes" if "ByteLevel" in flat else "sentencepiece" if SPACE in flat else "plain"
    return TokenizerParts(
        vocabulary=vocabulary,
        merges=merges,
        model="Unigram" if model == "Unigram" else "BPE",
        alphabet=alphabet,
        normalizer=sections.get("normalizer"),
        pre_tokenizer=sections.get("pre_tokenizer"),
        options={k: options[k] for k in ("fuse_unk", "byte_fallback", "ignore_merges") if options.get(k)},
        unk_id=unk_id,
        bos_id=bos_id if bos_id is not None else first,
        eos_ids=_folder_eos(folder, config, vocabulary) | _turn_ends(vocabulary),
        add_bos=bool(config.get("add_bos_token", first is not None)),
        add_space_prefix=alphabet == "sentencepiece"
        and any(word in flat for word in ("Prepend", "'always'", "'first'")),
        strips={
            i: (bool(t.get("lstrip")), bool(t.get("rstrip")))
            for i, t in in_model.items()
            if t.get("lstrip") or t.get("rstrip")
        },
    )


def _first_special(section: Any) -> int | None:
    """The id that a TemplateProcessing section puts before a text, if it does."""
    if not isinstance(section, dict):
        return None
    if section.get("type") == "Sequence":
        found = (_first_special(step) for step in section.get("processors", []))
        return next((i for i in found if i is not None), None)
    if section.get("type") != "TemplateProcessing" or not section.get("single"):
        return None
    name = section["single"][0].get("SpecialToken", {}).get("id")
    ids = section.get("special_tokens", {}).get(name, {}).get("ids", [])
    return ids[0] if ids else None


def _named_id(token: Any, vocabulary: Vocabulary) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return vocabulary.find(text) if isinstance(text, str) else None


def _folder_eos(folder: Path, config: Mapping[str, Any], vocabulary: Vocabulary) -> frozenset[int]:
    ids = {_named_id(config.get("eos_token"), vocabulary)}
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = read_object(folder / name).get("eos_token_id")
            ids |= set(value) if isinstance(value, list) else {value}
    return frozenset(i for i in ids if isinstance(i, int) and 0 <= i < len(vocabulary))
