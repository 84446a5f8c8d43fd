"""blocks — a block layout by its own name, such as ``int3_g64_sym`` or ``q4_k``.

For whoever chooses among layouts one by one, as ``barefoot compare`` does and :mod:`barefoot.engine.allocation`; the
other techniques of this folder name the same layouts by their knobs. Layouts, and the bytes of each, are documented in
:mod:`barefoot.ops.blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass

from barefoot.ops.blocks import lookup
from barefoot.weights.formats import WeightFormat


@dataclass(frozen=True)
class Blocks(WeightFormat, name="blocks", papers=(), status="stable"):
    id: str = "q8_0"

    def __post_init__(self) -> None:
        lookup(self.id)

    def layout(self, stored: str) -> str:
        return self.id
