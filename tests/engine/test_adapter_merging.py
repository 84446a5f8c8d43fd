"""Adapters made part of a model: dense matrices become the sum, packed ones keep their blocks and get the factors."""

import json

import numpy as np
import pytest
import tiny
from adapter_folders import changes, merged, random_pairs, spec_of, write_random_adapter
from folders import add_tokenizer, fitted, save, values
from random_files import LLAMA, write_random
from test_adapters import WIDE
from test_architectures import TOLERANCE

from barefoot.adapters.files import Pair, read_adapter
from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.engine.adapter_files import load_adapter, save_adapter
from barefoot.engine.gguf_export import export_gguf
from barefoot.engine.merging import Merged, merge
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.io.safetensors import write_safetensors
from barefoot.ops import blocks
from barefoot.weights.structures.bitstack import BitStack

IDS = np.random.default_rng(12).integers(0, 97, 30).tolist()


def merge_into(source, adapter, folder) -> Merged:
    with Checkpoint(source) as checkpoint:
        return merge(checkpoint, model_spec(checkpoint), read_adapter(adapter), folder)


def in_type(source, folder, type_id) -> None:
    """A float32 folder with its matrices in another dense type."""
    spec, found = values(source)
    shift = np.float32(spec.norm_plus_one)
    entries = []
    for w in spec.weights:
        value = found[w.name] - (shift if w.name.endswith("norm") else 0)
        shape = (w.cols,) if w.group == "norm" else value.shape
        entries.append((w.source, type_id, shape, [blocks.encode(type_id, value).data]))
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    write_safetensors(folder / "model.safetensors", entries)


@pytest.mark.parametrize("name", ["llama-gqa-9-3", "mistral", "qwen2", "qwen3", "gemma3", "phi3"])
def test_a_dense_model_becomes_a_folder_that_transformers_reads(name, tmp_path, tiny_gguf):
    import transformers

    model = tiny.build(name)
    save(model, tmp_path / "hf", tiny_gguf)
    write_random_adapter(tmp_path / "hf", tmp_path / "adapter")
    found = merge_into(tmp_path / "hf", tmp_path / "adapter", tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    expected = tiny.expected(merged(model, tmp_path / "adapter"), IDS)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32").eval()
    assert np.abs(tiny.expected(read, IDS) - expected).max() < TOLERANCE
    with tiny.engine(tmp_path / "merged") as run:
        assert np.abs(tiny.all_logits(run, IDS, 20) - expected).max() < TOLERANCE
    assert len(found.lost) == 7 * run.spec.n_layers
    assert not found.beside


@pytest.mark.parametrize(("type_id", "step"), [("f32", 2.0**-24), ("f16", 2.0**-11), ("bf16", 2.0**-8)])
def test_sums_are_exact_up_to_one_rounding_and_what_that_loses_is_said(tmp_path, tiny_gguf, type_id, step):
    """Element by element against float64; the loss stated is the norm of rounding errors over that of the change."""
    write_random(tmp_path / "f32", WIDE)
    in_type(tmp_path / "f32", tmp_path / "model", type_id)
    add_tokenizer(tmp_path / "model", tiny_gguf)
    write_random_adapter(tmp_path / "model", tmp_path / "adapter", roles=("q", "down"), scale=0.05)
    found = merge_into(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    (spec, before), (_, after) = values(tmp_path / "model"), values(tmp_path / "merged")
    added, pairs = changes(tmp_path / "adapter"), load_adapter(spec, read_adapter(tmp_path / "adapter"))
    for w in spec.weights:
        change = added.get(w.source.removesuffix(".weight"))
        assert (change is not None) == (w.name in found.lost)
        if change is None:
            assert np.array_equal(after[w.name], before[w.name]), w.name
            continue
        exact = before[w.name] + change
        of = pairs[w.name]
        summed = np.abs(before[w.name]) + of.scale * np.abs(of.b) @ np.abs(of.a)  # in float32, of 4 products
        error = np.abs(after[w.name] - exact)
        assert (error <= step * np.abs(exact) + 8 * 2.0**-24 * summed + (2.0**-25 if type_id == "f16" else 0)).all()
        stated = found.lost[w.name]
        if type_id == "f32":
            assert stated < 1e-5
        else:
            assert stated == pytest.approx(np.linalg.norm(after[w.name] - exact) / np.linalg.norm(change), rel=1e-3)
            assert stated > step / 8


@pytest.mark.parametrize("weights", ["int(bits=4)", "attn=int(bits=3) ffn=int(bits=8,symmetric=true)", "attn=nf4"])
def test_packed_matrices_keep_their_blocks(tmp_path, tiny_gguf, weights):
    """Bit for bit the logits of the adapter beside the model, from memory and from disk, and the same blocks."""
    write_random(tmp_path / "hf", WIDE)
    add_tokenizer(tmp_path / "hf", tiny_gguf)
    fitted(tmp_path / "hf", tmp_path / "model", weights)
    adapter = write_random_adapter(tmp_path / "model", tmp_path / "adapter", type_id="f16")
    found = merge_into(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    spec, after = spec_of(tmp_path / "model"), spec_of(tmp_path / "merged")
    packed = [w.name for w in spec.weights if blocks.block_elements(w.format) > 1 and w.layer is not None]
    assert sorted(found.beside) == sorted(packed)
    assert [(w.name, w.format) for w in after.weights] == [(w.name, w.format) for w in spec.weights]
    planned = dict(adapter.parts)
    for w in after.weights:
        assert [p.n_bytes for p in w.parts] == ([planned[w.name].n_bytes] if w.name in packed else [])
    for settings in ({"activations": "int8"}, {"n_streamed_layers": 2}):
        with tiny.engine(tmp_path / "model", **settings, adapter=adapter) as run:
            expected = tiny.all_logits(run, IDS, 20)
        with tiny.engine(tmp_path / "merged", **settings) as run:
            logits = tiny.all_logits(run, IDS, 20)
        if len(packed) == 7 * spec.n_layers:
            assert np.array_equal(logits, expected)
        else:  # dense ones have become sums
            assert np.abs(logits - expected).max() < (TOLERANCE if "activations" not in settings else 0.05)


def test_transformers_reads_packed_matrices_with_their_factors(tmp_path, tiny_gguf):
    transformers = pytest.importorskip("transformers", reason="the seam is that of transformers")
    from barefoot.drivers import weights  # noqa: F401  registers the folders

    write_random(tmp_path / "hf", WIDE)
    add_tokenizer(tmp_path / "hf", tiny_gguf)
    fitted(tmp_path / "hf", tmp_path / "model", "int(bits=4)")
    write_random_adapter(tmp_path / "model", tmp_path / "adapter")
    merge_into(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32").eval()
    with tiny.engine(tmp_path / "merged") as run:
        assert np.abs(tiny.all_logits(run, IDS, 20) - tiny.expected(model, IDS)).max() < TOLERANCE


def test_rows_of_gguf_files_go_over_into_the_order_of_transformers(tmp_path, tiny_gguf):
    """Packed q and k of a GGUF file, and dense ones, have other rows than their factors' file."""
    save(tiny.build("llama-gqa-9-3"), tmp_path / "hf", tiny_gguf)
    with Checkpoint(tmp_path / "hf") as checkpoint:
        export_gguf(checkpoint, model_spec(checkpoint), tmp_path / "dense.gguf")
    for source in (tmp_path / "dense.gguf", tiny_gguf.path):
        folder = tmp_path / f"merged-{source.stem}"
        adapter = write_random_adapter(source, tmp_path / f"adapter-{source.stem}")
        found = merge_into(source, tmp_path / f"adapter-{source.stem}", folder)
        assert bool(found.beside) == (source == tiny_gguf.path)
        with tiny.engine(source, adapter=adapter) as run:
            expected = tiny.all_logits(run, IDS, 20)
        with tiny.engine(source) as run:
            assert np.abs(tiny.all_logits(run, IDS, 20) - expected).max() > 1000 * TOLERANCE
        with tiny.engine(folder) as run:
            assert np.abs(tiny.all_logits(run, IDS, 20) - expected).max() < TOLERANCE


def test_a_sum_already_keeps_its_parts(tmp_path, tiny_gguf):
    """A stack of signed blocks with factors beside it is a stack as before, and runs with as much of it as asked."""
    from test_stacks import fitted as stacked

    write_random(tmp_path / "hf", LLAMA)
    add_tokenizer(tmp_path / "hf", tiny_gguf)
    how = BitStack(blocks=3)
    stacked(
        tmp_path / "hf", tmp_path / "model", lambda s: {w.name: how for w in s.weights if w.group in ("attn", "ffn")}
    )
    adapter = write_random_adapter(tmp_path / "model", tmp_path / "adapter")
    merge_into(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    before, after = spec_of(tmp_path / "model"), spec_of(tmp_path / "merged")
    assert before.stack
    assert [p.label for p in after.stack] == [p.label for p in before.stack]
    for n in (0, len(before.stack)):
        with tiny.engine(tmp_path / "model", n_stacked=n, adapter=adapter) as run:
            expected = tiny.all_logits(run, IDS, 20)
        with tiny.engine(tmp_path / "model", n_stacked=n) as run:
            assert np.abs(tiny.all_logits(run, IDS, 20) - expected).max() > 100 * TOLERANCE
        with tiny.engine(tmp_path / "merged", n_stacked=n) as run:
            assert np.array_equal(tiny.all_logits(run, IDS, 20), expected)
    with pytest.raises(Incompatible, match="has an adapter in it already"):
        merge_into(tmp_path / "merged", tmp_path / "adapter", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_what_cant_be_merged_is_refused_before_anything_is_written(tmp_path, tiny_gguf, monkeypatch):
    """Phi-3's packed gate_up_proj is one tensor, which can't have two parts."""
    config, model, settings = tiny.MODELS["phi3"]
    monkeypatch.setitem(tiny.MODELS, "phi3", (config, model, settings | {"hidden_size": 64, "intermediate_size": 96}))
    save(tiny.build("phi3"), tmp_path / "hf", tiny_gguf)
    fitted(tmp_path / "hf", tmp_path / "model", "ffn=int(bits=8,group=32)")
    write_random_adapter(tmp_path / "model", tmp_path / "adapter")
    with pytest.raises(Incompatible, match=r"gate_up_proj holds .*gate, .*up together, packed") as error:
        merge_into(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    assert "--adapter DIR" in error.value.cure
    assert not (tmp_path / "merged").exists()
    with pytest.raises(InvalidInput, match="is the model itself"):
        merge_into(tmp_path / "model", tmp_path / "adapter", tmp_path / "hf" / ".." / "model")


def test_a_sum_beyond_its_type_is_refused(tmp_path, tiny_gguf):
    write_random(tmp_path / "f32", LLAMA)
    in_type(tmp_path / "f32", tmp_path / "model", "f16")
    add_tokenizer(tmp_path / "model", tiny_gguf)
    spec = spec_of(tmp_path / "model")
    name, pair = next(iter(random_pairs(spec).items()))
    save_adapter(tmp_path / "adapter", spec, {name: Pair(pair.a, pair.b, 1e7)})
    with pytest.raises(Incompatible, match=r"layers\.0\.q with its adapter is beyond the numbers of f16"):
        merge_into(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged" / "config.json").exists()
