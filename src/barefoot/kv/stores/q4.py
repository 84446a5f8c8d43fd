"""q4 — keys and values as 4-bit integers, asymmetric, in groups of 32 channels of a row.

    x = scale × q + minimum,  q in 0 … 15,  scale and minimum from the group's range, rounded to f16

Bytes a row: head_dim / 2 + 4 × head_dim / 32. Per-token asymmetric quantization of A Survey of Quantization Methods
(arXiv:2103.13630, sections III.B and III.D) at sub-channel granularity.
"""

from __future__ import annotations

from dataclasses import dataclass

from barefoot.core.errors import Incompatible
from barefoot.kv.stores import KVStore

GROUP = 32


@dataclass(frozen=True)
class Int4Store(KVStore, name="q4", papers=(14,), status="stable"):
    @property
    def row_format(self) -> str:
        return "q4"

    def row_parts(self, head_dim: int) -> tuple[tuple[str, int, int], ...]:
        if head_dim % GROUP:
            raise Incompatible(f"KV store q4 keeps groups of {GROUP} channels; head_dim {head_dim} is no multiple")
        return (("codes", head_dim // 2, 1), ("scales", head_dim // GROUP, 2), ("minimums", head_dim // GROUP, 2))
