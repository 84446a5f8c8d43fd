"""Rotary position embedding: what the files say about it, and the frequencies that follow.

A pair of channels i of a head is turned by the angle position × f_i, f_i = theta^(-2i / dim) without scaling. The
scalings stretch the frequencies for contexts beyond the one that a model was first trained with:

* linear: f_i / factor.
* llama3: wavelengths above original_context / low_freq_factor are divided by ``factor``, those below
  original_context / high_freq_factor are kept, those between are blended.
* yarn (Peng et al. 2023, arXiv:2309.00071): channels that turn more than ``beta_fast`` times within the original
  context are kept, those that turn less than ``beta_slow`` times are divided by ``factor``, a ramp between; cosines
  and sines are multiplied by the attention factor.
* longrope (Ding et al. 2024, arXiv:2402.13753): f_i divided by a list of factors, the long list when the engine's
  context exceeds the original one, the short list otherwise; cosines and sines multiplied by the attention factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import CorruptFile, UnsupportedFormat
from barefoot.core.model import Rope

F32 = npt.NDArray[np.float32]

SCALINGS = ("none", "linear", "llama3", "yarn", "longrope")


def from_hf(config: Mapping[str, Any], head_dim: int, *, layer_type: str = "", theta: float = 10_000.0) -> Rope:
    """The rope of a config.json, in the spelling of transformers 5 (``rope_parameters``) or before (``rope_scaling``).

    ``layer_type`` chooses among nested parameters; ``theta`` is used when the config names none.
    """
    params = config.get("rope_parameters") or config.get("rope_scaling") or {}
    params = params.get(layer_type, params)
    kind = params.get("rope_type", params.get("type", "default"))
    kind = {"default": "none", "su": "longrope"}.get(kind, kind)
    if kind not in SCALINGS:
        raise UnsupportedFormat(f"rope scaling {kind!r} is not supported; known: {', '.join(SCALINGS)}")
    base = float(params.get("rope_theta", config.get("rope_theta", theta)))
    dim = int(head_dim * params.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))
    if kind == "none":
        return Rope(base, dim)
    if not params.get("truncate", True):
        raise UnsupportedFormat("yarn without truncated correction range is not supported")

    trained = config.get("max_position_embeddings", 0)
    original = config.get("original_max_position_embeddings", params.get("original_max_position_embeddings", trained))
    if kind in ("llama3", "yarn", "longrope") and not original:
        raise CorruptFile(f"rope scaling {kind} needs original_max_position_embeddings, which the config lacks")
    factor = params.get("factor")
    if factor is None:
        factor = trained / original
    return Rope(
        base,
        dim,
        scaling=kind,
        factor=float(factor),
        original_context=original,
        low_freq_factor=params.get("low_freq_factor", 1.0),
        high_freq_factor=params.get("high_freq_factor", 4.0),
        beta_fast=params.get("beta_fast") or 32.0,
        beta_slow=params.get("beta_slow") or 1.0,
        attention_factor=_attention_factor(kind, float(factor), original, params),
        short_factors=tuple(params.get("short_factor", ())),
        long_factors=tuple(params.get("long_factor", ())),
    )


def to_hf(rope: Rope) -> dict[str, Any]:
    """The keys of a config.json from which ``from_hf`` reads this rope, in the spelling before transformers 5."""
    if rope.scaling == "none":
        return {"rope_theta": rope.theta}
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling != "linear" and rope.original_context:  # GGUF files of Llama 3 give factors and no context
        scaling["original_max_position_embeddings"] = rope.original_context
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    if rope.scaling == "longrope":
        scaling |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
    if rope.scaling in ("yarn", "longrope"):
        scaling["attention_factor"] = rope.attention_factor
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _attention_factor(kind: str, factor: float, original: int, params: Mapping[str, Any]) -> float:
    if params.get("attention_factor") is not None:
        return float(params["attention_factor"])
    if kind == "yarn":
        scale, all_dims = params.get("mscale"), params.get("mscale_all_dim")
        if scale and all_dims:
            return yarn_magnitude(factor, scale) / yarn_magnitude(factor, all_dims)
        return yarn_magnitude(factor)
    if kind == "longrope" and factor > 1:
        return math.sqrt(1 + math.log(factor) / math.log(original))
    return 1.0


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """0.1 × scale × ln(factor) + 1, by which yarn multiplies cosines and sines."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def from_gguf(
    metadata: Mapping[str, Any], head_dim: int, *, interleaved: bool = False, theta: float = 10_000.0
) -> Rope:
    """The rope of a GGUF file. Lists of factors are tensors there: see :func:`barefoot.engine.specs.model_spec`."""
    prefix = f"{metadata['general.architecture']}.rope."
    kind = metadata.get(prefix + "scaling.type", "none")
    if kind not in SCALINGS:
        raise UnsupportedFormat(f"rope scaling {kind!r} is not supported; known: {', '.join(SCALINGS)}")
    factor = float(metadata.get(prefix + "scaling.factor", 1.0)) or 1.0
    magnitude = float(metadata.get(prefix + "scaling.attn_factor", 1.0))
    return Rope(
        float(metadata.get(prefix + "freq_base", theta)),
        int(metadata.get(prefix + "dimension_count", head_dim)),
        interleaved=interleaved,
        scaling=kind,
        factor=factor,
        original_context=int(metadata.get(prefix + "scaling.original_context_length", 0)),
        beta_fast=float(metadata.get(prefix + "scaling.yarn_beta_fast", 32.0)),
        beta_slow=float(metadata.get(prefix + "scaling.yarn_beta_slow", 1.0)),
        attention_factor=magnitude * yarn_magnitude(factor) if kind == "yarn" else magnitude,
    )


def to_gguf(rope: Rope) -> dict[str, Any]:
    """The keys below ``<architecture>.rope.`` from which ``from_gguf`` reads this rope, lists of factors apart."""
    keys: dict[str, Any] = {"freq_base": rope.theta, "dimension_count": rope.dim}
    if rope.scaling in ("linear", "yarn"):
        keys |= {"scaling.type": rope.scaling, "scaling.factor": rope.factor}
    magnitude = rope.attention_factor
    if rope.scaling == "yarn":
        keys |= {"scaling.yarn_beta_fast": rope.beta_fast, "scaling.yarn_beta_slow": rope.beta_slow}
        magnitude /= yarn_magnitude(rope.factor)
    if rope.original_context and rope.scaling in ("yarn", "longrope"):
        keys["scaling.original_context_length"] = rope.original_context
    if magnitude != 1:
        keys["scaling.attn_factor"] = magnitude
    return keys


def gguf_factors(rope: Rope) -> dict[str, F32]:
    """The tensors of divisors, float32 (dim / 2,), that a GGUF file keeps for this rope."""
    if rope.scaling == "llama3":
        return {"rope_freqs.weight": np.asarray(_divisors(rope, _plain(rope), 0), np.float32)}
    if rope.scaling != "longrope":
        return {}
    long, short = np.array(rope.long_factors, np.float32), np.array(rope.short_factors, np.float32)
    if rope.long_factors == rope.short_factors:
        return {"rope_freqs.weight": long}
    return {"rope_factors_long.weight": long, "rope_factors_short.weight": short}


def inverse_frequencies(rope: Rope, context: int) -> F32:
    """Angle per position of each pair, float32 (dim / 2,), for an engine of ``context`` positions."""
    plain = _plain(rope)
    return (plain / _divisors(rope, plain, context)).astype(np.float32)


def _plain(rope: Rope) -> F32:
    """The frequencies without scaling."""
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    frequencies: F32 = np.float32(1) / np.power(np.float32(rope.theta), exponents)
    return frequencies


def _divisors(rope: Rope, plain: F32, context: int) -> float | F32:
    """What the scaling divides each frequency by."""
    if rope.scaling == "none":
        return 1.0
    if rope.scaling == "linear":
        return rope.factor
    if rope.scaling == "longrope":
        factors = rope.long_factors if context > rope.original_context else rope.short_factors
        if len(factors) != rope.dim // 2:
            raise CorruptFile(f"longrope needs {rope.dim // 2} factors, got {len(factors)}")
        return np.array(factors, dtype=np.float32)
    kept = _kept_llama3(rope, plain) if rope.scaling == "llama3" else _kept_yarn(rope)
    return (1 / ((1 - kept) / rope.factor + kept)).astype(np.float32)


def _kept_llama3(rope: Rope, plain: F32) -> F32:
    """How much of each frequency stays: by the turns within the original context."""
    turns = rope.original_context * plain / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    return np.asarray(np.clip((turns - low) / (high - low), 0, 1), np.float32)


def _kept_yarn(rope: Rope) -> F32:
    """How much of each frequency stays: a ramp over the channels."""

    def channel(turns: float) -> float:
        """The pair that turns so many times within the original context."""
        return rope.dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low: float = max(math.floor(channel(rope.beta_fast)), 0)
    high: float = min(math.ceil(channel(rope.beta_slow)), rope.dim - 1)
    if low == high:
        high = low + 0.001  # the ramp becomes a step
    return np.asarray(1 - np.clip((np.arange(rope.dim // 2) - low) / (high - low), 0, 1), np.float32)
