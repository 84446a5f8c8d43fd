"""Llama 1 to 3.x and everything of the same shape: SmolLM, TinyLlama, and Mistral in GGUF files.

RMS norm, rotary attention with grouped keys and values, SiLU-gated feed-forward. GGUF files permute the rows of q and k
so that rotated pairs are neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from barefoot.core.errors import UnsupportedFormat
from barefoot.core.model import LayerSpec, ModelSpec
from barefoot.engine import decoder, rope

HF_TYPES = ("llama",)
GGUF_ARCHS = ("llama",)


def from_hf(config: Mapping[str, Any], tensors: decoder.Tensors | None = None) -> ModelSpec:
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise UnsupportedFormat("Llama variants with biases are not supported")
    names = decoder.hf_roles(decoder.HF, tied=config.get("tie_word_embeddings", False), tensors=tensors)
    sizes = decoder.hf_sizes(config, tensors, names)
    layer = LayerSpec(rope.from_hf(config, sizes.head_dim))
    return decoder.model(
        "llama",
        sizes,
        [layer] * sizes.n_layers,
        decoder.weights(names, sizes, tensors, decoder.hf_format(config)),
        activation=decoder.hf_activation(config),
    )


def to_hf(spec: ModelSpec) -> dict[str, Any]:
    window = spec.layers[0].window  # GGUF files of Mistral say llama
    if window is not None:
        return decoder.hf_config(
            spec, "mistral", "MistralForCausalLM", sliding_window=window, **rope.to_hf(spec.layers[0].rope)
        )
    return decoder.hf_config(spec, "llama", "LlamaForCausalLM", **rope.to_hf(spec.layers[0].rope))


def from_gguf(metadata: Mapping[str, Any], tensors: decoder.Tensors | None) -> ModelSpec:
    names = decoder.gguf_roles(decoder.GGUF, tensors)
    sizes = decoder.gguf_sizes(metadata, tensors, names)
    layer = LayerSpec(
        rope.from_gguf(metadata, sizes.head_dim, interleaved=True),
        metadata.get("llama.attention.sliding_window"),
    )
    return decoder.model("llama", sizes, [layer] * sizes.n_layers, decoder.weights(names, sizes, tensors, "f16"))


def to_gguf(spec: ModelSpec) -> dict[str, Any]:
    layer = spec.layers[0]
    return decoder.gguf_metadata(spec, "llama", rope.to_gguf(layer.rope), sliding_window=layer.window)
