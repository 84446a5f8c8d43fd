"""Models as GGUF files: the same weights, the same logits, the same tokens, whatever the architecture."""

import gguf
import numpy as np
import pytest
import tiny
from folders import add_tokenizer, fitted, logits, save
from random_files import GEMMA, LLAMA, write_random
from samples import diverse_texts

from barefoot.core.errors import Incompatible, UnsupportedFormat
from barefoot.engine.gguf_export import export_gguf
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.ops import blocks

IDS = np.random.default_rng(6).integers(0, 97, 40).tolist()


def exported(source, path) -> dict[str, str]:
    with Checkpoint(source) as checkpoint:
        return export_gguf(checkpoint, model_spec(checkpoint), path)


@pytest.mark.parametrize("name", [name for name in tiny.MODELS if name != "qwen2-window"])
def test_every_architecture(name, tmp_path, tiny_gguf):
    """Header, names, order of rows, norms and rope: the file is read as the model that transformers computes."""
    model = tiny.build(name)
    save(model, tmp_path / "hf", tiny_gguf)
    formats = exported(tmp_path / "hf", tmp_path / "m.gguf")
    assert set(formats.values()) == {"f32"}
    assert np.abs(logits(tmp_path / "m.gguf", IDS) - tiny.expected(model, IDS)).max() < 2e-4
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert len(reader.fields["tokenizer.ggml.tokens"].data) == model.config.vocab_size


def test_windows_in_some_layers_of_qwen2_are_refused(tmp_path, tiny_gguf):
    save(tiny.build("qwen2-window"), tmp_path / "hf", tiny_gguf)
    with pytest.raises(Incompatible, match="sliding window"):
        exported(tmp_path / "hf", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("int(bits=4,group=32)", "Q4_1"),
        ("int(bits=4,group=32,symmetric=true)", "Q4_0"),
        ("int(bits=8,group=32,symmetric=true)", "Q8_0"),
        ("int(bits=3,group=32)", "Q4_1"),
        ("int(bits=2,group=32,symmetric=true)", "Q4_0"),
        ("ternary(group=32)", "Q4_0"),
        ("dense(dtype=bf16)", "BF16"),
        ("dense(dtype=f16)", "F16"),
    ],
)
def test_fitted_models_decode_to_the_same_numbers(weights, expected, tmp_path, tiny_gguf):
    """By the gguf package: each tensor of the file against the fitted folder's, rows of q and k in their new order."""
    write_random(tmp_path / "hf", LLAMA)
    add_tokenizer(tmp_path / "hf", tiny_gguf)
    fitted(tmp_path / "hf", tmp_path / "fitted", weights)
    exported(tmp_path / "fitted", tmp_path / "m.gguf")
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    kinds = {t.tensor_type.name for t in read.values() if len(t.shape) == 2}
    assert kinds == {expected}
    with Checkpoint(tmp_path / "fitted") as checkpoint:
        spec = model_spec(checkpoint)
        for weight in spec.weights:
            rows = np.empty((weight.rows, blocks.row_bytes(weight.format, weight.cols)), np.uint8)
            checkpoint.read_into(weight.source, rows)
            values = blocks.decode(weight.format, rows, weight.cols)
            role = weight.name.split(".")[-1]
            if role in ("q", "k"):
                heads = spec.n_heads if role == "q" else spec.n_kv_heads
                values = values.reshape(heads, 2, spec.head_dim // 2, -1).swapaxes(1, 2).reshape(values.shape)
            tensor = read[GGUF_NAMES.get(role, "").format(i=weight.layer) or f"blk.{weight.layer}.{INNER[role]}.weight"]
            there = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)
            assert np.array_equal(there, values), weight.name


GGUF_NAMES = {"embed": "token_embd.weight", "head": "output.weight", "norm": "output_norm.weight"}
INNER = {
    **{role: f"attn_{role}" for role in "qkv"},
    "o": "attn_output",
    **{role: f"ffn_{role}" for role in ("gate", "up", "down")},
    "attn_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}


def test_a_gguf_file_through_a_folder_and_back(tmp_path, tiny_gguf):
    """Blocks, row order, header and tokens of the source return: what is computed is the same."""
    fitted(tiny_gguf.path, tmp_path / "fitted", "stored")
    exported(tmp_path / "fitted", tmp_path / "m.gguf")
    first, second = (
        {t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}
        for path in (tiny_gguf.path, tmp_path / "m.gguf")
    )
    assert first == second
    before, after = gguf.GGUFReader(tiny_gguf.path).fields, gguf.GGUFReader(tmp_path / "m.gguf").fields
    for key in ("tokens", "token_type", "merges", "bos_token_id", "eos_token_id"):
        assert before[f"tokenizer.ggml.{key}"].contents() == after[f"tokenizer.ggml.{key}"].contents()
    assert before["tokenizer.chat_template"].contents() == after["tokenizer.chat_template"].contents()
    with Checkpoint(tiny_gguf.path) as one, Checkpoint(tmp_path / "m.gguf") as other:
        here, there = load_tokenizer(one), load_tokenizer(other)
        for text in diverse_texts(200):
            assert here.encode(text, parse_special=True) == there.encode(text, parse_special=True)


def test_norms_of_gemma_are_stored_as_their_factors(tmp_path, tiny_gguf):
    write_random(tmp_path / "hf", GEMMA)
    add_tokenizer(tmp_path / "hf", tiny_gguf)
    exported(tmp_path / "hf", tmp_path / "m.gguf")
    read = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    with Checkpoint(tmp_path / "hf") as checkpoint:
        raw = np.empty(checkpoint.tensors["model.norm.weight"].n_bytes, np.uint8)
        checkpoint.read_into("model.norm.weight", raw)
    assert np.array_equal(read["output_norm.weight"], raw.view(np.float32) + np.float32(1))


def test_what_gguf_has_no_format_for_is_refused_before_anything_is_written(tmp_path, tiny_gguf):
    write_random(tmp_path / "hf", LLAMA)
    add_tokenizer(tmp_path / "hf", tiny_gguf)
    fitted(tmp_path / "hf", tmp_path / "fitted", "int(bits=8,group=32)")
    with pytest.raises(Incompatible, match=r"int8_g32_asym without loss; what can be held: .*int8_g32_sym"):
        exported(tmp_path / "fitted", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_memory_is_that_of_a_piece(tmp_path, tiny_gguf, monkeypatch):
    """Numpy's peak while a matrix of 12 MB is written in pieces of 64 KiB; a whole one in memory would show."""
    import tracemalloc

    write_random(tmp_path / "hf", LLAMA | {"vocab_size": 32768})
    add_tokenizer(tmp_path / "hf", tiny_gguf)
    monkeypatch.setattr("barefoot.engine.rows.PIECE_BYTES", 64 << 10)
    tracemalloc.start()
    try:
        exported(tmp_path / "hf", tmp_path / "m.gguf")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # the vocabulary of 32768 entries as Python texts and as bytes: about 3.5 MB of that
    assert peak < 8e6 < 32768 * 96 * 4


def test_an_unknown_pre_tokenizer_is_refused(tmp_path, tiny_gguf):
    import json

    write_random(tmp_path / "hf", LLAMA)
    add_tokenizer(tmp_path / "hf", tiny_gguf)
    path = tmp_path / "hf" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}, content["pre_tokenizer"]],
    }
    path.write_text(json.dumps(content))
    with pytest.raises(UnsupportedFormat, match="no name for this pre-tokenizer"):
        exported(tmp_path / "hf", tmp_path / "m.gguf")
