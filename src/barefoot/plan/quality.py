"""Predicted quality: KL divergence by group and format, from the measurements in ``quality.toml``.

KL is taken as additive over the groups and the KV store. A number that was not measured on the model at hand is taken
from the measured model of the nearest size, and a format without a measurement is interpolated: log KL is linear in
bits a weight. Both are marked as estimated. Plans are compared by tiers of the sum.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from barefoot.core.model import ModelSpec, WeightGroup
from barefoot.core.registry import techniques
from barefoot.core.spec import format_technique, parse_composition
from barefoot.core.technique import Technique
from barefoot.kv.ruled import Ruled
from barefoot.kv.stores import KVStore
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
    ("poor", math.inf),
)


def tier(kl: float) -> str:
    """The name of the quality tier of a summed KL."""
    return next(name for name, limit in TIERS if kl <= limit)


@dataclass(frozen=True)
class Measurement:
    """KL by group and format (spec string), measured on one model whose matrices were stored as ``stored``."""

    model: str
    parameters: int
    stored: str
    kl: Mapping[QualityGroup, Mapping[str, float]]
    source: str
    provisional: bool = False
    int8_inputs: float = 0.0


@dataclass(frozen=True)
class Loss:
    """A predicted KL, where it comes from, and whether it was estimated rather than measured on this model."""

    kl: float
    source: str
    estimated: bool


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


def kv_loss(spec: ModelSpec, store: KVStore) -> Loss:
    """The loss of a KV store against f16, without that of entries that a policy sends away (``unknown``)."""
    if unknown(store):
        assert isinstance(store, Ruled)
        loss = kv_loss(spec, store.store)
        return Loss(loss.kl, f"{loss.source}; what {store.policy} sends away is not measured, and not in the sum", True)
    name, candidates = str(store), _nearest(spec, "kv", "float")
    for measured in candidates:
        if name in measured.kl["kv"]:
            kl = measured.kl["kv"][name]
            exact = kl == 0 or _exactly(measured, spec, "float")
            return Loss(kl, "the reference" if kl == 0 else _describe(measured), not exact)
    if not candidates:
        return Loss(math.inf, "no measurement", True)
    width = 128  # bits a number for a usual head; stores keep their scales in groups of at most that
    points = {_store(other).bits_per_number(width): kl for other, kl in candidates[0].kl["kv"].items() if kl > 0}
    kl = interpolate(points, store.bits_per_number(width))
    return Loss(kl, _describe(candidates[0], "; estimated from its bits"), True)


def unknown(store: KVStore) -> bool:
    """Whether entries go that nothing has been measured without."""
    return isinstance(store, Ruled) and store.policy is not None


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
    """KL at ``bits`` from KL at other bits: log KL is linear between neighbours and beyond the ends.

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
