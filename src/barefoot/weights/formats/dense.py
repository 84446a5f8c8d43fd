"""dense — plain floating point, one number a weight.

Bytes: rows × cols × (4 for f32, 2 for f16 and bf16). f32 holds every stored type to its last bit; f16 and bf16 round
to nearest even.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from barefoot.core.errors import unknown_name
from barefoot.weights.formats import WeightFormat

DType = Literal["f32", "f16", "bf16"]


@dataclass(frozen=True)
class Dense(WeightFormat, name="dense", papers=(), status="stable"):
    dtype: DType = "f16"

    def __post_init__(self) -> None:
        if self.dtype not in get_args(DType):
            raise unknown_name("dtype of dense", self.dtype, get_args(DType))

    def layout(self, stored: str) -> str:
        return self.dtype
