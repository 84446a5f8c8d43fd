"""Planning a tuning: which combinations there are, what each takes and how long, and the one to use.

Combinations of base format, optimizer, activation policy, loss and micro-batch are all counted. Of those that fit, the
ones that keep the base as it is stored come first, and among them the fastest: a micro-batch of fewer tokens decodes
the base more often, a layer that is passed again costs its products once more, and pages of an optimizer come from disk
and go there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from barefoot.adapters import Adapter, Aside
from barefoot.adapters.pruning import Pruning, pruned_spec
from barefoot.adapters.pruning.taylor import Taylor
from barefoot.core.device import Device
from barefoot.core.errors import Incompatible, InvalidInput, OverBudget
from barefoot.core.ledger import Footprint, entry
from barefoot.core.ledger import Term as LedgerTerm
from barefoot.core.model import ModelSpec, WeightGroup
from barefoot.core.registry import techniques
from barefoot.core.units import MIB, format_bytes
from barefoot.optim import Optimizer
from barefoot.plan.job import format_weights
from barefoot.train.footprint import ACTIVATIONS, Activations, Compute, Tuning, footprint
from barefoot.train.lesson import Lesson
from barefoot.train.losses import Loss
from barefoot.weights.formats import WeightFormat

# Resident when PyTorch is imported and has multiplied once, where a plan is made without PyTorch.
RESERVED_BYTES = 270 * MIB
LEAST_TOKENS = 32
#: Formats that the base is rounded to where it doesn't fit as it is stored, in the order of what they cost.
SMALLER = ("int(bits=8)", "nf4", "nf4(double=true)", "int(bits=3)")
#: What could be cut out of the base where even these don't fit, and what that cost where it was measured
#: (benchmarks/results/train_loram_smollm2-135m-dithered.json).
PRUNINGS = tuple(Taylor(ratio) for ratio in (0.25, 0.5, 0.75))
PRICE = "with a third cut out, an adapter of SmolLM2-135M gained half of what it gains beside the whole model"


@dataclass(frozen=True)
class TuneJob:
    """``step_tokens`` tokens make a step, of documents of at most ``length`` tokens."""

    length: int
    step_tokens: int

    def __post_init__(self) -> None:
        if self.length < 2:
            raise InvalidInput(f"length must be at least 2 tokens, got {self.length}")
        if self.step_tokens < self.length:
            raise InvalidInput(
                f"a step of {self.step_tokens} tokens holds no document of {self.length}",
                cure=f"use --length {self.step_tokens} or less, or a larger --batch",
            )


@dataclass(frozen=True)
class TuneStated:
    """What the user has decided; None is the planner's to choose, and no teacher."""

    formats: Mapping[WeightGroup, WeightFormat] | None = None
    activations: Activations | None = None
    loss: Loss | None = None
    n_tokens: int | None = None
    compute: Compute = "float32"
    pruning: Pruning | None = None
    optimizer: Optimizer | None = None
    lesson: Lesson | None = None


@dataclass(frozen=True)
class TunePlan:
    """A combination, what it takes by phase, and the seconds of a step that are expected. ``n_parameters`` has what is
    trained beside."""

    tuning: Tuning
    footprint: Footprint
    seconds: float
    n_parameters: int

    @property
    def needed(self) -> int:
        return self.footprint.peak()[1]

    @property
    def phase(self) -> str:
        return str(self.footprint.peak()[0])

    @property
    def base(self) -> str:
        return format_weights(self.tuning.formats) or "stored"

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "adapter": str(self.tuning.adapter),
            "pruning": None if self.tuning.pruning is None else str(self.tuning.pruning),
            "parameters": self.n_parameters,
            "optimizer": str(self.tuning.optimizer),
            "loss": str(self.tuning.loss),
            "activations": self.tuning.activations,
            "compute": self.tuning.compute,
            "micro_batch_tokens": self.tuning.n_tokens,
            "needed_bytes": self.needed,
            "peak_phase": self.phase,
            "seconds_per_step": self.seconds,
            "by_phase": {str(p): self.footprint.select(phase=p).bytes for p in self.footprint.phases},
            "footprint": self.footprint.to_json(),
        }


def combinations(job: TuneJob, adapter: Adapter, stated: TuneStated) -> Iterator[Tuning]:
    """All that the planner may use, the base as it is stored first."""
    if stated.pruning is not None and isinstance(adapter, Aside):
        raise Incompatible(
            f"{adapter} reads what the whole base computes, and can't be put back from a pruned copy",
            cure="--adapter lora",
        )
    losses = _losses(stated)
    optimizers = [stated.optimizer] if stated.optimizer else [cls() for cls in techniques("optim").values()]
    for formats, activations, loss, optimizer, n_tokens in itertools.product(
        _formats(stated), _activations(adapter, stated), losses, optimizers, _micro_batches(job, stated)
    ):
        assert isinstance(optimizer, Optimizer)
        yield Tuning(
            adapter, loss, n_tokens, job.length, formats, activations, stated.compute,
            accumulates=n_tokens < job.step_tokens, optimizer=optimizer, pruning=stated.pruning,
            lesson=stated.lesson,
        )  # fmt: skip


def _losses(stated: TuneStated) -> list[Loss]:
    """Those that imitate where there is a teacher, and the others where there is none."""
    taught, loss = stated.lesson is not None, stated.loss
    if loss is None:
        made = cast("list[Loss]", [cls() for cls in techniques("train.losses").values()])
        return [each for each in made if each.imitates == taught]
    if loss.imitates and not taught:
        raise Incompatible(f"{loss} imitates a teacher, and there is none", cure="name one, as in --teacher MODEL")
    if taught and not loss.imitates:
        raise Incompatible(f"{loss} takes no teacher", cure="leave --loss or --teacher out")
    return [loss]


def _activations(adapter: Adapter, stated: TuneStated) -> tuple[Activations, ...]:
    if not isinstance(adapter, Aside):
        return ACTIVATIONS if stated.activations is None else (stated.activations,)
    if stated.activations == "recompute":
        raise Incompatible(
            f"{adapter} keeps nothing of the base's layers, so there is none to pass again", cure="--activations keep"
        )
    return ("keep",)


def _formats(stated: TuneStated) -> Iterator[Mapping[WeightGroup, WeightFormat]]:
    if stated.formats is not None:
        yield stated.formats
        return
    yield {}
    from barefoot.plan.job import parse_weights

    for text in SMALLER:
        found = parse_weights(text)
        yield {group: found[group] for group in ("attn", "ffn")}


def _micro_batches(job: TuneJob, stated: TuneStated) -> Iterator[int]:
    if stated.n_tokens is not None:
        yield stated.n_tokens
        return
    n = job.step_tokens
    while n > job.length:
        yield n
        n = -(-n // 2)
    yield job.length


@dataclass(frozen=True)
class Question:
    """What is to be planned: ``reserved_bytes`` are the process's own."""

    spec: ModelSpec
    job: TuneJob
    adapter: Adapter
    stated: TuneStated
    device: Device
    reserved_bytes: int

    def plans(self) -> list[TunePlan]:
        """Every combination with its bytes and time, in the order of preference."""
        return list(self._plans)

    @functools.cached_property
    def _plans(self) -> tuple[TunePlan, ...]:
        libraries = LedgerTerm("interpreter and libraries", 1, self.reserved_bytes)
        found = []
        for tuning in combinations(self.job, self.adapter, self.stated):
            try:
                job, copy = footprint(self.spec, tuning), pruned_spec(self.spec, tuning.sizes(self.spec))
            except Incompatible:
                if self.stated.formats is not None or not tuning.formats:
                    raise
                continue  # blocks of a format that nobody asked for don't fill its rows
            process = entry("process", "reserved", [libraries], phases=job.phases)
            found.append(
                TunePlan(tuning, process + job, seconds(copy, self.job, tuning, self.device), copy.n_parameters)
            )
        order = {plan.base: i for i, plan in reversed(list(enumerate(found)))}
        return tuple(sorted(found, key=lambda plan: (order[plan.base], plan.seconds, plan.needed)))

    def choose(self, budget: int) -> tuple[TunePlan, list[TunePlan]]:
        """The first one that fits, and all others.

        Raises
        ------
        OverBudget : none does.
        """
        every = self.plans()
        for plan in every:
            if plan.needed <= budget:
                return plan, [other for other in every if other is not plan]
        least = min(every, key=lambda plan: plan.needed)
        kinds = least.footprint.by_kind()
        largest = max(kinds, key=lambda kind: kinds[kind])
        length = self.largest_length(budget)
        shorter = f"--length {length}, " if length else ""
        raise OverBudget(
            f"tuning takes at least {format_bytes(least.needed)}; available are {format_bytes(budget)}. The largest "
            f"part is {largest}, {format_bytes(kinds[largest])}",
            needed=least.needed,
            available=budget,
            cure=f"use {shorter}{self._pruned(budget)}a smaller model, or --memory {-(-least.needed // MIB)}MiB",
        )

    def _pruned(self, budget: int) -> str:
        """The least pruning with which it would fit, and its price; nothing where none would."""
        if self.stated.pruning is not None or isinstance(self.adapter, Aside):
            return ""
        for pruning in PRUNINGS:
            copies = replace(self, stated=replace(self.stated, pruning=pruning))
            needed = min(plan.needed for plan in copies.plans())
            if needed <= budget:
                return f'--prune "{pruning}" ({format_bytes(needed)}; {PRICE}), '
        return ""

    def largest_length(self, budget: int) -> int:
        """The longest documents that fit with all else as it is; 0 for none of ``LEAST_TOKENS``."""
        low, high = 0, self.job.length
        while low < high:
            middle = (low + high + 1) // 2
            job = replace(self.job, length=middle, step_tokens=max(middle, self.job.step_tokens))
            if middle >= LEAST_TOKENS and any(p.needed <= budget for p in replace(self, job=job).plans()):
                low = middle
            elif middle < LEAST_TOKENS:
                low = middle  # too short to be of use, and no reason to look further down
            else:
                high = middle - 1
        return low if low >= LEAST_TOKENS else 0


def seconds(spec: ModelSpec, job: TuneJob, tuning: Tuning, device: Device) -> float:
    """Of a step: products at the machine's peak, the base decoded in each pass of each micro-batch, what the optimizer
    moves to disk and back. ``spec`` is what is trained beside."""
    matrices = [w for w in spec.weights if w.layer is not None and w.group != "norm"]
    n_weights = sum(w.n_elements for w in matrices)
    aside = isinstance(tuning.adapter, Aside)
    passes = 1 if aside else 3 if tuning.activations == "recompute" else 2
    heads = sum(w.cols for w in matrices if w.name.endswith(".o"))
    times = passes + (0 if aside else 1.5)  # two products, of half of the pairs, twice and a half back
    attention = 2 * 2 * job.length * heads * times
    logits = 2 * 2 * spec.vocab_size * spec.d_model
    flops = job.step_tokens * (2 * passes * n_weights + attention + logits)
    n_passes = -(-job.step_tokens // tuning.n_tokens)
    decoded = n_passes * (passes * n_weights + spec.vocab_size * spec.d_model) * 4
    moved = tuning.optimizer.moved_bytes([f.n_elements for f in tuning.adapter.factors(spec) if f.trained])
    paging = moved / (device.read_gb_s["disk"] * 1e9)
    if tuning.lesson:  # passed once a step, and the logits have two more products
        teacher = tuning.lesson.spec
        n_theirs = sum(w.n_elements for w in teacher.weights if w.layer is not None)
        n_head = teacher.vocab_size * teacher.d_model
        flops += job.step_tokens * (2 * n_theirs + 2 * n_head + 2 * spec.vocab_size * spec.d_model)
        decoded += (n_theirs + n_passes * n_head) * 4
    return flops / device.peaks["f32"] + decoded / (device.read_gb_s["host"] * 1e9 / 4) + paging
