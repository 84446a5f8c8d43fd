"""Tiny random models of every architecture: transformers builds and runs them, files are written to a folder."""

from __future__ import annotations

import numpy as np
import pytest

from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.kv.stores.f32 import FloatStore

COMMON = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 10_000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SHORT, LONG = [1.0, 1.1, 1.3, 1.2, 1.5], [1.0, 2.0, 3.5, 5.0, 9.0]


def _longrope(original: int) -> dict:
    return {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_size": 80,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
            "short_factor": SHORT,
            "long_factor": LONG,
        },
    }


# name: (config class, causal model class, settings beyond COMMON)
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama-gqa-4-1": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-gqa-9-3": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 51},
    ),
    "llama-head-dim": ("LlamaConfig", "LlamaForCausalLM", {"head_dim": 20, "hidden_size": 44, "vocab_size": 97}),
    "llama-linear": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
    ),
    "llama-llama3": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": LLAMA3 | {"rope_theta": 500_000.0}}),
    "llama-yarn": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": YARN | {"rope_theta": 10_000.0}}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 9}),
    "mistral-full": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("Qwen2Config", "Qwen2ForCausalLM", {"rope_parameters": YARN | {"rope_theta": 1e6}}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 24}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 7, "query_pre_attn_scalar": 24},
    ),
    "gemma3-linear": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "num_key_value_heads": 1,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"pad_token_id": 0}),
    "phi3-partial": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {"pad_token_id": 0, "partial_rotary_factor": 0.5, "sliding_window": 12},
    ),
    "phi3-longrope-long": ("Phi3Config", "Phi3ForCausalLM", {"pad_token_id": 0} | _longrope(16)),
    "phi3-longrope-short": ("Phi3Config", "Phi3ForCausalLM", {"pad_token_id": 0} | _longrope(250)),
}


def build(name: str):
    """The transformers model, float32, with weights large enough that every part matters."""
    torch = pytest.importorskip("torch", reason="the reference computation needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference computation needs transformers")
    config_class, model_class, settings = MODELS[name]
    config = getattr(transformers, config_class)(**COMMON | settings)
    torch.manual_seed(len(name))
    model = getattr(transformers, model_class)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "bias" in key else parameter.shape[-1] ** -0.5))
        if config.tie_word_embeddings:
            model.tie_weights()
    return model


def expected(model, ids) -> np.ndarray:
    """Logits float32 (tokens, vocab) of the whole sequence in one pass."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].float().numpy()


def engine(path, **settings) -> Engine:
    """An engine without any quantization, unless ``settings`` say otherwise."""
    checkpoint = Checkpoint(path)
    values = {"context": 128, "chunk": 64, "kv": FloatStore(), "activations": "float32", "n_threads": 2} | settings
    try:
        return Engine(checkpoint, model_spec(checkpoint), EngineConfig(**values))
    finally:
        checkpoint.close()


def all_logits(run: Engine, ids, n_prefill: int | None = None) -> np.ndarray:
    """Logits of every token: ``n_prefill`` of them by prefill, the others one by one."""
    n_prefill = len(ids) if n_prefill is None else n_prefill
    rows: list[np.ndarray] = []
    run.prefill(ids[:n_prefill], all_logits=lambda start, logits: rows.extend(logits.copy()))
    for token in ids[n_prefill:]:
        rows.append(run.decode(token).copy())
    return np.array(rows)
