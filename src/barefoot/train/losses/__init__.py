"""Losses: the cross-entropy of next tokens, from hidden states and the matrix of the logits.

Of token i, whose hidden state is E_i and whose label is x_i, with C (vocabulary, d_model)::

    A_i = C E_i (+ bias), c tanh(A_i / c) where the model has a soft cap c        loss_i = log Σ_v exp A_iv - A_i,x_i

Tokens without a label are left out before anything is computed. Their loss is 0, and they count in no mean. A loss that
imitates compares the logits with a teacher's as well, which come from hidden states and a matrix of its own.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from barefoot.core.ledger import Term
from barefoot.core.technique import Technique


@dataclass(frozen=True)
class LossShape:
    """
    Attributes
    ----------
    n_tokens, n_predicted : of a micro-batch, and those of them that have a label.
    hidden_bytes : of a number of the hidden states, 4 or 2.
    head_bytes : of a number of the matrix, 4 or 2; 0 where it is packed, and decoded to float32.
    trains_head, trains_bias : whether they get a gradient. A packed head gets none.
    softcap : whether logits are capped.
    taught_width : numbers of a teacher's hidden state, float32; its matrix is decoded. 0 where there is none.
    """

    n_tokens: int
    n_predicted: int
    d_model: int
    vocab_size: int
    hidden_bytes: int = 4
    head_bytes: int = 4
    trains_head: bool = False
    trains_bias: bool = False
    softcap: bool = False
    taught_width: int = 0

    @property
    def leaves_out(self) -> bool:
        """Whether some token predicts nothing."""
        return self.n_predicted < self.n_tokens


def total(terms: tuple[Term, ...]) -> int:
    """Bytes of all of them."""
    return sum(term.bytes for term in terms)


class Loss(Technique):
    """The role: how logits become a loss and its gradient, and what that takes on the host.

    Terms leave out what the caller holds: hidden states, labels, the matrix as it is stored.
    """

    imitates: ClassVar[bool] = False  # whether it takes a teacher

    @abstractmethod
    def forward_terms(self, shape: LossShape) -> tuple[Term, ...]:
        """Bytes that the forward pass allocates at most at a time, the ones that stay among them."""

    @abstractmethod
    def saved_terms(self, shape: LossShape) -> tuple[Term, ...]:
        """Bytes that stay for the backward pass."""

    @abstractmethod
    def backward_terms(self, shape: LossShape) -> tuple[Term, ...]:
        """Bytes that the backward pass allocates at most at a time, the gradients that it returns among them, beside
        what was saved."""

    @abstractmethod
    def per_token(
        self, hidden: Any, head: Any, labels: Any, *, bias: Any = None, softcap: float = 0.0, taught: Any = None
    ) -> Any:
        """Losses float32 (N,), 0 where there is no label. Arguments are ``train.driver.cross_entropy``'s, checked."""


ROLE = Loss
