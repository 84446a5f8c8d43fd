"""mikv — what a policy sends away stays, in few bits: no token is left behind.

No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision Quantization (Yang et al. 2024,
arXiv:2402.18096, sections 3 and 4). An evictor loses for good what it takes for unimportant. Here its choice means
demotion: the entries that it keeps stay in the store that ``mikv`` wraps, and those that it sends away, behind a prompt
or while decoding, become codes of ``bits`` bits by token (:mod:`barefoot.ops.kvrows`, in groups of 32 channels). All of
them are one softmax, so the policy's scores are shares of all that was ever there. Demotion is one-way: the precise
entry is gone, so that nothing ever asks for the scores of one in codes, and none are kept.

A few channels of queries and keys are large. With the largest of a prompt's queries and keys in channel c, rotated,

    m_c = √(max |q_c| / max |k_c|),

keys become codes as m_c k_c, and queries meet them as q_c / m_c (``balance``). The first prompt says m, of all queries
that share the keys; without one it is 1. Values have no such channels.

The policy is whichever is named before: ``h2o > mikv`` is the paper's, ``snapkv > mikv(bits=3) > q8`` keeps what SnapKV
chooses as q8 and the rest in 3 bits.

Bytes, of L layers with H key heads, d channels, S positions of which the policy keeps n at most and leaves n' at least
when some go: n slots of the wrapped store, as without ``mikv``; L H (S - n') (2 r(d) + 4) with rows of codes and a
position for each; 4 L H d for m.

*Differs from the paper*: groups of 32 channels, where its are of a head or half of one; entries that stay important are
rows of any store, without a balancer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.kv.stores import KVStore, Wrapper
from barefoot.kv.stores.f16 import HalfStore
from barefoot.kv.stores.q2 import Int2Store
from barefoot.kv.stores.q3 import Int3Store
from barefoot.kv.stores.q4 import Int4Store

if TYPE_CHECKING:
    from barefoot.kv.storage import Storage

CODES: dict[int, KVStore] = {2: Int2Store(), 3: Int3Store(), 4: Int4Store()}


@dataclass(frozen=True)
class MiKV(Wrapper, name="mikv", papers=(23,), needs=("a policy",)):
    forgets: ClassVar[bool] = False

    inner: KVStore = field(default_factory=HalfStore)
    bits: int = 2
    balance: bool = True

    def __post_init__(self) -> None:
        if self.bits not in CODES:
            raise InvalidInput(f"mikv: bits must be 2, 3 or 4, got {self.bits}")
        if not self.inner.rows:
            raise Incompatible(f"mikv can't demote entries of {self.inner}", cure="let it wrap a store of rows")

    def storage(self) -> type[Storage]:
        from barefoot.kv.demoting import Demoting

        return Demoting

    @property
    def codes(self) -> KVStore:
        return CODES[self.bits]

    def bits_per_number(self, head_dim: int) -> float:
        return self.codes.bits_per_number(head_dim)
