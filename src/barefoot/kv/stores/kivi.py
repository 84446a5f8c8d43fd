"""kivi — keys quantized by channel, values by token, and the last positions as they came.

KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (Liu et al. 2024, arXiv:2402.02750, algorithm 1). A few
channels of keys are large at every position, so each channel has a range of its own for ``group`` positions; values
have no such channels, and each position has one for every 32 channels (``barefoot.ops.kvblocks``, both). A prompt is
attended to in half precision and quantized afterwards, all but its end; behind it keys wait until there are
``residual`` of them, and go all at once when the next one comes. What is quantized stays as it is.

Bytes, of H key heads, d channels, S positions, G = ``group``, R = ``residual``: keys ⌊(S - 1) / R⌋ R / G blocks of
H (4 d + G d b / 8), and 2 H R d; values ⌊(S - 1 - R) / 32⌋ blocks of H (128 ⌈d / 32⌉ + 4 d b), and 2 H (R + 32) d,
always with room for one block of each; positions 4 H S where a policy sends some away. What is quantized takes 3 bits a
number at 2 bits and groups of 32.

*Differs from the paper*: values leave the last positions 32 at a time, so that between R + 1 and R + 32 of them are
there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from barefoot.core.errors import InvalidInput
from barefoot.kv.stores import SealingStore
from barefoot.ops import kvblocks

if TYPE_CHECKING:
    from barefoot.kv.storage import F32, U8


@dataclass(frozen=True)
class Kivi(SealingStore, name="kivi", papers=(33,), provides=("sealed entries",)):
    bits: int = 2
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual <= 0 or self.residual % self.group:
            raise InvalidInput(f"kivi: residual must be a multiple of group, got {self.residual}")

    @property
    def n_values_sealed(self) -> int:
        return kvblocks.RUN

    @property
    def n_values_left(self) -> int:
        return self.residual

    @property
    def value_format(self) -> str:
        return f"t{self.bits}"

    def value_block_bytes(self, head_dim: int) -> int:
        return kvblocks.value_block_bytes(self.bits, head_dim)

    def encode_values(self, values: F32) -> U8:
        return kvblocks.encode_values(self.bits, values)

    def decode_values(self, blocks: U8, head_dim: int) -> F32:
        return kvblocks.decode_values(self.bits, blocks, head_dim)
