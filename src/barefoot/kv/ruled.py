"""A store whose entries a policy chooses: ``h2o(keep=512) > q8``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from barefoot.core.errors import Incompatible
from barefoot.core.ledger import Term
from barefoot.core.model import ModelSpec
from barefoot.core.spec import format_composition, parse_composition
from barefoot.core.technique import Technique, check_composition
from barefoot.kv.layout import Layout
from barefoot.kv.policies import Policy
from barefoot.kv.storage import Heads
from barefoot.kv.stores import KVStore, Wrapper
from barefoot.kv.stores.f16 import HalfStore

MOST_POSITIONS = (1 << 31) - 1


@dataclass(frozen=True)
class Ruled(KVStore):
    """``policy`` rules the layers that see all positions; those with a window keep what it reaches, in rows.

    Without a policy every entry stays: what stores need whose entries are no rows.

    Raises
    ------
    Incompatible : the policy, the store and what it wraps don't go together.
    """

    policy: Policy | None
    store: KVStore

    def __post_init__(self) -> None:
        if isinstance(self.store, Ruled):
            raise Incompatible(f"{self.policy} can't rule {self.store}, which is ruled already")
        check_composition(self._techniques, frozenset() if self.policy is None else frozenset({"a policy"}))
        if self.policy is None:
            return
        storage = self.store.storage()
        # Where a policy chooses once, what merges is still staged.
        rewrites = self.policy.merges_tokens or self.policy.biased or storage.lets_go
        if self.policy.merges and rewrites and not storage.merges:
            raise Incompatible(f"{self.policy} lets entries join others, which {self.store} can't rewrite")
        if self.policy.n_anchored and not storage.anchors:
            raise Incompatible(f"{self.policy} turns queries to its first entries, which {self.store} has among others")
        if self.policy.n_anchored and self.store.sorts_keys:
            raise Incompatible(f"{self.policy} turns queries in pairs of channels, which {self.store} puts elsewhere")
        if self.policy.layers != "uniform" and not storage.resizes:
            raise Incompatible(f"{self.policy} gives layers unequal room, which {self.store} can't share")

    @property
    def _techniques(self) -> tuple[Technique, ...]:
        return self.store.chain if self.policy is None else (self.policy, *self.store.chain)

    def __str__(self) -> str:
        return format_composition(self._techniques)

    @property
    def row_format(self) -> str:
        return self.store.row_format

    @property
    def sorts_keys(self) -> bool:
        return self.store.sorts_keys

    def row_parts(self, head_dim: int) -> tuple[tuple[str, int, int], ...]:
        return self.store.row_parts(head_dim)

    def bits_per_number(self, head_dim: int) -> float:
        return self.store.bits_per_number(head_dim)

    def slots(self, spec: ModelSpec, layer: int, context: int, chunk: int) -> int:
        if spec.layers[layer].window is not None:
            return super().slots(spec, layer, context, chunk)
        return context if self.policy is None else self.policy.slots(context)

    def longest(self, spec: ModelSpec) -> int:
        """Any, where distances are those between entries."""
        endless = self.policy is not None and self.policy.n_anchored > 0
        return MOST_POSITIONS if endless else spec.context_length

    def most_seen(self, n: int) -> int:
        return n if self.policy is None or not self.store.forgets else min(n, self.policy.slots(n))

    def layer_bytes(self, spec: ModelSpec, layer: int, context: int, chunk: int) -> int:
        ruled = self.ruled(spec)
        if layer not in ruled:
            return super().layer_bytes(spec, layer, context, chunk)
        return sum(term.bytes for term in self.layout(spec, context, chunk).terms()) // len(ruled)

    def layout(self, spec: ModelSpec, context: int, chunk: int, activations: str = "float32") -> Layout:
        """The cache of the layers that the policy rules."""
        heads = Heads(spec.n_heads, spec.n_kv_heads, spec.head_dim, spec.attn_scale, spec.attn_softcap)
        return Layout(heads, len(self.ruled(spec)), context, self.policy, self.store, chunk, activations)

    @staticmethod
    def ruled(spec: ModelSpec) -> tuple[int, ...]:
        """The layers that see all positions."""
        return tuple(i for i, layer in enumerate(spec.layers) if layer.window is None)

    def terms(self, spec: ModelSpec, context: int, chunk: int) -> tuple[Term, ...]:
        windows = [i for i in range(spec.n_layers) if spec.layers[i].window is not None]
        slots = sum(self.slots(spec, i, context, chunk) for i in windows)
        rows = 2 * slots * spec.n_kv_heads
        parts = self.store.row_parts(spec.head_dim) if windows else ()
        in_windows = (Term(f"kv {name} of windows", rows * count, size) for name, count, size in parts)
        return (*self.layout(spec, context, chunk).terms(), *in_windows)


def of(kv: KVStore) -> Ruled | None:
    """How ``kv`` is kept where a layer sees all positions; None where that is in rows, one for each position."""
    if isinstance(kv, Ruled):
        return kv
    return None if kv.rows else Ruled(None, kv)


def parse(text: str, known: Mapping[str, type[Technique]]) -> KVStore:
    """The KV store of a spec string: ``policy > wrapper > … > store``, of which the store, or all else, can be left
    out; f16 is what is kept then.

    Raises
    ------
    InvalidInput : unreadable text, unknown names or knobs.
    Incompatible : what does not go together.
    """
    *outer, store = parse_composition(text, known, "kv")
    if isinstance(store, Policy):
        outer, store = [*outer, store], HalfStore()
    while isinstance(store, KVStore) and outer and isinstance(wrapper := outer[-1], Wrapper):
        store = replace(wrapper, inner=store)
        outer.pop()
    if not isinstance(store, KVStore) or not all(isinstance(t, Policy) for t in outer):
        raise Incompatible(
            f"{text!r}: policies come first, one store last", cure='for example "h2o(keep=512) > think > q8"'
        )
    if len(outer) > 1:
        raise Incompatible(f"{text!r}: one policy chooses the entries, got {len(outer)}")
    if outer:
        policy = outer[0]
        assert isinstance(policy, Policy)
        return Ruled(policy, store)
    of(store)
    return store
