"""KV policies: which entries of a cache stay, as pure functions on arrays.

An entry is one position's key and value of one key head, at a *slot*; slots hold entries in any order, and each layer
and key head has its own set. A policy sees what attention tells of them and says which stay (:meth:`Policy.choose`,
when a prompt is done, layer by layer) and which go (:meth:`Policy.evict`, after each decoded token). What is stored,
and how, is the drivers' business (``barefoot.kv.cache`` in the engine).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput
from barefoot.core.technique import Technique

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

#: What a policy can ask attention for:
#: ``mass``: the attention probability of every query, summed over the query heads of a key head, (n_kv_heads, n);
#: ``votes``: that of the last ``window`` queries of a prompt, each query head by itself, (n_heads, n);
#: ``strikes``: how many of the last ``window`` queries gave less than an even share in all query heads of a key head,
#: (n_kv_heads, n).
Observation = Literal["nothing", "mass", "votes", "strikes"]


#: For policies that send entries away one by one while they decode.
SINGLY = {"sealed entries": "keys by channel are quantized many positions at a time, and can't go a few at a time"}


@dataclass(frozen=True)
class Seen:
    """A layer's entries when a prompt is done, those of earlier prompts included.

    Attributes
    ----------
    position : int32 (n_kv_heads, n), ascending along n.
    n_tokens : tokens of the sequence so far: the next one's position.
    observed : what the policy asked for, float32; None for nothing.
    layer : its number among those that the policy rules.
    """

    position: I32
    n_tokens: int
    observed: F32 | None
    layer: int = 0

    @property
    def n(self) -> int:
        return int(self.position.shape[-1])


class Policy(Technique):
    """The role. ``slots`` bounds what is stored, in closed form; everything else is about entries."""

    observes: ClassVar[Observation] = "nothing"
    window: int = 0  # queries that votes and strikes are of

    @property
    def n_parts(self) -> int:
        """In which strikes are counted."""
        return 1

    @abstractmethod
    def slots(self, context: int) -> int:
        """The most entries that a key head keeps, of ``context`` positions."""

    @abstractmethod
    def choose(self, seen: Seen) -> I32:
        """Slots that stay when a prompt is done, (n_kv_heads, n_kept), ascending in each row."""

    def begins_part(self, n: int) -> bool:
        """Whether strikes of the tokens behind this one are counted apart, now that there are ``n`` entries."""
        return False

    def n_observed(self, n: int) -> int:
        """How many of a prompt's last queries votes and strikes are of, where ``n`` entries are there then."""
        return self.window

    def sends_away(self, n: int) -> bool:
        """Whether, behind a decoded token, some of ``n`` entries go."""
        return False

    def evict(self, position: I32, observed: F32 | None, n_tokens: int, layer: int) -> I32:
        """Slots (n_kv_heads, m) of a layer that go where ``sends_away`` says so; m is the same for all layers.

        position : int32 (n_kv_heads, n) of all entries. observed : float32 (n_kv_heads, n), of each since it came.
        n_tokens : tokens of the sequence so far.
        """
        raise NotImplementedError


def top(scores: F32, n: int) -> I32:
    """The ``n`` slots of largest score along the last axis, ascending; of equal ones the later."""
    last = scores.shape[-1]
    order = np.argsort(-scores[..., ::-1], axis=-1, kind="stable")[..., :n]
    return np.sort(last - 1 - order, axis=-1).astype(np.int32)


def lowest(scores: F32 | I32) -> I32:
    """The slot (..., 1) of least score along the last axis."""
    return np.asarray(scores.argmin(axis=-1, keepdims=True), np.int32)


def protect_recent(scores: F32, position: I32, n_tokens: int, n: int) -> F32:
    """Scores (..., slots), infinite for the last ``n`` positions."""
    return np.where(position >= n_tokens - n, np.float32(np.inf), scores)


def at_least(technique: Technique, **knobs: tuple[int | float, int | float]) -> None:
    """Refuse knobs below their least value: name = (value, least).

    Raises
    ------
    InvalidInput : with the knob's name.
    """
    for knob, (got, least) in knobs.items():
        if got < least:
            raise InvalidInput(f"{technique.name}: {knob} must be {least} or more, got {got}")


ROLE = Policy
