"""Texts that differ in everything that tokenizers care about."""

from __future__ import annotations

import random
from pydoc_data.topics import topics

LIBRARY_TEXT = "\n".join(topics[name] for name in sorted(topics))

FIXED = [
    "",
    " ",
    "  two  spaces  ",
    "\n",
    "\n\n\n",
    "a",
    " a",
    "<0x0A>",
    "<unk>",
    "<s>",
    "<|im_end|>",
    "x <|im_end|> \n y",
    "a <mask> b",
    "<|im_end|><|im_start|>",
    "<start_of_turn>",
    "▁▁a",
    "\t\tx = {'k': [1, 2.5e-3]}",
    "don't DON'T we'LL I’m",
    "１２３ ½ ⅷ 2024 007",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "日本語のテキスト。中文文本",
    "العربية नमस्ते ไทย",
    "e\u0301 \u0301 ﬁ Å",
]
_PARTS = [
    *" \n\taBéß漢字😀09-_<|>\u200b\u00a0\u3000\ufffd😂ж▁",
    "'s",
    "im_end",
    "क्ष",
    "<|im_start|>",
    "<|im_end|>",
    "<end_of_turn>",
    "\r\n",
    "()",
    "==",
    "    ",
    "e\u0301",
]
_RANGES = [(0x20, 0x500), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]


def diverse_texts(n: int) -> list[str]:
    """``n`` texts, the same ones each time: prose, mixtures, other scripts, damaged bytes, numbers."""
    rng = random.Random(7)

    def prose() -> str:
        at = rng.randrange(len(LIBRARY_TEXT))
        return LIBRARY_TEXT[at : at + rng.randrange(1, 400)]

    def mixture() -> str:
        return "".join(rng.choices(_PARTS, k=rng.randrange(1, 60)))

    def scripts() -> str:
        return "".join(chr(rng.randrange(*rng.choice(_RANGES))) for _ in range(rng.randrange(1, 60)))

    def garbage() -> str:
        return rng.randbytes(rng.randrange(1, 80)).decode("utf-8", "replace")

    def number() -> str:
        return str(rng.random() * 10 ** rng.randrange(1, 20))

    kinds = (prose, prose, prose, mixture, mixture, scripts, garbage, number)
    return FIXED + [rng.choice(kinds)() for _ in range(n - len(FIXED))]
