"""What attention takes in training: the bytes of ``train.driver.attention``, by the kernels of ``barefoot.ops``.

FlashAttention and FlashAttention-2 (arXiv:2205.14135, arXiv:2307.08691; :mod:`barefoot.ops.flash`). A layer keeps its
queries, keys, values and outputs and one number for each query and head, whatever the length of the documents::

    (2 n_heads + 2 n_kv_heads) head_dim n b + 4 n_heads n         bytes, of numbers of b bytes

where attention that is written out keeps ``n_heads n² b`` and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from barefoot.core.ledger import Term
from barefoot.ops.scratch import flash_scratch_bytes

FLOAT_BYTES = 4


@dataclass(frozen=True)
class AttentionShape:
    """Heads of one layer, and documents of ``lengths`` tokens."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    lengths: Sequence[int]

    @property
    def n(self) -> int:
        return sum(self.lengths)

    def _rows(self, name: str, n_heads: int) -> Term:
        return Term(name, self.n * n_heads * self.head_dim, FLOAT_BYTES)

    def _scratch(self, backward: bool, n_threads: int | None) -> Term:
        shape = (self.n_heads, self.n_kv_heads, self.head_dim)
        n_bytes = flash_scratch_bytes(self.lengths, *shape, backward=backward, n_threads=n_threads)
        return Term("scratch of attention", n_bytes, 1)

    def saved_terms(self) -> tuple[Term, ...]:
        """What stays for the backward pass, queries, keys and values among it, which the caller has made."""
        return (
            self._rows("queries", self.n_heads),
            self._rows("keys", self.n_kv_heads),
            self._rows("values", self.n_kv_heads),
            *self.made_terms(),
        )

    def made_terms(self) -> tuple[Term, ...]:
        """What of that the forward pass makes."""
        return self._rows("attention", self.n_heads), Term("log of sums", self.n_heads * self.n, FLOAT_BYTES)

    def forward_terms(self, n_threads: int | None = None) -> tuple[Term, ...]:
        """What the forward pass allocates at a time. ``n_threads`` : None, as many as the kernels take now."""
        return *self.made_terms(), self._scratch(False, n_threads)

    def backward_terms(self, n_threads: int | None = None) -> tuple[Term, ...]:
        """What the backward pass allocates at a time, beside what was saved and the gradient of the outputs."""
        return (
            self._rows("gradients of queries", self.n_heads),
            self._rows("gradients of keys", self.n_kv_heads),
            self._rows("gradients of values", self.n_kv_heads),
            self._scratch(True, n_threads),
        )
