"""KV policies: which entries of a cache stay, as pure functions on arrays.

An entry is one position's key and value of one key head, at a *slot*; slots hold entries in any order, and each layer
and key head has its own set. A policy sees what attention tells of them and says which stay (:meth:`Policy.choose`,
when a prompt is done, layer by layer) and which go (:meth:`Policy.evict`, after each decoded token); one that merges
says how those that go live on in others (:meth:`Policy.merge`). What is stored, and how, is the drivers' business
(``barefoot.kv.cache`` in the engine).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.core.technique import Technique
from barefoot.kv import budgets

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

#: What a policy can ask attention for:
#: ``mass``: the attention probability of every query, summed over the query heads of a key head, (n_kv_heads, n);
#: ``sums``: the same of a prompt's queries alone, which isn't kept;
#: ``votes``: that of the last ``window`` queries of a prompt, each query head by itself, (n_heads, n);
#: ``strikes``: how many of the last ``window`` queries gave less than an even share in all query heads of a key head,
#: (n_kv_heads, n).
Observation = Literal["nothing", "mass", "sums", "votes", "strikes"]


#: For policies that send entries away one by one while they decode.
SINGLY = {"sealed entries": "keys by channel are quantized many positions at a time, and can't go a few at a time"}


@dataclass(frozen=True)
class Seen:
    """A layer's entries, those of earlier prompts included: ascending by position when a prompt is done, else in any
    order.

    Attributes
    ----------
    position : int32 (n_kv_heads, n).
    n_tokens : tokens of the sequence so far: the next one's position.
    observed : what the policy asked for, float32; None for nothing.
    layer : its number among those that the policy rules.
    n_prompt : tokens that there were when the last prompt was done.
    bias : float32 (n_kv_heads, n), what is added to the entries' scores; None where none has any.
    carried : float32 (n_carried,), of the layer's last merge; zeros before.
    keys : of a key head, its entries' keys as they are stored, rotated, float32 (n, head_dim), not to be written.
    """

    position: I32
    n_tokens: int
    observed: F32 | None
    layer: int = 0
    n_prompt: int = 0
    bias: F32 | None = None
    carried: F32 | None = None
    keys: Callable[[int], F32] | None = None

    @property
    def n(self) -> int:
        return int(self.position.shape[-1])


@dataclass(frozen=True)
class Merge:
    """How entries that go live on: one that stays becomes the weighted sum of its group.

    Attributes
    ----------
    into : int32 (n_kv_heads, n), which entry each one joins: itself where it stays, -1 where it is lost.
    weight : float32 (n_kv_heads, n), of its key and value in the sum.
    value_factor : float32 (n_kv_heads, n), of a group's value, where entries stay; None for 1.
    bias : float32 (n_kv_heads, n), of those that stay; None for a policy that isn't ``biased``.
    carried : float32 (n_carried,), what the layer's next choice is given.
    """

    into: I32
    weight: F32
    value_factor: F32 | None = None
    bias: F32 | None = None
    carried: F32 | None = None


class Policy(Technique):
    """The role. ``slots`` bounds what is stored, in closed form; everything else is about entries."""

    observes: ClassVar[Observation] = "nothing"
    n_carried: ClassVar[int] = 0
    evicts_rows: ClassVar[bool] = False  # whether ``evict`` needs nothing of a layer but each row's positions and mass
    keep: int = 0  # entries of a key head, where that is a number
    window: int = 0  # queries that votes and strikes are of
    layers: budgets.Layers = "uniform"

    @property
    def least_keep(self) -> int:
        """The least budget of a layer."""
        return 2

    @property
    def n_left(self) -> int:
        """The fewest entries of a key head that are left when some go."""
        return self.keep

    @property
    def n_parts(self) -> int:
        """In which strikes are counted."""
        return 1

    @property
    def n_anchored(self) -> int:
        """So many of the first positions, which always stay, are as far from a query as entries are between them, not
        tokens."""
        return 0

    @property
    def merges(self) -> bool:
        """Whether entries live on in others that go when a prompt is done."""
        return False

    @property
    def merges_tokens(self) -> bool:
        """Whether those do that go behind a decoded token."""
        return False

    @property
    def biased(self) -> bool:
        """Whether entries have a bias."""
        return False

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

    def sends_away(self, n: int, n_tokens: int) -> bool:
        """Whether, behind a decoded token, some of ``n`` entries go."""
        return False

    def evict(self, seen: Seen) -> I32:
        """Slots (n_kv_heads, m) of a layer that go where ``sends_away`` says so; observed is of each since it came."""
        raise NotImplementedError

    def merge(self, seen: Seen, stay: I32) -> Merge:
        """How those that are not in ``stay``, (n_kv_heads, n_kept), live on in those that are."""
        raise NotImplementedError

    def with_keep(self, keep: int) -> Policy:
        """The same for a layer with a budget of its own."""
        return replace(self, keep=keep)  # type: ignore[type-var]


def by_layer(policy: Policy, weights: Sequence[float], n_layers: int, context: int) -> list[Policy]:
    """The policies of the first layers of ``n_layers``, whose weights these are: they share the budget of all."""
    parts = budgets.shares(n_layers * policy.keep, weights, policy.least_keep, max(policy.least_keep, context))
    return [policy.with_keep(part) for part in parts]


def top(scores: F32, n: int) -> I32:
    """The ``n`` slots of largest score along the last axis, ascending; of equal ones the later."""
    last = scores.shape[-1]
    order = np.argsort(-scores[..., ::-1], axis=-1, kind="stable")[..., :n]
    return np.sort(last - 1 - order, axis=-1).astype(np.int32)


def lowest(scores: F32 | I32) -> I32:
    """The slot (..., 1) of least score along the last axis."""
    return np.asarray(scores.argmin(axis=-1, keepdims=True), np.int32)


def lowest_before(scores: F32, position: I32, n_tokens: int, n: int) -> I32:
    """The slot (rows, 1) of least score in each row, of those that are not among the last ``n`` positions."""
    found = np.empty(len(scores), np.int32)
    ops.lowest_before(scores, position, n_tokens - n, found)
    return found[:, None]


def protect_recent(scores: F32, position: I32, n_tokens: int, n: int) -> F32:
    """Scores (..., slots), infinite for the last ``n`` positions."""
    return np.where(position >= n_tokens - n, np.float32(np.inf), scores)


def stands_for(into: I32, bias: F32 | None) -> F32:
    """Biases (n_kv_heads, n) of entries that others have joined: the logarithm of how many tokens each stands for, of
    which ``bias`` says the same before."""
    before = np.ones(into.shape) if bias is None else np.exp(bias.astype(np.float64))
    counts = [
        np.bincount(own[own >= 0], weights=n[own >= 0], minlength=len(own)) for own, n in zip(into, before, strict=True)
    ]
    return np.log(np.maximum(counts, 1)).astype(np.float32)


def every(seen: Seen) -> I32:
    """All slots, (n_kv_heads, n)."""
    return np.broadcast_to(np.arange(seen.n, dtype=np.int32), seen.position.shape)


def at_least(technique: Technique, **knobs: tuple[int | float, int | float]) -> None:
    """Refuse knobs below their least value: name = (value, least).

    Raises
    ------
    InvalidInput : with the knob's name.
    """
    for knob, (got, least) in knobs.items():
        if got < least:
            raise InvalidInput(f"{technique.name}: {knob} must be {least} or more, got {got}")


def one_of(technique: Technique, knob: str, got: str, known: Sequence[str]) -> None:
    """Refuse a word that a knob doesn't have.

    Raises
    ------
    InvalidInput : with those that it has.
    """
    if got not in known:
        raise InvalidInput(f"{technique.name}: {knob} must be {', '.join(known[:-1])} or {known[-1]}, got {got!r}")


ROLE = Policy
