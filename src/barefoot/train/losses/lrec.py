"""lrec — imitate a teacher: the divergence of its next tokens from the model's, and a little cross-entropy.

INT2.1 (Chai et al. 2023, arXiv:2306.08162), low-rank error correction: adapters beside a base of few bits learn what
its full-precision parent says of each token, of all words at once, where a label names one. With A and A' the logits
of the model and of the teacher, q and p their softmax, x_i the label of token i::

    loss_i = Σ_v p_iv (log p_iv - log q_iv)  -  ce log q_i,x_i        KL(teacher ‖ model) + ce × CE
    dE_i = g_i Σ_v ((1 + ce) q_iv - p_iv - ce 1[v = x_i]) (1 - (A_iv / c)²) C_v

**Normalisation.** Both parts are means over tokens. The paper sums the divergence over the tokens of a sample and takes
200 times the mean cross-entropy: of 2,048 tokens, each token's cross-entropy counts 200 / 2,048 of its divergence,
which is ``ce``, whatever the length.

**Exact, in one pass.** A tile of logits of either model is computed from its hidden states and its matrix, added to
running sums whose maxima run along, and forgotten. The differences A' - A are summed by p, and the model's rows are
drawn once by q and once by p: four products, where cross-entropy by tiles has two. So of the teacher nothing is kept
but a hidden state for each token, 4 d bytes; its logits would be 4 V. Of SmolLM2 that is 2.3 KiB a token for 192; the
64 likeliest words with their logits and the mass of all others would be 516 bytes, and not exact.

Bytes, n of N tokens predicting, d' the teacher's width: three tiles 4 t w (the logits and their difference), stretches
of both matrices 4 w (d + d'), sums 24 n, gradients 4 d (N + n); saved 4 N d. 2,048 tokens, 49,152 words, d 576:
25.6 MiB where both models' logits in float32 are 768.

*Differs from the paper*: weights of the two parts are not learned; the teacher's logits are computed again where the
paper keeps them on disk. The head of the model is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from barefoot.core.errors import InvalidInput
from barefoot.core.ledger import Term
from barefoot.train.losses import Loss, LossShape, total
from barefoot.train.losses.cce import LABELS


@dataclass(frozen=True)
class LREC(Loss, name="lrec", papers=(52,)):
    ce: float = 200 / 2048
    tile_tokens: int = 1024
    tile_vocab: int = 1024

    imitates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.ce < float("inf"):
            raise InvalidInput(f"lrec: ce must be 0 or more, got {self.ce}")
        for knob, value in (("tile_tokens", self.tile_tokens), ("tile_vocab", self.tile_vocab)):
            if value < 1:
                raise InvalidInput(f"lrec: {knob} must be 1 or more, got {value}")

    def tile(self, n_predicted: int, vocab_size: int) -> tuple[int, int]:
        """Tokens and words of a tile."""
        return min(self.tile_tokens, n_predicted), min(self.tile_vocab, vocab_size)

    def forward_terms(self, shape: LossShape) -> tuple[Term, ...]:
        n, d, taught = shape.n_predicted, shape.d_model, shape.taught_width
        block, width = self.tile(n, shape.vocab_size)
        terms = [
            Term("tiles of both logits and their difference", 3 * block * width, 4),
            Term("of a block of tokens", block, 40),
            Term("maxima, sums, differences and labels' logits", 6 * n, 4),
            Term("gradient in sums", shape.n_tokens * d, 4),
            Term("drawn by the teacher", n * d, 4),
        ]
        if shape.softcap:
            terms.append(Term("slopes of the soft caps", 2 * block * width, 4))
        if shape.leaves_out:
            terms.append(Term("places and labels", 2 * 2 * n, 8))
            terms.append(Term("hidden states of a block", block * (d + taught), 4))
            terms.append(Term("losses of all tokens", shape.n_tokens, 4))
        own = 0 if shape.head_bytes == 4 else d
        in_turn = (
            (Term("stretches of both heads", width * (own + taught), 4),),
            (Term("labels' rows of the head", min(LABELS, n) * d, 4),),
        )
        return (*terms, *max(in_turn, key=total))

    def saved_terms(self, shape: LossShape) -> tuple[Term, ...]:
        return (Term("gradient of hidden states", shape.n_tokens * shape.d_model, 4),)

    def backward_terms(self, shape: LossShape) -> tuple[Term, ...]:
        return ()

    def per_token(
        self, hidden: Any, head: Any, labels: Any, *, bias: Any = None, softcap: float = 0.0, taught: Any = None
    ) -> Any:
        from barefoot.train.driver.cross_entropy import imitated

        return imitated(self, hidden, head, labels, bias, softcap, taught)
