"""compositions — what a job's KV cache can be: a store that keeps every entry, or a policy over a store.

Stores are those with a measured price; policies those, too, each at the shares of the context that were measured. What
the model or the techniques themselves refuse is left out, and so is what another composition beats in everything. On
accelerators only stores of rows are known: what a prompt takes while it passes layer by layer is the engine's.

Entries that a policy sends away can't be recalled, and text that goes on shows little of that; so a plan sends entries
away only where nothing of the same quality tier that keeps them all fits, and takes rows where they fit (:func:`rank`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from barefoot.core.errors import Incompatible
from barefoot.core.model import ModelSpec
from barefoot.engine.config import EngineConfig
from barefoot.engine.footprint import by_layer_footprint
from barefoot.kv import ruled
from barefoot.kv.ruled import Ruled
from barefoot.kv.stores import KVStore
from barefoot.plan import quality
from barefoot.plan.job import RunJob

MANY = 512  # tokens of a prompt that pass at once, at most


def drops(kv: KVStore) -> bool:
    """Whether entries are sent away."""
    return isinstance(kv, Ruled) and kv.policy is not None


RANKS = (0, 1, 2)


def rank(kv: KVStore) -> int:
    """In which order compositions of a quality tier are taken: rows of all entries; entries that are no rows, of which
    none can be taken back; and a policy that sends entries away."""
    return 2 if drops(kv) else 0 if ruled.of(kv) is None else 1


def what_goes(kv: KVStore, context: int) -> str:
    """What a policy costs beside its KL, in one line."""
    kept = f"at most {kv.most_seen(context):,} of {context:,} positions stay in a layer that sees all of them"
    return f"{kv}: {kept}; facts that go can't be recalled, and KL on running text does not show them"


def possible(spec: ModelSpec, job: RunJob, *, by_layer: bool) -> tuple[KVStore, ...]:
    """Every composition with a price that the model can have, stores first; f16 is among them.

    ``by_layer``: whether prompts can pass layer by layer, as policies and some stores need.
    """
    stores = [s for s in quality.candidate_stores() if _holds(spec, job, s, by_layer=by_layer)]
    return (*stores, *(_ruled(spec, job, stores) if by_layer else ()))


def _ruled(spec: ModelSpec, job: RunJob, stores: Sequence[KVStore]) -> Iterator[KVStore]:
    for policy in quality.candidate_policies(job.context, job.max_tokens):
        for store in stores:
            try:
                kv = Ruled(policy, store)
            except Incompatible:
                continue
            known = not quality.kv_loss(spec, kv, job.context).partial
            if known and _holds(spec, job, kv, by_layer=True):
                yield kv


def _holds(spec: ModelSpec, job: RunJob, kv: KVStore, *, by_layer: bool) -> bool:
    rule = ruled.of(kv)
    if rule is not None and not (by_layer and rule.ruled(spec)):
        return False
    try:
        kv.terms(spec, job.context, 1)
    except Incompatible:
        return False
    return True


def passing_bytes(spec: ModelSpec, config: EngineConfig) -> int:
    """What the cache needs beside its entries while prompts pass and tokens are decoded; 0 for rows."""
    return by_layer_footprint(spec, config).bytes


@dataclass(frozen=True)
class Priced:
    """A composition that a job's cache could be, for all its sequences.

    ``bytes`` are kept while tokens are decoded; ``passing_bytes`` are needed beside them, above all by prompts;
    ``n_kept`` of a sequence's positions stay where a layer sees all of them. ``kl``, in nats a token, is the cache's
    alone.
    """

    kv: str
    bytes: int
    passing_bytes: int
    n_kept: int
    kl: float
    tier: str
    estimated: bool
    source: str

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__}


def priced(spec: ModelSpec, job: RunJob, config: EngineConfig, *, by_layer: bool) -> tuple[Priced, ...]:
    """What could be the cache of a job that runs under ``config``, its own first, then by rising KL."""
    others = worthwhile(spec, job, possible(spec, job, by_layer=by_layer))
    return tuple(_priced(spec, replace(config, kv=kv), by_layer=by_layer) for kv in dict.fromkeys((config.kv, *others)))


def _priced(spec: ModelSpec, config: EngineConfig, *, by_layer: bool) -> Priced:
    kv, context = config.kv, config.context
    loss = quality.kv_loss(spec, kv, context)
    return Priced(
        kv=str(kv),
        bytes=entry_bytes(spec, config),
        passing_bytes=passing_bytes(spec, config) if by_layer else 0,
        n_kept=kv.most_seen(context),
        kl=loss.kl,
        tier="not measured" if loss.partial else quality.tier(loss.kl),
        estimated=loss.estimated,
        source=loss.source,
    )


def entry_bytes(spec: ModelSpec, config: EngineConfig) -> int:
    """Keys and values of all layers and sequences."""
    layers = range(spec.n_layers)
    return config.n_sequences * sum(config.kv.layer_bytes(spec, i, config.context, config.chunk) for i in layers)


def worthwhile(spec: ModelSpec, job: RunJob, compositions: Sequence[KVStore]) -> tuple[KVStore, ...]:
    """The compositions without those that another one beats or equals in KL, bytes, entries and bits, by rising KL;
    none beats one of a lower :func:`rank`."""
    costs = {kv: _costs(spec, job, kv) for kv in compositions}
    found: list[KVStore] = []
    for kv in sorted(compositions, key=costs.__getitem__):
        rivals = (costs[other] for other in found if rank(other) <= rank(kv))
        if not any(all(map(operator.le, rival, costs[kv])) for rival in rivals):
            found.append(kv)
    return tuple(found)


def _costs(spec: ModelSpec, job: RunJob, kv: KVStore) -> tuple[float, ...]:
    """KL; bytes with prompts that pass one token at a time, or many; what attention reads to decode a token."""
    configs = [EngineConfig(job.context, kv, {}, chunk=n, n_sequences=job.batch) for n in (1, min(MANY, job.n_prompt))]
    return (
        quality.kv_loss(spec, kv, job.context).kl,
        *(entry_bytes(spec, config) + passing_bytes(spec, config) for config in configs),
        kv.most_seen(job.context),
        kv.bits_per_number(spec.head_dim),
    )
