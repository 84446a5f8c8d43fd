"""A tokenizer as the files that transformers reads: tokenizer.json, tokenizer_config.json, generation_config.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from barefoot.io.files import atomic_writer
from barefoot.io.pretokenize import SPACE, Section
from barefoot.io.tokenizer_files import TokenizerParts
from barefoot.io.vocabulary import CONTROL, UNKNOWN, USER_DEFINED, merges_by_score

BATCH = 256  # items of a long array that are encoded together


def export_tokenizer(parts: TokenizerParts, chat_template: str | None, folder: Path) -> None:
    """Write the three files into ``folder``, each whole or not at all."""
    text = parts.vocabulary.text

    def name(token: int | None) -> str | None:
        return None if token is None else text(token)

    # The token that ends a turn is what transformers is to stop at; an id of several is as good as another.
    eos_ids = sorted(parts.eos_ids)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": parts.add_bos,
        "clean_up_tokenization_spaces": False,
        "bos_token": name(parts.bos_id),
        "eos_token": name(eos_ids[0]) if eos_ids else None,
        "unk_token": name(parts.unk_id),
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    generation = {"eos_token_id": eos_ids} | ({} if parts.bos_id is None else {"bos_token_id": parts.bos_id})
    _write(folder / "tokenizer.json", tokenizer_json(parts))
    _write(folder / "tokenizer_config.json", {key: value for key, value in config.items() if value is not None})
    _write(folder / "generation_config.json", generation)


def _write(path: Path, content: dict[str, Any]) -> None:
    with atomic_writer(path) as file:
        for piece in _encoded(content):
            file.write(piece.encode())


@dataclass(frozen=True)
class _Lazy:
    """An object or an array of JSON whose items, encoded, come one at a time."""

    brackets: str
    items: Iterator[str]


def _encoded(value: Any) -> Iterator[str]:
    """JSON in pieces, so that a vocabulary's whole text is never there."""
    if isinstance(value, _Lazy):
        yield value.brackets[0]
        for number, batch in enumerate(iter(lambda: list(islice(value.items, BATCH)), [])):
            yield (",\n" if number else "\n") + ",\n".join(batch)
        yield value.brackets[1]
    elif isinstance(value, dict):
        yield "{"
        for number, (key, each) in enumerate(value.items()):
            yield f"{',' if number else ''}\n{_json(key)}: "
            yield from _encoded(each)
        yield "}"
    else:
        yield _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def tokenizer_json(parts: TokenizerParts) -> dict[str, Any]:
    """The content of a tokenizer.json with all entries, long ones lazy; it encodes and decodes as ``parts`` do."""
    vocabulary = parts.vocabulary
    added = [
        {
            "id": token,
            "content": vocabulary.text(token),
            "single_word": False,
            "lstrip": parts.strips.get(token, (False, False))[0],
            "rstrip": parts.strips.get(token, (False, False))[1],
            "normalized": False,
            "special": int(vocabulary.kinds[token]) != USER_DEFINED,
        }
        for token in vocabulary.of_kind(UNKNOWN, CONTROL, USER_DEFINED).tolist()
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": _beginning(parts),
        "decoder": _decoder(parts),
        "model": _model(parts),
    }


def _model(parts: TokenizerParts) -> dict[str, Any]:
    vocabulary = parts.vocabulary
    text, every = vocabulary.text, range(len(vocabulary))
    if parts.model == "Unigram":
        assert vocabulary.scores is not None
        scored = _Lazy("[]", (_json([text(i), float(score)]) for i, score in enumerate(vocabulary.scores)))
        options = {"byte_fallback": bool(parts.options.get("byte_fallback"))}
        return {"type": "Unigram", "unk_id": parts.unk_id, "vocab": scored, **options}
    repeated = set(vocabulary.repeated().tolist())  # of equal texts the first counts
    entries = _Lazy("{}", (f"{_json(text(i))}: {i}" for i in every if i not in repeated))
    if parts.merges is None:
        ways = merges_by_score(vocabulary, np.arange(len(vocabulary)))
        merges = _Lazy("[]", (_json([text(left), text(right)]) for left, right in ways))
    else:
        among = parts.merges.among(vocabulary, {text(i) for i in every}, np.arange(len(vocabulary)))
        merges = _Lazy("[]", (_json(pair) for pair in among))
    unk = None if parts.unk_id is None else text(parts.unk_id)
    return {"type": "BPE", "unk_token": unk, **parts.options, "vocab": entries, "merges": merges}


def _beginning(parts: TokenizerParts) -> Section | None:
    """What puts the token in front that begins a text."""
    if not parts.add_bos or parts.bos_id is None:
        return None
    bos = parts.vocabulary.text(parts.bos_id)
    first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, first | {"SpecialToken": {"id": bos, "type_id": 1}}, other],
        "special_tokens": {bos: {"id": bos, "ids": [parts.bos_id], "tokens": [bos]}},
    }


def _decoder(parts: TokenizerParts) -> Section | None:
    if parts.alphabet == "bytes":
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if parts.alphabet == "plain":
        return None
    steps: list[Section] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    if parts.options.get("byte_fallback"):
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if parts.add_space_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}
