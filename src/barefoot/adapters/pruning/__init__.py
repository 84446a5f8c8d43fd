"""LoRAM: an adapter trained beside a smaller copy of a model, and put back beside the whole one.

Zhang et al. 2025 (arXiv:2502.13533). The frozen base is most of what (Q)LoRA takes. Its structured variants train on a
copy from which whole units are cut out, and recover the factors for the model as it was:

- a channel i of the feed-forward half: row i of gate and up, column i of down; ff − ceil(ratio × ff) are kept;
- a group of heads: a head of keys and values (their rows), the heads of queries that share it (rows of q), and what
  they feed (columns of o); heads of keys are kept but for int(ratio × their number);
- the hidden size, embeddings, head, norms, the first four layers and the last two stay whole.

Columns that are stored in blocks are kept by whole blocks: as many more units are kept as fill them. Which units those
are is what techniques differ in. Recovered, B has zeros in the rows that were cut, or A in the columns, so that B A
equals the trained product where the copy has entries, and is 0 elsewhere.

Bytes: of a pruned layer 2 d (queries' and keys' channels that are kept) + 3 d (kept channels) numbers and its norms, in
the base's format; and 4 a kept channel and group of indices, which :mod:`barefoot.adapters.pruning.files` stores.

Differs from the paper: its unstructured variants save no memory, and are not here.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from barefoot.adapters import F32
from barefoot.adapters.files import Pair
from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.model import ModelSpec, WeightSpec
from barefoot.core.technique import Technique
from barefoot.ops import blocks

I32 = npt.NDArray[np.int32]
Sizes = Mapping[int, tuple[int, int]]  # heads of keys and channels that are left, by layer
Scores = Mapping[int, tuple[F32, F32]]  # of heads of keys and of channels, by layer


@dataclass(frozen=True)
class Kept:
    """Of a layer: the numbers, ascending, of heads of keys and of channels of the feed-forward half that are left."""

    groups: I32
    channels: I32

    @property
    def n_bytes(self) -> int:
        return self.groups.nbytes + self.channels.nbytes


def stored(weight: WeightSpec) -> str:
    """The blocks in which the file has a matrix."""
    return weight.format


@dataclass(frozen=True)
class Pruning(Technique):
    """The role: ``ratio`` of the units is cut out, in all layers but the ``first`` and the ``last``.

    Raises
    ------
    InvalidInput : a ratio outside [0, 1), or layers below 0.
    """

    ratio: float = 0.65
    first: int = 4
    last: int = 2
    scored: ClassVar[bool] = False  # whether the choice needs scores

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise InvalidInput(f"a ratio of what is cut out must be from 0 to below 1, got {self.ratio}")
        if min(self.first, self.last) < 0:
            raise InvalidInput(f"layers that stay whole must be 0 or more, got {self.first} and {self.last}")

    @abstractmethod
    def kept(self, spec: ModelSpec, sizes: Sizes, seed: int, scores: Callable[[], Scores]) -> dict[int, Kept]:
        """The units that are left, of ``sizes`` by layer; ``scores`` are computed when they are asked for."""

    def layers(self, spec: ModelSpec) -> range:
        """Those that lose something."""
        begin = min(self.first, spec.n_layers)
        return range(begin, max(begin, spec.n_layers - self.last))

    def counts(self, spec: ModelSpec) -> tuple[int, int]:
        """Heads of keys and channels that such a layer keeps, where no blocks ask for more."""
        cut = round(self.ratio * spec.d_ff, 6)  # 0.55 × 100 is above 55
        return spec.n_kv_heads - int(round(self.ratio * spec.n_kv_heads, 6)), spec.d_ff - math.ceil(cut)

    def sizes(self, spec: ModelSpec, layout: Callable[[WeightSpec], str] = stored) -> dict[int, tuple[int, int]]:
        """The same by layer, for a copy whose matrices have these layouts."""
        (n_groups, n_channels), weights = self.counts(spec), {weight.name: weight for weight in spec.weights}
        found = {}
        for layer in self.layers(spec):
            of_o, of_down = (blocks.block_elements(layout(weights[f"layers.{layer}.{role}"])) for role in ("o", "down"))
            groups = _filled(n_groups, _size(spec, "query"), of_o)
            found[layer] = min(groups, spec.n_kv_heads), min(_filled(n_channels, 1, of_down), spec.d_ff)
        return found


ROLE = Pruning


def _filled(n: int, size: int, block: int) -> int:
    """The least number of units of ``size`` entries, ``n`` or more, that fills whole blocks."""
    step = block // math.gcd(size, block)
    return -(-n // step) * step


def pruned_spec(spec: ModelSpec, sizes: Sizes) -> ModelSpec:
    """The copy: the same model with fewer heads of keys and channels in the layers that ``sizes`` has.

    Raises
    ------
    Incompatible : a matrix that loses something is a sum of parts.
    """
    if not sizes:
        return spec
    weights = []
    for weight in spec.weights:
        unit, side = _cut(weight)
        if unit is not None and weight.layer is not None and weight.layer in sizes:
            if weight.parts:
                raise Incompatible(f"{weight.name} is a sum of blocks and other parts, of which nothing can be cut out")
            n_groups, n_channels = sizes[weight.layer]
            n = n_channels if unit == "channel" else n_groups * _size(spec, unit)
            weight = replace(weight, rows=n) if side == "rows" else replace(weight, cols=n)
        weights.append(weight)
    return replace(spec, weights=tuple(weights))


def sizes_of(kept: Mapping[int, Kept]) -> dict[int, tuple[int, int]]:
    """Heads of keys and channels by layer."""
    return {layer: (len(each.groups), len(each.channels)) for layer, each in kept.items()}


_UNITS = {"q": "query", "k": "key", "v": "key", "o": "query", "gate": "channel", "up": "channel", "down": "channel"}


def _cut(weight: WeightSpec) -> tuple[str | None, str]:
    """What the entries of a weight belong to that a copy may lack, and on which side they are."""
    role = weight.name.rpartition(".")[2]
    bias, role = role.endswith("_bias"), role.removesuffix("_bias")
    if bias and role in ("o", "down"):
        return None, ""
    return _UNITS.get(role), "cols" if bias or role in ("o", "down") else "rows"


def _size(spec: ModelSpec, unit: str) -> int:
    """Entries of a group of heads."""
    return spec.head_dim * (spec.n_heads // spec.n_kv_heads if unit == "query" else 1)


def entries(spec: ModelSpec, weight: WeightSpec, kept: Kept) -> tuple[I32 | None, I32 | None]:
    """Rows and columns of a weight (a bias is a row) that are left; None for all."""
    unit, side = _cut(weight)
    if unit is None:
        return None, None
    found = kept.channels if unit == "channel" else expanded(kept.groups, _size(spec, unit))
    return (found, None) if side == "rows" else (None, found)


def expanded(groups: I32, size: int) -> I32:
    """The numbers of all entries of groups of ``size`` neighbours."""
    found: I32 = np.add.outer(groups * np.int32(size), np.arange(size, dtype=np.int32)).reshape(-1)
    return found


def pruned_matrix(w: F32, rows: I32 | None, cols: I32 | None) -> F32:
    """What is left of w (rows, cols), a copy."""
    some = w if rows is None else w[rows]
    return np.ascontiguousarray(some if cols is None else some[:, cols])


def recovered(spec: ModelSpec, pairs: Mapping[str, Pair], kept: Mapping[int, Kept]) -> dict[str, Pair]:
    """Pairs that were trained beside the copy, for the model ``spec`` as it was.

    Raises
    ------
    InvalidInput : a pair's shape is not the copy's.
    """
    weights = {weight.name: weight for weight in spec.weights}
    found = {}
    for name, pair in pairs.items():
        weight = weights[name]
        assert weight.layer is not None
        layer = kept.get(weight.layer)
        rows, cols = (None, None) if layer is None else entries(spec, weight, layer)
        n_rows, n_cols = weight.rows if rows is None else len(rows), weight.cols if cols is None else len(cols)
        if (len(pair.b), pair.a.shape[1]) != (n_rows, n_cols):
            raise InvalidInput(
                f"{name}: a pair of a matrix ({len(pair.b)}, {pair.a.shape[1]}); the pruned one is ({n_rows}, {n_cols})"
            )
        a, b = pair.a, pair.b
        if rows is not None:
            b = np.zeros((weight.rows, pair.rank), np.float32)
            b[rows] = pair.b
        if cols is not None:
            a = np.zeros((pair.rank, weight.cols), np.float32)
            a[:, cols] = pair.a
        found[name] = Pair(a, b, pair.scale)
    return found
