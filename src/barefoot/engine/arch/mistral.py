"""Mistral 7B: Llama's shape, with a sliding window in every layer in its first version.

GGUF files of it say ``llama`` and are read by that file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from barefoot.core.model import LayerSpec, ModelSpec
from barefoot.engine import decoder, rope
from barefoot.engine.arch import llama

HF_TYPES = ("mistral",)
GGUF_ARCHS = ()


def from_hf(config: Mapping[str, Any], tensors: decoder.Tensors | None = None) -> ModelSpec:
    names = decoder.hf_roles(decoder.HF, tied=config.get("tie_word_embeddings", False), tensors=tensors)
    sizes = decoder.hf_sizes(config, tensors, names)
    layer = LayerSpec(rope.from_hf(config, sizes.head_dim), config.get("sliding_window", 4096))
    return decoder.model(
        "mistral",
        sizes,
        [layer] * sizes.n_layers,
        decoder.weights(names, sizes, tensors, decoder.hf_format(config)),
        activation=decoder.hf_activation(config),
    )


def to_hf(spec: ModelSpec) -> dict[str, Any]:
    layer = spec.layers[0]
    return decoder.hf_config(
        spec, "mistral", "MistralForCausalLM", sliding_window=layer.window, **rope.to_hf(layer.rope)
    )


def to_gguf(spec: ModelSpec) -> dict[str, Any]:
    return llama.to_gguf(spec)
