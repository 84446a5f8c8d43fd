"""think — old keys lose the channels that the last queries of a prompt ask least for.

ThinK: Thinner Key Cache by Query-Driven Pruning (Xu et al. 2024, arXiv:2407.21018, section 3). Key channels are very
unequal. Of each layer and key head, with Q the last ``window`` queries of a prompt and K the keys that stay behind it,
both rotated, channel c scores ‖Q_c‖ ‖K_c‖, the norm of what it adds to the scores Q Kᵀ; where query heads share keys,
‖Q_c‖² is the mean over them. All but the best

    T = d - ⌊ratio d⌋, up to the next multiple of 8,

go, once and for all, of all keys but the ``recent`` newest; values stay whole. Queries meet thin keys with the same
channels, and the scale stays that of d. The choice is made when the first keys become thin.

Over a store of rows, ``recent`` keys lie in f16 until they are thin, in rows of T channels. Over ``kivi`` or ``comet``
a block of keys by channel has T of them, and those that wait to be sealed are the newest ones; ``recent`` says nothing
there.

Bytes, of L layers with H key heads, S slots, R = min(``recent``, S), and rows r(·) of the store that it wraps: keys L H
(2 R d + (S - R) r(T)), values L H S r(d), positions 4 L H S; channels L H (2 T + 4 d), with the sums that choose them.

*Differs from the paper*: where the paper would pad rows of T numbers, further channels stay. An entry that a policy
takes out of the newest, or that is newest again after going back, leaves ``recent`` keys full only in form: thin ones
take the room, with zeros where channels have gone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.units import round_up
from barefoot.kv.stores import KVStore, Wrapper
from barefoot.kv.stores.f16 import HalfStore

if TYPE_CHECKING:
    from barefoot.kv.storage import Storage

WHOLE = 8  # channels: 16 bytes of f16, and rows of every format


@dataclass(frozen=True)
class Think(Wrapper, name="think", papers=(36,)):
    inner: KVStore = field(default_factory=HalfStore)
    ratio: float = 0.4
    window: int = 32
    recent: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise InvalidInput(f"think: ratio must be 0 or more and below 1, got {self.ratio}")
        for knob, got in (("window", self.window), ("recent", self.recent)):
            if got < 1:
                raise InvalidInput(f"think: {knob} must be 1 or more, got {got}")
        if not self.inner.rows and "sealed entries" not in self.inner.provides:
            raise Incompatible(f"think can't take channels from {self.inner}", cure="let it wrap rows, or kivi")

    def storage(self) -> type[Storage]:
        from barefoot.kv.thin import Thin, ThinSealed

        return Thin if self.inner.rows else ThinSealed

    def n_kept(self, head_dim: int) -> int:
        """Channels of a key that stay."""
        return min(head_dim, round_up(head_dim - math.floor(self.ratio * head_dim), WHOLE))

    def bits_per_number(self, head_dim: int) -> float:
        kept = self.n_kept(head_dim)
        if not self.inner.rows:  # as many bits a number of a key, whatever its width
            return self.inner.bits_per_number(head_dim) * (kept + head_dim) / (2 * head_dim)
        return 4 * (self.inner.row_bytes(kept) + self.inner.row_bytes(head_dim)) / head_dim
