"""The bytes of a run, in closed form: what the engine's arena will hand out, entry by entry.

Each entry, but for those of ``PASSING``, is one region of the arena under its owner's name; the engine takes from it
exactly what is stated here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from barefoot.core.errors import Incompatible
from barefoot.core.ledger import Footprint, Phase, Term, entry
from barefoot.core.lifetimes import ALIGNMENT, Arrangement, Buffer, arrange
from barefoot.core.model import ModelSpec, PartSpec, WeightGroup
from barefoot.core.units import round_up
from barefoot.engine.config import AdapterParts, EngineConfig
from barefoot.engine.key_order import key_order_footprint
from barefoot.engine.placement import Placement, Resident, place, stream_buffer_bytes
from barefoot.engine.repacking import REPACKED_ROWS
from barefoot.engine.stacks import n_stacked, signed, stack_footprint
from barefoot.kv import ruled
from barefoot.kv.placement.geometry import VirtualTensor
from barefoot.ops import attention_scratch_bytes, blocks, lowrank, lut, matmul_scratch_bytes, panels, parts, signs
from barefoot.ops.rounding import ENCODED_AT_A_TIME
from barefoot.ops.scratch import SIGN_TOKENS, sign_scratch_bytes
from barefoot.weights.formats.dense import Dense
from barefoot.weights.formats.stored import Stored

RUNNING: tuple[Phase, ...] = ("prefill", "decode")

ARRANGE_BYTES = 1 << 20  # of rows rearranged at a time: within the cache of a core
CONVERT_ELEMENTS = 1 << 16  # weights converted at a time: staging, whatever the model's size

# Entries of numpy arrays that come and go; all others are regions of the arena. A test measures the number.
PASSING = ("encoder", "repacker", "chooser", "key sorter", "adapter reader")
ENCODE_BYTES_PER_WEIGHT = 17  # where numpy encodes, ENCODED_AT_A_TIME weights or a row; kernels take nothing
REPACK_BYTES_PER_WEIGHT = 10  # where groups are scattered; less than half elsewhere
ADAPTER_BYTES_PER_NUMBER = 10  # of B of an adapter's module while it is read as bf16; A and other types take less


def footprint(spec: ModelSpec, config: EngineConfig) -> Footprint:
    """All regions of a run of ``spec`` under ``config``.

    Raises
    ------
    InvalidInput : numbers of ``config`` that the model does not allow.
    Incompatible : a format or KV store that does not divide the model's sizes.
    """
    placement = place(spec, config)
    return (
        _weights(spec, config, placement)
        + stack_footprint(spec, n_stacked(spec, config))
        + _streams(spec, placement)
        + _staging(placement)
        + by_layer_footprint(spec, config)
        + key_order_footprint(spec, config.kv)
        + adapter_footprint(config.adapter)
        + entry("kv", "kv", _kv(spec, config), phases=RUNNING)
        + entry("activations", "activations", [_block("arrangement", activations(spec, config).bytes)], phases=RUNNING)
        + entry("logits", "logits", _logits(spec, config), phases=RUNNING)
        + entry("rope", "workspace", _rope(spec, config), phases=RUNNING)
        + entry("scratch", "workspace", [_block("scratch", scratch_bytes(spec, config, placement))], phases=RUNNING)
    )


def _block(name: str, n_bytes: int) -> Term:
    return Term(name, 1, round_up(n_bytes, ALIGNMENT))


def _padding(sizes: Iterable[int]) -> Term:
    """Bytes between arrays that each start on a cache line."""
    return Term("alignment", sum(-size % ALIGNMENT for size in sizes), 1)


def _weights(spec: ModelSpec, config: EngineConfig, placement: Placement) -> Footprint:
    """An entry for each group of resident weights. Matrices of one shape are counted together."""
    shapes: dict[WeightGroup, Counter[tuple[int, int, str]]] = {}
    added: dict[WeightGroup, list[PartSpec]] = {}
    for resident in placement.resident:
        weight = resident.weight
        shapes.setdefault(weight.group, Counter())[weight.rows, weight.cols, weight.format] += 1
        added.setdefault(weight.group, []).extend(resident.parts)
    phases = _loading(placement) + RUNNING
    result = Footprint()
    for group, counted in shapes.items():
        fmt = Dense("f32") if group == "norm" else config.weights.get(group, Stored())
        totals: Counter[tuple[str, int]] = Counter()
        padding = 0
        for (rows, cols, stored), n in counted.items():
            terms = fmt.terms(fmt.layout(stored), rows, cols, stored)
            for term in terms:
                totals[term.name, term.bytes_each] += n * term.count
            padding += n * (-sum(t.bytes for t in terms) % ALIGNMENT)
        for part in added[group]:
            totals[f"{part.kind} parts", 1] += part.n_bytes
            padding += -part.n_bytes % ALIGNMENT
        summed = [Term(name, count, size) for (name, size), count in totals.items()]
        result += entry(f"weights.{group}", "weights", [*summed, Term("alignment", padding, 1)], phases=phases)
    return result


def _streams(spec: ModelSpec, placement: Placement) -> Footprint:
    n_bytes = stream_buffer_bytes(spec, placement)
    if not n_bytes:
        return Footprint()
    return entry("stream", "weights", [Term("buffers", 2, n_bytes)], phases=RUNNING)


def _loading(placement: Placement) -> tuple[Phase, ...]:
    return ("load", "convert") if any(r.converted for r in placement.resident) else ("load",)


def tile_rows(resident: Resident) -> int:
    """Rows of a weight that pass through staging at a time, whole panels: to be converted, or only rearranged."""
    weight = resident.weight
    row_bytes = blocks.row_bytes(weight.format, weight.cols)
    arithmetic = resident.converted or weight.packed_bytes
    rows = CONVERT_ELEMENTS // weight.cols if arithmetic else ARRANGE_BYTES // row_bytes
    whole = lut.ROWS if resident.layout == "lut" else REPACKED_ROWS if weight.packed_bytes else panels.ROWS
    return min(weight.rows, max(1, rows // whole) * whole)


@dataclass(frozen=True)
class Staging:
    """What passes through memory while weights are read.

    Attributes
    ----------
    stored : bytes of the largest tile as the file stores it.
    decoded : weights of the largest tile that is converted; ``widest``: of the longest row of such tiles.
    encoded : bytes of the largest tile that is rearranged after it was converted.
    packed : bytes of the largest matrix that another program packed, and ``repacked`` weights of the largest tile of
        such a matrix.
    """

    stored: int
    decoded: int
    widest: int
    encoded: int
    packed: int
    repacked: int


def staging(placement: Placement) -> Staging:
    """The sizes of everything that is staged."""
    tiles = [(r.weight, tile_rows(r), r) for r in placement.resident if r.staged]
    direct = [(w, rows) for w, rows, _ in tiles if not w.packed_bytes]
    return Staging(
        stored=max((rows * blocks.row_bytes(w.format, w.cols) for w, rows in direct), default=0),
        decoded=max((rows * w.cols for w, rows, r in tiles if r.converted), default=0),
        widest=max((w.cols for w, _, r in tiles if r.converted), default=0),
        encoded=max(
            (rows * blocks.row_bytes(r.format, w.cols) for w, rows, r in tiles if r.converted and r.layout != "rows"),
            default=0,
        ),
        packed=max((w.packed_bytes for w, _, _ in tiles), default=0),
        repacked=max((rows * w.cols for w, rows, _ in tiles if w.packed_bytes), default=0),
    )


def _staging(placement: Placement) -> Footprint:
    sizes = staging(placement)
    phases = _loading(placement)
    blocks_of = {
        "stored tile": sizes.stored,
        "float tile": 4 * sizes.decoded,
        "encoded tile": sizes.encoded,
        "packed matrix": sizes.packed,
    }
    terms = [_block(name, n_bytes) for name, n_bytes in blocks_of.items() if n_bytes]
    found = entry("staging", "workspace", terms, phases=phases) if terms else Footprint()
    if sizes.repacked:
        found += entry(
            "repacker", "workspace", [Term("arrays", sizes.repacked, REPACK_BYTES_PER_WEIGHT)], phases=phases
        )
    if sizes.decoded:
        at_a_time = min(sizes.decoded, max(ENCODED_AT_A_TIME, sizes.widest))
        encoder = [Term("arrays", at_a_time, ENCODE_BYTES_PER_WEIGHT)]
        found += entry("encoder", "workspace", encoder, phases=("convert",))
    return found


def row_layers(spec: ModelSpec, config: EngineConfig) -> tuple[int, ...]:
    """The layers whose keys and values are rows, one for each position that they see."""
    rule = ruled.of(config.kv)
    others = () if rule is None else rule.ruled(spec)
    return tuple(layer for layer in range(spec.n_layers) if layer not in others)


def kv_tensors(spec: ModelSpec, config: EngineConfig) -> list[VirtualTensor]:
    """Keys and values of each of ``row_layers`` in turn, a range for each head. Kernels want ranges one behind the
    other, so that where these start on pages their rows fill pages: the capacity is rounded up to that."""
    row = config.kv.row_bytes(spec.head_dim)
    page = 1 if config.kv_placement is None else config.kv_placement.page_bytes
    capacities = [
        round_up(spec.kv_positions(layer, config.context, config.chunk), page // math.gcd(page, row))
        for layer in row_layers(spec, config)
    ]
    return [VirtualTensor(spec.n_kv_heads, capacity, row) for capacity in capacities for _ in ("keys", "values")]


def _kv(spec: ModelSpec, config: EngineConfig) -> Sequence[Term]:
    tensors = kv_tensors(spec, config)
    if config.kv_placement is not None:
        return config.kv_placement.terms(tensors, config.n_sequences)
    of_one = config.kv.terms(spec, config.context, config.chunk)
    terms = [Term(t.name, config.n_sequences * t.count, t.bytes_each) for t in of_one]
    sizes = [config.n_sequences * t.n_ranges * t.capacity * t.row_bytes for t in tensors]
    rule = ruled.of(config.kv)
    if rule is not None:
        own = rule.layout(spec, config.context, config.chunk).own()
        sizes += config.n_sequences * [array.bytes for array in own]
    return [*terms, _padding(sizes)]


def by_layer_footprint(spec: ModelSpec, config: EngineConfig) -> Footprint:
    """Where prompts pass layer by layer: their hidden states between layers, and what caches use in turn, beside the
    entries; empty where keys and values are rows.

    Raises
    ------
    Incompatible : the cache does not go with the model, or with its placement.
    """
    rule = ruled.of(config.kv)
    if rule is None:
        return Footprint()
    if config.kv_placement is not None:
        raise Incompatible(
            f"{config.kv_placement} can't place {config.kv}: it commits rows by position, and these entries are not"
        )
    if not rule.ruled(spec):
        raise Incompatible(
            f"{config.kv} has nothing to rule: every layer of {spec.name} has a window, which bounds its cache already",
            cure="take a store of rows, such as q8",
        )
    layout = rule.layout(spec, config.context, config.chunk, config.activations)
    arrays = layout.shared(config.n_threads)
    shared = [*(array.term for array in arrays), _padding(array.bytes for array in arrays)]
    states = _block("hidden states", 4 * config.context * spec.d_model)
    return (
        entry("kv workspace", "workspace", shared, phases=RUNNING)
        + entry("prompt", "activations", [states], phases=RUNNING)
        + entry("chooser", "workspace", [layout.passing()], phases=RUNNING)
    )


def adapter_footprint(adapter: AdapterParts | None) -> Footprint:
    """The factors beside matrices, resident throughout, and what reading those of the largest module takes."""
    if adapter is None:
        return Footprint()
    parts_of = [part for _, part in adapter.parts]
    terms = [Term("scales", len(parts_of), lowrank.HEADER_BYTES)]
    n_numbers: Counter[str] = Counter()
    of_module: Counter[str] = Counter()
    for part in parts_of:
        n_numbers[part.kind] += lowrank.n_numbers(part.kind, part.n_bytes)
        of_module[part.source] += lowrank.n_numbers(part.kind, part.n_bytes)
    terms += [Term(f"{kind} numbers", n, lowrank.number_bytes(kind)) for kind, n in n_numbers.items()]
    terms.append(_padding(part.n_bytes for part in parts_of))
    reading = [Term("arrays", max(of_module.values()), ADAPTER_BYTES_PER_NUMBER)]
    return entry("adapter", "adapter", terms, phases=("load", *RUNNING)) + entry(
        "adapter reader", "workspace", reading, phases=("load",)
    )


def _logits(spec: ModelSpec, config: EngineConfig) -> list[Term]:
    n = config.n_logit_rows * spec.vocab_size
    return [Term("logits", n, 4), _padding([n * 4])]


def activations(spec: ModelSpec, config: EngineConfig) -> Arrangement:
    """Where the arrays of a pass lie in one block, by their lifetimes within a layer."""
    return arrange([b for b, _ in activation_buffers(spec, config)])


def activation_buffers(spec: ModelSpec, config: EngineConfig) -> list[tuple[Buffer, int]]:
    """Each array of the largest pass, and its width: float32 (n_rows, width), or bytes of width 0.

    Steps: 0 embed, 1 norm, 2 q k v, 3 rope and append, 4 attention, 5 o, 6 norm and add, 7 norm, 8 gate and up, 9 glu,
    10 down, 11 norm and add, 12 logits.
    """
    n = config.n_rows
    d, ff = spec.d_model, spec.d_ff
    q, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    sandwich = any(w.name.endswith("post_attn_norm") for w in spec.weights)
    arrays = [
        ("x", d, 0, 12),
        ("attn_in", d, 1, 2),
        ("q", q, 2, 4),
        ("k", kv, 2, 3),
        ("v", kv, 2, 3),
        ("attn_out", q, 4, 5),
        ("ffn_in", d, 7, 8),
        ("gate", ff, 8, 10),
        ("up", ff, 8, 9),
        ("head_in", d, 12, 12),
        *((("o", d, 5, 6), ("down", d, 10, 11)) if sandwich else ()),
    ]
    buffers = [(Buffer(name, n * width * 4, start, end), width) for name, width, start, end in arrays]
    buffers.append((Buffer("ids", n * 4, 0, 0), 0))
    row = _streamed_embed_row_bytes(spec, config)
    if row:
        buffers.append((Buffer("embed_rows", n * row, 0, 0), 0))
    return buffers


def _streamed_embed_row_bytes(spec: ModelSpec, config: EngineConfig) -> int:
    """Bytes of one embedding row that is read from disk; 0 when the matrix is resident."""
    if not (config.stream_head and spec.tied):
        return 0
    embed = next(w for w in spec.weights if w.name == "embed")
    return blocks.row_bytes(embed.format, embed.cols)


def _rope(spec: ModelSpec, config: EngineConfig) -> list[Term]:
    """For each kind of rope, frequencies, and the cosines and sines of a pass's positions."""
    terms = [Term("positions", 2 * round_up(config.n_rows, 16), 4)]
    for rope in dict.fromkeys(layer.rope for layer in spec.layers):
        half = rope.dim // 2
        terms.append(Term("frequencies", round_up(half, 16), 4))
        terms.append(Term("cosines and sines", 2 * round_up(config.n_rows * half, 16), 4))
    return terms


def scratch_bytes(spec: ModelSpec, config: EngineConfig, placement: Placement) -> int:
    """The most that one op of a pass needs; ops run one after the other and share it."""
    added = config.adapter.parts if config.adapter is not None else ()
    looks_up = any(r.layout == "lut" for r in placement.resident)
    inputs = (spec.d_model, spec.n_heads * spec.head_dim, spec.d_ff)
    heads, threads = (spec.n_heads, spec.n_kv_heads, spec.head_dim), config.n_threads
    return max(
        *(
            matmul_scratch_bytes(n, cols, config.activations, n_threads=threads, looks_up=looks_up)
            for n in {1, min(lut.FEW_TOKENS, config.n_rows), config.n_rows}
            for cols in inputs
        ),
        *(
            parts.lookup(part.kind).scratch_bytes(n, weight.rows, weight.cols, part.n_bytes, threads)
            for weight in spec.weights
            for part in (*weight.parts, *(part for name, part in added if name == weight.name))
            if part.kind != signs.KIND.name
            for n in (1, config.n_rows)
        ),
        *(
            sign_scratch_bytes(n, cols, rank, n_blocks, config.activations, n_threads=threads)
            for cols, rank, n_blocks in _stacks(spec)
            for n in {1, min(SIGN_TOKENS, config.n_rows), config.n_rows}
        ),
        attention_scratch_bytes(config.chunk, *heads, config.activations, n_threads=threads),
        attention_scratch_bytes(config.n_sequences, *heads, n_threads=threads, each=True),
    )


def _stacks(spec: ModelSpec) -> set[tuple[int, int, int]]:
    """Columns, rank and number of blocks of every matrix of signed blocks, whether they are in memory or not."""
    found = set()
    for weight in spec.weights:
        blocks_of = signed(weight)
        if blocks_of:
            rank = signs.rank_of(weight.rows, weight.cols, blocks_of[0].n_bytes)
            found.add((weight.cols, rank, len(blocks_of)))
    return found
