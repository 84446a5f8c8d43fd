"""roofline — the time that a machine needs at least, and what bounds it.

LLM Inference Unveiled: Survey and Roofline Model Insights (Yuan et al. 2024, arXiv:2402.16363), section 2: an operator
of OPs operations that moves A bytes takes

    time = t0 + max(OPs / peak, A / bandwidth)          memory-bound if OPs / A < peak / bandwidth

with A = weights and KV. Activations are in the operator table but not charged, since a chunk of them stays in cache:
the time is a lower bound. t0 is the machine's fixed time of an operator. A stage whose weights come from disk takes
max(disk, computation + the time to put into memory what was read), so it is never as fast as one in memory. What is on
the host beside an accelerator is read over the link or computed where it is, whichever is faster. Sums over chunks and
over generated tokens are closed forms, exact for these formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from barefoot.core.device import GB, Compute, Device
from barefoot.core.model import ModelSpec
from barefoot.engine.config import EngineConfig
from barefoot.plan.job import RunJob
from barefoot.plan.operators import Op, Site, Stage, attention_op, embed_stage, head_stage, layer_stages
from barefoot.plan.result import Bound, PhaseTime

Times = dict[Bound, float]  # seconds by what bounds them
_NUMBERS = ("ops", "load_weight", "load_act", "store_act", "load_kv", "store_kv")


@dataclass(frozen=True)
class Rates:
    """What a device gives, in operations and bytes a second.

    ``slow`` is the bandwidth of weights that are not where the computation is: disk, or the link to the host, whose
    own speeds are ``host_peak`` and ``host_memory``. ``n_split`` accelerators share each matrix and exchange sums at
    ``peer``.
    """

    site: Site
    peaks: Mapping[Compute, float]
    memory: float
    slow: float
    op_seconds: float
    host_peak: float = 0.0
    host_memory: float = 0.0
    n_split: int = 1
    peer: float = 0.0


def rates(device: Device, *, n_threads: int | None = None, n_host_layers: int = 0) -> Rates:
    """The rates that the operators see. Accelerators with a link among them share each matrix; others take turns."""
    if device.n_accelerators:
        split = device.n_accelerators if device.peer_gb_s else 1
        return Rates(
            site=Site("accelerator", 2, n_host_layers),
            peaks={kind: split * peak for kind, peak in device.peaks.items()},
            memory=split * device.read_gb_s["accelerator"] * GB,
            slow=split * device.link_gb_s * GB,
            op_seconds=device.op_seconds,
            host_peak=device.host_peak,
            host_memory=device.read_gb_s["host"] * GB,
            n_split=split,
            peer=device.peer_gb_s * GB,
        )
    used = min(1.0, (n_threads or device.n_cores) / device.n_cores)
    return Rates(
        site=Site("host"),
        peaks={kind: used * peak for kind, peak in device.peaks.items()},
        memory=device.read_gb_s["host"] * GB,
        slow=device.read_gb_s["disk"] * GB,
        op_seconds=device.op_seconds,
    )


def _bounded(op: Op, machine: Rates) -> tuple[float, Bound]:
    """Seconds without the fixed part, and which of the bounds gives them."""

    def roof(moved: float, memory: Bound, ops: float, compute: Bound) -> tuple[float, Bound]:
        return (moved, memory) if moved >= ops else (ops, compute)

    computing = op.ops / machine.peaks[op.compute]
    if op.at == "host" and machine.site.place == "accelerator":
        there = roof(op.moved / machine.host_memory, "host memory", op.ops / machine.host_peak, "host compute")
        over = roof(op.moved / machine.slow, "link", computing, "compute")
        return min(there, over)
    return roof(op.moved / machine.memory, "memory", computing, "compute")


def op_time(op: Op, machine: Rates) -> tuple[float, Bound]:
    """Seconds of one operator, and what bounds it."""
    seconds, bound = _bounded(op, machine)
    return seconds + machine.op_seconds, bound if seconds >= machine.op_seconds else "overhead"


def add(parts: Iterable[tuple[Mapping[Bound, float], float]]) -> Times:
    """Times × how often, summed by bound."""
    totals: Times = {}
    for part, count in parts:
        for bound, seconds in part.items():
            totals[bound] = totals.get(bound, 0.0) + count * seconds
    return totals


def stage_times(stage: Stage, machine: Rates, attention: Op | None = None) -> Times:
    """Seconds of a stage; reading from disk runs beside the computation, but takes memory bandwidth from it."""
    ops = stage.ops if attention is None else (*stage.ops, attention)
    totals: Times = {}
    for op in ops:
        seconds, bound = op_time(op, machine)
        totals[bound] = totals.get(bound, 0.0) + seconds
    if stage.slow_bytes:
        totals["memory"] = totals.get("memory", 0.0) + stage.slow_bytes / machine.memory
    reading = stage.slow_bytes / machine.slow
    return {"disk": reading} if reading > sum(totals.values()) else totals


@dataclass(frozen=True)
class Sweep:
    """``count`` passes over ``n`` new positions each, the first after ``start`` positions, each next ``n`` further.

    ``batch`` sequences run together, and the whole is done ``repeats`` times.
    """

    n: int
    start: int
    count: int
    batch: int = 1
    repeats: int = 1

    @property
    def tokens(self) -> int:
        """Inputs of each pass."""
        return self.n * self.batch


def prefill_sweeps(job: RunJob, chunk: int) -> tuple[Sweep, ...]:
    """Full chunks, then what is left; the sequences of a batch one after the other."""
    full, rest = divmod(job.n_prompt, chunk)
    sweeps = (Sweep(chunk, 0, full, repeats=job.batch), Sweep(rest, full * chunk, 1, repeats=job.batch))
    return tuple(s for s in sweeps if s.n and s.count)


def decode_sweep(job: RunJob) -> Sweep:
    """One position a pass, all sequences of the batch together."""
    return Sweep(1, job.n_prompt, job.max_tokens, batch=job.batch)


def _linear(first: Op, middle: Op, last: Op) -> bool:
    """Whether the middle is the mean of the ends: the fields are concave in the position, so all between is linear."""
    return all(2 * getattr(middle, n) == getattr(first, n) + getattr(last, n) for n in _NUMBERS)


def sweep_times(stage: Stage, attention_at: Callable[[int], Op], n_passes: int, machine: Rates) -> Times:
    """Seconds of a stage over passes 0 … n_passes − 1, in O(log n_passes) evaluations.

    ``attention_at(i)`` is the i-th pass's attention: concave and piecewise linear in i. The passes are cut until all of
    a piece is linear and bound by the same thing; its sum is then n × the mean of its ends.
    """

    def piece(low: int, high: int) -> Times:
        first, last = attention_at(low), attention_at(high)
        n = high - low + 1
        at_low, at_high = stage_times(stage, machine, first), stage_times(stage, machine, last)
        same = _bounded(first, machine)[1] == _bounded(last, machine)[1] and ("disk" in at_low) == ("disk" in at_high)
        if n <= 2 or (n % 2 and same and _linear(first, attention_at((low + high) // 2), last)):
            return add([(at_low, n / 2), (at_high, n / 2)])
        middle = high - 1 if n % 2 == 0 else (low + high) // 2
        return add([(piece(low, middle), 1), (piece(middle + 1, high), 1)])

    return piece(0, n_passes - 1)


def exchange_seconds(spec: ModelSpec, machine: Rates, tokens: int) -> float:
    """Two ring all-reduces a layer among accelerators that share each matrix: 2 (n − 1) / n of the activations each."""
    n = machine.n_split
    if n == 1:
        return 0.0
    moved = 2 * (n - 1) / n * tokens * spec.d_model * machine.site.activation_bytes
    return 2 * spec.n_layers * (moved / machine.peer + machine.op_seconds)


def layers_times(spec: ModelSpec, config: EngineConfig, machine: Rates, sweep: Sweep) -> Times:
    """Seconds of all layers in all passes of a sweep."""
    parts: list[tuple[Mapping[Bound, float], float]] = []
    for stage, count in layer_stages(spec, config, machine.site, sweep.tokens):

        def attention_at(i: int, stage: Stage = stage) -> Op:
            past = sweep.start + i * sweep.n
            return attention_op(spec, config.kv, machine.site, stage, n=sweep.n, past=past, batch=sweep.batch)

        parts.append((sweep_times(stage, attention_at, sweep.count, machine), count * sweep.repeats))
    exchange: Times = {"link": exchange_seconds(spec, machine, sweep.tokens)}
    return add([*parts, (exchange, sweep.count * sweep.repeats)])


def _embed_times(spec: ModelSpec, config: EngineConfig, machine: Rates, sweep: Sweep) -> tuple[Times, float]:
    stage = embed_stage(spec, config, machine.site, sweep.tokens)
    return stage_times(stage, machine), sweep.count * sweep.repeats


def _phase(totals: Times, n_tokens: int) -> PhaseTime:
    return PhaseTime(sum(totals.values()), n_tokens, max(totals, key=lambda bound: totals[bound]))


def phase_times(
    spec: ModelSpec, config: EngineConfig, job: RunJob, device: Device, n_host_layers: int = 0
) -> tuple[PhaseTime, PhaseTime]:
    """Time of the longest prompt (its logits once), and of the answer that follows, for the whole batch."""
    machine = rates(device, n_threads=config.n_threads, n_host_layers=n_host_layers)
    sweeps, last = prefill_sweeps(job, config.chunk), decode_sweep(job)
    prefill = [(layers_times(spec, config, machine, s), 1.0) for s in sweeps]
    prefill += [_embed_times(spec, config, machine, s) for s in sweeps]
    prefill.append((stage_times(head_stage(spec, config, machine.site, 1), machine), job.batch))
    decode = [(layers_times(spec, config, machine, last), 1.0), _embed_times(spec, config, machine, last)]
    decode.append((stage_times(head_stage(spec, config, machine.site, job.batch), machine), last.count))
    return _phase(add(prefill), job.batch * job.n_prompt), _phase(add(decode), job.batch * job.max_tokens)
