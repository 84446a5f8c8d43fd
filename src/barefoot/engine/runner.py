"""The torch-free engine: a decoder run token by token and chunk by chunk, in exactly the planned bytes.

A prompt passes through the layers ``chunk`` tokens at a time, one sequence after the other; a decode step passes one
token of each sequence that takes part, so that the matrices are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.core.measure import release_free_memory
from barefoot.core.model import ModelSpec, WeightSpec
from barefoot.engine import beside
from barefoot.engine.arena import Arena
from barefoot.engine.buffers import Buffers, Views
from barefoot.engine.by_layer import ByLayer
from barefoot.engine.config import EngineConfig
from barefoot.engine.files import WeightFiles
from barefoot.engine.footprint import PASSING, RUNNING, footprint, scratch_bytes
from barefoot.engine.key_order import read_orders
from barefoot.engine.kv_memory import KVMemory
from barefoot.engine.placement import Placement, place, stream_buffer_bytes
from barefoot.engine.programs import Layer, Recorder
from barefoot.engine.sequences import Sequences
from barefoot.engine.stacks import Stacks, n_stacked
from barefoot.engine.stream import Item, Stream, arrange_item, byte_range, layer_item
from barefoot.engine.weights import Progress, Sum, load
from barefoot.io.inventory import Checkpoint
from barefoot.kv import ruled
from barefoot.ops import PackedWeight, blocks

if TYPE_CHECKING:
    from barefoot.engine.snapshots import Snapshots

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
AllLogits = Callable[[int, F32], None]  # index in the prompt of the first row, logits (n, vocab) valid during the call


class Engine:
    """A model loaded under a configuration, and the keys and values of its sequences, numbered from 0 on.

    Parameters
    ----------
    checkpoint : the opened weights that ``spec`` was made from.
    progress : called with (bytes done, bytes in all) while resident weights are read.

    Raises
    ------
    InvalidInput, Incompatible : ``config`` does not go with the model; nothing was allocated.
    CorruptFile : the weights can't be read.
    """

    def __init__(
        self, checkpoint: Checkpoint, spec: ModelSpec, config: EngineConfig, *, progress: Progress | None = None
    ) -> None:
        self.spec, self.config = spec, config
        self.footprint = footprint(spec, config)
        self.arena = Arena(self.footprint)
        self._sequences = Sequences(spec, config)
        self._rule = ruled.of(config.kv)
        self._tensors = checkpoint.tensors
        self._placement = place(spec, config)
        self._files = WeightFiles(checkpoint.paths)
        ops.set_threads(config.n_threads)
        try:
            self._matrices, self._vectors = load(
                spec, self._placement, self._tensors, checkpoint.linears, self._files, self.arena, progress
            )
            self.arena.release("staging")
            self._beside = {} if config.adapter is None else beside.load(spec, config.adapter, self.arena)
            self._key_orders = read_orders(checkpoint, spec, config.kv, self.arena)
            release_free_memory()  # what converting took must not stay beside keys and values
            self.stacks = self._stack()
            self._allocate()
        except BaseException:
            self._files.close()
            raise
        self._check_bytes()

    def _check_bytes(self) -> None:
        running = (e for phase in RUNNING for e in self.footprint.select(phase=phase))
        planned = {e.owner: e.bytes for e in running if e.owner not in PASSING}
        assert self.arena.used_by_owner() == planned

    def _stack(self) -> Stacks | None:
        """The residual blocks that come and go, as many of them as the configuration says."""
        if not self.spec.stack:
            return None
        found = {name: m.stack for name, m in self._matrices.items() if m.stack is not None}
        stacks = Stacks(self.spec, self._tensors, self._files, self.arena, found)
        stacks.resize(n_stacked(self.spec, self.config))
        return stacks

    def _allocate(self) -> None:
        spec, config, placement = self.spec, self.config, self._placement
        self._buffers = Buffers(spec, config, self.arena)
        self._logits = self.arena.floats("logits", config.n_logit_rows, spec.vocab_size)
        self._scratch = self.arena.take("scratch", scratch_bytes(spec, config, placement))
        self.kv = KVMemory(spec, config, self.arena)
        self._layers = [self._layer(i) for i in range(spec.n_layers)]
        first_streamed = spec.n_layers - len(placement.streamed)
        recorder = Recorder(spec, config, self._buffers.views(config.n_rows), self._scratch)
        self._by_layer: ByLayer | None = None
        if self._rule is not None:
            self._by_layer = ByLayer(spec, config, self._rule, self.arena, self._buffers, recorder, self._layers)
        else:
            self._resident_layers = recorder.whole(self._layers[:first_streamed])
            self._streamed_layers = [(layer, recorder.whole([layer])) for layer in self._layers[first_streamed:]]
        self._stream, self._n_tiles = None, 0
        if placement.streamed or placement.head_tile_rows:
            n_bytes = stream_buffer_bytes(spec, placement)
            buffers = self.arena.take("stream", n_bytes), self.arena.take("stream", n_bytes)
            self._stream = Stream(self._files, self._items(placement), buffers)

    def _items(self, placement: Placement) -> list[Item]:
        """Streamed layers, then tiles of the head: the order of a pass."""
        sizes = [self._files.size(shard) for shard in range(self._files.n_shards)]
        items = [layer_item(weights, self._tensors, sizes) for weights in placement.streamed]
        if placement.head_tile_rows:
            head = placement.head
            tensor = self._tensors[head.source]
            for first, n_rows in _tiles(head.rows, placement.head_tile_rows):
                piece = (tensor.shard, *byte_range(head, tensor, first, n_rows))
                items.append(arrange_item([piece], sizes, join=False))
                self._n_tiles += 1
        return items

    def _layer(self, index: int) -> Layer:
        spec = self.spec
        prefix = f"layers.{index}."
        first_streamed = spec.n_layers - len(self._placement.streamed)
        streamed: dict[str, tuple[WeightSpec, Sum]] = {}
        matrices: Mapping[str, Sum] = self._matrices
        if index >= first_streamed:
            specs = self._placement.streamed[index - first_streamed]
            matrices = {w.name: Sum.of(w, w.format, "rows") for w in specs}
            streamed = {w.name: (w, matrices[w.name]) for w in specs}
        matrix = {name: matrices[prefix + name].plus(self._beside.get(prefix + name)) for name in _MATRICES}
        keys, values = self.kv.arrays.get(index, (None, None))
        return Layer(
            spec=spec.layers[index],
            rope=self._buffers.tables.ropes.index(spec.layers[index].rope),
            capacity=0 if keys is None else keys.shape[2],
            keys=keys,
            values=values,
            qkv=[matrix["q"], matrix["k"], matrix["v"]],
            o=[matrix["o"]],
            gate_up=[matrix["gate"], matrix["up"]],
            down=[matrix["down"]],
            vectors={n.removeprefix(prefix): v for n, v in self._vectors.items() if n.startswith(prefix)},
            key_order=None if self._key_orders is None else self._key_orders[index],
            streamed=tuple(streamed.values()),
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and close the files. The arena goes with the engine."""
        self.kv.close()
        if self._stream is not None:
            self._stream.close()
        self._files.close()

    def resize(self, n_stacked: int) -> None:
        """Have so many parts of the model's stack in memory from now on: what is new is read, what goes is given back.

        Keys and values stay; tokens to come see those that the earlier weights made. ``config`` and ``footprint`` are
        those of the new size.

        Raises
        ------
        InvalidInput : the model's stack has fewer parts.
        CorruptFile : a part can't be read; the engine is as it was.
        Incompatible : it is fewer, and this system takes no memory back; the engine is as it was.
        """
        config = replace(self.config, n_stacked=n_stacked)
        planned = footprint(self.spec, config)
        if self.stacks is not None:
            self.stacks.resize(n_stacked)
        self.config, self.footprint = config, planned
        self._check_bytes()

    # --- the sequences ----------------------------------------------------------------------------------------------

    @property
    def positions(self) -> tuple[int, ...]:
        """How many tokens each sequence has."""
        return self._sequences.lengths

    @property
    def position(self) -> int:
        """How many tokens the first sequence has."""
        return self._sequences.length(0)

    @property
    def remaining(self) -> int:
        """How many more tokens the context of the first sequence holds."""
        return self.config.context - self.position

    def reset(self, sequence: int = 0) -> None:
        """Forget the sequence."""
        self._sequences.reset(sequence)
        self.kv.free(sequence)
        if self._by_layer is not None:
            self._by_layer.caches[sequence].clear()

    def fork(self, sequence: int, into: int) -> None:
        """Let the sequence ``into`` go on from where ``sequence`` is, in place of what it had.

        Raises
        ------
        InvalidInput : no such sequence, or both are the same.
        PoolExhausted : there is no room for both; all is as before.
        """
        self._sequences.check_fork(sequence, into)
        lengths = list(self.positions)
        lengths[into] = lengths[sequence]
        self.kv.grow(lengths)
        self._sequences.fork(sequence, into)
        if self._by_layer is not None:
            self._by_layer.caches[sequence].fork(self._by_layer.caches[into])
        for array in (array for pair in self.kv.arrays.values() for array in pair):
            n = min(lengths[sequence], array.shape[2])
            array[into, :, :n] = array[sequence, :, :n]

    def truncate(self, n: int, sequence: int = 0) -> None:
        """Forget all but the first ``n`` tokens of the sequence.

        Raises
        ------
        InvalidInput : ``n`` is not 0 to its length, a window layer has already overwritten what token n would see, or a
            policy has sent entries away since; nothing has changed.
        """
        if n == 0:
            self.reset(sequence)
            return
        if self._by_layer is not None:
            self._sequences.check_truncate(n, sequence)
            self._by_layer.caches[sequence].trim(n)
        self._sequences.truncate(n, sequence)

    def save(self, path: Path, sequence: int = 0) -> None:
        """Write the sequence's keys and values to a file. Nothing is there before all of it is.

        Raises
        ------
        InvalidInput : no such sequence, or it is empty.
        """
        self._snapshots().save(path, sequence)

    def load(self, path: Path, sequence: int = 0) -> None:
        """Go on from where a saved sequence was, in place of what this one had.

        Raises
        ------
        InvalidInput : no such sequence, or the context is too small for it; nothing has changed.
        Incompatible : the file was taken of another model or store; nothing has changed.
        CorruptFile : the file is none of these, and nothing has changed, or it is damaged, and the sequence is empty.
        PoolExhausted : the placement's pool has no pages for it; the sequence is empty.
        """
        snapshots = self._snapshots()
        found = snapshots.open(path)
        self.reset(sequence)
        try:
            self._make_room({sequence: found.n_tokens})
            snapshots.load(found, sequence)
        except BaseException:
            self.reset(sequence)
            raise

    def _snapshots(self) -> Snapshots:
        from barefoot.engine.snapshots import Snapshots, identity  # most runs save nothing

        caches = [] if self._by_layer is None else self._by_layer.caches
        factors = {name: part.buffer for name, part in self._beside.items() if part.buffer is not None}
        same = identity(self.spec, self.config, self._vectors, factors)
        return Snapshots(same, self.config.context, self._sequences, self.kv, caches)

    def prefill(
        self,
        ids: Sequence[int],
        progress: Progress | None = None,
        *,
        sequence: int = 0,
        all_logits: AllLogits | None = None,
    ) -> F32:
        """Append ``ids`` to a sequence, ``chunk`` at a time; the logits of the last one, float32 (vocab,), valid until
        the next call.

        ``progress`` gets (tokens done, tokens in all); ``all_logits`` every token's logits, ``n_logits`` at a time.

        Raises
        ------
        InvalidInput : no ids, an unknown id or sequence, or more than the context holds; nothing was appended.
        PoolExhausted : the placement's pool has no pages for them; nothing was appended.
        CorruptFile : streamed weights can't be read; the chunks before are kept. Where layers pass one by one (a policy
            rules the entries), the sequence is empty then, as it is after any other interruption.
        """
        self._sequences.check(ids, sequence)
        if self._by_layer is not None:
            return self._prefill_by_layer(self._by_layer, ids, progress, sequence, all_logits)
        self._make_room({sequence: len(ids)})
        for start in range(0, len(ids), self.config.chunk):
            part = ids[start : start + self.config.chunk]
            last = start + len(part) == len(ids)
            views = self._append(part, sequence, logits_follow=last or all_logits is not None)
            if all_logits is not None:
                self._give_logits(views, start, all_logits)
            if progress is not None:
                progress(start + len(part), len(ids))
        return self._last(views, views.n - 1)

    def _give_logits(self, views: Views, start: int, all_logits: AllLogits) -> None:
        for first in range(0, views.n, self.config.n_logits):
            all_logits(start + first, self._head(views, first, min(views.n, first + self.config.n_logits)))

    def _prefill_by_layer(
        self,
        by_layer: ByLayer,
        ids: Sequence[int],
        progress: Progress | None,
        sequence: int,
        all_logits: AllLogits | None,
    ) -> F32:
        """Every layer takes the whole prompt before the next one does, so that one layer at a time holds all of it."""
        chunk, position, n_layers = self.config.chunk, self._sequences.length(sequence), self.spec.n_layers
        by_layer.begin(sequence, len(ids))
        self._sequences.overwrite({sequence: len(ids)})
        try:
            for start in range(0, len(ids), chunk):
                views = self._begin(ids[start : start + chunk])
                by_layer.put(start, views)
            for index in range(n_layers):
                self._enter(index, logits_follow=True)
                for start in range(0, len(ids), chunk):
                    if start and self._n_tiles and all_logits is not None and index + 1 == n_layers:
                        self._enter(index, logits_follow=True)  # the head has passed through its buffer
                    views = by_layer.take(start, min(chunk, len(ids) - start))
                    by_layer.chunk(index, sequence, views, position + start)
                    by_layer.put(start, views)
                    if all_logits is not None and index + 1 == n_layers:
                        self._give_logits(views, start, all_logits)
                by_layer.settle(index, sequence)
                if progress is not None:
                    progress(len(ids) * (index + 1) // n_layers, len(ids))
        except BaseException:
            self.reset(sequence)  # some layers have taken the prompt, others not
            raise
        self._sequences.grow({sequence: len(ids)})
        return self._last(views, views.n - 1)

    def decode(self, token: int, sequence: int = 0) -> F32:
        """Append one token; the logits after it, float32 (vocab,), valid until the next call. Errors as in prefill."""
        if self._by_layer is not None:
            row: F32 = self.decode_batch({sequence: token})[0]
            return row
        self._sequences.check((token,), sequence)
        self._make_room({sequence: 1})
        return self._last(self._append((token,), sequence, logits_follow=True), 0)

    def decode_batch(self, tokens: Mapping[int, int]) -> F32:
        """Append one token to each of several sequences, in one pass that reads the weights once.

        ``tokens`` are the ids by sequence. Returns the logits after them, float32 (len(tokens), vocab), in the order of
        ``tokens``, valid until the next call. With ``activations="float32"`` a row is what decoding that sequence alone
        gives; with int8 the inputs are rounded alike, and sums may be taken in another order.

        Raises
        ------
        InvalidInput, PoolExhausted : as in prefill; nothing was appended to any sequence.
        CorruptFile : streamed weights can't be read; nothing was appended, unless it was the logits' matrix. Where
            layers pass one by one, these sequences are empty then.
        """
        for sequence, token in tokens.items():
            self._sequences.check((token,), sequence)
        if not tokens:
            raise InvalidInput("no tokens were given; a batch needs at least one")
        self._make_room(dict.fromkeys(tokens, 1))
        views = self._begin(list(tokens.values()))
        sequences = list(tokens)
        positions = [self._sequences.length(s) for s in sequences]
        self._buffers.tables.fill_each(positions)
        grown = dict.fromkeys(sequences, 1)
        if self._by_layer is not None:
            self._decode_by_layer(self._by_layer, views, sequences, positions)
            self._sequences.grow(grown)
            return self._head(views, 0, views.n)
        self._run_layers(lambda program: program.run_each(sequences, positions), grown, logits_follow=True)
        return self._head(views, 0, views.n)

    def _decode_by_layer(
        self, by_layer: ByLayer, views: Views, sequences: Sequence[int], positions: Sequence[int]
    ) -> None:
        by_layer.check(sequences)
        self._sequences.overwrite(dict.fromkeys(sequences, 1))
        try:
            for index in range(self.spec.n_layers):
                self._enter(index, logits_follow=True)
                by_layer.step(index, sequences, positions, views)
            by_layer.stepped(sequences)
        except BaseException:
            for sequence in sequences:
                self.reset(sequence)  # some layers have taken the token, others not
            raise

    def _enter(self, index: int, *, logits_follow: bool) -> None:
        """Have a layer's weights at hand."""
        item = index - (self.spec.n_layers - len(self._placement.streamed))
        if item >= 0:
            last = index + 1 == self.spec.n_layers
            self._bind(self._layers[index], item, 0 if last and not (logits_follow and self._n_tiles) else item + 1)

    # --- one pass ---------------------------------------------------------------------------------------------------

    def _append(self, ids: Sequence[int], sequence: int, *, logits_follow: bool) -> Views:
        """Pass tokens of one sequence through all layers, leaving the residual stream in ``x``."""
        views, position = self._begin(ids), self._sequences.length(sequence)
        self._buffers.tables.fill(position, views.n)
        grown = {sequence: views.n}
        self._run_layers(lambda program: program.run(views.n, position, sequence), grown, logits_follow=logits_follow)
        return views

    def _make_room(self, grown: Mapping[int, int]) -> None:
        """Have memory for so many tokens more of these sequences."""
        self.kv.grow([n + grown.get(sequence, 0) for sequence, n in enumerate(self.positions)])

    def _begin(self, ids: Sequence[int]) -> Views:
        """The arrays of a pass over ``ids``, their embeddings in ``x``."""
        if ops.n_threads() != self.config.n_threads:  # another engine of this process uses another number
            ops.set_threads(self.config.n_threads)
        views = self._buffers.views(len(ids))
        self._embed(ids, views)
        return views

    def _run_layers(self, run: Callable[[ops.Program], None], grown: Mapping[int, int], *, logits_follow: bool) -> None:
        """Pass ``x`` through all layers by ``run``, after which the sequences have ``grown`` by so many tokens each."""
        self._sequences.overwrite(grown)
        run(self._resident_layers)
        for item, (layer, program) in enumerate(self._streamed_layers):
            last = item + 1 == len(self._streamed_layers)
            self._bind(layer, item, 0 if last and not (logits_follow and self._n_tiles) else item + 1)
            run(program)
        self._sequences.grow(grown)

    def _bind(self, layer: Layer, item: int, then: int) -> None:
        assert self._stream is not None
        buffer = self._stream.get(item, then)
        spans = iter(self._stream.spans(item))
        for spec, weight in layer.streamed:
            rows, *parts = (buffer[slice(*next(spans))] for _ in range(1 + len(spec.parts)))
            weight.bind(rows, spec.parts, parts)

    def _embed(self, ids: Sequence[int], views: Views) -> None:
        scale = self.spec.embed_scale
        if not self._placement.embed_on_disk:
            views.ids[:] = ids
            ops.embed(views.ids, self._matrices["embed"].blocks, views.x, scale=scale)
            return
        weight = self._placement.head
        tensor = self._tensors[weight.source]
        rows = self._buffers.embed_rows
        size = blocks.row_bytes(weight.format, weight.cols)
        for i, token in enumerate(ids):
            offset, _ = byte_range(weight, tensor, token, 1)
            self._files.read(tensor.shard, offset, rows[i * size : (i + 1) * size])
            views.ids[i] = i
        packed = PackedWeight(weight.format, views.n, weight.cols, rows[: views.n * size])
        ops.embed(views.ids, packed, views.x, scale=scale)

    def _matmul(self, x: F32, weights: list[PackedWeight], outs: list[F32]) -> None:
        ops.matmul(x, weights, outs, activations=self.config.activations, scratch=self._scratch)

    # --- logits -----------------------------------------------------------------------------------------------------

    def _last(self, views: Views, row: int) -> F32:
        logits: F32 = self._head(views, row, row + 1)[0]
        return logits

    def _head(self, views: Views, first: int, stop: int) -> F32:
        """Logits (stop - first, vocab) of tokens of the present pass."""
        spec, placement = self.spec, self._placement
        n = stop - first
        inputs, logits = views.head_in[:n], self._logits[:n]
        ops.rmsnorm(views.x[first:stop], self._vectors["norm"], spec.norm_eps, inputs)
        if placement.head_tile_rows:
            self._head_from_disk(inputs, logits)
        else:
            self._matmul(inputs, [self._matrices[placement.head.name].blocks], [logits])
        if spec.logit_softcap:
            np.divide(logits, np.float32(spec.logit_softcap), out=logits)
            np.tanh(logits, out=logits)
            np.multiply(logits, np.float32(spec.logit_softcap), out=logits)
        return logits

    def _head_from_disk(self, inputs: F32, logits: F32) -> None:
        assert self._stream is not None
        head = self._placement.head
        first_item = len(self._placement.streamed)
        for tile, (first, n_rows) in enumerate(_tiles(head.rows, self._placement.head_tile_rows)):
            item = first_item + tile
            buffer = self._stream.get(item, 0 if tile + 1 == self._n_tiles else item + 1)
            ((start, stop),) = self._stream.spans(item)
            weight = PackedWeight(head.format, n_rows, head.cols, buffer[start:stop])
            for row in range(len(inputs)):  # a slice of one row is contiguous
                self._matmul(inputs[row : row + 1], [weight], [logits[row : row + 1, first : first + n_rows]])


_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def _tiles(n_rows: int, tile_rows: int) -> list[tuple[int, int]]:
    """(first row, rows) of each tile."""
    return [(first, min(tile_rows, n_rows - first)) for first in range(0, n_rows, tile_rows)]
