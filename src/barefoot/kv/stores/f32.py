"""f32 — keys and values as they were computed: 4 × head_dim bytes a row. The reference for the other stores."""

from __future__ import annotations

from dataclasses import dataclass

from barefoot.kv.stores import KVStore


@dataclass(frozen=True)
class FloatStore(KVStore, name="f32", status="stable"):
    @property
    def row_format(self) -> str:
        return "f32"

    def row_parts(self, head_dim: int) -> tuple[tuple[str, int, int], ...]:
        return (("values", head_dim, 4),)
