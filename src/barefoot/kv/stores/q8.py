"""q8 — keys and values as 8-bit integers, symmetric, in groups of 32 channels of a row.

    x = scale × q,  q in −127 … 127,  scale = max|x| / 127 rounded to f16

Bytes a row: head_dim + 2 × head_dim / 32. Per-token quantization of A Survey of Quantization Methods (arXiv:2103.13630,
section III.D) at sub-channel granularity.
"""

from __future__ import annotations

from dataclasses import dataclass

from barefoot.core.errors import Incompatible
from barefoot.kv.stores import KVStore

GROUP = 32


@dataclass(frozen=True)
class Int8Store(KVStore, name="q8", papers=(14,), status="stable"):
    @property
    def row_format(self) -> str:
        return "q8"

    def row_parts(self, head_dim: int) -> tuple[tuple[str, int, int], ...]:
        if head_dim % GROUP:
            raise Incompatible(f"KV store q8 keeps groups of {GROUP} channels; head_dim {head_dim} is no multiple")
        return (("codes", head_dim, 1), ("scales", head_dim // GROUP, 2))
