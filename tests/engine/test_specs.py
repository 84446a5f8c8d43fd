"""Headers: spellings old and new, sizes from tensors, and what is refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from random_files import GEMMA, LLAMA, write_random

from barefoot.core.errors import CorruptFile, UnsupportedFormat
from barefoot.engine.specs import architectures, model_spec, spec_from_config
from barefoot.io.inventory import Checkpoint


def first_rope(config):
    return spec_from_config(config, "x").layers[0].rope


def test_rope_spelling_of_transformers_4_and_5_agree():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling | {"rope_type": "llama3"}}
    older = LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling | {"type": "llama3"}}
    new = LLAMA | {"rope_parameters": scaling | {"rope_type": "llama3", "rope_theta": 5e5}}
    assert first_rope(old) == first_rope(older) == first_rope(new)
    assert (first_rope(new).theta, first_rope(new).factor, first_rope(new).scaling) == (5e5, 8.0, "llama3")


def test_gemma_spelling_of_transformers_4():
    """The first configs on the hub: no layer types, one theta for each kind of layer, scaling for global layers."""
    config = {k: v for k, v in GEMMA.items() if k not in ("layer_types", "num_hidden_layers")} | {
        "num_hidden_layers": 13,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 6,
    }
    layers = spec_from_config(config, "x").layers
    assert [i for i, layer in enumerate(layers) if layer.window is None] == [5, 11]
    assert (layers[5].rope.theta, layers[5].rope.factor) == (1e6, 8.0)
    assert (layers[0].rope.theta, layers[0].rope.scaling, layers[0].window) == (1e4, "none", 16)
    nested = {"model_type": "gemma3", "text_config": config, "vision_config": {}}
    assert spec_from_config(nested, "x") == replace(spec_from_config(config, "x"))


def test_yarn_attention_factor():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    # 0.1 ln 4 + 1
    assert first_rope(LLAMA | {"rope_scaling": scaling}).attention_factor == pytest.approx(1.1386294, abs=1e-7)


def test_every_file_of_the_folder_is_an_architecture():
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3"} <= set(architectures())
    for module in architectures().values():
        assert module.HF_TYPES
        assert callable(module.from_hf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba' is not supported; known: gemma3"),
        ({"model_type": None}, "architecture None is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by gptq"),
        ({"dtype": "float64"}, "dtype 'float64'"),
        ({"attention_bias": True}, "biases"),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    with pytest.raises(UnsupportedFormat, match=message):
        spec_from_config(LLAMA | change, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "many"}, "hidden_size must be a positive whole number, got 'many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive whole number, got 0"),
        ({"num_key_value_heads": 2}, "3 heads can't share 2 key-value heads"),
    ],
)
def test_bad_numbers_are_refused(change, message):
    with pytest.raises(CorruptFile, match=message):
        spec_from_config(LLAMA | change, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 260}, "the header states vocab_size 260, the tensors have 259"),
        ({"intermediate_size": 161}, "the header states d_ff 161, the tensors have 160"),
        ({"head_dim": 16}, "the header states head_dim 16, the tensors have 32"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "96 attention outputs can't be shared by 5 heads"),
        (
            {"num_key_value_heads": 3},
            r"'model.layers.0.self_attn.k_proj.weight' is \(32, 96\), the header implies \(96",
        ),
        ({"num_hidden_layers": 5}, "lacks the tensor 'model.layers.4.input_layernorm.weight'"),
    ],
)
def test_tensors_that_contradict_the_header_are_refused(change, message, tmp_path):
    write_random(tmp_path, LLAMA)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | change))
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(CorruptFile, match=message):
        model_spec(checkpoint)


def test_header_and_tensors_give_the_same_spec(tmp_path):
    for config in (LLAMA, GEMMA):
        write_random(tmp_path / "model", config)
        with Checkpoint(tmp_path / "model") as checkpoint:
            full = model_spec(checkpoint)
        alone = spec_from_config(config, full.name)
        assert replace(full, weights=()) == replace(alone, weights=())
        assert full.weights == alone.weights
        shutil.rmtree(tmp_path / "model")


def test_the_engine_imports_neither_torch_nor_tokenizers():
    heavy = ("torch", "transformers", "tokenizers", "jinja2", "rich")
    code = f"import sys, barefoot.engine.generate; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
