"""A model's shapes: everything that bytes and operations depend on, without a weight being read.

Names of weights are barefoot's own and the same for every architecture and file type::

    embed  head  norm                                        head is absent when it is tied to embed
    layers.{i}.attn_norm  .q .k .v .o  .q_bias .k_bias .v_bias  .q_norm .k_norm  .post_attn_norm
    layers.{i}.ffn_norm   .gate .up .down                                         .post_ffn_norm

Every matrix is (rows, cols) = (outputs, inputs); a vector is (1, n).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

WeightGroup = Literal["embed", "attn", "ffn", "head", "norm"]
MATRIX_GROUPS: tuple[WeightGroup, ...] = ("embed", "attn", "ffn", "head")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of layer.

    ``dim`` is the number of rotated channels of a head; ``interleaved`` rotates pairs (2i, 2i+1), otherwise pairs
    (i, i + dim/2). ``scaling`` is one of none, linear, llama3, yarn, longrope; the numbers that it needs follow.
    """

    theta: float
    dim: int
    interleaved: bool = False
    scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class LayerSpec:
    """What differs from layer to layer: ``window`` is the number of positions seen, this one included (None: all)."""

    rope: Rope
    window: int | None = None


@dataclass(frozen=True)
class PartSpec:
    """What is added to a matrix's blocks: a part of that ``kind`` (``barefoot.ops.parts``), of ``n_bytes`` bytes.

    ``label`` tells a matrix's parts apart and orders them; ``source`` is the tensor's name in the file.
    """

    label: str
    kind: str
    n_bytes: int
    source: str


@dataclass(frozen=True)
class WeightSpec:
    """One weight: its shape, how its file stores it, and where.

    ``format`` is the id of the stored type (``"bf16"``, ``"q4_1"`` …). ``source`` is the tensor's name in the file, or
    without a file the one that transformers gives it, and ``row_start`` its first row there, for weights that files
    keep fused (Phi-3's qkv_proj). A matrix with ``parts`` is the sum of its blocks and of these; the format ``"zero"``
    means that it has no blocks.

    ``packed_bytes`` are those of the tensors that another program keeps the matrix as (GPTQ's codes, scales and zeros),
    read as a whole and put into blocks of ``format``; 0 for a tensor that holds such blocks already.
    """

    name: str
    group: WeightGroup
    rows: int
    cols: int
    format: str
    source: str = ""
    row_start: int = 0
    parts: tuple[PartSpec, ...] = ()
    packed_bytes: int = 0

    @functools.cached_property
    def layer(self) -> int | None:
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None

    @property
    def n_elements(self) -> int:
        return self.rows * self.cols


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer. Sizes are numbers of elements.

    ``norm_plus_one``: the file stores w and the norm multiplies by 1 + w (Gemma in safetensors, not in GGUF).
    ``embed_scale`` multiplies embeddings; ``attn_scale`` multiplies q·k; a ``softcap`` of 0 means none.
    ``stack``: parts of the weights of which, from the first one on, so many are in memory as there is room for.
    """

    name: str
    arch: str
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    context_length: int
    layers: tuple[LayerSpec, ...]
    weights: tuple[WeightSpec, ...]
    norm_eps: float
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embed_scale: float = 1.0
    attn_scale: float = 1.0
    norm_plus_one: bool = False
    attn_softcap: float = 0.0
    logit_softcap: float = 0.0
    stack: tuple[PartSpec, ...] = ()

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @functools.cached_property
    def tied(self) -> bool:
        """Whether the logits use the embedding matrix, stored once."""
        return not any(w.group == "head" for w in self.weights)

    @functools.cached_property
    def n_parameters(self) -> int:
        return sum(w.n_elements for w in self.weights)

    @functools.cached_property
    def streamable(self) -> bool:
        """Whether layers can be read from disk as they are used: all are blocks in the file already."""
        return not any(w.packed_bytes for w in self.weights if w.layer is not None)

    def kv_positions(self, layer: int, context: int, chunk: int) -> int:
        """Slots that a layer's KV must hold for ``context`` positions when prefill passes ``chunk`` at a time.

        A window layer keeps the window minus the present position plus one chunk, since the first query of a chunk
        still looks back a whole window when the chunk's last key is already written.
        """
        window = self.layers[layer].window
        return context if window is None else min(context, window - 1 + chunk)
