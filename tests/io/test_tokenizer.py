"""Ids equal to those of the full ``tokenizers`` tokenizer, for small tokenizers trained here; decoding; safety."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import LIBRARY_TEXT, diverse_texts
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Full

from barefoot.core.errors import CorruptFile, InvalidInput, SourceNotFound, UnsupportedFormat
from barefoot.io.inventory import Checkpoint
from barefoot.io.pretokenize import byte_level_sections
from barefoot.io.tokenizer import StreamDecoder, Tokenizer, load_tokenizer, tokenizer_bytes
from barefoot.io.tokenizer_files import footprint_bytes, read_json_tokenizer

TEXTS = diverse_texts(400)
SPECIAL = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def trained_byte_level() -> Full:
    full = Full(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    full.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    full.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    full.train_from_iterator(LIBRARY_TEXT[:200_000].splitlines(), trainer)
    full.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("\n\n\n", normalized=False)])
    return full


def trained_metaspace() -> Full:
    """As Llama-2's: ▁ for spaces, one in front, bytes for what is not in the vocabulary."""
    full = Full(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    full.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    full.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<unk>", *SPECIAL, *BYTES], show_progress=False, max_token_length=12
    )
    words = (word for line in LIBRARY_TEXT[:100_000].splitlines() for word in line.split(" "))
    full.train_from_iterator(words, trainer)
    data = json.loads(full.to_str())  # bytes are entries of the model, not added tokens
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] not in BYTES]
    return Full.from_str(json.dumps(data))


def trained_unigram() -> Full:
    full = Full(models.Unigram())
    full.normalizer = normalizers.NFKC()
    full.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    full.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=1000, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    full.train_from_iterator(LIBRARY_TEXT[:60_000].splitlines(), trainer)
    data = json.loads(full.to_str())
    # Sums of such scores are exact, so that equal paths are equal in every order of adding.
    data["model"]["vocab"] = [[text, round(score * 1024) / 1024] for text, score in data["model"]["vocab"]]
    return Full.from_str(json.dumps(data))


def trained_nfc() -> Full:
    """As Qwen2's: NFC, and a regular expression in the file."""
    full = Full(models.BPE(ignore_merges=True))
    full.normalizer = normalizers.NFC()
    cut = byte_level_sections("qwen2")[1]
    section = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": cut,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    full.pre_tokenizer = Full.from_str(json.dumps(section)).pre_tokenizer
    full.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    full.train_from_iterator(LIBRARY_TEXT[:100_000].splitlines(), trainer)
    full.add_special_tokens(
        [AddedToken("<|im_start|>"), AddedToken("<|im_end|>", rstrip=True), AddedToken("<mask>", lstrip=True)]
    )
    return full


TRAINED = {
    f.__name__.removeprefix("trained_"): f
    for f in (trained_byte_level, trained_metaspace, trained_unigram, trained_nfc)
}


@pytest.fixture(scope="module", params=TRAINED)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Full, Tokenizer]:
    full = TRAINED[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    full.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|bos|>", "eos_token": {"content": "<|im_end|>"}})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    return full, Tokenizer(read_json_tokenizer(folder))


def plain(full: Full) -> Full:
    """The full tokenizer without control tokens, as it must treat a user's text."""
    data = json.loads(full.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["special"]]
    if data["model"]["type"] == "Unigram":  # whose control tokens are pieces too: give them texts that do not occur
        data["model"]["vocab"] = [[f"\uffff{t}" if t in SPECIAL else t, s] for t, s in data["model"]["vocab"]]
    return Full.from_str(json.dumps(data))


def test_ids_equal_the_full_tokenizers(both: tuple[Full, Tokenizer]):
    full, ours = both
    user = plain(full)
    for text in TEXTS:
        assert ours.encode(text, add_bos=False, parse_special=True) == full.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_bos=False) == user.encode(text, add_special_tokens=False).ids


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_ids_equal_on_any_text(both: tuple[Full, Tokenizer], text: str):
    full, ours = both
    assert ours.encode(text, add_bos=False, parse_special=True) == full.encode(text, add_special_tokens=False).ids


def test_ids_before_marks_are_those_of_the_text_up_to_there(both: tuple[Full, Tokenizer]):
    _, ours = both
    chosen = [text for text in TEXTS if len(text) < 60][:60]
    texts = [([(text, True)], range(len(text) + 1)) for text in chosen]
    for (ids, n_before), text in zip(ours.encode_marked(texts, add_bos=False), chosen, strict=True):
        assert ids == ours.encode(text, add_bos=False, parse_special=True)
        inside = {i for added in re.finditer(r"<[^>]*>|\n{2,3}", text) for i in range(added.start() + 1, added.end())}
        for mark, n in enumerate(n_before):
            if mark in inside:  # of an added token
                continue
            up_to = ours.encode(text[:mark], add_bos=False, parse_special=True)
            same = [a == b for a, b in zip(ids, up_to, strict=False)]
            assert n == (same.index(False) if False in same else len(same)), (text, mark)


def test_special_ids(both: tuple[Full, Tokenizer]):
    full, ours = both
    assert ours.n_vocab == full.get_vocab_size()
    assert ours.bos_id == full.token_to_id("<|bos|>")
    assert ours.eos_ids == {5, 6, full.token_to_id("<|im_end|>")}
    assert not ours.add_bos
    assert ours.decode_bytes(full.token_to_id("<|im_end|>")) == b""
    assert ours.piece(full.token_to_id("<|im_end|>")) == "<|im_end|>"


def byte_level(tmp_path: Path) -> tuple[Full, Tokenizer]:
    full = trained_byte_level()
    full.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", full.token_to_id("<|bos|>"))]
    )
    full.save(str(tmp_path / "tokenizer.json"))
    return full, Tokenizer(read_json_tokenizer(tmp_path))


def test_bos_from_the_post_processor(tmp_path: Path):
    full, ours = byte_level(tmp_path)
    assert ours.encode("hello") == full.encode("hello").ids
    assert ours.encode("hello", add_bos=False) == full.encode("hello").ids[1:]


def test_round_trip_and_stream(tmp_path: Path):
    _, ours = byte_level(tmp_path)
    for text in TEXTS:
        ids = ours.encode(text, add_bos=False)
        assert ours.decode(ids) == text
        stream = StreamDecoder(ours)
        parts = [stream.feed(i) for i in ids]
        assert "".join(parts) + stream.flush() == text
        assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


def test_stream_ends_in_the_middle_of_a_character(tmp_path: Path):
    _, ours = byte_level(tmp_path)
    ids = ours.encode("😀", add_bos=False)
    assert len(ids) == 4
    stream = StreamDecoder(ours)
    assert [stream.feed(i) for i in ids[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"


def test_segments_join_without_a_trace_but_keep_control_apart(tmp_path: Path):
    full, ours = byte_level(tmp_path)
    start, end = (full.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>"))
    text = "<|im_start|>user\n\nint main<|im_end|>"
    for cut in range(13, 24):
        segments = [(text[:cut], True), (text[cut:], True)]
        assert ours.encode_segments(segments, add_bos=False) == full.encode(text, add_special_tokens=False).ids
    ids = ours.encode_segments([("<|im_start|>", True), ("x<|im_end|>y", False), ("<|im_end|>", True)], add_bos=False)
    assert [i for i in ids if i in (start, end)] == [start, end]
    assert ours.decode(ids) == "x<|im_end|>y"
    split_token = [("<|im_", True), ("end|>", False), ("<|im_", False), ("end|>", True)]
    assert end not in ours.encode_segments(split_token, add_bos=False)


def test_ids_are_checked(tmp_path: Path):
    _, ours = byte_level(tmp_path)
    with pytest.raises(InvalidInput):
        ours.decode([ours.n_vocab])
    with pytest.raises(InvalidInput):
        ours.decode_bytes(-1)


def test_a_large_json_is_read_in_windows(tmp_path: Path):
    """60,000 entries and 40,000 merges, which json.loads would turn into ten times the bytes of their text."""
    letters = [f"{i:05d}" for i in range(20_000)]
    vocabulary = {
        text: i for i, text in enumerate([*letters, *(f"{t}x{t}" for t in letters), *(f"{t}x" for t in letters), "x"])
    }
    merges = [[t, "x"] for t in letters] + [[f"{t}x", t] for t in letters]
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
    (folder / "config.json").write_text("{}")
    safetensors.numpy.save_file({"w": np.zeros(1, np.float32)}, folder / "model.safetensors")
    with Checkpoint(folder) as checkpoint:
        held, loading = tokenizer_bytes(checkpoint)
        tracemalloc.start()
        try:
            ours = load_tokenizer(checkpoint)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert ours.n_vocab == 60_001
    assert ours.resident_bytes() <= held == (folder / "tokenizer.json").stat().st_size
    assert 0.5 * loading <= peak <= loading


# GGUF


def write_gguf(path: Path, fill: Callable[[gguf.GGUFWriter], None]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    fill(writer)
    writer.add_tensor("t", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def entries(full: Full) -> tuple[list[str], list[int]]:
    texts = [full.id_to_token(i) for i in range(full.get_vocab_size())]
    kinds = [
        3 if t in SPECIAL else 6 if t in BYTES else 2 if t == "<unk>" else 4 if set(t) == {"\n"} else 1 for t in texts
    ]
    return texts, kinds


def test_gguf_byte_level(tmp_path: Path):
    full = trained_byte_level()
    texts, kinds = entries(full)

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(texts)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(m) for m in json.loads(full.to_str())["model"]["merges"]])
        writer.add_bos_token_id(texts.index("<|bos|>"))
        writer.add_eos_token_id(7)

    with Checkpoint(write_gguf(tmp_path / "m.gguf", fill)) as model:
        ours = load_tokenizer(model)
        assert ours.resident_bytes() == footprint_bytes(model.config)
    user = plain(full)
    for text in TEXTS:
        assert ours.encode(text, parse_special=True) == full.encode(text).ids
        assert ours.encode(text) == user.encode(text).ids
    assert (ours.bos_id, ours.eos_ids) == (texts.index("<|bos|>"), {7, texts.index("<|im_end|>")})


def scored(full: Full) -> tuple[list[str], list[int], list[float]]:
    """The entries with minus the rank of the merge that makes each as its score."""
    texts, kinds = entries(full)
    ranks = {"".join(m): float(-i) for i, m in reversed(list(enumerate(json.loads(full.to_str())["model"]["merges"])))}
    return texts, kinds, [ranks.get(t, -1e6) for t in texts]


def sentencepiece_reference(texts: list[str], kinds: list[int], scores: list[float], full: Full) -> Full:
    """All merges of the whole vocabulary in the order of their scores, as transformers converts such a vocabulary."""
    ids = {t: i for i, t in enumerate(texts) if kinds[i] in (1, 4)}
    merges = []
    for text, i in ids.items():
        ways = [(text[:k], text[k:]) for k in range(1, len(text)) if text[:k] in ids and text[k:] in ids]
        merges += [(a, b, scores[i]) for a, b in sorted(ways, key=lambda w: (ids[w[0]], ids[w[1]]))]
    merges.sort(key=lambda m: (m[2], len(m[0]), len(m[1])), reverse=True)
    data = json.loads(full.to_str())
    data["model"]["merges"] = [[a, b] for a, b, _ in merges]
    return Full.from_str(json.dumps(data))


@pytest.mark.parametrize("prefix", [True, False])
def test_gguf_sentencepiece(tmp_path: Path, prefix: bool):
    trained = trained_metaspace()
    texts, kinds, scores = scored(trained)
    full = sentencepiece_reference(texts, kinds, scores, trained)
    if not prefix:
        full.normalizer = normalizers.Replace(" ", "▁")

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(texts)
        writer.add_token_types(kinds)
        writer.add_token_scores(scores)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(3)
        writer.add_unk_token_id(0)
        writer.add_add_space_prefix(prefix)

    with Checkpoint(write_gguf(tmp_path / "m.gguf", fill)) as model:
        ours = load_tokenizer(model)
        assert ours.resident_bytes() == footprint_bytes(model.config)
    user = plain(full)
    for text in TEXTS:
        assert ours.encode(text, add_bos=False, parse_special=True) == full.encode(text).ids
        assert ours.encode(text) == [1, *user.encode(text).ids], "this family begins with bos unless the file says no"
        if "▁" not in text:
            assert ours.decode(ours.encode(text)) == text


def test_gguf_unigram(tmp_path: Path):
    full = trained_unigram()
    full.normalizer = None
    full.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    texts, kinds = entries(full)
    # A GGUF file holds single precision; the reference gets the same scores.
    data = json.loads(full.to_str())
    scores = np.array([score for _, score in data["model"]["vocab"]], np.float32)
    data["model"]["vocab"] = [[t, float(s)] for t, s in zip(texts, scores, strict=True)]
    full = Full.from_str(json.dumps(data))

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("t5")
        writer.add_token_list(texts)
        writer.add_token_types(kinds)
        writer.add_token_scores(scores.tolist())
        writer.add_unk_token_id(0)

    with Checkpoint(write_gguf(tmp_path / "m.gguf", fill)) as model:
        ours = load_tokenizer(model)
    for text in TEXTS:
        assert ours.encode(text, parse_special=True) == full.encode(text).ids


# What is not a tokenizer


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("tokenizer.ggml.pre", "no-such-one", UnsupportedFormat),
        ("tokenizer.ggml.model", "rwkv", UnsupportedFormat),
        ("tokenizer.ggml.token_type", [1], CorruptFile),
        ("tokenizer.ggml.token_type", [-1, 1, 1], CorruptFile),
        ("tokenizer.ggml.token_type", [6, 1, 1], CorruptFile),
        ("tokenizer.ggml.merges", ["ab"], CorruptFile),
        ("tokenizer.ggml.merges", ["a x"], CorruptFile),
        ("tokenizer.ggml.tokens", [1, 2, 3], CorruptFile),
        ("tokenizer.ggml.eos_token_id", 3, CorruptFile),
    ],
)
def test_contradictions_in_gguf(tmp_path: Path, key: str, value: object, error: type[Exception]):
    data = {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.token_type": [1, 1, 1]}
    data |= {
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 1,
    }

    def fill(changed: dict[str, object]) -> Callable[[gguf.GGUFWriter], None]:
        def write(writer: gguf.GGUFWriter) -> None:
            for name, content in changed.items():
                if isinstance(content, list):
                    writer.add_array(name, content)
                elif isinstance(content, int):
                    writer.add_uint32(name, content)
                else:
                    writer.add_string(name, str(content))

        return write

    with Checkpoint(write_gguf(tmp_path / "good.gguf", fill(data))) as model:
        assert load_tokenizer(model).encode("abba") == [2, 1, 0]
    with Checkpoint(write_gguf(tmp_path / "bad.gguf", fill(data | {key: value}))) as model:
        with pytest.raises(error):
            load_tokenizer(model)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", CorruptFile),
        ("[]", CorruptFile),
        ('{"model": {"type": "BPE", "vocab": {"a": 0', CorruptFile),
        ('{"model": {"type": "BPE", "vocab": {"a": 1e99}, "merges": []}}', CorruptFile),
        ('{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', CorruptFile),
        ('{"model": {"type": "BPE", "vocab": {"a": 2000000000}, "merges": []}}', CorruptFile),
        ('{"model": {"type": "BPE", "vocab": {}, "merges": []}}', CorruptFile),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}}', CorruptFile),
        ('{"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.5]]}}', CorruptFile),
        ('{"model": {"type": "Unigram", "vocab": [["a", 0.5, 1]]}}', CorruptFile),
        ('{"model": {"type": "WordPiece", "vocab": {"a": 0}}}', UnsupportedFormat),
        ('{"model": {"type": "BPE", "continuing_subword_prefix": "##", "vocab": {"a": 0}}}', UnsupportedFormat),
    ],
)
def test_contradictions_in_json(tmp_path: Path, text: str, error: type[Exception]):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(error):
        read_json_tokenizer(tmp_path)


def test_no_tokenizer(tmp_path: Path):
    with pytest.raises(SourceNotFound):
        read_json_tokenizer(tmp_path)
