"""Plans, refusals and ledgers as text for people and as plain data for programs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from barefoot.cli import console
from barefoot.core.ledger import KINDS, Footprint, Kind
from barefoot.core.units import format_bytes

if TYPE_CHECKING:
    from barefoot.core.ledger import Place
    from barefoot.core.model import ModelSpec
    from barefoot.plan.compositions import Priced
    from barefoot.plan.job import RunJob
    from barefoot.plan.result import PhaseTime, Plan

_SHOWN_CANDIDATES = 5


def model_line(name: str, spec: ModelSpec) -> str:
    """One line of what the model is."""
    title = spec.name if spec.name == name else f"{name} ({spec.name})"
    return (
        f"{title}: {spec.arch}, {spec.n_parameters / 1e6:,.1f} M parameters, {spec.n_layers} layers, "
        f"{spec.vocab_size:,} words, context up to {spec.context_length:,}"
    )


def job_line(job: RunJob) -> str:
    """What is to be done, in a few words."""
    text = f"context {job.context:,}, answers of up to {job.max_tokens:,} tokens"
    return text if job.batch == 1 else f"{text}, {job.batch} at once"


def bytes_table(footprint: Footprint, place: Place) -> str:
    """Bytes by kind and phase in one place, with the sum of each phase; the peak phase is marked.

    The process itself is there in every phase; only those of the job are shown.
    """
    job = Footprint(tuple(e for e in footprint if e.kind != "reserved"))
    phases = job.select(place=place).phases
    peak_phase, _ = footprint.peak(place)
    by_phase = {phase: footprint.by_kind(place, phase) for phase in phases}
    rows = [
        [kind, *(format_bytes(by_phase[phase].get(kind, 0)) for phase in phases)]
        for kind in KINDS
        if any(by_phase[phase].get(kind) for phase in phases)
    ]
    rows.append(["all", *(format_bytes(sum(by_phase[phase].values())) for phase in phases)])
    header = [f"bytes, {place}", *(f"{phase} ◄ peak" if phase == peak_phase else phase for phase in phases)]
    return console.table(rows, header=header, right=range(1, len(header)))


def _speed(time: PhaseTime) -> str:
    return f"{time.tokens_per_second:,.1f} tokens/s, bound by {time.bound}"


def _streamed(plan: Plan) -> str:
    parts = [f"{plan.config.n_streamed_layers} layers"] if plan.config.n_streamed_layers else []
    parts += ["head"] if plan.config.stream_head else []
    return " + ".join(parts)


def _by_source(sources: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for group, source in sources.items():
        groups.setdefault(source, []).append(group)
    return groups


def choices_table(plan: Plan) -> str:
    """What was chosen, and what it is predicted to give."""
    from barefoot.plan.job import format_weights

    config, quality = plan.config, plan.quality
    kind = "estimated" if quality.estimated else "measured on this model"
    rows = [
        ("weights", format_weights(config.weights)),
        ("kv", str(config.kv)),
        ("prefill", f"{config.chunk} tokens at once"),
        ("batch", f"{plan.job.batch} sequences decoded together" if plan.job.batch > 1 else ""),
        ("from disk", _streamed(plan) or "nothing"),
        ("on host", f"{plan.n_host_layers} layers" if plan.n_host_layers else ""),
        ("compute", f"{config.n_threads} threads, {config.activations} activations" if plan.place == "host" else ""),
        ("quality", f"{quality.tier}: KL {quality.kl:.4f} nats a token from the stored weights, {kind}"),
        *(("", f"{', '.join(groups)}: {source}") for source, groups in _by_source(quality.sources).items()),
        ("speed", f"decode {_speed(plan.decode)}; prefill {_speed(plan.prefill)}"),
    ]
    rows += [("note", note) for note in plan.notes]
    return console.table([row for row in rows if row[1]])


def budget_line(plan: Plan) -> str:
    """Peak, budget and what is left, in the place that computes."""
    needed, allowed = plan.needed[plan.place], plan.budget[plan.place]
    return f"peak {format_bytes(needed)} of {format_bytes(allowed)}; {format_bytes(allowed - needed)} left"


def candidates_table(plans: Sequence[Plan], *, everything: bool = False) -> str:
    """One line for each plan considered, the recommended one first."""
    from barefoot.plan.job import format_weights

    shown = plans if everything else plans[:_SHOWN_CANDIDATES]
    rows = [
        [
            "→" if plan is plans[0] else " ",
            plan.quality.tier,
            f"{plan.quality.kl:.4f}",
            format_bytes(plan.needed[plan.place]),
            f"{plan.decode.tokens_per_second:,.1f}",
            str(plan.config.kv),
            _streamed(plan) or "-",
            format_weights(plan.config.weights),
        ]
        for plan in shown
    ]
    header = ("", "quality", "KL", "peak", "tokens/s", "kv", "from disk", "weights")
    text = console.table(rows, header=header, right=(2, 3, 4))
    hidden = len(plans) - len(shown)
    return text + (f"\n  and {hidden} more: --all" if hidden else "")


def caches_table(caches: Sequence[Priced]) -> str:
    """What the cache could be, the chosen one first."""
    rows = [
        [
            " " if i else "→",
            cache.kv,
            format_bytes(cache.bytes),
            format_bytes(cache.passing_bytes),
            f"{cache.n_kept:,}",
            f"{cache.kl:.4f}",
            cache.tier,
            "estimated" if cache.estimated else "measured",
        ]
        for i, cache in enumerate(caches)
    ]
    header = ("", "kv", "bytes", "beside them", "positions", "KL", "of the cache alone", "")
    return console.table(rows, header=header, right=(2, 3, 4, 5))


def ledger_table(
    predicted: Mapping[Kind, int], measured: Mapping[Kind, int], predicted_peak: int, measured_peak: int | None
) -> str:
    """Predicted beside measured, by kind, then the peaks and what the ledger can't account for."""

    def cell(n: int | None) -> str:
        return "not measured" if n is None else format_bytes(n)

    rows = [[kind, format_bytes(predicted[kind]), cell(measured.get(kind))] for kind in KINDS if kind in predicted]
    rows.append(["peak", format_bytes(predicted_peak), cell(measured_peak)])
    if measured_peak is not None:
        difference = measured_peak - predicted_peak
        rows.append(["unaccounted", "", f"{format_bytes(difference)} ({difference / predicted_peak:+.1%})"])
    return console.table(rows, header=("ledger", "predicted", "measured"), right=(1, 2))


def error_json(error: Exception) -> dict[str, Any]:
    """What ``--json`` holds when a command failed; a refusal adds what the planner knows."""
    from barefoot.core.errors import BarefootError, OverBudget

    if not isinstance(error, BarefootError):
        return {"error": {"name": type(error).__name__, "message": str(error), "cure": None, "exit_code": 1}}
    data: dict[str, Any] = {
        "error": {"name": error.name, "message": str(error), "cure": error.cure, "exit_code": error.exit_code}
    }
    if isinstance(error, OverBudget):
        data |= {"fits": False, "needed_bytes": error.needed, "available_bytes": error.available}
        data |= {"candidates": [], "recommended": None, "command": None, "kv": []}
        if error.refusal is not None:
            data |= error.refusal.to_json()  # type: ignore[attr-defined]
    return data


def print_section(text: str, stream: TextIO | None = None) -> None:
    """A block of text with an empty line before it."""
    print(f"\n{text}", file=stream or sys.stdout)
