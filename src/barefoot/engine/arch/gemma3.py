"""Gemma 3, text only.

RMS norm before and after both halves of a layer, and over each head of q and k; embeddings scaled by sqrt(d_model);
GELU-gated feed-forward; five layers with a sliding window for each that sees everything, with a rope of their own.
Norms multiply by 1 + w in safetensors; GGUF files store 1 + w. transformers rounds the embedding scale to the type of
the weights (25.25 for 25.298 in bf16); here it is not rounded, as in transformers in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from barefoot.core.errors import Incompatible, UnsupportedFormat
from barefoot.core.model import LayerSpec, ModelSpec
from barefoot.engine import decoder, rope

HF_TYPES = ("gemma3_text", "gemma3")
GGUF_ARCHS = ("gemma3",)

GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4
GLOBAL_EVERY = 6

_HF = (
    decoder.HF
    | decoder.HF_QK_NORM
    | decoder.roles(
        {
            "post_attn_norm": "model.layers.{i}.post_attention_layernorm.weight",
            "ffn_norm": "model.layers.{i}.pre_feedforward_layernorm.weight",
            "post_ffn_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
        }
    )
)
_GGUF = (
    decoder.GGUF
    | decoder.GGUF_QK_NORM
    | decoder.roles(
        {
            "post_attn_norm": "blk.{i}.post_attention_norm.weight",
            "post_ffn_norm": "blk.{i}.post_ffw_norm.weight",
        }
    )
)

# Configs of the larger models leave out whatever equals the defaults of their class.
_HF_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "sliding_window_pattern": GLOBAL_EVERY,
}


def _pattern(n_layers: int, every: int) -> list[bool]:
    """Whether each layer sees everything: the last of every ``every``."""
    return [(i + 1) % every == 0 for i in range(n_layers)]


def _layers(sees_all: list[bool], everywhere: LayerSpec, nearby: LayerSpec) -> list[LayerSpec]:
    return [everywhere if all_ else nearby for all_ in sees_all]


def from_hf(stated: Mapping[str, Any], tensors: decoder.Tensors | None = None) -> ModelSpec:
    config: dict[str, Any] = _HF_DEFAULTS | dict(stated.get("text_config", stated))
    if config.get("attention_bias") or config.get("use_bidirectional_attention"):
        raise UnsupportedFormat("Gemma 3 variants with biases or bidirectional attention are not supported")
    names = decoder.hf_roles(_HF, tied=config["tie_word_embeddings"], tensors=tensors)
    sizes = decoder.hf_sizes(config, tensors, names)
    nested = config.get("rope_parameters") is not None
    local_config = config if nested else {"rope_theta": config.get("rope_local_base_freq", LOCAL_THETA)}
    types = config.get("layer_types")
    sees_all = (
        [kind == "full_attention" for kind in types]
        if types
        else _pattern(sizes.n_layers, config["sliding_window_pattern"])
    )
    layers = _layers(
        sees_all,
        LayerSpec(rope.from_hf(config, sizes.head_dim, layer_type="full_attention", theta=GLOBAL_THETA)),
        LayerSpec(
            rope.from_hf(local_config, sizes.head_dim, layer_type="sliding_attention", theta=LOCAL_THETA),
            config["sliding_window"],
        ),
    )
    return decoder.model(
        "gemma3",
        sizes,
        layers,
        decoder.weights(names, sizes, tensors, decoder.hf_format(config)),
        activation=decoder.hf_activation(config),
        embed_scale=sizes.d_model**0.5,
        attn_scale=config["query_pre_attn_scalar"] ** -0.5,
        norm_plus_one=True,
        attn_softcap=config.get("attn_logit_softcapping") or 0.0,
        logit_softcap=config.get("final_logit_softcapping") or 0.0,
    )


def to_hf(spec: ModelSpec) -> dict[str, Any]:
    everywhere = next(layer for layer in spec.layers if layer.window is None)
    nearby = next(layer for layer in spec.layers if layer.window is not None)
    return decoder.hf_config(
        spec,
        "gemma3_text",
        "Gemma3ForCausalLM",
        hidden_activation="gelu_pytorch_tanh",
        layer_types=["full_attention" if layer.window is None else "sliding_attention" for layer in spec.layers],
        sliding_window=nearby.window,
        rope_local_base_freq=nearby.rope.theta,
        query_pre_attn_scalar=round(spec.attn_scale**-2),
        attn_logit_softcapping=spec.attn_softcap or None,
        final_logit_softcapping=spec.logit_softcap or None,
        **rope.to_hf(everywhere.rope),
    )


def to_gguf(spec: ModelSpec) -> dict[str, Any]:
    if spec.attn_softcap:
        raise Incompatible("GGUF files of Gemma 3 can't state a cap of attention scores")
    everywhere = next(layer for layer in spec.layers if layer.window is None)
    nearby = next(layer for layer in spec.layers if layer.window is not None)
    local = [layer.window is not None for layer in spec.layers]
    usual = [not all_ for all_ in _pattern(spec.n_layers, GLOBAL_EVERY)]
    return decoder.gguf_metadata(
        spec,
        "gemma3",
        rope.to_gguf(everywhere.rope) | {"freq_base_swa": nearby.rope.theta},
        sliding_window=nearby.window,
        sliding_window_pattern=None if local == usual else np.array(local),
        scale=None if spec.attn_scale == spec.head_dim**-0.5 else spec.attn_scale,
    ) | ({"gemma3.final_logit_softcapping": spec.logit_softcap} if spec.logit_softcap else {})


def from_gguf(metadata: Mapping[str, Any], tensors: decoder.Tensors | None) -> ModelSpec:
    names = decoder.gguf_roles(_GGUF, tensors)
    sizes = decoder.gguf_sizes(metadata, tensors, names)
    every = metadata.get("gemma3.attention.sliding_window_pattern", GLOBAL_EVERY)
    sees_all = _pattern(sizes.n_layers, every) if isinstance(every, int) else [not local for local in every]
    local_theta = metadata.get("gemma3.rope.freq_base_swa", LOCAL_THETA)
    # Scaling is for the layers that see everything; the header states one rope for both.
    local = {"general.architecture": "gemma3", "gemma3.rope.freq_base": local_theta}
    layers = _layers(
        sees_all,
        LayerSpec(rope.from_gguf(metadata, sizes.head_dim, theta=GLOBAL_THETA)),
        LayerSpec(rope.from_gguf(local, sizes.head_dim), decoder.need(metadata, "gemma3.attention.sliding_window")),
    )
    # The 27B, known by its 62 layers, scales by the width that each head would have if all shared d_model.
    scaled_by = sizes.d_model / sizes.n_heads if sizes.n_layers == 62 else sizes.head_dim
    return decoder.model(
        "gemma3",
        sizes,
        layers,
        decoder.weights(names, sizes, tensors, "f16"),
        activation="gelu_tanh",
        embed_scale=sizes.d_model**0.5,
        attn_scale=metadata.get("gemma3.attention.scale", scaled_by**-0.5),
        logit_softcap=metadata.get("gemma3.final_logit_softcapping", 0.0),
    )
