"""Phi-3 and Phi-3.5 mini, Phi-4-mini: Llama's shape with q, k, v in one tensor, gate and up in another; longrope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from barefoot.core.model import LayerSpec, ModelSpec
from barefoot.engine import decoder, rope

HF_TYPES = ("phi3",)
GGUF_ARCHS = ("phi3",)

_HF = (
    decoder.HF
    | decoder.fused_after("model.layers.{i}.self_attn.qkv_proj.weight", "qkv")
    | decoder.fused_after("model.layers.{i}.mlp.gate_up_proj.weight", ("gate", "up"))
)
_GGUF = (
    decoder.GGUF
    | decoder.fused_after("blk.{i}.attn_qkv.weight", "qkv")
    | decoder.fused_after("blk.{i}.ffn_up.weight", ("gate", "up"))
)


def from_hf(config: Mapping[str, Any], tensors: decoder.Tensors | None = None) -> ModelSpec:
    names = decoder.hf_roles(_HF, tied=config.get("tie_word_embeddings", False), tensors=tensors)
    sizes = decoder.hf_sizes(config, tensors, names)
    turned = rope.from_hf(_phi_rope(config), sizes.head_dim)
    return decoder.model(
        "phi3",
        sizes,
        [LayerSpec(turned, config.get("sliding_window"))] * sizes.n_layers,
        decoder.weights(names, sizes, tensors, decoder.hf_format(config)),
        activation=decoder.hf_activation(config),
    )


def to_hf(spec: ModelSpec) -> dict[str, Any]:
    layer = spec.layers[0]
    original = layer.rope.original_context or spec.context_length
    share = layer.rope.dim / spec.head_dim
    return decoder.hf_config(
        spec,
        "phi3",
        "Phi3ForCausalLM",
        sliding_window=layer.window,
        original_max_position_embeddings=original,
        partial_rotary_factor=share,
        **rope.to_hf(layer.rope),
    )


def _phi_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with its early names of longrope, ``su`` and ``yarn``, replaced."""
    result = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        params = result.get(key)
        if params and params.get("rope_type", params.get("type")) in ("su", "yarn"):
            result[key] = dict(params, rope_type="longrope")
    return result


def from_gguf(metadata: Mapping[str, Any], tensors: decoder.Tensors | None) -> ModelSpec:
    names = decoder.gguf_roles(_GGUF, tensors)
    sizes = decoder.gguf_sizes(metadata, tensors, names)
    turned = rope.from_gguf(metadata, sizes.head_dim)
    if tensors is not None and "rope_factors_long.weight" in tensors:
        turned = replace(turned, scaling="longrope")
    layer = LayerSpec(turned, metadata.get("phi3.attention.sliding_window") or None)
    return decoder.model("phi3", sizes, [layer] * sizes.n_layers, decoder.weights(names, sizes, tensors, "f16"))


def to_gguf(spec: ModelSpec) -> dict[str, Any]:
    layer = spec.layers[0]
    return decoder.gguf_metadata(spec, "phi3", rope.to_gguf(layer.rope), sliding_window=layer.window)
