"""A tokenizer as GGUF metadata: that of a GGUF file carried as it is, that of a folder written anew."""

from __future__ import annotations

import numpy as np

from barefoot.core.errors import UnsupportedFormat
from barefoot.io.chat import folder_template
from barefoot.io.files import BinaryFile
from barefoot.io.gguf_writer import Texts, Value, read_value
from barefoot.io.inventory import Checkpoint
from barefoot.io.pretokenize import name_of
from barefoot.io.tokenizer_files import TokenizerParts, read_json_tokenizer
from barefoot.io.vocabulary import UNUSED, Vocabulary


def gguf_tokenizer(checkpoint: Checkpoint, vocab_size: int) -> dict[str, Value]:
    """The keys below ``tokenizer.`` of a model whose embedding has ``vocab_size`` rows.

    Raises
    ------
    UnsupportedFormat : a kind of tokenizer for which GGUF files, or their readers, have no name.
    """
    if checkpoint.kind == "gguf":
        with BinaryFile(checkpoint.path) as file:
            kept = {key: value for key, value in checkpoint.config.items() if key.startswith("tokenizer.")}
            return {key: read_value(file, value) for key, value in kept.items()}
    keys = _keys(read_json_tokenizer(checkpoint.path), vocab_size)
    template = folder_template(checkpoint.path)
    return keys if template is None else keys | {"tokenizer.chat_template": template}


def _keys(parts: TokenizerParts, vocab_size: int) -> dict[str, Value]:
    if parts.model != "BPE" or parts.alphabet == "plain":
        raise UnsupportedFormat(f"a tokenizer of {parts.model} on {parts.alphabet} is not written to GGUF files")
    texts, kinds = _filled(parts.vocabulary, vocab_size)
    keys: dict[str, Value] = {"tokens": Texts.of(texts), "token_type": kinds.astype(np.int32)}
    if parts.alphabet == "bytes":
        keys |= {
            "model": "gpt2",
            "pre": name_of(parts.normalizer, parts.pre_tokenizer),
            "merges": _merges(parts, vocab_size),
        }
    else:
        keys |= {"model": "llama", "pre": "default", "scores": _scores(parts, vocab_size)}
        keys["add_space_prefix"] = parts.add_space_prefix
    ends = sorted(parts.eos_ids)
    ids = {"bos": parts.bos_id, "eos": ends[0] if ends else None, "eot": ends[1] if len(ends) > 1 else None}
    ids["unknown"] = parts.unk_id
    keys |= {f"{name}_token_id": i for name, i in ids.items() if i is not None and i < vocab_size}
    keys["add_bos_token"] = parts.add_bos
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def _filled(vocabulary: Vocabulary, n: int) -> tuple[list[bytes], np.ndarray]:
    """``n`` entries and their kinds: those of rows that no token has are unused, tokens without a row are left out."""
    texts = [vocabulary.raw(i) for i in range(min(n, len(vocabulary)))]
    texts += [f"[PAD{i}]".encode() for i in range(len(texts), n)]
    kinds = np.full(n, UNUSED, np.uint8)
    kinds[: len(vocabulary)] = vocabulary.kinds[:n]
    return texts, kinds


def _merges(parts: TokenizerParts, n: int) -> Texts:
    """The merges that make one of ``n`` entries, each as its two parts with a space between them, best first."""
    assert parts.merges is not None
    both = zip(parts.merges.results.tolist(), parts.merges.splits.tolist(), strict=True)
    raws = ((parts.vocabulary.raw(made), split) for made, split in both if made < n)
    return Texts.of(raw[:split] + b" " + raw[split:] for raw, split in raws)


def _scores(parts: TokenizerParts, n: int) -> np.ndarray:
    """Scores that rank entries as the merges that make them do: minus the rank of the best one."""
    if parts.vocabulary.scores is not None:
        scores = np.zeros(n, np.float32)
        scores[: len(parts.vocabulary)] = parts.vocabulary.scores[:n]
        return scores
    assert parts.merges is not None
    made = parts.merges.results
    ranks = np.full(max(n, len(parts.vocabulary)), len(made), np.int64)
    np.minimum.at(ranks, made, np.arange(len(made)))
    return -ranks[:n].astype(np.float32)
