"""plain — all logits at once, and PyTorch's own cross-entropy.

What every trainer does, and what the others are measured against. With n tokens that predict and V words, logits are
float32 (n, V), as are their logarithmic softmax, which stays for the backward pass, and there two gradients.

Bytes: 8 n V in the forward pass, 4 n V saved, 8 n V more in the backward pass, 12 n V at a time. 1.2 GB for 2,048
tokens and 49,152 words. A soft cap saves 4 n V more, hidden states of 16 bits make logits of 16 bits first. A packed
head is decoded as a whole, and stays so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from barefoot.core.ledger import Term
from barefoot.train.losses import Loss, LossShape, total


@dataclass(frozen=True)
class Plain(Loss, name="plain", status="stable"):
    def forward_terms(self, shape: LossShape) -> tuple[Term, ...]:
        n, v, d = shape.n_predicted, shape.vocab_size, shape.d_model
        terms = [*self.saved_terms(shape), Term("logits", n * v, 4), Term("losses", shape.n_tokens, 4)]
        if shape.leaves_out and not shape.trains_head:
            terms.append(Term("hidden states that predict", n * d, shape.hidden_bytes))
        return tuple(terms)

    def saved_terms(self, shape: LossShape) -> tuple[Term, ...]:
        n, v, d = shape.n_predicted, shape.vocab_size, shape.d_model
        terms = [Term("logarithms of probabilities", n * v, 4)]
        if shape.softcap:
            terms.append(Term("hyperbolic tangents", n * v, 4))
        if shape.head_bytes != shape.hidden_bytes:
            terms.append(Term("head as hidden states are", v * d, shape.hidden_bytes))
        if shape.leaves_out:
            terms += (Term("places and labels", 2 * n, 8), Term("losses of those that predict", n, 4))
        if shape.leaves_out and shape.trains_head:
            terms.append(Term("hidden states that predict", n * d, shape.hidden_bytes))
        return tuple(terms)

    def backward_terms(self, shape: LossShape) -> tuple[Term, ...]:
        n, v, d = shape.n_predicted, shape.vocab_size, shape.d_model
        of_logits = (Term("gradients of logits and logarithms", 2 * n * v, 4),)
        returned = [Term("gradient of hidden states", shape.n_tokens * d, shape.hidden_bytes)]
        if shape.leaves_out:
            returned.append(Term("gradient of those that predict", n * d, shape.hidden_bytes))
        if shape.trains_head:
            returned.append(Term("gradient of the head", v * d, shape.head_bytes))
        if shape.trains_bias:
            returned.append(Term("gradient of the bias", v, 4))
        # By then the gradient of the logits lies where their logarithms were.
        return max(of_logits, tuple(returned), key=total)

    def per_token(
        self, hidden: Any, head: Any, labels: Any, *, bias: Any = None, softcap: float = 0.0, taught: Any = None
    ) -> Any:
        from barefoot.train.driver.cross_entropy import plain

        return plain(hidden, head, labels, bias, softcap)
