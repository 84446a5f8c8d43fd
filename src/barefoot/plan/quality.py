"""Predicted quality: KL divergence by group and format, from the measurements in ``quality.toml``.

KL is taken as additive over the groups and the KV cache, and in the cache over the policy and the store. A number that
was not measured on the model at hand is taken from the measured model of the nearest size, and a format without a
measurement is interpolated: log KL is linear in bits a weight. What a policy costs depends on the share of the context
that it keeps: log KL is linear in the logarithm of the share, between shares that were measured; below the smallest one
nothing is known. All of that is marked as estimated. Plans are compared by tiers of the sum.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from barefoot.core.errors import InvalidInput
from barefoot.core.model import ModelSpec, WeightGroup
from barefoot.core.registry import techniques
from barefoot.core.spec import format_technique, parse_composition
from barefoot.core.technique import Technique
from barefoot.kv.policies import Policy
from barefoot.kv.ruled import Ruled
from barefoot.kv.stores import KVStore, Wrapper
from barefoot.ops import blocks
from barefoot.weights.formats import WeightFormat

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

QualityGroup = Literal["embed", "attn", "ffn", "head", "kv"]

# Nats a token: two models that differ by less are not told apart; the rest are named by what a reader notices.
TIERS: tuple[tuple[str, float], ...] = (
    ("lossless in practice", 0.01),
    ("very close", 0.03),
    ("close", 0.1),
    ("degraded", 0.3),
    ("poor", 1.0),
    ("broken", math.inf),
)

LEAST_KL = 1e-5  # the table's last digit

KEEP = "KEEP"  # in the spec of a policy, for how many entries it keeps


def tier(kl: float) -> str:
    """The name of the quality tier of a summed KL."""
    return next(name for name, limit in TIERS if kl <= limit)


@dataclass(frozen=True)
class Measurement:
    """KL by group and format (spec string), measured on one model whose matrices were stored as ``stored``.

    ``policies`` has, by spec with ``KEEP``, (positions, entries kept of them, nats): what a KV policy costs over 16
    bits. ``windows``: some layers of the model see a window only, where no policy rules.
    """

    model: str
    parameters: int
    stored: str
    kl: Mapping[QualityGroup, Mapping[str, float]]
    source: str
    provisional: bool = False
    int8_inputs: float = 0.0
    policies: Mapping[str, Sequence[tuple[int, int, float]]] = field(default_factory=dict)
    windows: bool = False


@dataclass(frozen=True)
class Loss:
    """A predicted KL, where it comes from, and whether it was estimated rather than measured on this model.

    ``partial``: some of the loss is not known, and not in ``kl``.
    """

    kl: float
    source: str
    estimated: bool
    partial: bool = False


def read_measurements(text: str) -> tuple[Measurement, ...]:
    """The measurements of a table in the shape of ``quality.toml``."""
    rows: list[dict[str, Any]] = tomllib.loads(text)["row"]
    return tuple(Measurement(**row) for row in rows)


@functools.cache
def measurements() -> tuple[Measurement, ...]:
    """The shipped measurements."""
    return read_measurements((Path(__file__).parent / "quality.toml").read_text(encoding="utf-8"))


def _technique(spec: str, family: str) -> Technique:
    return parse_composition(spec, techniques(family), family)[0]


@functools.cache
def candidate_formats(group: WeightGroup) -> tuple[WeightFormat, ...]:
    """The formats that the planner may choose for a group: the file's own, and those with a measurement."""
    specs = {spec for m in measurements() for spec in m.kl.get(_quality_group(group), {})}
    found = (_technique(spec, "weights.formats") for spec in ["stored", *sorted(specs)])
    return tuple(f for f in found if isinstance(f, WeightFormat))


@functools.cache
def candidate_stores() -> tuple[KVStore, ...]:
    """The KV stores that the planner may choose: those with a measurement."""
    specs = {spec for m in measurements() for spec in m.kl.get("kv", {})}
    found = (_technique(spec, "kv.stores") for spec in sorted(specs))
    return tuple(s for s in found if isinstance(s, KVStore))


def candidate_policies(context: int, max_tokens: int) -> tuple[Policy, ...]:
    """The policies that the planner may choose: each at the shares of ``context`` positions that were measured, rounded
    up to whole entries, with room for an answer of ``max_tokens``."""
    keeps = {
        (spec, -(-context * kept // n))
        for m in measurements()
        for spec, points in m.policies.items()
        for n, kept, _ in points
    }
    found = []
    for spec, keep in sorted(keeps):
        try:
            policy = _with_keep(spec, keep)
        except InvalidInput:  # of a short context, fewer entries than a knob allows
            continue
        found.append(dataclasses.replace(policy, room=max_tokens) if "room" in policy.knobs() else policy)  # type: ignore[type-var]
    return tuple(found)


def _with_keep(spec: str, keep: int) -> Policy:
    policy = _technique(spec.replace(KEEP, str(keep)), "kv.policies")
    assert isinstance(policy, Policy)
    return policy


def _quality_group(group: WeightGroup) -> QualityGroup:
    if group == "norm":
        raise ValueError("norms are never quantized")
    return group


def _nearest(spec: ModelSpec, group: QualityGroup, stored: str) -> tuple[Measurement, ...]:
    """Measurements of the group, best match first: same stored type before floats, then the nearest size."""
    usable = [m for m in measurements() if m.stored in (stored, "float") and group in m.kl]
    size = math.log(max(1, spec.n_parameters))
    return tuple(sorted(usable, key=lambda m: (m.stored != stored, abs(math.log(m.parameters) - size))))


def _exactly(measured: Measurement, spec: ModelSpec, stored: str) -> bool:
    """Whether the measurement was made on this model as it is stored here."""
    same = measured.parameters == spec.n_parameters and measured.stored == stored
    return same and not measured.provisional


def _describe(measured: Measurement, how: str = "") -> str:
    return f"{measured.source} ({measured.model}, stored {measured.stored}{how})"


def _stored_kind(stored: str) -> str:
    return "float" if stored in ("f32", "f16", "bf16") else stored


def weight_loss(spec: ModelSpec, group: WeightGroup, fmt: WeightFormat, stored: str) -> Loss:
    """The loss of keeping a group of matrices, stored as ``stored`` in the file, in ``fmt``.

    None for what keeps every bit: the stored layout itself, and any float at least as wide.
    """
    layout = fmt.layout(stored)
    if layout == stored or (layout == "f32") or (layout in ("f16", "bf16") and stored not in ("f32", "f16", "bf16")):
        return Loss(0.0, "keeps the stored values", False)
    if layout in ("f16", "bf16"):
        return Loss(0.0005, "estimated: rounding to 16 bits", True)
    kind, name = _stored_kind(stored), format_technique(fmt)
    candidates = _nearest(spec, _quality_group(group), kind)
    for measured in candidates:
        known = measured.kl[_quality_group(group)]
        if name in known:
            return Loss(known[name], _describe(measured), not _exactly(measured, spec, kind))
    if not candidates:
        return Loss(math.inf, "no measurement", True)
    table = candidates[0]
    points = {
        blocks.bits_per_weight(_layout(other, stored)): kl
        for other, kl in table.kl[_quality_group(group)].items()
        if kl > 0
    }
    kl = interpolate(points, blocks.bits_per_weight(layout))
    return Loss(kl, _describe(table, "; estimated from its bits a weight"), True)


def _layout(spec: str, stored: str) -> str:
    fmt = _technique(spec, "weights.formats")
    assert isinstance(fmt, WeightFormat)
    return fmt.layout(stored)


def kv_loss(spec: ModelSpec, kv: KVStore, context: int) -> Loss:
    """The loss of a KV cache of ``context`` positions against f16: of its store, and of what its policy sends away."""
    if not isinstance(kv, Ruled):
        return _store_loss(spec, kv)
    store = _store_loss(spec, kv.store)
    if kv.policy is None:
        return store
    policy = _policy_loss(spec, kv.policy, context)
    if policy is None:
        why = f"{store.source}; what {kv.policy} sends away is not measured, and not in the sum"
        return Loss(store.kl, why, True, partial=True)
    source = policy.source if store.kl == 0 else f"{policy.source}; {kv.store}: {store.source}"
    return Loss(policy.kl + store.kl, source, policy.estimated or store.estimated, store.partial)


def _kv_measurements(spec: ModelSpec) -> tuple[Measurement, ...]:
    """Measurements of caches, best match first: models with windows and without apart, then the nearest size."""
    size, windows = math.log(max(1, spec.n_parameters)), any(layer.window is not None for layer in spec.layers)
    usable = [m for m in measurements() if "kv" in m.kl]
    return tuple(sorted(usable, key=lambda m: (m.windows != windows, abs(math.log(m.parameters) - size))))


def _on_this(measured: Measurement, spec: ModelSpec) -> bool:
    return measured.parameters == spec.n_parameters and not measured.provisional


def _store_loss(spec: ModelSpec, store: KVStore) -> Loss:
    name, candidates = str(store), _kv_measurements(spec)
    for measured in candidates:
        if name in measured.kl["kv"]:
            kl = measured.kl["kv"][name]
            source = "the reference" if kl == 0 else f"{measured.source} ({measured.model})"
            return Loss(kl, source, kl > 0 and not _on_this(measured, spec))
    if isinstance(store, Wrapper):  # what it does to entries isn't a matter of bits
        inner = _store_loss(spec, store.inner)
        why = f"{inner.source}; what {format_technique(store)} loses is not measured, and not in the sum"
        return Loss(inner.kl, why, True, partial=True)
    if not candidates:
        return Loss(math.inf, "no measurement", True)
    table = candidates[0]
    lossy = [(_store(other), kl) for other, kl in table.kl["kv"].items() if kl > 0]
    alike = [(other, kl) for other, kl in lossy if other.name == store.name] or lossy
    width = 128  # bits a number for a usual head; stores keep their scales in groups of at most that
    kl = interpolate({other.bits_per_number(width): kl for other, kl in alike}, store.bits_per_number(width))
    return Loss(kl, f"{table.source} ({table.model}; estimated from its bits)", True)


def _policy_loss(spec: ModelSpec, policy: Policy, context: int) -> Loss | None:
    """What is lost with the entries that a policy sends away; None where nothing was measured that tells: another
    policy, other knobs, or a share of the context below the smallest one."""
    keep = n_kept(policy)
    if keep is None:
        return None
    if keep >= context:
        return Loss(0.0, f"{policy} keeps every entry", False)
    for measured in _kv_measurements(spec):
        for pattern, points in measured.policies.items():
            if _rule(_measured_policy(pattern)) != _rule(policy):
                continue
            kl = _at_share(points, keep / context)
            if kl is None:
                return None
            longest = max(n for n, _, _ in points)
            exactly = context <= longest and any(kept * context == keep * n for n, kept, _ in points)
            source = f"{measured.source} ({measured.model}, prompts of up to {longest:,}, of which such a share stayed)"
            return Loss(kl, source, not (exactly and _on_this(measured, spec)))
    return None


def n_kept(policy: Policy) -> int | None:
    """Entries of a key head that a policy keeps of a long prompt; None where it does not say so in one number."""
    keep = getattr(policy, "keep") if "keep" in policy.knobs() else None  # noqa: B009
    return keep if isinstance(keep, int) else None


def _rule(policy: Policy) -> tuple[str, dict[str, Any]]:
    """The policy without how many entries it keeps, and without ``room``, which decides nothing about what stays."""
    return policy.name, {name: getattr(policy, name) for name in policy.knobs() if name not in ("keep", "room")}


@functools.cache
def _measured_policy(pattern: str) -> Policy:
    """The policy of a spec with ``KEEP``, keeping very much."""
    return _with_keep(pattern, 1 << 30)


def _at_share(points: Sequence[tuple[int, int, float]], share: float) -> float | None:
    """KL at a share of the positions, of lengths that were measured the worst; above the largest share that of it."""
    worst: dict[float, float] = {}
    for n, kept, kl in points:  # equal shares are equal quotients
        worst[kept / n] = max(kl, worst.get(kept / n, LEAST_KL))
    if share < min(worst):
        return None
    if share in worst or share > max(worst):
        return worst[min(share, max(worst))]
    return interpolate({math.log(at): kl for at, kl in worst.items()}, math.log(share))


def int8_inputs(spec: ModelSpec) -> Measurement | None:
    """The nearest measurement of what int8 activations cost: the same in every plan, so no part of the sums."""
    found = [m for m in measurements() if m.int8_inputs]
    size = math.log(max(1, spec.n_parameters))
    return min(found, key=lambda m: abs(math.log(m.parameters) - size), default=None)


def _store(spec: str) -> KVStore:
    store = _technique(spec, "kv.stores")
    assert isinstance(store, KVStore)
    return store


def interpolate(points: Mapping[float, float], bits: float) -> float:
    """KL at ``bits`` (or another abscissa) from KL at others: log KL is linear between neighbours and beyond the ends.

    ``points`` holds positive KL; with a single point, each bit is worth a factor of 4.
    """
    if len(points) == 1:
        ((at, kl),) = points.items()
        return float(kl * 4.0 ** (at - bits))
    known = sorted(points)
    upper = next((i for i, b in enumerate(known) if b >= bits), len(known) - 1)
    low, high = known[max(0, upper - 1)], known[max(1, upper)]
    share = (bits - low) / (high - low)
    return math.exp((1 - share) * math.log(points[low]) + share * math.log(points[high]))
