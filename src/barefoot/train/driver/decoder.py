"""A decoder whose weights are frozen as they are stored, with adapters that learn."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from barefoot.adapters import Beside
from barefoot.adapters.driver.adapted import AdaptedLinear
from barefoot.adapters.files import Pair
from barefoot.adapters.pruning import Kept, entries, pruned_matrix, pruned_spec, recovered, sizes_of
from barefoot.core.model import ModelSpec, Rope, WeightGroup, WeightSpec
from barefoot.engine.adapter_files import save_adapter
from barefoot.engine.rope import inverse_frequencies
from barefoot.engine.rows import PIECE_BYTES, decode, read_rows
from barefoot.io.inventory import Checkpoint
from barefoot.ops import blocks
from barefoot.train import MicroBatch
from barefoot.train.driver.cross_entropy import cross_entropy
from barefoot.train.driver.elementwise import rms_norm
from barefoot.train.driver.layer import LayerPass, Product, StreamLayer
from barefoot.train.driver.recompute import recompute
from barefoot.train.footprint import Activations, Compute, format_of
from barefoot.train.losses import Loss
from barefoot.weights.formats import WeightFormat
from barefoot.weights.formats.stored import Stored
from barefoot.weights.module import DoubleLinear, PackedEmbedding, PackedLinear
from barefoot.weights.recycling import Recycler

TYPES: Mapping[Compute, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Turns = Mapping[Rope, tuple[Tensor, Tensor]]


class Frozen(nn.Module):
    """A decoder as it is stored: nothing in it learns.

    Parameters
    ----------
    formats : of the matrices by group; those that aren't named stay as they are stored.
    compute : type of products and attention.
    kept : by layer, what is left of it where the base is a smaller copy, cut out of the model while it is read
        (:mod:`barefoot.adapters.pruning`); ``spec`` is the whole model's, and the attribute the copy's.
    resident : whether all layers are in memory; else each is from ``load_layer`` to ``drop_layer``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        *,
        formats: Mapping[WeightGroup, WeightFormat] | None = None,
        compute: Compute = "float32",
        kept: Mapping[int, Kept] | None = None,
        resident: bool = True,
    ) -> None:
        super().__init__()
        self._model, self._whole, self._kept = spec, {w.name: w for w in spec.weights}, kept or {}
        spec = pruned_spec(spec, sizes_of(self._kept))
        self.spec, self.compute = spec, TYPES[compute]
        self._checkpoint, self._formats = checkpoint, formats or {}
        weights = {w.name: w for w in spec.weights}
        self.embed = self._embedding(weights["embed"])
        self.head = self.embed if spec.tied else self._head(weights["head"])
        self.norm = self._vector(weights["norm"])
        self._vectors: list[dict[str, Tensor]] = [{} for _ in spec.layers]
        self.layers = nn.ModuleList(nn.ModuleDict() for _ in spec.layers)
        for index in range(spec.n_layers if resident else 0):
            self.load_layer(index)

    def load_layer(self, index: int) -> None:
        """Read a layer."""
        for weight in self.spec.weights:
            if weight.layer == index:
                role, own = weight.name.rpartition(".")[2], cast("Any", self.layers[index])
                if weight.group == "norm":
                    self._vectors[index][role] = self._vector(weight)
                else:
                    own[role] = self._linear(weight)

    def drop_layer(self, index: int) -> None:
        """Let go of it."""
        cast("nn.ModuleDict", self.layers[index]).clear()
        self._vectors[index].clear()

    def _format(self, weight: WeightSpec) -> WeightFormat:
        return format_of(weight, self._formats)

    def _stored(self, weight: WeightSpec) -> Iterator[npt.NDArray[np.uint8]]:
        """Rows of a matrix as the file has them, those that the base has, some at a time."""
        whole = self._whole[weight.name]
        left, _ = self._left(whole)
        step = max(1, PIECE_BYTES // (4 * whole.cols))
        for first in range(0, whole.rows, step):
            some = read_rows(self._checkpoint, whole, first, min(step, whole.rows - first))
            yield some if left is None else some[left[(left >= first) & (left < first + step)] - first]

    def _decoded(self, weight: WeightSpec) -> Iterator[npt.NDArray[np.float32]]:
        """The same as numbers, and of the columns those that the base has."""
        whole = self._whole[weight.name]
        _, cols = self._left(whole)
        for some in self._stored(weight):
            yield pruned_matrix(decode(whole.format, some, whole.cols), None, cols)

    def _fill(self, into: Tensor, weight: WeightSpec, layout: str) -> None:
        """Rows of a matrix in blocks of ``layout``."""
        whole = self._whole[weight.name]
        as_they_are = layout == whole.format and self._left(whole)[1] is None
        encode = functools.partial(blocks.encode, layout)
        rows, done = into.numpy(), 0
        for some in self._stored(weight) if as_they_are else map(encode, self._decoded(weight)):
            rows[done : done + len(some)] = some
            done += len(some)

    def _left(self, weight: WeightSpec) -> tuple[npt.NDArray[np.int32] | None, npt.NDArray[np.int32] | None]:
        """Rows and columns of a weight of the whole model that the base has; None for all."""
        kept = None if weight.layer is None else self._kept.get(weight.layer)
        return (None, None) if kept is None else entries(self.spec, weight, kept)

    def _original(self, weight: WeightSpec) -> npt.NDArray[np.float32]:
        """A matrix (rows, cols) as the file has it."""
        found: npt.NDArray[np.float32] = self._linear(weight, Stored()).dense().numpy()
        return found

    def _linear(self, weight: WeightSpec, format: WeightFormat | None = None) -> PackedLinear:
        added = {part.label: (part.kind, part.n_bytes) for part in weight.parts}
        format = format or self._format(weight)
        made: PackedLinear = format.linear(weight.rows, weight.cols, weight.format, added=added)
        if isinstance(made, DoubleLinear):
            made.fill(self._decoded(weight))
        else:
            self._fill(made.weight, weight, made.format)
        for part in weight.parts:
            self._checkpoint.read_into(part.source, made.get_buffer(f"weight+{part.label}").numpy())
        return made

    def _embedding(self, weight: WeightSpec) -> PackedEmbedding:
        layout = self._format(weight).layout(weight.format)
        made = PackedEmbedding(layout, weight.rows, weight.cols, scale=self.spec.embed_scale)
        self._fill(made.weight, weight, layout)
        return made

    def _head(self, weight: WeightSpec) -> PackedLinear | PackedEmbedding:
        return self._linear(weight)

    def _vector(self, weight: WeightSpec) -> Tensor:
        whole = self._whole[weight.name]
        values = decode(whole.format, read_rows(self._checkpoint, whole), whole.cols)
        values = pruned_matrix(values, *self._left(whole)).reshape(-1)
        if self.spec.norm_plus_one and weight.name.endswith("norm"):
            values += 1
        return torch.from_numpy(values)

    def embedded(self, batch: MicroBatch) -> Tensor:
        """What the first layer meets, float32 (1, N, d_model)."""
        return self.embed(torch.from_numpy(batch.ids)).float()[None]

    def layer(self, index: int, turns: Turns, lengths: tuple[int, ...]) -> LayerPass:
        turn, products = turns[self.spec.layers[index].rope], cast("Mapping[str, Product]", self.layers[index])
        function = StreamLayer(self.spec, index, *turn, compute=self.compute, lengths=lengths, products=products)
        return LayerPass(function, self._vectors[index])

    def normed(self, x: Tensor) -> Tensor:
        """Behind the last norm, float32 (N, d_model)."""
        return rms_norm(x.flatten(0, 1), self.norm, self.spec.norm_eps)

    def logits(self, x: Tensor) -> Tensor:
        """Of what is behind the last norm, float32 (N, vocabulary), by tiles of the head."""
        tiles = [x @ self.head.dense(first, last).T for first, last in self.head.tiles()]
        found, cap = torch.cat(tiles, dim=-1), self.spec.logit_softcap
        return cap * torch.tanh(found / cap) if cap else found


class Decoder(Frozen):
    """With adapters beside its matrices.

    Parameters
    ----------
    seed : of the adapters' first values.
    activations : ``"recompute"`` keeps each layer's input and passes the layer again in the backward pass; ``"keep"``
        keeps all that it needs.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        adapter: Beside,
        *,
        formats: Mapping[WeightGroup, WeightFormat] | None = None,
        seed: int = 0,
        activations: Activations = "recompute",
        compute: Compute = "float32",
        kept: Mapping[int, Kept] | None = None,
    ) -> None:
        super().__init__(checkpoint, spec, formats=formats, compute=compute, kept=kept)
        self.adapter, self.activations, self.recycler = adapter, activations, Recycler()
        ranks, random = adapter.ranks_of(self.spec, self._original), torch.Generator().manual_seed(seed)
        for weight in self.spec.weights:
            if weight.name in ranks:
                assert weight.layer is not None
                own, role = cast("nn.ModuleDict", self.layers[weight.layer]), weight.name.rpartition(".")[2]
                own[role] = adapter.module(
                    cast("PackedLinear", own[role]), weight, ranks[weight.name], self._original, random
                )

    def hidden(self, batch: MicroBatch) -> Tensor:
        """Behind the last norm, float32 (N, d_model)."""
        x, turns = self.embedded(batch), turns_of(self.spec, batch.lengths)
        for index, layer in enumerate(self.layers):
            function = self.layer(index, turns, batch.lengths)
            if self.activations == "recompute" and torch.is_grad_enabled():
                learned = [parameter for parameter in layer.parameters() if parameter.requires_grad]
                x = recompute(function, x, learned, draws=self.training and self.adapter.dropout > 0)
            else:
                x = function(x)
        return self.normed(x)

    def loss(self, batch: MicroBatch, loss: Loss) -> Tensor:
        """The mean over the tokens that predict something."""
        labels = torch.from_numpy(batch.labels)
        cap, taught = self.spec.logit_softcap, batch.taught
        return cross_entropy(loss, self.hidden(batch), self.head, labels, softcap=cap, taught=taught)

    # --- what learns ---

    def _adapted(self) -> Iterator[tuple[str, AdaptedLinear]]:
        """Modules with an adapter, by their matrix's name."""
        for index, layer in enumerate(self.layers):
            for role, module in cast("nn.ModuleDict", layer).items():
                if isinstance(module, AdaptedLinear):
                    yield f"layers.{index}.{role}", module

    def adapters(self) -> dict[str, nn.Parameter]:
        """What learns, by the names that the adapter gives it."""
        return {f"{name}.{letter}": p for name, module in self._adapted() for letter, p in module.learned.items()}

    def settled(self) -> dict[str, Tensor]:
        """What has learned, and no longer does; by the same names."""
        return {f"{name}.{letter}": x for name, module in self._adapted() for letter, x in module.settled.items()}

    def advance(self, step: int, steps: int) -> dict[str, slice]:
        """Have only that learn which is to behind ``step`` of ``steps``: what rows are left of those that lost some."""
        return {
            f"{name}.{letter}": rows
            for name, module in self._adapted()
            for letter, rows in module.advance(step, steps).items()
        }

    def pairs(self) -> dict[str, Pair]:
        """What the adapters add to the matrices as the file has them, by name."""
        return {name: module.pair() for name, module in self._adapted()}

    def write(self, folder: Path, base: str | None = None) -> None:
        """Write what the adapters add, as PEFT's folder for the whole model."""
        save_adapter(folder, self._model, recovered(self._model, self.pairs(), self._kept), base=base)


def turns_of(spec: ModelSpec, lengths: tuple[int, ...], first: int = 0) -> Turns:
    """Cosines and sines of each token's position in its document, for each rotation; documents begin at ``first``."""
    position = np.concatenate([np.arange(first, first + n, dtype=np.float32) for n in lengths])
    found = {}
    for rope in {layer.rope for layer in spec.layers}:
        angles = position[:, None] * inverse_frequencies(rope, first + max(lengths))
        factor = np.float32(rope.attention_factor)
        found[rope] = torch.from_numpy(np.cos(angles) * factor), torch.from_numpy(np.sin(angles) * factor)
    return found
