"""How text is cut before the merges: named pre-tokenizers of GGUF files, as sections of a tokenizer.json.

GGUF files name the pre-tokenizer instead of holding it (``tokenizer.ggml.pre``). The regular expressions are facts of
the models: GPT-2's is published with the model, the others stand in the tokenizer.json of the models named.
"""

from __future__ import annotations

from typing import Any

from barefoot.core.errors import UnsupportedFormat

Section = dict[str, Any]

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{s}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{s}}"

_LLAMA3 = rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN2 = rf"{_SHORT}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_TEKKEN = rf"{_CASED.replace('{s}', '')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
_GPT4O = rf"{_CASED.replace('{s}', _SHORT + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"


def _byte_level(use_regex: bool) -> Section:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> Section:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


_GPT2: Section = _byte_level(True)
_DIGITS: Section = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
}

# name → (pre-tokenizer, the whole word is looked up before its merges, text is brought to NFC first)
_PRE: dict[str, tuple[Section, bool, bool]] = {
    "default": (_GPT2, False, False),
    "gpt-2": (_GPT2, False, False),
    "phi-2": (_GPT2, False, False),
    "olmo": (_GPT2, False, False),
    "smollm": (_DIGITS, False, False),
    "starcoder": (_DIGITS, False, False),
    "refact": (_DIGITS, False, False),
    "command-r": (_DIGITS, False, False),
    "llama-bpe": (_split(_LLAMA3), True, False),
    "llama3": (_split(_LLAMA3), True, False),
    "qwen2": (_split(_QWEN2), False, True),
    "tekken": (_split(_TEKKEN), True, False),
    "gpt-4o": (_split(_GPT4O), False, False),
}

SPACE = "▁"


def byte_level_sections(pre: str) -> tuple[Section | None, Section, bool]:
    """(normalizer, pre-tokenizer, ignore_merges) of a byte-level BPE model whose GGUF file names ``pre``.

    Raises
    ------
    UnsupportedFormat : a name that is not known; a wrong guess would tokenize wrongly and silently.
    """
    if pre not in _PRE:
        raise UnsupportedFormat(f"pre-tokenizer {pre!r} is not known; known: {', '.join(sorted(_PRE))}")
    cut, whole_words, composed = _PRE[pre]
    return ({"type": "NFC"} if composed else None), cut, whole_words


def sentencepiece_normalizer(add_space_prefix: bool) -> Section:
    """Spaces become ▁, with one more in front of each stretch of text where the model was trained so."""
    steps: list[Section] = [{"type": "Prepend", "prepend": SPACE}] if add_space_prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


_PROBE = (
    "Don't stop  at 1234,56: ÉTÉ café's\n\n \tif(x != y) {z+=1;}  'LL 日本語のтекст e\u0301…\r\n   end / of $a_b\n "
)


def name_of(normalizer: Section | None, pre_tokenizer: Section | None) -> str:
    """The name that GGUF files have for a byte-level pre-tokenizer: of one that cuts a text with everything in it so.

    Raises
    ------
    UnsupportedFormat : none that is known does.
    """
    wanted = _cut(normalizer, pre_tokenizer)
    for name, (section, _, composed) in _PRE.items():
        # What llama.cpp takes "default" for is none of the usual ones.
        if name != "default" and _cut({"type": "NFC"} if composed else None, section) == wanted:
            return name
    raise UnsupportedFormat(f"GGUF has no name for this pre-tokenizer; known: {', '.join(sorted(_PRE))}")


def _cut(normalizer: Section | None, pre_tokenizer: Section | None) -> list[str]:
    """The pieces of the probe, as the ``tokenizers`` library cuts it."""
    import json

    from tokenizers import Tokenizer

    model = {"type": "BPE", "vocab": {}, "merges": []}
    sections = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "model": model}
    made = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], **sections}))
    text = made.normalizer.normalize_str(_PROBE) if made.normalizer else _PROBE
    return [piece for piece, _ in made.pre_tokenizer.pre_tokenize_str(text)] if made.pre_tokenizer else [text]
