"""The plan: what was chosen, its bytes, its time, its quality, and where each number comes from."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from barefoot.core.errors import InvalidInput
from barefoot.core.ledger import Entry, Footprint, Phase, Place, Term
from barefoot.core.model import PartSpec
from barefoot.engine.config import Activations, AdapterParts, EngineConfig
from barefoot.plan.commands import command
from barefoot.plan.job import RunJob, Stated, format_weights, parse_kv, parse_weights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Bound = Literal["memory", "compute", "disk", "link", "host memory", "host compute", "overhead"]


@dataclass(frozen=True)
class PhaseTime:
    """Predicted time of one phase, at the roofline: a machine does not do better, and rarely quite as well.

    ``bound`` names what most of the time is spent on.
    """

    seconds: float
    n_tokens: int
    bound: Bound

    @property
    def tokens_per_second(self) -> float:
        return self.n_tokens / self.seconds if self.seconds else float("inf")


@dataclass(frozen=True)
class Quality:
    """Predicted loss against the stored weights with an f16 KV store, in nats of KL divergence a token.

    ``tier`` is the class that plans are compared by; ``sources`` says where each group's number comes from, and
    ``estimated`` whether any of them was not measured on this model.
    """

    kl: float
    tier: str
    estimated: bool
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """A job that fits.

    Attributes
    ----------
    config : what the engine obeys.
    footprint : every byte, the runtime's own (kind ``reserved``) included.
    budget : bytes allowed in each place.
    prefill, decode : predicted time of the longest prompt, and of the answer after it.
    n_host_layers : layers that stay in host memory beside an accelerator.
    notes : what a reader should know: stated choices, margins, defaults that were not measured.
    """

    model: str
    device: str
    job: RunJob
    config: EngineConfig
    footprint: Footprint
    budget: Mapping[Place, int]
    prefill: PhaseTime
    decode: PhaseTime
    quality: Quality
    n_host_layers: int = 0
    notes: tuple[str, ...] = ()

    @property
    def needed(self) -> dict[Place, int]:
        """Peak bytes in each place that has a budget."""
        return {place: self.footprint.peak(place)[1] for place in self.budget}

    @property
    def place(self) -> Place:
        """Where the model computes."""
        return "accelerator" if "accelerator" in self.budget else "host"

    def peaks(self) -> dict[Phase, int]:
        """Bytes alive in each phase, in the place that computes."""
        return {p: self.footprint.select(place=self.place, phase=p).bytes for p in self.footprint.phases}

    @property
    def command(self) -> str:
        """The command that runs exactly this plan."""
        config = self.config
        stated = Stated(
            weights=config.weights,
            kv=config.kv,
            chunk=config.chunk,
            streamed_layers=self.n_host_layers or config.n_streamed_layers,
            stream_head=config.stream_head,
            n_threads=config.n_threads,
            activations=config.activations,
            layouts=config.layouts,
            n_stacked=config.n_stacked,
        )
        return command(self.model, self.device, self.job, self.budget[self.place], stated, exact=True)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data; :func:`plan_from_json` reads it back."""
        config = self.config
        return {
            "model": self.model,
            "device": self.device,
            "job": _job_json(self.job),
            "config": {
                "context": config.context,
                "kv": str(config.kv),
                "weights": format_weights(config.weights),
                "chunk": config.chunk,
                "activations": config.activations,
                "n_streamed_layers": config.n_streamed_layers,
                "stream_head": config.stream_head,
                "n_threads": config.n_threads,
                "layouts": dict(config.layouts),
                **({} if config.n_stacked is None else {"n_stacked": config.n_stacked}),
            },
            "n_host_layers": self.n_host_layers,
            "budget_bytes": dict(self.budget),
            "needed_bytes": self.needed,
            "peak_bytes": self.peaks(),
            "prefill": _time_json(self.prefill),
            "decode": _time_json(self.decode),
            "quality": {
                "kl": self.quality.kl,
                "tier": self.quality.tier,
                "estimated": self.quality.estimated,
                "sources": dict(self.quality.sources),
            },
            "notes": list(self.notes),
            "terms": self.footprint.to_json(),
            "command": self.command,
        }

    def to_toml(self) -> str:
        """The plan as TOML text; :func:`plan_from_toml` reads it back."""
        import tomli_w

        text: str = tomli_w.dumps(self.to_json())
        return text


def _job_json(job: RunJob) -> dict[str, Any]:
    data: dict[str, Any] = {"context": job.context, "max_tokens": job.max_tokens, "batch": job.batch}
    if job.adapter is not None:
        parts = {name: [part.label, part.kind, part.n_bytes, part.source] for name, part in job.adapter.parts}
        data["adapter"] = {"path": job.adapter.path, "parts": parts}
    return data


def _job_from_json(data: Mapping[str, Any]) -> RunJob:
    adapter = data.get("adapter")
    if adapter is not None:
        parts = tuple((name, PartSpec(*part)) for name, part in adapter["parts"].items())
        adapter = AdapterParts(adapter["path"], parts)
    return RunJob(**{**data, "adapter": adapter})


def _time_json(time: PhaseTime) -> dict[str, Any]:
    return {
        "seconds": time.seconds,
        "n_tokens": time.n_tokens,
        "tokens_per_second": time.tokens_per_second,
        "bound": time.bound,
    }


def _time_from_json(data: Mapping[str, Any]) -> PhaseTime:
    return PhaseTime(float(data["seconds"]), int(data["n_tokens"]), data["bound"])


def plan_from_json(data: Mapping[str, Any]) -> Plan:
    """The plan that ``Plan.to_json`` wrote.

    Raises
    ------
    InvalidInput : a key is missing or holds something else than it should.
    """
    try:
        config = data["config"]
        entries = tuple(
            Entry(e["owner"], e["kind"], e["place"], tuple(e["phases"]), tuple(Term(*t) for t in e["terms"]))
            for e in data["terms"]
        )
        quality = data["quality"]
        job = _job_from_json(data["job"])
        return Plan(
            model=data["model"],
            device=data["device"],
            job=job,
            config=EngineConfig(
                context=config["context"],
                kv=parse_kv(config["kv"]),
                weights=parse_weights(config["weights"]),
                chunk=config["chunk"],
                activations=cast(Activations, config["activations"]),
                n_streamed_layers=config["n_streamed_layers"],
                stream_head=config["stream_head"],
                n_sequences=job.batch,
                n_threads=config["n_threads"],
                n_stacked=config.get("n_stacked"),
                layouts=dict(config["layouts"]),
                adapter=job.adapter,
            ),
            footprint=Footprint(entries),
            budget=dict(data["budget_bytes"]),
            prefill=_time_from_json(data["prefill"]),
            decode=_time_from_json(data["decode"]),
            quality=Quality(quality["kl"], quality["tier"], quality["estimated"], dict(quality["sources"])),
            n_host_layers=data["n_host_layers"],
            notes=tuple(data["notes"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"not a saved plan: {type(error).__name__} {error}") from error


def plan_from_toml(text: str) -> Plan:
    """The plan that ``Plan.to_toml`` wrote.

    Raises
    ------
    InvalidInput : no TOML, or not a plan.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"not a saved plan: {error}") from error
    return plan_from_json(data)
