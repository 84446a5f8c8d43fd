"""The engine takes exactly what the footprint says, kind by kind, and nothing per token."""

import gc
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import tiny

from barefoot.core.errors import Incompatible, InvalidInput, OverBudget
from barefoot.core.ledger import Term, entry
from barefoot.core.model import ModelSpec
from barefoot.engine.arena import Arena
from barefoot.engine.config import EngineConfig
from barefoot.engine.footprint import CONVERT_ELEMENTS, ENCODE_BYTES_PER_WEIGHT, PASSING, footprint
from barefoot.engine.specs import model_spec, spec_from_config
from barefoot.io.inventory import Checkpoint
from barefoot.io.safetensors import array_entry, write_safetensors
from barefoot.kv.stores.f16 import HalfStore
from barefoot.kv.stores.q4 import Int4Store
from barefoot.kv.stores.q8 import Int8Store
from barefoot.ops import blocks
from barefoot.weights.formats.dense import Dense
from barefoot.weights.formats.integer import IntegerGroups

LLAMA = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "dtype": "float32",
}
GEMMA = LLAMA | {
    "model_type": "gemma3_text",
    "head_dim": 64,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
}
INT4, INT8 = IntegerGroups(4, 32), IntegerGroups(8, 32, True)
CASES = {
    "plain": (LLAMA, {}),
    "q8": (LLAMA, {"kv": Int8Store(), "context": 77, "chunk": 5}),
    "int4": (LLAMA, {"weights": {"attn": INT4, "ffn": INT4, "embed": INT8, "head": INT8}, "kv": Int4Store()}),
    "mixed": (LLAMA | {"tie_word_embeddings": True}, {"weights": {"attn": Dense("f16")}, "chunk": 1, "n_threads": 2}),
    "streamed": (LLAMA, {"n_streamed_layers": 2, "weights": {"ffn": INT4}}),
    "all streamed": (LLAMA, {"n_streamed_layers": 4, "stream_head": True, "n_logits": 3}),
    "tied streamed": (LLAMA | {"tie_word_embeddings": True, "vocab_size": 4001}, {"stream_head": True}),
    "windows": (GEMMA, {"kv": Int8Store(), "context": 300, "chunk": 24, "activations": "float32"}),
    "windows streamed": (GEMMA, {"n_streamed_layers": 3, "stream_head": True, "weights": {"attn": INT8}}),
}


def config_of(settings) -> EngineConfig:
    return EngineConfig(**{"context": 128, "kv": HalfStore(), "chunk": 16} | settings)


def write_random(folder, config, rng) -> None:
    """A safetensors folder of that config; the names and shapes are those that its spec lists."""
    import json

    (folder / "config.json").write_text(json.dumps(config))
    spec = spec_from_config(config, "random")
    entries = []
    for weight in spec.weights:
        values = rng.standard_normal((weight.rows, weight.cols)).astype(np.float32) * weight.cols**-0.5
        entries.append(array_entry(hf_name(weight.name), values[0] if weight.group == "norm" else values))
    write_safetensors(folder / "model.safetensors", entries)


def hf_name(name: str) -> str:
    outer = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
    if name in outer:
        return outer[name]
    _, layer, role = name.split(".")
    kinds = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    kinds |= {r: f"self_attn.{r}_proj" for r in "qkvo"} | {r: f"mlp.{r}_proj" for r in ("gate", "up", "down")}
    kinds |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    return f"model.layers.{layer}.{kinds[role]}.weight"
