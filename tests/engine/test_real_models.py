"""The packaged models against transformers in float32 on the same, dequantized weights."""

import gc

import gguf
import numpy as np
import pytest
import tiny

from barefoot.core.measure import release_free_memory, resident
from barefoot.engine.config import EngineConfig
from barefoot.engine.footprint import PASSING
from barefoot.engine.generate import Generation, generate
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.io.chat import find_chat_template
from barefoot.io.inventory import Checkpoint
from barefoot.io.sources import resolve
from barefoot.io.tokenizer import StreamDecoder, load_tokenizer
from barefoot.kv.stores.q8 import Int8Store

TEXT = "The memory of a machine is small, and the model that it runs should leave the smallest footprint. In 1969,"

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_NAMES = NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
CONFIGS = {
    "smollm2": (
        "Llama",
        "LlamaConfig",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100_000.0,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3-270m": (
        "Gemma3",
        "Gemma3TextConfig",
        {
            "vocab_size": 262_144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
            "query_pre_attn_scalar": 256,
            "max_position_embeddings": 32_768,
        },
    ),
}


def dequantized(path):
    """(name, float32 values) of every tensor, as the gguf package computes them from the file's bytes."""
    with Checkpoint(path) as checkpoint:
        for info in checkpoint.tensors.values():
            raw = np.empty(info.n_bytes, np.uint8)
            checkpoint.read_into(info.name, raw)
            kind = gguf.GGMLQuantizationType[info.type.upper()]
            values = gguf.quants.dequantize(raw.reshape(info.n_rows, -1), kind).astype(np.float32)
            yield info.name, values.reshape(info.shape)


def transformers_model(name, path):
    """The model in transformers with the weights of the file."""
    torch = pytest.importorskip("torch", reason="the reference computation needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference computation needs transformers")
    family, config_class, settings = CONFIGS[name]
    config = getattr(transformers, config_class)(**settings)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")._from_config(config)
    names = GEMMA_NAMES if family == "Gemma3" else NAMES
    state = {}
    for tensor_name, values in dequantized(path):
        parts = tensor_name.removesuffix(".weight").split(".")
        if family == "Gemma3" and parts[-1].endswith("norm"):
            values = values - 1
        if family == "Llama" and parts[-1] in ("attn_q", "attn_k"):
            n_heads = config.num_attention_heads if parts[-1] == "attn_q" else config.num_key_value_heads
            values = values.reshape(n_heads, config.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
        stem = names[parts[0]] if len(parts) == 1 else f"model.layers.{parts[1]}.{names[parts[2]]}"
        state[f"{stem}.weight"] = torch.from_numpy(np.ascontiguousarray(values))
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    # what is computed at construction and not stored was left without memory
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    if family == "Gemma3":
        model.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
    assert not [key for key, value in model.named_parameters() if value.is_meta]
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name):
    path = resolve(name)
    with Checkpoint(path) as checkpoint:
        ids = load_tokenizer(checkpoint).encode(TEXT, add_bos=True)
    assert len(ids) > 20
    with tiny.engine(path, chunk=32, n_logits=32) as run:
        logits = tiny.all_logits(run, ids, len(ids) - 4)
    del run
    expected = tiny.expected(transformers_model(name, path), ids)
    differences = np.abs(logits - expected)
    assert (differences / np.maximum(1, np.abs(expected))).max() < 2e-4


def test_smollm2_answers_within_its_footprint():
    """int8 activations and an int8 KV store, as run by default: the answer, and the private memory it takes."""
    with Checkpoint(resolve("smollm2")) as checkpoint:
        tokenizer, template = load_tokenizer(checkpoint), find_chat_template(checkpoint)
        messages = [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "What is the capital of France?"},
        ]
        prompt = tokenizer.encode_segments(template.render(messages, tokenizer))
        spec = model_spec(checkpoint)
        gc.collect()
        release_free_memory()  # loading does so too: what other tests freed must not be counted as its doing
        before = resident()
        run = Engine(checkpoint, spec, EngineConfig(context=1024, kv=Int8Store(), n_threads=2))
        after = resident()
    planned = sum(e.bytes for e in run.footprint.select(phase="decode") if e.owner not in PASSING)
    if before is not None and after is not None:
        assert abs(after.anonymous - before.anonymous - planned) < 0.03 * planned
    result = Generation()
    with run:
        for _ in generate(run, prompt, StreamDecoder(tokenizer), max_tokens=8, result=result):
            pass
    assert result.text.startswith("The capital of France is Paris.")
