"""Qwen3: Qwen2 without biases, with an RMS norm over each head of q and k, and a head size of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from barefoot.core.errors import UnsupportedFormat
from barefoot.core.model import ModelSpec
from barefoot.engine import decoder
from barefoot.engine.arch import qwen2

HF_TYPES = ("qwen3",)
GGUF_ARCHS = ("qwen3",)

_HF_DEFAULTS = {"head_dim": 128}


def from_hf(config: Mapping[str, Any], tensors: decoder.Tensors | None = None) -> ModelSpec:
    if config.get("attention_bias"):
        raise UnsupportedFormat("Qwen3 variants with attention biases are not supported")
    return qwen2.read_hf("qwen3", decoder.HF | decoder.HF_QK_NORM, _HF_DEFAULTS | dict(config), tensors)


def to_hf(spec: ModelSpec) -> dict[str, Any]:
    return qwen2.write_hf(spec, "qwen3", "Qwen3ForCausalLM")


def from_gguf(metadata: Mapping[str, Any], tensors: decoder.Tensors | None) -> ModelSpec:
    return qwen2.read_gguf("qwen3", decoder.GGUF | decoder.GGUF_QK_NORM, metadata, tensors)


def to_gguf(spec: ModelSpec) -> dict[str, Any]:
    return qwen2.write_gguf(spec, "qwen3")
