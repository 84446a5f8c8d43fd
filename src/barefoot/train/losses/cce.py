"""cce — logits a tile at a time, never all of them.

Cut Your Losses in Large-Vocabulary Language Models (Wijmans et al. 2024, arXiv:2411.09009). A tile of logits, of a
block of tokens and a stretch of the vocabulary, is computed in a scratch that all tiles share, added to running sums,
and forgotten. With p = softmax A, G_iv = (p_iv - 1[v = x_i]) (1 - (A_iv / c)²), g_i the gradient by the loss of token
i::

    loss_i = log Σ_v exp A_iv - A_i,x_i        dE_i = g_i Σ_v G_iv C_v        dC_v = Σ_i g_i G_iv E_i

**A head that is trained** takes the paper's two passes: the forward one keeps the logarithm of the sum for each token,
the backward one computes the tiles again, four products in all where plain cross-entropy has three.

- ``filter``: tiles in which every |p - 1[v = x]| is smaller are not multiplied (section 4.3; the paper has 2**-12, what
  bfloat16 can't tell from 0 in a sum of ones). Of 0, nothing is left out.
- ``sort``: then likely words lie together, by their mean logits, so that more tiles are left out. Only numbers of rows
  move.
- ``whole_head``: the head's gradient is not filtered, for what trains from the start: there p is 1 / V everywhere, and
  no rare word would learn (the paper's ``full_c``).
- ``sums``: gradients of hidden states of 16 bits are summed in float32, or (``kahan``) in their own type, with what
  rounding took from them. Those of the head are complete when a tile is, so float32 takes no more than a tile.

**A head that is frozen**, as in fine-tuning, takes one pass: dE_i + C_x is softmax(E Cᵀ) C, which is attention with
the head as its keys and its values, and a maximum that runs along gives both at once, with no filter and nothing
computed again: two products, as in plain cross-entropy. Its gradient is ready when the loss is, and the backward pass
hands it out, once.

Bytes, n of N tokens predicting: a tile 4 t w (and as much for a soft cap), a decoded or converted stretch of the head
w d, sums 12 n; saved 4 n, or N d for a frozen head; gradients N d and V d, which every method has; 24 V while sorting.
2,048 tokens, 49,152 words, d 576: 8.8 MiB with the gradient of 4.5 where plain cross-entropy has 1,152.

*Differs from the paper*: the one pass for frozen heads; mean logits are those of the mean hidden state, one product
with a vector, where the paper adds up logits; the vocabulary is the outer loop, so that packed heads are decoded once a
pass; tiles are larger, for a CPU. On a GPU see ``barefoot.ops.triton.cross_entropy``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from barefoot.core.errors import InvalidInput
from barefoot.core.ledger import Term
from barefoot.train.losses import Loss, LossShape, total

Sums = Literal["float32", "kahan"]

LABELS = 128  # tokens whose labels' rows of the head are there at a time


@dataclass(frozen=True)
class CutCrossEntropy(Loss, name="cce", papers=(65,), status="stable"):
    filter: float = 0.0
    sort: bool = True
    whole_head: bool = True
    sums: Sums = "float32"
    tile_tokens: int = 1024
    tile_vocab: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.filter < 1:
            raise InvalidInput(f"cce: filter must lie between 0 and 1, got {self.filter}")
        if self.sums not in ("float32", "kahan"):
            raise InvalidInput(f"cce: sums must be float32 or kahan, got {self.sums!r}")
        for knob, value in (("tile_tokens", self.tile_tokens), ("tile_vocab", self.tile_vocab)):
            if value < 1:
                raise InvalidInput(f"cce: {knob} must be 1 or more, got {value}")

    def tile(self, n_predicted: int, vocab_size: int) -> tuple[int, int]:
        """Tokens and words of a tile."""
        return min(self.tile_tokens, n_predicted), min(self.tile_vocab, vocab_size)

    def in_one_pass(self, shape: LossShape) -> bool:
        return not (shape.trains_head or shape.trains_bias)

    def forward_terms(self, shape: LossShape) -> tuple[Term, ...]:
        n, d, narrow = shape.n_predicted, shape.d_model, shape.hidden_bytes != 4
        terms = (*self._scratch(shape), Term("maxima, sums and labels' logits", 3 * n, 4), *self._all_losses(shape))
        if not self.in_one_pass(shape):
            return (*terms, *self._stretch(shape))
        rows = min(LABELS, n) * d
        in_turn = (
            self._stretch(shape),
            (Term("labels' rows of the head", rows, shape.head_bytes or 4), Term("labels' rows", narrow * rows, 6)),
            self._rounded(shape) if narrow else (),
        )
        summed = Term("gradient in sums", (n if narrow else shape.n_tokens) * d, 4)
        return (*terms, *(self._products(shape) if narrow else ()), summed, *max(in_turn, key=total))

    def saved_terms(self, shape: LossShape) -> tuple[Term, ...]:
        if self.in_one_pass(shape):
            return (Term("gradient of hidden states", shape.n_tokens * shape.d_model, shape.hidden_bytes),)
        return (Term("logarithms of sums", shape.n_predicted, 4),)

    def backward_terms(self, shape: LossShape) -> tuple[Term, ...]:
        if self.in_one_pass(shape):
            return ()
        n, v, d, size = shape.n_predicted, shape.vocab_size, shape.d_model, shape.hidden_bytes
        block, width = self.tile(n, v)
        kahan, sorts = self.sums == "kahan", bool(self.filter and self.sort)
        wide = size != 4 and not kahan  # sums are in another type than hidden states
        terms = list(self._scratch(shape))
        terms.append(Term("gradient in sums", n * d, 4) if wide else self._gradient(shape))
        if kahan:
            terms.append(Term("lost by rounding", n * d, size))
        if wide or kahan:
            terms += self._products(shape)
        if shape.trains_bias:
            terms.append(Term("gradient of the bias", v, 4))
        if sorts:
            terms += (Term("order of the vocabulary", v, 8), Term("labels in order", n, 8))
        if shape.trains_head:
            terms.append(Term("gradient of the head", v * d, shape.head_bytes))
        if shape.trains_head and (sorts or shape.head_bytes != 4):
            terms.append(Term("gradient of a stretch of the head", width * d, 4))
        rounded = width * d if shape.trains_head and shape.head_bytes != 4 else 0
        in_loop = max(
            Term("a block's sums before", block * d if kahan else 0, size),
            Term("a stretch's gradient as the head is", rounded, shape.head_bytes),
            key=lambda term: term.bytes,
        )
        in_turn = (*self._stretch(shape, gathered=sorts), in_loop), self._rounded(shape) if wide else ()
        return (*terms, *max(in_turn, key=total))

    def _scratch(self, shape: LossShape) -> tuple[Term, ...]:
        """What all tiles share."""
        n, d = shape.n_predicted, shape.d_model
        block, width = self.tile(n, shape.vocab_size)
        terms = [Term("tile of logits", block * width, 4), Term("of a block of tokens", block, 40)]
        if shape.softcap:
            terms.append(Term("slopes of the soft cap", block * width, 4))
        if shape.hidden_bytes != 4:
            terms.append(Term("tile as hidden states are", block * width, shape.hidden_bytes))
        if shape.leaves_out:
            terms.append(Term("places and labels", 2 * n, 8))
            terms.append(Term("hidden states of a block", block * d, shape.hidden_bytes))
        return tuple(terms)

    def _all_losses(self, shape: LossShape) -> tuple[Term, ...]:
        return (Term("losses of all tokens", shape.n_tokens, 4),) if shape.leaves_out else ()

    def _products(self, shape: LossShape) -> tuple[Term, ...]:
        """Scratch of products that don't go straight into their sums."""
        block, width = self.tile(shape.n_predicted, shape.vocab_size)
        return (Term("products", max(block, width) * shape.d_model, shape.hidden_bytes),)

    def _stretch(self, shape: LossShape, gathered: bool = False) -> tuple[Term, ...]:
        """Of the head, where it isn't the matrix itself."""
        _, width = self.tile(shape.n_predicted, shape.vocab_size)
        n, terms = width * shape.d_model, []
        if gathered or not shape.head_bytes:
            terms.append(Term("stretch of the head", n, shape.head_bytes or 4))
        if (shape.head_bytes or 4) != shape.hidden_bytes:
            terms.append(Term("stretch as hidden states are", n, shape.hidden_bytes))
        return tuple(terms)

    def _rounded(self, shape: LossShape) -> tuple[Term, ...]:
        """The gradient of hidden states that are narrower than sums."""
        block, _ = self.tile(shape.n_predicted, shape.vocab_size)
        return (self._gradient(shape), Term("rounded block", block * shape.d_model, shape.hidden_bytes))

    def _gradient(self, shape: LossShape) -> Term:
        return Term("gradient of hidden states", shape.n_tokens * shape.d_model, shape.hidden_bytes)

    def per_token(
        self, hidden: Any, head: Any, labels: Any, *, bias: Any = None, softcap: float = 0.0, taught: Any = None
    ) -> Any:
        from barefoot.train.driver.cross_entropy import cut

        return cut(self, hidden, head, labels, bias, softcap)
