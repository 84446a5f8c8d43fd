"""Qwen2 and Qwen2.5: Llama's shape with biases on q, k and v; some configs give the upper layers a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from barefoot.core.errors import Incompatible
from barefoot.core.model import LayerSpec, ModelSpec
from barefoot.engine import decoder, rope

HF_TYPES = ("qwen2",)
GGUF_ARCHS = ("qwen2",)


def windows(config: Mapping[str, Any], n_layers: int) -> list[int | None]:
    """Each layer's window: ``layer_types`` where the config lists them, else the layers from max_window_layers on."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    types = config.get("layer_types") or [
        "full_attention" if i < first else "sliding_attention" for i in range(n_layers)
    ]
    return [window if kind == "sliding_attention" else None for kind in types]


def from_hf(config: Mapping[str, Any], tensors: decoder.Tensors | None = None) -> ModelSpec:
    return read_hf("qwen2", decoder.HF | decoder.HF_ATTN_BIAS, config, tensors)


def to_hf(spec: ModelSpec) -> dict[str, Any]:
    return write_hf(spec, "qwen2", "Qwen2ForCausalLM")


def from_gguf(metadata: Mapping[str, Any], tensors: decoder.Tensors | None) -> ModelSpec:
    return read_gguf("qwen2", decoder.GGUF | decoder.GGUF_ATTN_BIAS, metadata, tensors)


def read_hf(arch: str, names: decoder.Roles, config: Mapping[str, Any], tensors: decoder.Tensors | None) -> ModelSpec:
    names = decoder.hf_roles(names, tied=config.get("tie_word_embeddings", False), tensors=tensors)
    sizes = decoder.hf_sizes(config, tensors, names)
    turned = rope.from_hf(config, sizes.head_dim)
    return decoder.model(
        arch,
        sizes,
        [LayerSpec(turned, window) for window in windows(config, sizes.n_layers)],
        decoder.weights(names, sizes, tensors, decoder.hf_format(config)),
        activation=decoder.hf_activation(config),
    )


def write_hf(spec: ModelSpec, model_type: str, class_name: str) -> dict[str, Any]:
    windows = [layer.window for layer in spec.layers]
    types = ["full_attention" if window is None else "sliding_attention" for window in windows]
    window = next((w for w in windows if w is not None), None)
    return decoder.hf_config(
        spec,
        model_type,
        class_name,
        layer_types=types,
        use_sliding_window=window is not None,
        sliding_window=window,
        **rope.to_hf(spec.layers[0].rope),
    )


def to_gguf(spec: ModelSpec) -> dict[str, Any]:
    return write_gguf(spec, "qwen2")


def read_gguf(
    arch: str, names: decoder.Roles, metadata: Mapping[str, Any], tensors: decoder.Tensors | None
) -> ModelSpec:
    names = decoder.gguf_roles(names, tensors)
    sizes = decoder.gguf_sizes(metadata, tensors, names)
    layer = LayerSpec(rope.from_gguf(metadata, sizes.head_dim))
    return decoder.model(arch, sizes, [layer] * sizes.n_layers, decoder.weights(names, sizes, tensors, "f16"))


def write_gguf(spec: ModelSpec, arch: str) -> dict[str, Any]:
    if any(layer.window is not None for layer in spec.layers):
        raise Incompatible(f"GGUF files of {arch} can't say which layers have a sliding window")
    return decoder.gguf_metadata(spec, arch, rope.to_gguf(spec.layers[0].rope))
