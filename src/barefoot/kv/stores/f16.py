"""f16 — keys and values in half precision: 2 × head_dim bytes a row."""

from __future__ import annotations

from dataclasses import dataclass

from barefoot.kv.stores import KVStore


@dataclass(frozen=True)
class HalfStore(KVStore, name="f16", status="stable"):
    @property
    def row_format(self) -> str:
        return "f16"

    def row_parts(self, head_dim: int) -> tuple[tuple[str, int, int], ...]:
        return (("values", head_dim, 2),)
