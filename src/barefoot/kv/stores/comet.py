"""comet — keys and values both quantized by channel, in groups of positions; the group that is not full yet as it came.

COMET: Towards Practical W4A4KV4 LLMs Serving (Liu et al. 2024, arXiv:2410.12168), of which this is the cache, KV4. Of
each channel of keys, rotated, and of values alike, ``group`` positions share a range:

    x = s_c q + z_c,  q in 0 … 2^bits - 1,  s_c = (maximum - minimum) / (2^bits - 1),  z_c = minimum

So nothing but the codes is of a position: s_c and z_c are factors of the queries for keys, and of what the codes of a
group sum up to for values, Σ_t p_t (s_c q_tc + z_c) = s_c Σ_t p_t q_tc + z_c Σ_t p_t (``barefoot.ops.kvblocks``, both).
A prompt is attended to in half precision and quantized afterwards, all but its last group; a group that has come whole
goes when the next entry comes. What is quantized stays as it is.

Bytes, of H key heads, d channels, S positions, G = ``group``: ⌊(S - 1) / G⌋ blocks (room for one always) of
2 H (4 d + G d b / 8), and 4 H G d; positions 4 H S where a policy sends some away. What is quantized takes b + 32 / G
bits a number: 4.25 by default, 3.76 times less than half precision.

*Differs from the paper*: its pages and kernels are those of a GPU; other widths than 4 bits are allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from barefoot.kv.stores import SealingStore
from barefoot.ops import kvblocks

if TYPE_CHECKING:
    from barefoot.kv.storage import F32, U8


@dataclass(frozen=True)
class Comet(SealingStore, name="comet", papers=(86,), provides=("sealed entries",)):
    bits: int = 4
    group: int = 128

    @property
    def residual(self) -> int:
        return self.group

    @property
    def n_values_sealed(self) -> int:
        return self.group

    @property
    def n_values_left(self) -> int:
        return 0

    @property
    def value_format(self) -> str:
        return f"c{self.bits}"

    def value_block_bytes(self, head_dim: int) -> int:
        return kvblocks.channel_block_bytes(self.bits, self.group, head_dim)

    def encode_values(self, values: F32) -> U8:
        return kvblocks.encode_channels(self.bits, values)

    def decode_values(self, blocks: U8, head_dim: int) -> F32:
        return kvblocks.decode_channels(self.bits, blocks, self.group, head_dim)
