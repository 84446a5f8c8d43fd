"""kivi — keys quantized by channel, values by token, and the last positions as they came.

KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (Liu et al. 2024, arXiv:2402.02750, algorithm 1). A few
channels of keys are large at every position, so each channel has a range of its own for ``group`` positions; values
have no such channels, and each position has one for every 32 channels (``barefoot.ops.kvblocks``, both). A prompt is
attended to in half precision and quantized afterwards, all but its end; behind it keys wait until there are
``residual`` of them, and then go all at once. What is quantized stays as it is.

Bytes, of H key heads, d channels, S positions, G = ``group``, R = ``residual``: keys ⌊S / R⌋ R / G blocks (at least
one) of H (4 d + G d b / 8), and 2 H R d; values ⌈S / 32⌉ blocks of H (128 ⌈d / 32⌉ + 4 d b), and 2 H (R + 32) d;
positions 4 H S. What is quantized takes 3 bits a number at 2 bits and groups of 32.

*Differs from the paper*: values leave the last positions 32 at a time, so that between R and R + 31 of them are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from barefoot.core.errors import InvalidInput
from barefoot.kv.stores import KVStore
from barefoot.ops import kvblocks

if TYPE_CHECKING:
    from barefoot.kv.storage import Storage


@dataclass(frozen=True)
class Kivi(KVStore, name="kivi", papers=(33,), provides=("sealed entries",)):
    rows: ClassVar[bool] = False

    bits: int = 2
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4):
            raise InvalidInput(f"kivi: bits must be 2, 3 or 4, got {self.bits}")
        if self.group <= 0 or self.group % kvblocks.RUN:
            raise InvalidInput(f"kivi: group must be a multiple of {kvblocks.RUN}, got {self.group}")
        if self.residual <= 0 or self.residual % self.group:
            raise InvalidInput(f"kivi: residual must be a multiple of group, got {self.residual}")

    def storage(self) -> type[Storage]:
        from barefoot.kv.sealed import Sealed

        return Sealed

    @property
    def row_format(self) -> str:
        """Of layers with a window, which keep no more than that, and of what is not quantized yet."""
        return "f16"

    def row_parts(self, head_dim: int) -> tuple[tuple[str, int, int], ...]:
        return (("values", head_dim, 2),)

    def bits_per_number(self, head_dim: int) -> float:
        keys = self.block_bytes(head_dim) / self.group
        return 4 * (keys + self.value_block_bytes(head_dim) / kvblocks.RUN) / head_dim

    def block_bytes(self, head_dim: int) -> int:
        """Keys of ``group`` positions of one head."""
        return kvblocks.block_bytes(self.bits, self.group, head_dim)

    def value_block_bytes(self, head_dim: int) -> int:
        """Values of 32 positions of one head."""
        return kvblocks.value_block_bytes(self.bits, head_dim)
