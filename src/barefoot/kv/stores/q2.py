"""q2 — keys and values as 2-bit integers, asymmetric, in groups of 32 channels of a row, the last one perhaps shorter.

    x = scale × q + minimum,  q in 0 … 3,  scale and minimum from the group's range, rounded to f16

Bytes a row: head_dim / 4 + 4 × ⌈head_dim / 32⌉. Codes: ``barefoot.ops.kvrows``. Per-token
asymmetric quantization of A Survey of Quantization Methods (arXiv:2103.13630, sections III.B and III.D) at sub-channel
granularity.
"""

from __future__ import annotations

from dataclasses import dataclass

from barefoot.kv.stores import KVStore, whole_rows
from barefoot.ops.kvrows import GROUP


@dataclass(frozen=True)
class Int2Store(KVStore, name="q2", papers=(14,)):
    @property
    def row_format(self) -> str:
        return "q2"

    def row_parts(self, head_dim: int) -> tuple[tuple[str, int, int], ...]:
        whole_rows(self, self.row_format, head_dim)
        return (
            ("codes", head_dim // 4, 1),
            ("scales", -(-head_dim // GROUP), 2),
            ("minimums", -(-head_dim // GROUP), 2),
        )
