"""What a teacher takes: one of its layers while it passes forward, and a hidden state for each token that is kept."""

from __future__ import annotations

from dataclasses import dataclass

from barefoot.core.ledger import Term
from barefoot.core.model import ModelSpec
from barefoot.engine.rows import PIECE_BYTES
from barefoot.ops import blocks


@dataclass(frozen=True)
class Lesson:
    """
    Attributes
    ----------
    spec : the teacher's.
    step_tokens, held_out : tokens of a step, and of what is evaluated on.
    """

    spec: ModelSpec
    step_tokens: int
    held_out: int

    def states(self) -> Term:
        """What stays of what has passed, float32."""
        kept = self.step_tokens + self.held_out
        return Term("a teacher's hidden states, of a step and of what is held out", kept, 4 * self.spec.d_model)

    def passing(self, n_tokens: int) -> tuple[Term, ...]:
        """A pass in micro-batches of so many, besides those and a decoded tile: a layer as it is stored, and what it
        makes of a micro-batch, most of it where the feed-forward narrows again."""
        spec, layers, largest = self.spec, [0] * self.spec.n_layers, 0
        for w in spec.weights:
            if w.layer is not None:
                size = w.rows * blocks.row_bytes(w.format, w.cols)
                layers[w.layer] += size + sum(part.n_bytes for part in w.parts)
                largest = max(largest, size)
        queries, keys = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        made = 6 * spec.d_model + queries + 2 * keys + 4 * spec.d_ff
        turns = sum(rope.dim for rope in {layer.rope for layer in spec.layers})
        return (
            Term("a teacher's layer", 1, max(layers)),
            Term("rows that are read", 1, min(PIECE_BYTES, largest)),
            Term("turns of positions", max(self.step_tokens, self.held_out) * turns, 4),
            Term("what the layer makes", n_tokens * made, 4),
        )

    def head_rows(self, n_rows: int) -> Term:
        """So many rows of its head as the file has them, which are decoded then."""
        head = next(w for w in self.spec.weights if w.name == ("embed" if self.spec.tied else "head"))
        return Term("rows of the teacher's head", min(n_rows, head.rows), blocks.row_bytes(head.format, head.cols))
