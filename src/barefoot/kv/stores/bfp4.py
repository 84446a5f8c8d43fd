"""bfp4 — keys and values as block floating point: 32 channels of a row share an exponent, each has 4 bits.

Accurate Block Quantization in LLMs with Outliers (Trukhanov and Soloveychik 2024, arXiv:2403.20137), its BFP12-32:

    x = 2^e × q,  q in -7 … 7,  e = ⌊log2 of the largest magnitude⌋ - 2

No number but a power of two scales a block, so a product needs no multiplication behind the integers'. Bytes a row:
head_dim / 2 + ⌈head_dim / 32⌉. Layout: ``barefoot.ops.kvrows``.

With ``sort`` the channels of keys come in the order of their sizes, so that large ones share their blocks with large
ones (K-sort, :mod:`barefoot.engine.key_order`): 2 bytes more for each channel of a layer's key head, once.

*Differs from the paper*: values are stored like keys, and what meets them is not rounded to its BFP16.
"""

from __future__ import annotations

from dataclasses import dataclass

from barefoot.kv.stores import KVStore
from barefoot.ops.kvrows import GROUP


@dataclass(frozen=True)
class BlockFloatStore(KVStore, name="bfp4", papers=(41,)):
    sort: bool = False

    @property
    def row_format(self) -> str:
        return "bfp4"

    @property
    def sorts_keys(self) -> bool:
        return self.sort

    def row_parts(self, head_dim: int) -> tuple[tuple[str, int, int], ...]:
        return (("codes", head_dim // 2, 1), ("exponents", -(-head_dim // GROUP), 1))
