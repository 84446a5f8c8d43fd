"""Bringing a process to where a run starts: every library imported, and used once.

Importing alone is not enough. The system maps a library's code page by page when it is first used, and libraries build
tables of their own then; what is measured as reserved before that would be some MiB too little.
"""

from __future__ import annotations

import importlib

_MODULES = ("jinja2.sandbox", "tokenizers", "barefoot.engine.generate", "barefoot.plan.planner")
_TEMPLATE = "{% for m in messages %}<|s|>{{ m.role }}\n{{ m.content | trim }}{% endfor %}"


def warm_up() -> None:
    """Import what a run uses, use each part once on a toy, and give back what that took."""
    for name in _MODULES:
        importlib.import_module(name)
    from barefoot.core.measure import release_free_memory
    from barefoot.engine.sampling import SamplingParams

    _use_tokenizer()
    _use_planner()
    SamplingParams().rng()  # imports numpy.random
    release_free_memory()


def _use_planner() -> None:
    from barefoot.core.ledger import Footprint
    from barefoot.core.units import GIB
    from barefoot.plan.job import Budget, RunJob
    from barefoot.plan.known import known_spec
    from barefoot.plan.planner import plan
    from barefoot.plan.reserved import Reserved

    job = RunJob(context=64, max_tokens=32)
    plan(known_spec("smollm2-135m"), job, Budget({"host": GIB}), reserved=Reserved(0, "a toy"), extra=Footprint())


def _use_tokenizer() -> None:
    import numpy as np

    from barefoot.io.chat import ChatTemplate
    from barefoot.io.pretokenize import byte_level_sections
    from barefoot.io.tokenizer import Tokenizer
    from barefoot.io.tokenizer_files import TokenizerParts
    from barefoot.io.vocabulary import CONTROL, NORMAL, Merges, Vocabulary

    entries = [b"h", b"e", b"he", b"<|s|>"]
    blob = np.frombuffer(b"".join(entries), np.uint8)
    offsets = np.cumsum([0, *map(len, entries)]).astype(np.uint32)
    vocabulary = Vocabulary(blob, offsets, np.array([NORMAL] * 3 + [CONTROL], np.uint8), None)
    merges = Merges(vocabulary, np.frombuffer(b"he", np.uint8), np.array([0, 2], np.uint32), np.array([1]))
    normalizer, pre_tokenizer, _ = byte_level_sections("default")
    tokenizer = Tokenizer(
        TokenizerParts(
            vocabulary=vocabulary,
            merges=merges,
            model="BPE",
            alphabet="bytes",
            normalizer=normalizer,
            pre_tokenizer=pre_tokenizer,
            options={},
            unk_id=None,
            bos_id=None,
            eos_ids=frozenset(),
            add_bos=False,
        )
    )
    messages = [{"role": "h", "content": "he <|s|>"}]
    tokenizer.decode(
        tokenizer.encode_segments(ChatTemplate(_TEMPLATE, True).render(messages, tokenizer), add_bos=False)
    )
