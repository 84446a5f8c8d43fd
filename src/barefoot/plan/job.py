"""What a plan is made from: the job, the memory that may be used, and what the user has already decided."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast, get_args

from barefoot.core.errors import InvalidInput
from barefoot.core.ledger import Place
from barefoot.core.model import MATRIX_GROUPS, WeightGroup
from barefoot.core.registry import techniques
from barefoot.core.spec import format_technique, parse_composition
from barefoot.core.technique import Technique
from barefoot.engine.config import Activations, AdapterParts
from barefoot.kv import ruled
from barefoot.kv.stores import KVStore
from barefoot.ops.dispatch import Layout
from barefoot.weights.formats import WeightFormat


@dataclass(frozen=True)
class RunJob:
    """Answer prompts: ``context`` positions for prompt and answer together, of which ``max_tokens`` are generated.

    ``batch`` sequences of that size share the weights and an ``adapter``; each has its own keys and values.
    """

    context: int
    max_tokens: int
    batch: int = 1
    adapter: AdapterParts | None = None

    def __post_init__(self) -> None:
        for name, got in (("context", self.context), ("max_tokens", self.max_tokens), ("batch", self.batch)):
            if got < 1:
                raise InvalidInput(f"{name} must be at least 1, got {got}")
        if self.max_tokens >= self.context:
            raise InvalidInput(
                f"max_tokens ({self.max_tokens}) leaves no room for a prompt in a context of {self.context}",
                cure=f"use --context {self.max_tokens + 1} or more, or fewer --max-tokens",
            )

    @property
    def n_prompt(self) -> int:
        """The longest prompt that leaves room for the answer."""
        return self.context - self.max_tokens


@dataclass(frozen=True)
class Budget:
    """Bytes that the job may use in each place; a place that is not named may be used up to the device's capacity."""

    bytes: Mapping[Place, int]

    def __post_init__(self) -> None:
        for place, got in self.bytes.items():
            if place not in get_args(Place) or got <= 0:
                raise InvalidInput(f"budget of {place!r} must be a positive number of bytes, got {got}")


@dataclass(frozen=True)
class Stated:
    """What the user has decided; the planner never changes it. None, or a missing group, is the planner's to choose.

    Attributes
    ----------
    weights : format of some or all groups.
    kv : the KV store.
    chunk : tokens of prefill at once.
    streamed_layers : so many of the last layers stay on disk (with an accelerator: on the host); 0 forbids it.
    stream_head : whether the logits' matrix stays on disk.
    n_threads, activations, layouts, n_stacked : as in the engine's config.
    """

    weights: Mapping[WeightGroup, WeightFormat] = field(default_factory=dict)
    kv: KVStore | None = None
    chunk: int | None = None
    streamed_layers: int | None = None
    stream_head: bool | None = None
    n_threads: int | None = None
    activations: Activations | None = None
    layouts: Mapping[str, Layout] | None = None
    n_stacked: int | None = None

    def __post_init__(self) -> None:
        for name, got, least in (
            ("chunk", self.chunk, 1),
            ("streamed_layers", self.streamed_layers, 0),
            ("n_threads", self.n_threads, 1),
            ("n_stacked", self.n_stacked, 0),
        ):
            if got is not None and got < least:
                raise InvalidInput(f"{name} must be at least {least}, got {got}")


_PART = r"(?:([a-z]+)\s*=\s*)?([a-z_][a-z0-9_]*\s*(?:\([^()]*\))?)"


def parse_weights(text: str) -> dict[WeightGroup, WeightFormat]:
    """Formats by group from ``"int(bits=4)"`` (all groups) or ``"ffn=int(bits=3) attn=stored"`` (those named).

    Raises
    ------
    InvalidInput : unreadable, an unknown group or format, or a group given twice.
    """
    return cast("dict[WeightGroup, WeightFormat]", parse_groups(text, techniques("weights.formats")))


def parse_groups(text: str, known: Mapping[str, type[Technique]]) -> dict[WeightGroup, Technique]:
    """The same with any techniques."""
    if re.fullmatch(rf"\s*{_PART}(?:[\s,]+{_PART})*\s*", text) is None:
        raise InvalidInput(
            f"can't read the weights {text!r}", cure='write "int(bits=4)" or "ffn=int(bits=3) attn=stored"'
        )
    formats: dict[WeightGroup, Technique] = {}
    for group, spec in re.findall(_PART, text):
        if group and group not in MATRIX_GROUPS:
            raise InvalidInput(f"unknown group {group!r} of weights; known: {', '.join(MATRIX_GROUPS)}")
        (technique,) = parse_composition(spec, known, "weights.formats")
        for name in (group,) if group else MATRIX_GROUPS:
            if name in formats:
                raise InvalidInput(f"the format of {name} is given twice in {text!r}")
            formats[cast(WeightGroup, name)] = technique
    return formats


def format_weights(weights: Mapping[WeightGroup, WeightFormat]) -> str:
    """The text that ``parse_weights`` reads back: one format when all four groups share it, else group by group."""
    if len(weights) == len(MATRIX_GROUPS) and len(set(weights.values())) == 1:
        return format_technique(next(iter(weights.values())))
    return " ".join(f"{group}={format_technique(weights[group])}" for group in MATRIX_GROUPS if group in weights)


def parse_kv(text: str) -> KVStore:
    """The KV store of a spec string such as ``"q8"`` or ``"h2o(keep=512) > q8"``."""
    return ruled.parse(text, {**techniques("kv.stores"), **techniques("kv.policies")})
