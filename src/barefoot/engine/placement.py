"""Where each weight of a job lives: resident in a block layout, or on disk and passed through two buffers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.model import ModelSpec, PartSpec, WeightSpec
from barefoot.core.units import round_up
from barefoot.engine.config import EngineConfig
from barefoot.ops import blocks, dispatch
from barefoot.weights.formats.stored import Stored

PAGE = 4096  # bytes; direct reads start and end on multiples of it, in the file and in memory
HEAD_TILE_BYTES = 1 << 20  # rows of a streamed head that are read at a time


@dataclass(frozen=True)
class Resident:
    """A weight in memory: its block format and its layout; all layouts take the same bytes. ``parts`` are those of its
    parts that are no part of the model's stack."""

    weight: WeightSpec
    format: str
    layout: dispatch.Layout
    parts: tuple[PartSpec, ...] = ()

    @property
    def converted(self) -> bool:
        """Whether the file stores another format."""
        return self.format != self.weight.format

    @property
    def staged(self) -> bool:
        """Whether rows pass through staging on their way, and are not read into their place."""
        return self.converted or self.layout != "rows" or bool(self.weight.packed_bytes)


@dataclass(frozen=True)
class Placement:
    """The weights of a model, divided.

    Attributes
    ----------
    resident : every weight in memory; vectors are f32.
    streamed : the matrices of each streamed layer, in layer order; they keep the file's blocks.
    head : the matrix of the logits.
    head_tile_rows : its rows that are read at a time; 0 when it is resident.
    """

    resident: tuple[Resident, ...]
    streamed: tuple[tuple[WeightSpec, ...], ...]
    head: WeightSpec
    head_tile_rows: int

    @property
    def embed_on_disk(self) -> bool:
        return bool(self.head_tile_rows) and self.head.name == "embed"


def place(spec: ModelSpec, config: EngineConfig) -> Placement:
    """Divide the weights as ``config`` says.

    Raises
    ------
    InvalidInput : numbers of ``config`` that the model does not allow.
    Incompatible : what can't be done with parts.
    """
    _check(spec, config)
    if spec.stack and config.n_streamed_layers:
        raise Incompatible(
            f"the layers of {spec.name} are stacks of blocks, of which as many are loaded as fit, and are not streamed",
            cure="use --stream-layers 0",
        )
    elastic = set(spec.stack)
    first_streamed = spec.n_layers - config.n_streamed_layers
    head_name = "embed" if spec.tied else "head"
    head = next(w for w in spec.weights if w.name == head_name)
    resident: list[Resident] = []
    streamed: list[list[WeightSpec]] = [[] for _ in range(config.n_streamed_layers)]
    for weight in spec.weights:
        layer = weight.layer
        if weight.group == "norm":
            resident.append(Resident(weight, "f32", "rows"))
        elif layer is not None and layer >= first_streamed:
            streamed[layer - first_streamed].append(weight)
        elif not (config.stream_head and weight is head):
            resident.append(_resident(weight, tuple(p for p in weight.parts if p not in elastic), config))
    tile_rows = max(1, HEAD_TILE_BYTES // blocks.row_bytes(head.format, head.cols)) if config.stream_head else 0
    return Placement(tuple(resident), tuple(map(tuple, streamed)), head, min(tile_rows, head.rows))


def _resident(weight: WeightSpec, parts: tuple[PartSpec, ...], config: EngineConfig) -> Resident:
    format_id = config.weights.get(weight.group, Stored()).layout(weight.format)
    if weight.parts and format_id != weight.format:
        raise Incompatible(
            f"{weight.name} is a sum of parts, which can't be converted to {format_id} when it is loaded",
            cure="leave its weights as they are stored",
        )
    if config.activations != "int8":
        return Resident(weight, format_id, "rows", parts)
    return Resident(weight, format_id, dispatch.choose(format_id, weight.rows, weight.cols, config.layouts), parts)


def _check(spec: ModelSpec, config: EngineConfig) -> None:
    head = next(w for w in spec.weights if w.name == ("embed" if spec.tied else "head"))
    if (config.n_streamed_layers and not spec.streamable) or (config.stream_head and head.packed_bytes):
        raise Incompatible(
            f"{spec.name} keeps its weights in another program's layout, which can't be used from disk as it is",
            cure="write it anew: barefoot export MODEL --to barefoot -o FOLDER",
        )
    names = {weight.name for weight in spec.weights if weight.layer is not None}
    odd = [name for name, _ in config.adapter.parts if name not in names] if config.adapter is not None else []
    if odd:
        raise Incompatible(f"the adapter is of another model: {spec.name} has no {odd[0]} in its layers")
    if config.n_sequences < 1:
        raise InvalidInput(f"n_sequences must be at least 1, got {config.n_sequences}")
    for name, got, low, high in (
        ("context", config.context, 1, config.kv.longest(spec)),
        ("chunk", config.chunk, 1, config.context),
        ("n_logits", config.n_logits, 1, config.chunk),
        ("n_streamed_layers", config.n_streamed_layers, 0, spec.n_layers),
    ):
        if not low <= got <= high:
            raise InvalidInput(f"{name} must be {low} to {high} for {spec.name}, got {got}")


def stored_bytes(weight: WeightSpec) -> int:
    """Bytes of a weight in its file, without padding: of its blocks and parts."""
    return sum(piece_bytes(weight, weight.parts))


def piece_bytes(weight: WeightSpec, parts: Sequence[PartSpec]) -> tuple[int, ...]:
    """Bytes of a weight's blocks, and of each of these parts of it."""
    return (weight.rows * blocks.row_bytes(weight.format, weight.cols), *(part.n_bytes for part in parts))


def item_bytes(weights: Iterable[WeightSpec]) -> int:
    """Bytes of a buffer that holds these matrices read directly from a file, wherever they start in it.

    In the worst case each is read by itself, with up to a page before it and its end rounded to a page.
    """
    return sum(round_up(n_bytes, PAGE) + PAGE for w in weights for n_bytes in piece_bytes(w, w.parts))


def stream_buffer_bytes(spec: ModelSpec, placement: Placement) -> int:
    """Bytes of one of the two buffers: the largest streamed layer or head tile. 0 when nothing is streamed."""
    sizes = [item_bytes(layer) for layer in placement.streamed]
    if placement.head_tile_rows:
        tile = placement.head_tile_rows * blocks.row_bytes(placement.head.format, placement.head.cols)
        sizes.append(round_up(tile, PAGE) + PAGE)
    return max(sizes, default=0)
