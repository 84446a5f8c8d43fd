"""planner — from a model's shapes, a job and a budget to a plan, in milliseconds and without a weight being read.

What the user states is kept. The rest is chosen by quality first: predicted KL divergence is compared in tiers
(:data:`barefoot.plan.quality.TIERS`). Within a tier, what keeps every entry of the cache comes before what sends some
away, since facts go with them and KL does not tell; then the faster plan wins, within 1 % of its time the one closer to
the original, then the smaller one. The search is exact (:mod:`barefoot.plan.search`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from barefoot.core.device import NOT_MEASURED, Device, this_machine
from barefoot.core.ledger import Footprint, Place
from barefoot.core.model import ModelSpec
from barefoot.core.units import MIB, format_bytes, round_up
from barefoot.engine.stacks import stack_footprint
from barefoot.plan import compositions, quality
from barefoot.plan.choices import Problem
from barefoot.plan.commands import command
from barefoot.plan.job import Budget, RunJob, Stated
from barefoot.plan.refusal import Alternative, Refusal
from barefoot.plan.reserved import SLACK_BYTES, Reserved, reserved_expected
from barefoot.plan.result import Plan, Quality
from barefoot.plan.roofline import phase_times
from barefoot.plan.search import Search, Solution

LOSSLESS = quality.TIERS[0][1]
STACK_CHUNK = 64  # prompt tokens at once that a stack leaves room for: its weights are decoded for each chunk anew


def plan(
    spec: ModelSpec,
    job: RunJob,
    budget: Budget,
    device: Device | None = None,
    stated: Stated | None = None,
    *,
    reserved: Reserved | None = None,
    extra: Footprint | None = None,
    model: str | None = None,
) -> Plan:
    """The best plan within the budget.

    Parameters
    ----------
    spec : the model's shapes.
    job : what to run.
    budget : bytes allowed by place; a place that it does not name may be used up to the device's capacity.
    device : the machine; this one when None.
    stated : what the user has decided.
    reserved : the runtime's own bytes; when None, what a run's process is expected to keep resident.
    extra : further bytes that are there whatever is chosen, such as the tokenizer's and the prompt's.
    model : the model's name in commands; ``spec.name`` when None.

    Raises
    ------
    OverBudget : nothing fits; ``refusal`` says what would.
    Incompatible : a stated technique can't hold the model.
    """
    found = _Case(spec, job, budget, device, stated, reserved, extra, model).first()
    if found is None:
        raise refuse(spec, job, budget, device, stated, reserved=reserved, extra=extra, model=model).error()
    return found


def candidates(
    spec: ModelSpec,
    job: RunJob,
    budget: Budget,
    device: Device | None = None,
    stated: Stated | None = None,
    *,
    reserved: Reserved | None = None,
    extra: Footprint | None = None,
    model: str | None = None,
) -> tuple[Plan, ...]:
    """The best plan of each quality tier, best quality first, with every entry of the cache and then without; each but
    the first only where it is faster by over 10 %.

    The first is the one that :func:`plan` recommends; nothing fits when there is none. Parameters as there.
    """
    case = _Case(spec, job, budget, device, stated, reserved, extra, model)
    if spec.stack and case.stated.n_stacked is None:
        case = case.with_stack()
    plans: list[Plan] = []
    for solution in case.solutions():
        found = case.finish(solution)
        if not plans or _seconds(found) < 0.9 * _seconds(plans[-1]):
            plans.append(found)
    return tuple(plans)


def smallest_budget(
    spec: ModelSpec,
    job: RunJob,
    device: Device | None = None,
    stated: Stated | None = None,
    *,
    max_kl: float = math.inf,
    reserved: Reserved | None = None,
    extra: Footprint | None = None,
) -> int | None:
    """The least bytes, in the place that computes, with which :func:`plan` succeeds at a predicted KL of ``max_kl``.

    None when no choice reaches that KL within what is stated. Other parameters as for ``plan``.
    """
    case = _Case(spec, job, Budget({}), device, stated, reserved, extra, None)
    solution = case.smallest(max_kl)
    return None if solution is None else solution.footprint.peak(case.search.place)[1]


def refuse(
    spec: ModelSpec,
    job: RunJob,
    budget: Budget,
    device: Device | None = None,
    stated: Stated | None = None,
    *,
    reserved: Reserved | None = None,
    extra: Footprint | None = None,
    model: str | None = None,
) -> Refusal:
    """What to answer when nothing fits: bytes, the largest job that fits, and commands that were planned and fit."""
    case = _Case(spec, job, budget, device, stated, reserved, extra, model)
    solution = case.smallest()
    place = case.search.place
    assert solution is not None, "without a limit on KL there is always a smallest choice"
    largest_context, largest_batch = case.largest_context(), case.largest_batch()
    return Refusal(
        model=case.model,
        job=job,
        place=place,
        needed_bytes=solution.footprint.peak(place)[1],
        available_bytes=case.budget[place],
        largest_context=largest_context,
        largest_batch=largest_batch,
        alternatives=case.alternatives(largest_context, largest_batch),
        n_stack=len(spec.stack),
    )


def _seconds(found: Plan) -> float:
    return found.prefill.seconds + found.decode.seconds


class _Case:
    """One call's arguments with their defaults filled in, and what can be asked of them."""

    def __init__(
        self,
        spec: ModelSpec,
        job: RunJob,
        budget: Budget,
        device: Device | None,
        stated: Stated | None,
        reserved: Reserved | None,
        extra: Footprint | None,
        model: str | None,
        search: Search | None = None,
    ) -> None:
        self.spec, self.job = spec, job
        self.device = device or this_machine()
        self.stated = stated or Stated()
        self.reserved = reserved or reserved_expected()
        self.extra = extra or Footprint()
        self.model = model or spec.name
        self.search = search or Search(
            Problem(spec, job, self.device, self.stated), self.reserved.footprint() + self.extra
        )
        capacity = self.device.memory_bytes
        self.budget: dict[Place, int] = {p: min(n, budget.bytes.get(p, n)) for p, n in capacity.items()}
        self.clipped = {p: n for p, n in budget.bytes.items() if n > capacity.get(p, n)}

    def first(self) -> Plan | None:
        """The best plan of the best quality tier in which anything fits."""
        if self.spec.stack and self.stated.n_stacked is None:
            return self.with_stack().first()
        solution = next(self.solutions(), None)
        return None if solution is None else self.finish(solution)

    def solutions(self) -> Iterator[Solution]:
        """The best of what fits, preferred ones first."""
        for (_, max_kl), rank in itertools.product(quality.TIERS, compositions.RANKS):
            solution = self.search.fastest(self.budget, max_kl, rank=rank)
            if solution is not None:
                yield solution

    def with_stack(self) -> _Case:
        """The case with as much of the stack as fits beside the smallest lossless choice of all else, in memory.

        Where none of it does, the rest is chosen as for any model: a stack shrinks before anything else gives way.
        """
        chunk = self.stated.chunk or min(STACK_CHUNK, self.job.n_prompt)
        inside = replace(self.stated, n_stacked=0, chunk=chunk, stream_head=self.stated.stream_head or False)
        bare = self.having(stated=inside).smallest(LOSSLESS, keeping=True)

        def fits(n: int) -> bool:
            assert bare is not None
            return self.search.fits(bare.footprint + stack_footprint(self.spec, n), self.budget)

        n = 0 if bare is None else _largest(fits, 0, len(self.spec.stack))
        return self.having(stated=replace(inside, n_stacked=n) if n else replace(self.stated, n_stacked=0))

    def finish(self, solution: Solution) -> Plan:
        """The plan of a solution: with its times, its quality and notes."""
        on_host = solution.frame.n_slow if self.device.n_accelerators else 0
        prefill, decode = phase_times(self.spec, solution.config, self.job, self.device, on_host)
        return Plan(
            model=self.model,
            device=self.device.name,
            job=self.job,
            config=solution.config,
            footprint=solution.footprint,
            budget=self.budget,
            prefill=prefill,
            decode=decode,
            quality=self._quality(solution),
            n_host_layers=on_host,
            notes=self._notes(solution),
        )

    def _quality(self, solution: Solution) -> Quality:
        config, kl = solution.config, solution.choice.kl
        cache = quality.kv_loss(self.spec, config.kv, config.context)
        losses = {"kv": cache}
        for group, fmt in config.weights.items():
            stored = {w.format for w in self.spec.weights if w.group == group and w.rows > 1}
            found = [quality.weight_loss(self.spec, group, fmt, s) for s in sorted(stored)]
            losses[group] = max(found, key=lambda loss: loss.kl)
        sources = {name: loss.source for name, loss in losses.items()}
        if cache.kl:
            sources["kv"] = f"KL {cache.kl:.4f}, {cache.source}"
        inputs = quality.int8_inputs(self.spec)
        if inputs is not None and config.activations == "int8" and not self.device.n_accelerators:
            sources["activations"] = f"int8 adds KL {inputs.int8_inputs} in any plan ({inputs.model}), not in the sum"
        return Quality(
            kl=kl,
            tier="not measured" if cache.partial else quality.tier(kl),
            estimated=any(loss.estimated for loss in losses.values()),
            sources=sources,
        )

    def _notes(self, solution: Solution) -> tuple[str, ...]:
        frame, device = solution.frame, self.device
        notes = []
        if not device.n_accelerators:
            notes.append(f"runtime's own {format_bytes(self.reserved.bytes)}: {self.reserved.source}")
            notes.append(f"allocator slack of {format_bytes(SLACK_BYTES)} is part of the reserved bytes")
        notes += [
            f"{format_bytes(n)} of {p} memory were allowed, {device.title} has {format_bytes(self.budget[p])}"
            for p, n in self.clipped.items()
        ]
        if device.n_accelerators and frame.n_slow:
            notes.append(f"{frame.n_slow} of {self.spec.n_layers} layers stay in host memory, with their KV")
        elif frame.n_slow or frame.stream_head:
            what = [f"{frame.n_slow} of {self.spec.n_layers} layers"] if frame.n_slow else []
            what += ["the logits' matrix"] if frame.stream_head else []
            notes.append(f"{' and '.join(what)} are read from disk in each step")
        if device.n_accelerators > 1:
            how = "share each matrix" if device.peer_gb_s else "take layers in turn"
            notes.append(f"the {device.n_accelerators} accelerators {how}")
        if self.job.adapter is not None:
            beside = len(self.job.adapter.parts)
            notes.append(f"an adapter stands beside {beside} matrices; times and quality are those without it")
        if compositions.drops(solution.config.kv):
            notes.append(compositions.what_goes(solution.config.kv, self.job.context))
        if self.spec.stack:
            held = solution.config.n_stacked
            notes.append(f"{held:,} of the {len(self.spec.stack):,} blocks that the model can do without are in memory")
        if self.job.context > self.spec.context_length:
            notes.append(f"the model was made for {self.spec.context_length:,} positions")
        guessed = sorted(k for k in device.sources if device.sources[k].startswith(NOT_MEASURED))
        if guessed:
            notes.append(f"speeds are defaults, not measured ({', '.join(guessed)}): run barefoot doctor")
        if not device.checked:
            notes.append(f"numbers of {device.title} were recalled, not checked: {device.source('*')}")
        return tuple(notes)

    # What would fit.

    def smallest(self, max_kl: float = math.inf, *, keeping: bool = False) -> Solution | None:
        """The solution with the least peak where the computation is; ``keeping`` every entry, if nothing is stated."""
        place = self.search.place
        ranks = compositions.RANKS[:2] if keeping and self.stated.kv is None else compositions.RANKS
        for host in (self.budget["host"], None) if place == "accelerator" else (None,):
            found = [self.search.smallest(max_kl, host, rank=rank) for rank in ranks]
            solutions = [solution for solution in found if solution is not None]
            if solutions:
                return min(solutions, key=lambda s: s.footprint.peak(place)[1])
        return None

    def having(self, *, job: RunJob | None = None, stated: Stated | None = None, main: int | None = None) -> _Case:
        """The same case with another job, other stated choices, or another budget where the computation is."""
        budget = dict(self.budget)
        if main is not None:
            budget[self.search.place] = main
        return _Case(
            self.spec,
            job or self.job,
            Budget(budget),
            self.device,
            self.stated if stated is None else stated,
            self.reserved,
            self.extra,
            self.model,
            self.search if job is None and stated is None else None,  # a search does not depend on the budget
        )

    def _has_room(self, job: RunJob) -> bool:
        case = self.having(job=job)
        solution = case.smallest()
        return solution is not None and case.search.fits(solution.footprint, case.budget)

    def _with_context(self, context: int) -> RunJob:
        return replace(self.job, context=context, max_tokens=min(self.job.max_tokens, max(1, context // 2)))

    @property
    def _least_context(self) -> int:
        """Room for a prompt and an answer, and for a stated chunk."""
        return max(2, self.stated.chunk or 0)

    def largest_context(self) -> int:
        """The largest context that fits, at most the job's own; 0 when not even the least one does."""
        return _largest(lambda n: self._has_room(self._with_context(n)), self._least_context, self.job.context)

    def largest_batch(self) -> int:
        """The largest batch that fits, at most the job's own; 0 when not even one sequence does."""
        return _largest(lambda n: self._has_room(replace(self.job, batch=n)), 1, self.job.batch)

    def alternatives(self, largest_context: int, largest_batch: int) -> tuple[Alternative, ...]:
        """What would fit, each planned: cheapest in quality first."""
        tries: list[tuple[str, _Case]] = []
        if largest_context >= 16:
            shorter = max(largest_context // 16 * 16, self._least_context)
            tries.append((f"a context of {shorter:,}", self.having(job=self._with_context(shorter))))
        if self.job.batch > 1 and largest_batch:
            tries.append((f"a batch of {largest_batch}", self.having(job=replace(self.job, batch=largest_batch))))
        if self.stated != Stated():
            tries.append(("let the planner choose all", self.having(stated=Stated())))
        fast = self.having(stated=replace(self.stated, streamed_layers=0, stream_head=False))
        away = "disk" if self.search.place == "host" else "the host"
        for case, max_kl, what in (
            (fast, LOSSLESS, f"all in memory, {quality.TIERS[0][0]}"),
            (self, LOSSLESS, f"{quality.TIERS[0][0]}, partly read from {away} in each step"),
            (fast, quality.TIERS[2][1], f"all in memory, {quality.TIERS[2][0]} to the original"),
            (fast, math.inf, "the least memory with all in it"),
            (self, math.inf, "the least memory"),
        ):
            solution = case.smallest(max_kl, keeping=max_kl < math.inf)
            if solution is not None:
                main = round_up(solution.footprint.peak(self.search.place)[1], MIB)
                tries.append((what, case.having(main=main)))
        found: dict[str, Alternative] = {}
        for what, case in tries:
            alternative = case.as_alternative(what)
            if alternative is not None:
                found.setdefault(alternative.command, alternative)
        return tuple(sorted(found.values(), key=lambda a: (a.kl > LOSSLESS, a.kl, a.budget_bytes)))

    def as_alternative(self, change: str) -> Alternative | None:
        """This case as something to do instead, if it can be planned."""
        found = self.first()
        if found is None:
            return None
        main = self.budget[self.search.place]
        return Alternative(
            change=change,
            command=command(self.model, self.device.name, self.job, main, self.stated),
            needed_bytes=found.needed[self.search.place],
            budget_bytes=main,
            kl=found.quality.kl,
            tier=found.quality.tier,
            decode_tokens_per_second=found.decode.tokens_per_second,
        )


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest n in low … high that fits, by bisection; 0 when ``low`` does not."""
    if not fits(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
