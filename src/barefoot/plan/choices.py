"""choices — what the planner may choose from, as slots of an exact search.

A :class:`Frame` fixes what does not add up: the chunk, how many layers are slow (streamed from disk, or on the host
beside an accelerator), whether the head is streamed. Within a frame each group of matrices is a slot whose options are
formats, and the KV store is a slot; bytes, seconds and KL add up over the slots. :class:`Tables` holds each option's
costs layer by layer, so that the options of any frame are sums over a range of layers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from barefoot.core.device import Device
from barefoot.core.errors import Incompatible
from barefoot.core.ledger import Place
from barefoot.core.model import MATRIX_GROUPS, ModelSpec, WeightGroup, WeightSpec
from barefoot.engine.config import Activations, EngineConfig
from barefoot.kv.stores import KVStore
from barefoot.ops import blocks
from barefoot.plan import quality
from barefoot.plan.job import RunJob, Stated
from barefoot.plan.memory import layer_kv_bytes
from barefoot.plan.operators import (
    Op,
    Stage,
    attention_op,
    elementwise_op,
    embed_stage,
    head_stage,
    layers_of,
    matrix_op,
    weight_op,
)
from barefoot.plan.roofline import (
    Sweep,
    decode_sweep,
    exchange_seconds,
    op_time,
    prefill_sweeps,
    rates,
    stage_times,
    sweep_times,
)
from barefoot.plan.solve import Option
from barefoot.weights.formats import WeightFormat
from barefoot.weights.formats.stored import Stored

CHUNKS = (16, 32, 64, 128, 256, 512)

Value = WeightFormat | KVStore


@dataclass(frozen=True)
class Frame:
    """What is fixed while formats are chosen: ``n_slow`` layers, the last ones, are on disk or on the host."""

    chunk: int
    n_slow: int
    stream_head: bool


@dataclass(frozen=True)
class Problem:
    """What is to be planned; the search reads nothing else."""

    spec: ModelSpec
    job: RunJob
    device: Device
    stated: Stated

    @property
    def groups(self) -> tuple[WeightGroup, ...]:
        present = {w.group for w in self.spec.weights if w.rows > 1}
        return tuple(g for g in MATRIX_GROUPS if g in present)

    @property
    def activations(self) -> Activations:
        return self.stated.activations or "int8"

    @property
    def n_threads(self) -> int:
        return self.stated.n_threads or self.device.n_cores

    @property
    def slow_place(self) -> Place:
        """Where layers go that the place that computes has no room for."""
        return "host" if self.device.n_accelerators else "disk"

    def config(self, frame: Frame, values: Sequence[Value]) -> EngineConfig:
        """The engine's config of a frame and one value for each slot."""
        *formats, kv = values
        assert isinstance(kv, KVStore)
        return EngineConfig(
            context=self.job.context,
            kv=kv,
            weights={g: f for g, f in zip(self.groups, formats, strict=True) if isinstance(f, WeightFormat)},
            chunk=frame.chunk,
            activations=self.activations,
            n_streamed_layers=0 if self.device.n_accelerators else frame.n_slow,
            stream_head=frame.stream_head,
            n_threads=self.n_threads,
        )

    def frames(self) -> list[Frame]:
        """Every frame that what is stated leaves open.

        A stated format is not undone by streaming, which would carry the file's own blocks: layers are only streamed
        when their formats are open or ``stored``, unless streaming is stated as well.
        """
        stated, spec = self.stated, self.spec
        chunks = {min(c, self.job.n_prompt) for c in CHUNKS} if stated.chunk is None else {stated.chunk}
        on_disk = self.slow_place == "disk"

        def kept(groups: Iterable[WeightGroup]) -> bool:
            return any(not isinstance(stated.weights.get(g, Stored()), Stored) for g in groups)

        if stated.streamed_layers is not None:
            layers: Iterable[int] = [min(stated.streamed_layers, spec.n_layers)]
        else:
            layers = [0] if on_disk and kept(("attn", "ffn")) else range(spec.n_layers + 1)
        if stated.stream_head is not None:
            heads = [stated.stream_head]
        else:
            heads = [False, True] if on_disk and not kept(["embed" if spec.tied else "head"]) else [False]
        return [Frame(c, n, h) for c, h, n in itertools.product(sorted(chunks), heads, layers)]


@dataclass(frozen=True)
class _Costs:
    """One option's running sums over the layers: index i holds the sum over layers below i."""

    bytes: tuple[int, ...]
    fast: tuple[float, ...]  # seconds where the computation is
    slow: tuple[float, ...]  # seconds as a slow layer
    kl: tuple[float, ...]


def _running(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(itertools.accumulate(values, initial=0.0))


class Tables:
    """Costs of every option of a problem, each computed once, when a frame first asks for it."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        n_host = 1 if problem.device.n_accelerators else 0  # only marks the site; frames count the layers
        self._machine = rates(problem.device, n_threads=problem.n_threads, n_host_layers=n_host)
        self._layers = layers_of(problem.spec)
        self._formats = {g: self._open_formats(g) for g in problem.groups}
        self._stores = self._open_stores()
        self._group_costs = functools.cache(self._compute_group_costs)
        self._kv_costs = functools.cache(self._compute_kv_costs)
        self._matrix_seconds = functools.cache(self._compute_matrix_seconds)
        self._outer_seconds = functools.cache(self._compute_outer_seconds)
        self._exchange_seconds = functools.cache(self._compute_exchange_seconds)

    # What may be chosen.

    def _open_formats(self, group: WeightGroup) -> tuple[WeightFormat, ...]:
        """The stated format, else all candidates that save bytes on every matrix of the group and can hold it."""
        matrices = {(w.cols, w.format) for w in self.problem.spec.weights if w.group == group and w.rows > 1}
        chosen = self.problem.stated.weights.get(group)
        if chosen is not None:
            for cols, stored in matrices:
                blocks.row_bytes(chosen.layout(stored), cols)  # raises Incompatible with the reason
            return (chosen,)

        def usable(fmt: WeightFormat) -> bool:
            if isinstance(fmt, Stored):
                return True
            try:
                return all(
                    blocks.row_bytes(fmt.layout(stored), cols) < blocks.row_bytes(stored, cols)
                    for cols, stored in matrices
                )
            except Incompatible:
                return False

        return tuple(fmt for fmt in quality.candidate_formats(group) if usable(fmt))

    def _open_stores(self) -> tuple[KVStore, ...]:
        if self.problem.stated.kv is not None:
            self.problem.stated.kv.row_bytes(self.problem.spec.head_dim)  # raises Incompatible with the reason
            return (self.problem.stated.kv,)

        def usable(store: KVStore) -> bool:
            try:
                return store.row_bytes(self.problem.spec.head_dim) > 0
            except Incompatible:
                return False

        return tuple(s for s in quality.candidate_stores() if usable(s))

    # Costs, by layer.

    def _sweeps(self, chunk: int) -> tuple[Sweep, ...]:
        return (*prefill_sweeps(self.problem.job, chunk), decode_sweep(self.problem.job))

    def _plain_config(self, kv: KVStore, weights: dict[WeightGroup, WeightFormat]) -> EngineConfig:
        job = self.problem.job
        return EngineConfig(job.context, kv, weights, activations=self.problem.activations)

    def _op_seconds(self, op_of: Iterable[tuple[Op, Sweep]]) -> float:
        return sum(op_time(op, self._machine)[0] * sweep.count * sweep.repeats for op, sweep in op_of)

    def _compute_matrix_seconds(self, shape: WeightSpec, fmt: WeightFormat, chunk: int, at: Place) -> float:
        config = self._plain_config(self._stores[0], {shape.group: fmt})
        site = self._machine.site
        return self._op_seconds(
            (matrix_op(shape, config, site, sweep.tokens, at), sweep) for sweep in self._sweeps(chunk)
        )

    def _loss(self, group: WeightGroup, fmt: WeightFormat, matrices: Sequence[WeightSpec], total: int) -> float:
        """KL of these matrices of a group of ``total`` weights, each in proportion to its size."""
        spec = self.problem.spec
        return sum(quality.weight_loss(spec, group, fmt, w.format).kl * w.n_elements / total for w in matrices)

    def _compute_group_costs(self, group: WeightGroup, fmt: WeightFormat, chunk: int) -> _Costs:
        main, slow = self._machine.site.place, self.problem.slow_place
        matrices = [[w for w in layer if w.group == group] for layer in self._layers]
        total = sum(w.n_elements for layer in matrices for w in layer)
        sizes, fast, late, losses = [], [], [], []
        for layer in matrices:
            shapes = [replace(w, name="layers.0.w", source="", row_start=0) for w in layer]
            sizes.append(sum(w.rows * blocks.row_bytes(fmt.layout(w.format), w.cols) for w in layer))
            fast.append(sum(self._matrix_seconds(s, fmt, chunk, main) for s in shapes))
            late.append(sum(self._matrix_seconds(s, fmt, chunk, slow) for s in shapes) if slow == "host" else 0.0)
            losses.append(self._loss(group, fmt, layer, total))
        running = tuple(itertools.accumulate(sizes, initial=0))
        return _Costs(running, _running(fast), _running(late), _running(losses))

    def _rest_seconds(self, layer: int, kv: KVStore, chunk: int, at: Place) -> float:
        """Attention and all that is no matrix; for a layer from disk everything, since reading hides or is hidden."""
        spec, site = self.problem.spec, self._machine.site
        weights = [w for w in self._layers[layer] if at == "disk" or w.rows == 1]
        config = self._plain_config(kv, {})
        total = 0.0
        for sweep in self._sweeps(chunk):
            ops = [weight_op(spec, w, config, site, sweep.tokens, at) for w in weights]
            slow_bytes = sum(op.load_weight for op in ops) if at == "disk" else 0
            kv_at: Place = "host" if at == "host" else site.place
            ops.append(elementwise_op(spec, site, sweep.tokens))
            stage = Stage("rest", tuple(ops), True, spec.layers[layer].window, kv_at, slow_bytes)

            def attention_at(i: int, sweep: Sweep = sweep, stage: Stage = stage) -> Op:
                past = sweep.start + i * sweep.n
                return attention_op(spec, kv, site, stage, n=sweep.n, past=past, batch=sweep.batch)

            times = sweep_times(stage, attention_at, sweep.count, self._machine)
            total += sweep.repeats * sum(times.values())
        return total

    def _compute_kv_costs(self, kv: KVStore, chunk: int) -> _Costs:
        problem = self.problem
        spec, job = problem.spec, problem.job
        config = replace(self._plain_config(kv, {}), chunk=chunk)
        known: dict[object, tuple[int, float, float]] = {}
        rows = []
        for i, weights in enumerate(self._layers):
            key = (spec.layers[i].window, tuple((w.rows, w.cols, w.format) for w in weights))
            if key not in known:
                known[key] = (
                    layer_kv_bytes(spec, config, i, job.batch),
                    self._rest_seconds(i, kv, chunk, self._machine.site.place),
                    self._rest_seconds(i, kv, chunk, problem.slow_place),
                )
            rows.append(known[key])
        sizes, fast, slow = zip(*rows, strict=True)
        running = tuple(itertools.accumulate(sizes, initial=0))
        return _Costs(running, _running(fast), _running(slow), (0.0,) * (len(rows) + 1))

    # Options of a frame.

    def slots(self, frame: Frame) -> list[list[Option[Value]]]:
        """One list of options for each group of matrices, then one for the KV store."""
        return [*(self._group_slot(g, frame) for g in self.problem.groups), self._kv_slot(frame)]

    def _split(self, total: tuple[int, ...], n_fast: int) -> tuple[int, int]:
        """Bytes in the place that computes, and on the host beside it; what stays on disk counts nowhere."""
        slow = total[-1] - total[n_fast] if self.problem.slow_place == "host" else 0
        return total[n_fast], slow

    def _group_slot(self, group: WeightGroup, frame: Frame) -> list[Option[Value]]:
        if group in ("embed", "head"):
            return self._outer_slot(group, frame)
        n_fast = self.problem.spec.n_layers - frame.n_slow
        on_host = self.problem.slow_place == "host"
        options: list[Option[Value]] = []
        for fmt in self._formats[group]:
            costs = self._group_costs(group, fmt, frame.chunk)
            seconds = costs.fast[n_fast] + costs.slow[-1] - costs.slow[n_fast]
            kl = costs.kl[-1] if on_host else costs.kl[n_fast]
            options.append(Option(fmt, self._split(costs.bytes, n_fast), seconds, kl))
        if not n_fast and not on_host:  # nothing of the group is in memory: the format makes no difference
            return options[:1]
        return options

    def _outer_slot(self, group: WeightGroup, frame: Frame) -> list[Option[Value]]:
        """The embedding or the head; a tied embedding is both."""
        spec = self.problem.spec
        (matrix,) = (w for w in spec.weights if w.group == group)
        streamed = frame.stream_head and (group == "head" or spec.tied)
        formats = (Stored(),) if streamed else self._formats[group]
        options: list[Option[Value]] = []
        for fmt in formats:
            size = 0 if streamed else matrix.rows * blocks.row_bytes(fmt.layout(matrix.format), matrix.cols)
            kl = 0.0 if streamed else self._loss(group, fmt, [matrix], matrix.n_elements)
            options.append(Option(fmt, (size, 0), self._outer_seconds(group, fmt, frame.chunk, frame.stream_head), kl))
        return options

    def _compute_outer_seconds(self, group: WeightGroup, fmt: WeightFormat, chunk: int, stream_head: bool) -> float:
        spec, job, site = self.problem.spec, self.problem.job, self._machine.site
        config = replace(self._plain_config(self._stores[0], {group: fmt}), stream_head=stream_head)
        total = 0.0
        if group == "embed":
            for sweep in self._sweeps(chunk):
                times = stage_times(embed_stage(spec, config, site, sweep.tokens), self._machine)
                total += sum(times.values()) * sweep.count * sweep.repeats
        if group == "head" or spec.tied:
            once = stage_times(head_stage(spec, config, site, 1), self._machine)
            step = stage_times(head_stage(spec, config, site, job.batch), self._machine)
            total += job.batch * sum(once.values()) + job.max_tokens * sum(step.values())
        return total

    def _compute_exchange_seconds(self, chunk: int) -> float:
        return sum(
            exchange_seconds(self.problem.spec, self._machine, s.tokens) * s.count * s.repeats
            for s in self._sweeps(chunk)
        )

    def _kv_slot(self, frame: Frame) -> list[Option[Value]]:
        spec = self.problem.spec
        n_fast = spec.n_layers - frame.n_slow
        options: list[Option[Value]] = []
        for kv in self._stores:
            costs = self._kv_costs(kv, frame.chunk)
            size = self._split(costs.bytes, n_fast) if self.problem.slow_place == "host" else (costs.bytes[-1], 0)
            seconds = costs.fast[n_fast] + costs.slow[-1] - costs.slow[n_fast]
            seconds += self._exchange_seconds(frame.chunk)
            options.append(Option(kv, size, seconds, quality.kv_loss(spec, kv).kl))
        return options
