"""Random safetensors models written without transformers."""

from __future__ import annotations

import json

import numpy as np

from barefoot.engine.specs import spec_from_config
from barefoot.io.safetensors import array_entry, write_safetensors

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

OUTER = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{role: f"self_attn.{role}_proj" for role in "qkvo"},
    **{role: f"mlp.{role}_proj" for role in ("gate", "up", "down")},
    **{f"{role}_norm": f"self_attn.{role}_norm" for role in "qk"},
    **{f"{role}_bias": f"self_attn.{role}_proj" for role in "qkv"},
}
GEMMA_INNER = INNER | {
    "post_attn_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffn_norm": "post_feedforward_layernorm",
}


def write_random(folder, config, seed: int = 0) -> None:
    """A folder of config.json and float32 weights, their names and shapes those that the config implies."""
    rng = np.random.default_rng(seed)
    inner = GEMMA_INNER if config["model_type"].startswith("gemma3") else INNER
    entries = []
    for weight in spec_from_config(config, "random").weights:
        values = rng.standard_normal((weight.rows, weight.cols), dtype=np.float32) * np.float32(weight.cols**-0.5)
        if weight.layer is None:
            name = OUTER[weight.name]
        else:
            name = f"model.layers.{weight.layer}.{inner[weight.name.split('.')[2]]}"
        kind = "bias" if weight.name.endswith("_bias") else "weight"
        entries.append(array_entry(f"{name}.{kind}", values[0] if weight.group == "norm" else values))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", entries)
