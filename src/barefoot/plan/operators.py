"""The operator table: operations and bytes of everything that a pass through the model does.

LLM Inference Unveiled: Survey and Roofline Model Insights (Yuan et al. 2024, arXiv:2402.16363), section 3. Each
operator has six fields: OPs (a multiply-add is two), load_weight, load_act, store_act, load_kv, store_kv, in bytes of
the block layouts and KV rows, scales included.

Differences from the paper's program: embedding, norms, biases and head are counted, the head for the last position only
and with both operations of a multiply-add; keys and values are read once per KV head, not per query head; the causal
half and sliding windows are exact sums; head_dim is the model's own; a tied matrix is one matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from barefoot.core.device import Compute
from barefoot.core.ledger import Place
from barefoot.core.model import ModelSpec, WeightSpec
from barefoot.engine.config import EngineConfig
from barefoot.engine.stacks import loaded, n_stacked
from barefoot.kv.stores import KVStore
from barefoot.ops import blocks

DENSE_LAYOUTS = ("f32", "f16", "bf16")
NORM_OPS, SOFTMAX_OPS, GATE_OPS, ROPE_OPS, ADD_OPS = 7, 5, 2, 3, 1  # operations an element


@dataclass(frozen=True)
class Op:
    """One operator of one pass, the arithmetic it uses, and where what it reads is before it runs."""

    name: str
    compute: Compute
    ops: int
    load_weight: int = 0
    load_act: int = 0
    store_act: int = 0
    load_kv: int = 0
    store_kv: int = 0
    at: Place = "host"

    @property
    def moved(self) -> int:
        """Bytes that pass through memory whatever the caches: weights, keys and values."""
        return self.load_weight + self.load_kv + self.store_kv


@dataclass(frozen=True)
class Site:
    """What the table depends on beside model and config: the place that computes and the bytes of an activation."""

    place: Place = "host"
    activation_bytes: int = 4
    n_host_layers: int = 0

    @property
    def floating(self) -> Compute:
        """Floating-point arithmetic there: half precision on accelerators."""
        return "f16" if self.place == "accelerator" else "f32"


@dataclass(frozen=True)
class Stage:
    """Operators that run one after the other: a layer, the embedding, or the logits.

    ``attends``: there is attention besides ``ops``, within ``window`` positions, over keys and values ``kv_at``.
    ``slow_bytes`` come from disk while the stage computes.
    """

    name: str
    ops: tuple[Op, ...]
    attends: bool = False
    window: int | None = None
    kv_at: Place = "host"
    slow_bytes: int = 0


def arithmetic(layout: str, config: EngineConfig, site: Site) -> Compute:
    """Integers only when weights and activations both are; otherwise quantized weights cut bytes, not operations."""
    integers = site.place == "host" and config.activations == "int8" and layout not in DENSE_LAYOUTS
    return "int8" if integers else site.floating


def layout_of(weight: WeightSpec, config: EngineConfig, at: Place) -> str:
    """The block layout that is read: vectors are f32, what comes from disk is the file's."""
    if weight.rows == 1:
        return "f32"
    chosen = config.weights.get(weight.group)
    return weight.format if at == "disk" or chosen is None else chosen.layout(weight.format)


def matrix_op(weight: WeightSpec, config: EngineConfig, site: Site, tokens: int, at: Place) -> Op:
    """y = W x for ``tokens`` inputs."""
    layout = layout_of(weight, config, at)
    act = site.activation_bytes
    return Op(
        name=weight.name.rpartition(".")[2],
        compute=arithmetic(layout, config, site),
        ops=2 * weight.rows * weight.cols * tokens,
        load_weight=weight.rows * blocks.row_bytes(layout, weight.cols) + sum(p.n_bytes for p in weight.parts),
        load_act=weight.cols * tokens * act,
        store_act=weight.rows * tokens * act,
        at=at,
    )


def vector_op(spec: ModelSpec, weight: WeightSpec, site: Site, tokens: int, at: Place) -> Op:
    """A norm or a bias; query and key norms repeat for every head."""
    name = weight.name.rpartition(".")[2]
    repeats = {"q_norm": spec.n_heads, "k_norm": spec.n_kv_heads}.get(name, 1)
    elements = weight.n_elements * repeats * tokens
    moved = elements * site.activation_bytes
    each = ADD_OPS if name.endswith("_bias") else NORM_OPS
    return Op(name, site.floating, each * elements, 4 * weight.n_elements, moved, moved, at=at)


def n_pairs(n: int, past: int, window: int | None) -> int:
    """Query-key pairs of ``n`` new positions after ``past`` ones: the exact causal sum of min(past + i, window)."""
    if window is None or past + n <= window:
        return n * past + n * (n + 1) // 2
    growing = max(0, window - past)  # new positions that still see everything
    return growing * past + growing * (growing + 1) // 2 + (n - growing) * window


def attention_op(spec: ModelSpec, kv: KVStore, site: Site, stage: Stage, *, n: int, past: int, batch: int = 1) -> Op:
    """New keys and values stored; scores, softmax and weighted values in one pass over all of them.

    Storing counts here, not with the projections as in the paper, so that no operator depends on two techniques. A
    policy sends entries away behind a prompt, so several tokens at once see all that came before.
    """
    window = stage.window
    if window is None and n == 1:
        past = kv.most_seen(past)
    pairs = batch * spec.n_heads * n_pairs(n, past, window)
    seen = past + n if window is None else min(past + n, window - 1 + n)
    width = batch * n * spec.n_heads * spec.head_dim * site.activation_bytes
    bits = kv.bits_per_number(spec.head_dim)
    position = int(2 * batch * spec.n_kv_heads * spec.head_dim * bits / 8)  # bytes of one position's keys and values
    return Op(
        name="attention",
        compute=site.floating,
        ops=pairs * (4 * spec.head_dim + SOFTMAX_OPS),
        load_act=width,
        store_act=width,
        load_kv=seen * position,
        store_kv=n * position,
        at=stage.kv_at,
    )


def elementwise_op(spec: ModelSpec, site: Site, tokens: int) -> Op:
    """What a layer does without weights: rotation of queries and keys, the gate, two residual sums."""
    rotated = (spec.n_heads + spec.n_kv_heads) * spec.head_dim
    ops = tokens * (ROPE_OPS * rotated + GATE_OPS * spec.d_ff + 2 * ADD_OPS * spec.d_model)
    loads = tokens * (rotated + 2 * spec.d_ff + 4 * spec.d_model) * site.activation_bytes
    stores = tokens * (rotated + spec.d_ff + 2 * spec.d_model) * site.activation_bytes
    return Op("elementwise", site.floating, ops, load_act=loads, store_act=stores, at=site.place)


def weight_op(spec: ModelSpec, weight: WeightSpec, config: EngineConfig, site: Site, tokens: int, at: Place) -> Op:
    """The operator of one weight of a layer; vectors are always in memory."""
    if weight.rows == 1:
        return vector_op(spec, weight, site, tokens, site.place if at == "disk" else at)
    return matrix_op(weight, config, site, tokens, at)


def layer_place(spec: ModelSpec, layer: int, config: EngineConfig, site: Site) -> Place:
    """Where a layer's weights are when it is its turn: the last ones may be on disk, or on an accelerator's host."""
    n_slow = site.n_host_layers or config.n_streamed_layers
    if layer < spec.n_layers - n_slow:
        return site.place
    return "host" if site.n_host_layers else "disk"


def layers_of(spec: ModelSpec) -> list[list[WeightSpec]]:
    """The weights of each layer, in order."""
    found: list[list[WeightSpec]] = [[] for _ in spec.layers]
    for weight in spec.weights:
        if weight.layer is not None:
            found[weight.layer].append(weight)
    return found


def layer_stages(spec: ModelSpec, config: EngineConfig, site: Site, tokens: int) -> list[tuple[Stage, int]]:
    """The layers' stages for ``tokens`` inputs, without their attention; equal layers are one stage with a count."""
    found: Counter[Stage] = Counter()
    known: dict[object, Stage] = {}
    for i, weights in enumerate(layers_of(loaded(spec, n_stacked(spec, config)))):
        at, window = layer_place(spec, i, config, site), spec.layers[i].window
        key = (at, window, tuple((w.rows, w.cols, w.format, w.group, sum(p.n_bytes for p in w.parts)) for w in weights))
        if key not in known:
            ops = [weight_op(spec, w, config, site, tokens, at) for w in weights]
            slow = sum(op.load_weight for op in ops if op.at == "disk")
            name = "layer" if at == site.place else f"layer from {at}"
            kv_at: Place = "host" if at == "host" else site.place
            known[key] = Stage(name, (*ops, elementwise_op(spec, site, tokens)), True, window, kv_at, slow)
        found[known[key]] += 1
    return list(found.items())


def _outside_layers(spec: ModelSpec) -> list[WeightSpec]:
    return [w for w in spec.weights if not w.name.startswith("layers.")]


def embed_stage(spec: ModelSpec, config: EngineConfig, site: Site, tokens: int) -> Stage:
    """The rows of ``tokens`` embeddings, gathered; a tied head that is streamed leaves them on disk."""
    embed = next(w for w in _outside_layers(spec) if w.group == "embed")
    at: Place = "disk" if config.stream_head and spec.tied else site.place
    gathered = tokens * blocks.row_bytes(layout_of(embed, config, at), embed.cols)
    op = Op("embed", site.floating, 0, gathered, store_act=tokens * spec.d_model * site.activation_bytes, at=at)
    return Stage("embedding", (op,), slow_bytes=gathered if at == "disk" else 0)


def head_stage(spec: ModelSpec, config: EngineConfig, site: Site, n_rows: int) -> Stage:
    """Final norm and logits of ``n_rows`` last positions."""
    outside = _outside_layers(spec)
    matrix = next((w for w in outside if w.group == "head"), None) or next(w for w in outside if w.group == "embed")
    at: Place = "disk" if config.stream_head else site.place
    norms = [vector_op(spec, w, site, n_rows, site.place) for w in outside if w.rows == 1]
    product = replace(matrix_op(matrix, config, site, n_rows, at), name="head")
    return Stage("head", (*norms, product), slow_bytes=product.load_weight if at == "disk" else 0)


def table(
    spec: ModelSpec, config: EngineConfig, site: Site, *, n: int, past: int, batch: int = 1
) -> Sequence[tuple[str, Op, int]]:
    """The operator table of one pass over ``n`` new positions after ``past``: (stage, operator, how often)."""
    tokens = batch * n
    rows: list[tuple[str, Op, int]] = []
    ends = [(embed_stage(spec, config, site, tokens), 1), (head_stage(spec, config, site, batch), 1)]
    for stage, count in [ends[0], *layer_stages(spec, config, site, tokens), ends[1]]:
        rows += [(stage.name, op, count) for op in stage.ops]
        if stage.attends:
            attention = attention_op(spec, config.kv, site, stage, n=n, past=past, batch=batch)
            rows.append((stage.name, attention, count))
    return rows
