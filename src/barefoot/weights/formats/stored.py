"""stored — the file's own blocks, carried exactly.

Nothing is re-quantized: a GGUF block type is kept byte for byte, a float type stays that type. Bytes are those of the
tensor in the file, without its padding.
"""

from __future__ import annotations

from dataclasses import dataclass

from barefoot.weights.formats import WeightFormat


@dataclass(frozen=True)
class Stored(WeightFormat, name="stored", papers=(), status="stable"):
    def layout(self, stored: str) -> str:
        return stored
