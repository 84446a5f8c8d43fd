"""choices — what the planner may choose from, as slots of an exact search.

A :class:`Frame` fixes what does not add up: the chunk, how many layers are slow (streamed from disk, or on the host
beside an accelerator), whether the head is streamed. Within a frame each group of matrices is a slot whose options are
formats, and the KV cache is a slot; bytes, seconds and KL add up over the slots. :class:`Tables` holds each option's
costs layer by layer, so that the options of any frame are sums over a range of layers. Of caches it takes those that
are asked for (:class:`Caches`), and computes no others' costs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from barefoot.core.device import Device
from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.ledger import Place
from barefoot.core.model import MATRIX_GROUPS, ModelSpec, WeightGroup, WeightSpec
from barefoot.engine.config import Activations, EngineConfig
from barefoot.engine.stacks import loaded
from barefoot.kv.stores import KVStore
from barefoot.ops import blocks
from barefoot.ops.dispatch import Layout
from barefoot.plan import compositions, quality
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
from barefoot.plan.solve import Option, undominated
from barefoot.weights.formats import WeightFormat
from barefoot.weights.formats.stored import Stored

CHUNKS = (16, 32, 64, 128, 256, compositions.MANY)

Value = WeightFormat | KVStore


@dataclass(frozen=True)
class Frame:
    """What is fixed while formats are chosen: ``n_slow`` layers, the last ones, are on disk or on the host."""

    chunk: int
    n_slow: int
    stream_head: bool


class Caches(NamedTuple):
    """The KV caches of at most ``max_kl`` and of a :func:`~barefoot.plan.compositions.rank`."""

    max_kl: float
    rank: int


@dataclass(frozen=True)
class Problem:
    """What is to be planned; the search reads nothing else."""

    spec: ModelSpec
    job: RunJob
    device: Device
    stated: Stated

    @functools.cached_property
    def groups(self) -> tuple[WeightGroup, ...]:
        present = {w.group for w in self.spec.weights if w.rows > 1}
        return tuple(g for g in MATRIX_GROUPS if g in present)

    @functools.cached_property
    def caches(self) -> tuple[KVStore, ...]:
        """The stated KV cache, else every one that can be best in something."""
        if self.stated.kv is not None:
            self.stated.kv.row_bytes(self.spec.head_dim)  # raises Incompatible with the reason
            return (self.stated.kv,)
        found = compositions.possible(self.spec, self.job, by_layer=not self.device.n_accelerators)
        return compositions.worthwhile(self.spec, self.job, found)

    @property
    def activations(self) -> Activations:
        return self.stated.activations or "int8"

    @property
    def n_threads(self) -> int:
        return self.stated.n_threads or self.device.n_cores

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """What was measured on the device counts for its number of threads."""
        if self.stated.layouts is not None:
            return self.stated.layouts
        return self.device.layouts if self.n_threads == self.device.n_threads else {}

    @property
    def n_stacked(self) -> int:
        """Parts of the model's stack in memory: none unless it is stated. The planner states it."""
        return self.stated.n_stacked or 0

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
            n_sequences=self.job.batch,
            n_threads=self.n_threads,
            n_stacked=self.n_stacked if self.spec.stack else None,
            layouts=self.layouts,
            adapter=self.job.adapter,
        )

    def frames(self) -> list[Frame]:
        """Every frame that what is stated leaves open.

        A stated format is not undone by streaming, which would carry the file's own blocks: layers are only streamed
        when their formats are open or ``stored``, unless streaming is stated as well. Those of a stack never are.
        """
        stated, spec = self.stated, self.spec
        chunks = {min(c, self.job.n_prompt) for c in CHUNKS} if stated.chunk is None else {stated.chunk}
        on_disk = self.slow_place == "disk"

        def kept(groups: Iterable[WeightGroup]) -> bool:
            return any(not isinstance(stated.weights.get(g, Stored()), Stored) for g in groups)

        if stated.streamed_layers is not None:
            if stated.streamed_layers > spec.n_layers:
                raise InvalidInput(f"{spec.name} has {spec.n_layers} layers to stream, got {stated.streamed_layers}")
            layers: Iterable[int] = [stated.streamed_layers]
        else:
            whole = on_disk and (kept(("attn", "ffn")) or not spec.streamable)
            layers = [0] if spec.stack or whole else range(spec.n_layers + 1)
        if stated.stream_head is not None:
            heads = [stated.stream_head]
        else:
            head: WeightGroup = "embed" if spec.tied else "head"
            packed = any(w.packed_bytes for w in spec.weights if w.name == head)
            heads = [False, True] if on_disk and not kept([head]) and not packed else [False]
        return [Frame(c, n, h) for c, h, n in itertools.product(sorted(chunks), heads, layers)]


class _Running(NamedTuple):
    """Sums over the layers: index i holds the sum over layers below i. ``slow`` is the time as a slow layer."""

    bytes: list[int]
    fast: list[float]
    slow: list[float]
    kl: list[float]


class Tables:
    """Costs of every option of a problem, each computed once, when a frame first asks for it.

    Layers of equal shapes, types and window are one kind and are computed once. With ``timed`` false all times are 0,
    for searches that only ask for bytes.
    """

    def __init__(self, problem: Problem, *, timed: bool = True) -> None:
        self.problem = problem
        self._timed = timed
        n_host = 1 if problem.device.n_accelerators else 0  # only says that there is a host beside; frames count layers
        self._machine = rates(problem.device, n_threads=problem.n_threads, n_host_layers=n_host)
        spec = problem.spec
        kinds: dict[object, int] = {}
        rests: dict[object, int] = {}
        self._alike: dict[int, int] = {}  # the first layer whose matrices alone may differ
        self._kind_layers: list[int] = []  # the first layer of each kind
        self._kinds: list[int] = []  # the kind of each layer
        self._layers = layers_of(loaded(spec, problem.n_stacked))
        for i, weights in enumerate(self._layers):
            key = (spec.layers[i].window, tuple((w.group, w.rows, w.cols, w.format) for w in weights))
            if key not in kinds:
                kinds[key] = len(kinds)
                self._kind_layers.append(i)
            self._kinds.append(kinds[key])
            vectors = tuple((w.group, w.cols) for w in weights if w.rows == 1)
            self._alike[i] = rests.setdefault((spec.layers[i].window, vectors), i)
        self._matrices = {g: [w for w in spec.weights if w.group == g and w.rows > 1] for g in problem.groups}
        self._formats = {g: self._open_formats(g) for g in problem.groups}
        self._weight_kl = functools.cache(lambda *choice: quality.weight_loss(spec, *choice).kl)
        self._kv_kl = functools.cache(lambda kv: quality.kv_loss(spec, kv, problem.job.context).kl)
        self._group_costs = functools.cache(self._compute_group_costs)
        self._kv_costs = functools.cache(self._compute_kv_costs)
        self._rest_seconds = functools.cache(self._compute_rest_seconds)
        self._passing_bytes = functools.cache(self._compute_passing_bytes)
        self._outer_option = functools.cache(self._compute_outer_option)
        self._exchange_seconds = functools.cache(self._compute_exchange_seconds)
        self._group_slot = functools.cache(self._compute_group_slot)
        self.asked = functools.cache(self._asked)
        self.slots = functools.cache(self._compute_slots)

    # What may be chosen.

    def _open_formats(self, group: WeightGroup) -> tuple[WeightFormat, ...]:
        """The stated format, else all candidates that save bytes on every matrix of the group and can hold it."""
        matrices = {(w.cols, w.format) for w in self._matrices[group]}
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

    # Costs, kind by kind of layer.

    def _sweeps(self, chunk: int) -> tuple[Sweep, ...]:
        return (*prefill_sweeps(self.problem.job, chunk), decode_sweep(self.problem.job)) if self._timed else ()

    def _plain_config(self, kv: KVStore, weights: dict[WeightGroup, WeightFormat]) -> EngineConfig:
        return EngineConfig(self.problem.job.context, kv, weights, activations=self.problem.activations)

    def _loss(self, group: WeightGroup, fmt: WeightFormat, matrices: Sequence[WeightSpec], total: int) -> float:
        """KL of these matrices of a group of ``total`` weights, each in proportion to its size."""
        return sum(self._weight_kl(group, fmt, w.format) * w.n_elements / total for w in matrices)

    def _over_layers(self, by_kind: Sequence[tuple[int, float, float, float]]) -> _Running:
        sizes, fast, slow, kl = zip(*(by_kind[kind] for kind in self._kinds), strict=True)
        return _Running(
            list(itertools.accumulate(sizes, initial=0)),
            list(itertools.accumulate(fast, initial=0.0)),
            list(itertools.accumulate(slow, initial=0.0)),
            list(itertools.accumulate(kl, initial=0.0)),
        )

    def _compute_group_costs(self, group: WeightGroup, fmt: WeightFormat, chunk: int) -> _Running:
        main, slow = self._machine.site.place, self.problem.slow_place
        total = sum(w.n_elements for w in self._matrices[group])
        config = self._plain_config(self.problem.caches[0], {group: fmt})
        by_kind = []
        for layer in self._kind_layers:
            matrices = [w for w in self._layers[layer] if w.group == group]

            def seconds(at: Place, matrices: Sequence[WeightSpec] = matrices) -> float:
                return sum(
                    op_time(matrix_op(w, config, self._machine.site, s.tokens, at), self._machine)[0]
                    * (s.count * s.repeats)
                    for w in matrices
                    for s in self._sweeps(chunk)
                )

            size = sum(w.rows * blocks.row_bytes(fmt.layout(w.format), w.cols) for w in matrices)
            late = seconds(slow) if slow == "host" else 0.0  # from disk, the whole layer is one cost: see _rest_seconds
            by_kind.append((size, seconds(main), late, self._loss(group, fmt, matrices, total)))
        return self._over_layers(by_kind)

    def _compute_rest_seconds(self, layer: int, kv: KVStore, chunk: int, at: Place) -> float:
        """Attention and all that is no matrix; for a layer from disk everything, since reading hides or is hidden."""
        spec, site = self.problem.spec, self._machine.site
        weights = [w for w in self._layers[layer] if at == "disk" or w.rows == 1]
        config = self._plain_config(kv, {})
        total = 0.0
        for sweep in self._sweeps(chunk):
            ops = [weight_op(spec, w, config, site, sweep.tokens, at) for w in weights]
            slow_bytes = sum(op.load_weight for op in ops if op.at == "disk")
            kv_at: Place = "host" if at == "host" else site.place
            ops.append(elementwise_op(spec, site, sweep.tokens))
            stage = Stage("rest", tuple(ops), True, spec.layers[layer].window, kv_at, slow_bytes)

            def attention_at(i: int, sweep: Sweep = sweep, stage: Stage = stage) -> Op:
                past = sweep.start + i * sweep.n
                return attention_op(spec, kv, site, stage, n=sweep.n, past=past, batch=sweep.batch)

            times = sweep_times(stage, attention_at, sweep.count, self._machine)
            total += sweep.repeats * sum(times.values())
        return total

    def _compute_kv_costs(self, kv: KVStore, chunk: int) -> _Running:
        spec, main, slow = self.problem.spec, self._machine.site.place, self.problem.slow_place
        config = replace(self._plain_config(kv, {}), chunk=chunk)

        def seconds(layer: int, at: Place) -> float:
            return self._rest_seconds(layer if at == "disk" else self._alike[layer], kv, chunk, at)

        return self._over_layers(
            [
                (
                    layer_kv_bytes(spec, config, layer, self.problem.job.batch),
                    seconds(layer, main),
                    seconds(layer, slow),
                    0.0,
                )
                for layer in self._kind_layers
            ]
        )

    def _compute_passing_bytes(self, kv: KVStore, chunk: int) -> int:
        """What the cache takes beside its entries, in the place that computes."""
        if self.problem.device.n_accelerators:
            return 0
        config = replace(self._plain_config(kv, {}), chunk=chunk, n_threads=self.problem.n_threads)
        return compositions.passing_bytes(self.problem.spec, config)

    def _compute_outer_option(self, group: WeightGroup, fmt: WeightFormat, chunk: int, streamed: bool) -> Option:
        """The embedding or the head in a format; a tied embedding is both. ``streamed``: it makes logits from disk."""
        (matrix,) = self._matrices[group]
        spec, job, site = self.problem.spec, self.problem.job, self._machine.site
        config = replace(self._plain_config(self.problem.caches[0], {group: fmt}), stream_head=streamed)
        seconds = 0.0
        if group == "embed":
            for sweep in self._sweeps(chunk):
                times = stage_times(embed_stage(spec, config, site, sweep.tokens), self._machine)
                seconds += sum(times.values()) * sweep.count * sweep.repeats
        if (group == "head" or spec.tied) and self._timed:
            once = stage_times(head_stage(spec, config, site, 1), self._machine)
            step = stage_times(head_stage(spec, config, site, job.batch), self._machine)
            seconds += job.batch * sum(once.values()) + job.max_tokens * sum(step.values())
        if streamed:
            return Option(fmt, (0, 0), seconds, 0.0)
        size = matrix.rows * blocks.row_bytes(fmt.layout(matrix.format), matrix.cols)
        return Option(fmt, (size, 0), seconds, self._loss(group, fmt, [matrix], matrix.n_elements))

    def _compute_exchange_seconds(self, chunk: int) -> float:
        return sum(
            exchange_seconds(self.problem.spec, self._machine, s.tokens) * s.count * s.repeats
            for s in self._sweeps(chunk)
        )

    # Options of a frame.

    def _asked(self, caches: Caches) -> tuple[KVStore, ...]:
        """The caches that are asked for; perhaps none."""
        return tuple(
            kv
            for kv in self.problem.caches
            if compositions.rank(kv) == caches.rank and self._kv_kl(kv) <= caches.max_kl
        )

    def _compute_slots(self, frame: Frame, caches: Caches) -> list[list[Option]]:
        """One list of options for each group of matrices, then one for the KV cache; none is worse in all."""
        return [undominated(options) for options in self._all_options(frame, caches)]

    def least(self, frame: Frame, caches: Caches) -> tuple[tuple[int, int], float, float]:
        """(bytes, seconds, KL) below which no choice within the frame is: the sums of what each slot has least."""
        main = second = 0
        seconds = kl = 0.0
        for options in self._all_options(frame, caches):
            main += min(o.bytes[0] for o in options)
            second += min(o.bytes[1] for o in options)
            seconds += min(o.seconds for o in options)
            kl += min(o.kl for o in options)
        return (main, second), seconds, kl

    def _all_options(self, frame: Frame, caches: Caches) -> Iterator[list[Option]]:
        for group in self.problem.groups:
            yield self._group_slot(group, frame)
        yield self._kv_slot(frame, caches)

    def _compute_group_slot(self, group: WeightGroup, frame: Frame) -> list[Option]:
        if group in ("embed", "head"):
            streamed = frame.stream_head and (group == "head" or self.problem.spec.tied)
            formats = (Stored(),) if streamed else self._formats[group]
            return [self._outer_option(group, fmt, frame.chunk, streamed) for fmt in formats]
        n = self.problem.spec.n_layers - frame.n_slow
        on_host = self.problem.slow_place == "host"
        options = []
        for fmt in self._formats[group]:
            size, fast, slow, kl = self._group_costs(group, fmt, frame.chunk)
            here = (size[n], size[-1] - size[n] if on_host else 0)
            options.append(Option(fmt, here, fast[n] + slow[-1] - slow[n], kl[-1] if on_host else kl[n]))
        # Where all layers are on disk, in the file's blocks, the format makes no difference.
        return options if n or on_host else options[:1]

    def _kv_slot(self, frame: Frame, caches: Caches) -> list[Option]:
        n = self.problem.spec.n_layers - frame.n_slow
        on_host = self.problem.slow_place == "host"
        exchange = self._exchange_seconds(frame.chunk)
        options = []
        for kv in self.asked(caches):
            size, fast, slow, _ = self._kv_costs(kv, frame.chunk)
            passing = self._passing_bytes(kv, frame.chunk)
            here = (size[n] + passing, size[-1] - size[n]) if on_host else (size[-1] + passing, 0)
            options.append(Option(kv, here, fast[n] + slow[-1] - slow[n] + exchange, self._kv_kl(kv)))
        return options
