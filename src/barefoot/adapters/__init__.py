"""Adapters: what is trained beside a frozen base.

An adapter states its arrays before anything is allocated. One that stands beside matrices (:class:`Beside`) adds a
product of thin factors to each of them: y = x Wᵀ + scale × (x Aᵀ …) Bᵀ. The files of these are PEFT's
(:mod:`barefoot.adapters.files`). One that stands aside (:class:`Aside`) reads what the base computes; its files are
those of :mod:`barefoot.adapters.folders`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput
from barefoot.core.ledger import Term
from barefoot.core.model import ModelSpec, WeightSpec
from barefoot.core.technique import Technique

Targets = Literal["all", "attn", "ffn", "qv"]
ROLES: dict[Targets, tuple[str, ...]] = {
    "all": ("q", "k", "v", "o", "gate", "up", "down"),
    "attn": ("q", "k", "v", "o"),
    "ffn": ("gate", "up", "down"),
    "qv": ("q", "v"),
}

F32 = npt.NDArray[np.float32]
Original = Callable[[WeightSpec], F32]  # a matrix (rows, cols) as the model's file has it


@dataclass(frozen=True)
class Factor:
    """An array of an adapter, (rows, cols), named as the matrix that it belongs to and its own letter."""

    name: str
    rows: int
    cols: int
    trained: bool = True

    @property
    def n_elements(self) -> int:
        return self.rows * self.cols


class Adapter(Technique):
    """The role. What learns may become less while training goes on: ``step`` of ``steps`` are done."""

    @abstractmethod
    def factors(self, spec: ModelSpec, step: int = 0, steps: int = 1) -> tuple[Factor, ...]:
        """All arrays, in the model's order."""

    def n_trained(self, spec: ModelSpec, step: int = 0, steps: int = 1) -> int:
        """Numbers that training changes from then on."""
        return sum(factor.n_elements for factor in self.factors(spec, step, steps) if factor.trained)

    def load_terms(self, spec: ModelSpec) -> tuple[Term, ...]:
        """Bytes that making it takes at most at a time, beside its arrays."""
        return ()


class Beside(Adapter):
    """Adapters that stand beside matrices of the layers."""

    rank: int
    targets: Targets
    dropout: float = 0.0
    keeps_inputs: ClassVar[bool] = True  # whether a product's input stays for the backward pass on account of it

    @property
    @abstractmethod
    def scale(self) -> float:
        """Of the product that is added."""

    @abstractmethod
    def beside(self, weight: WeightSpec, rank: int, step: int = 0, steps: int = 1) -> tuple[Factor, ...]:
        """The factors of one matrix."""

    @abstractmethod
    def module(self, base: Any, weight: WeightSpec, rank: int, original: Original, random: Any) -> Any:
        """The PyTorch module in the place of ``base``, a ``PackedLinear``: an ``AdaptedLinear`` of the driver.
        ``random`` is a ``torch.Generator``."""

    def kept(self, rank: int, step: int = 0, steps: int = 1) -> int:
        """Numbers a token that a pass keeps for its backward on account of a matrix, beside its input."""
        return rank

    def ranks_of(self, spec: ModelSpec, original: Original | None = None) -> dict[str, int]:
        """Of each matrix's factors, by its name. Without the weights, those may be in another order among matrices of
        one role and shape, which take the same bytes."""
        return {weight.name: self.rank for weight in self.matrices(spec)}

    def matrices(self, spec: ModelSpec) -> tuple[WeightSpec, ...]:
        """Those that have one."""
        roles = ROLES[self.targets]
        return tuple(w for w in spec.weights if w.layer is not None and w.name.rpartition(".")[2] in roles)

    def factors(self, spec: ModelSpec, step: int = 0, steps: int = 1) -> tuple[Factor, ...]:
        ranks = self.ranks_of(spec)
        return tuple(f for w in self.matrices(spec) for f in self.beside(w, ranks[w.name], step, steps))

    def _check(self) -> None:
        """Refuse knobs that all of these have.

        Raises
        ------
        InvalidInput : with the knob's name.
        """
        if self.rank < 1:
            raise InvalidInput(f"{self.name}: rank must be 1 or more, got {self.rank}")
        if self.targets not in ROLES:
            raise InvalidInput(f"{self.name}: targets must be one of {', '.join(ROLES)}, got {self.targets!r}")


@dataclass(frozen=True)
class Passing:
    """What passes take besides the base, a decoded tile of it and the loss.

    Attributes
    ----------
    kept : by the layers, from the forward pass to the end of the backward one.
    head : where the logits are, and on.
    forward, backward : beside what is kept, at most at a time, where no logits are; ``head`` is there in the second.
    """

    kept: tuple[Term, ...]
    head: tuple[Term, ...]
    forward: tuple[Term, ...]
    backward: tuple[Term, ...]


class Aside(Adapter):
    """Adapters that learn outside of the base: it only passes forward, and nothing of it has a gradient."""

    @abstractmethod
    def passing(self, spec: ModelSpec, n_tokens: int, length: int, width: int) -> Passing:
        """What ``n_tokens`` take that pass at once, in documents of at most ``length``; ``width`` bytes a number in the
        base's products."""


ROLE = Adapter
