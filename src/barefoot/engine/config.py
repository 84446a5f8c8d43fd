"""What the planner decides and the engine obeys: one frozen record, no weights and no arrays in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from barefoot.core.model import PartSpec, WeightGroup
from barefoot.kv.placement import Placement
from barefoot.kv.stores import KVStore
from barefoot.ops.dispatch import Layout
from barefoot.weights.formats import WeightFormat

Activations = Literal["int8", "float32"]


@dataclass(frozen=True)
class AdapterParts:
    """What an adapter adds to matrices: parts of :mod:`barefoot.ops.lowrank` by the matrices' names, in the model's
    order. ``path`` is the folder that they are read from (:mod:`barefoot.engine.beside`)."""

    path: str
    parts: tuple[tuple[str, PartSpec], ...]


@dataclass(frozen=True)
class EngineConfig:
    """How a model is laid out in memory and run.

    Attributes
    ----------
    context : positions that the KV store holds.
    chunk : tokens that prefill passes through the layers at once; bounds the activations.
    weights : format of each group of matrices (embed, attn, ffn, head); vectors are always f32.
    kv : the KV store.
    kv_placement : how keys and values get their memory; None: all of it is resident from the start.
    activations : ``int8`` rounds the inputs of quantized matrices to 8 bits by groups of 32, or many of them to
        bfloat16 where the processor multiplies that faster (fast); ``float32`` keeps them.
    n_streamed_layers : so many layers, the last ones, stay on disk and pass through two buffers in each step. They
        keep the file's own blocks, whatever ``weights`` says.
    stream_head : the matrix that makes the logits is read from disk by tiles in each step, and, when it is tied,
        embedding rows are read singly.
    n_logits : tokens of a prompt whose logits are computed at once; more than 1 only pays where all are wanted.
    n_sequences : sequences that the KV store holds, ``context`` positions each; one token of each makes a decode step.
    n_threads : compute threads.
    n_stacked : so many parts of the model's stack are in memory, the first ones; None: all. It can change while the
        engine lives (``Engine.resize``).
    layouts : class of matrices → the layout in which resident ones lie, where it is not panels
        (:mod:`barefoot.ops.dispatch`). Only for int8: ``float32`` reads rows.
    adapter : stands beside the matrices, resident, whatever these are stored as and wherever.
    """

    context: int
    kv: KVStore
    weights: Mapping[WeightGroup, WeightFormat] = field(default_factory=dict)
    chunk: int = 64
    activations: Activations = "int8"
    n_streamed_layers: int = 0
    stream_head: bool = False
    n_logits: int = 1
    n_sequences: int = 1
    n_threads: int = 1
    n_stacked: int | None = None
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    kv_placement: Placement | None = None
    adapter: AdapterParts | None = None

    @property
    def n_rows(self) -> int:
        """Tokens of the largest pass: a chunk of a prompt, or one of each sequence."""
        return max(self.chunk, self.n_sequences)

    @property
    def n_logit_rows(self) -> int:
        """Tokens whose logits are there at once."""
        return max(self.n_logits, self.n_sequences)
