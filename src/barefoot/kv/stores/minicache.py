"""minicache — two layers share the directions of their keys and values; each has its own lengths.

MiniCache: KV Cache Compression in Depth Dimension for Large Language Models (Liu et al. 2024, arXiv:2405.14366). From
the middle of a model on, adjacent layers' keys (and values) of one token point in similar directions. Layers l - 1 and
l make a pair; of each entry and key head, for keys and values alike:

    n = ‖x‖,  u = x / n,  Ω = arccos(u_(l-1) · u_l)
    e = [sin((1 - t) Ω) u_(l-1) + sin(t Ω) u_l] / sin Ω        stored once, a unit vector
    x̂_(l-1) = n_(l-1) e,  x̂_l = n_l e                          stored: the four numbers n

The larger ``t``, the nearer to the deeper layer. Both layers turn a key by the same angles (RoPE), which commutes with
this, so turned keys are merged. Nothing is restored to be read: attention multiplies by e, and its scores, or the
weights of the values, by n. Entries whose directions differ most (Ω, the larger one of key and value) stay as they are
in both layers: ``retain`` of all. A layer's prompt is attended to whole; the pair is merged behind its second layer.
What is decoded comes as it is; when ``recent`` of it have come, as many are merged, those that differ least of all.

The wrapped store holds the directions, ``minicache > q8``, and the layers before the first pair, which is the first one
from ``start`` on with an even number of layers from there. A policy chooses once for a pair, from the sum of what both
layers' attention gives.

Bytes of a pair with H key heads, S slots, of which E = ⌊retain S⌋ + recent are exact, rows of r bytes and d channels:
H (S - E) (2 r + 16) for directions and numbers, H E (8 d + 4) for exact rows and their angles, 4 H S for positions; 4 H
S more where attention mass is kept, 2 for each part of strikes. In passing, a second layer's prompt is staged.

*Differs from the paper*: a count stays exact, the most different of all, whose room is there anyway, not what lies
within 5 % of the range of angles; each key head has its own, keys with their values. Merging waits for ``recent``
tokens, not for one. Numbers are float32. Directions are quantized by token. What was merged on account of entries that
are taken back stays merged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.kv.stores import KVStore, Wrapper
from barefoot.kv.stores.f16 import HalfStore

if TYPE_CHECKING:
    from barefoot.kv.storage import Storage

F32 = npt.NDArray[np.float32]

SMALL = 1e-3  # sines of angles that are interpolated linearly


class Merged(NamedTuple):
    """Rows of two layers as one.

    Attributes
    ----------
    direction : float32 (…, d).
    lengths : float32 (2, …), of the first layer's and the second's: times ``direction`` they are what is left of them.
    """

    direction: F32
    lengths: F32


@dataclass(frozen=True)
class MiniCache(Wrapper, name="minicache", papers=(49,)):
    inner: KVStore = field(default_factory=HalfStore)
    start: int | None = None  # half of the layers that see all positions
    t: float = 0.6
    retain: float = 0.05
    recent: int = 16

    def __post_init__(self) -> None:
        if self.start is not None and self.start < 0:
            raise InvalidInput(f"minicache: start must be 0 or more, got {self.start}")
        if not 0 <= self.t <= 1:
            raise InvalidInput(f"minicache: t must lie between 0 and 1, got {self.t}")
        if not 0 <= self.retain < 1:
            raise InvalidInput(f"minicache: retain must be 0 or more and less than 1, got {self.retain}")
        if self.recent < 1:
            raise InvalidInput(f"minicache: recent must be 1 or more, got {self.recent}")
        if not self.inner.rows:
            raise Incompatible(
                f"minicache can't keep directions in {self.inner}: they come one by one, in no order of positions",
                cure="let it wrap rows, such as q8",
            )

        if self.inner.sorts_keys:
            raise Incompatible(
                f"minicache can't keep directions in {self.inner}: channels would have another order in either layer",
                cure="let it wrap rows without sorting",
            )

    def storage(self) -> type[Storage]:
        from barefoot.kv.by_depth import ByDepth

        return ByDepth

    def groups(self, n_layers: int) -> tuple[range, ...]:
        first = self.n_single(n_layers)
        pairs = (range(layer, layer + 2) for layer in range(first, n_layers, 2))
        return (*super().groups(first), *pairs)

    def n_single(self, n_layers: int) -> int:
        """Layers before the first pair, of those that see all positions."""
        start = n_layers // 2 if self.start is None else min(self.start, n_layers)
        return start + (n_layers - start) % 2

    def n_retained(self, n_slots: int) -> int:
        """Entries of a pair's key head that stay exact, of so many."""
        return int(self.retain * n_slots)

    def n_exact(self, n_slots: int) -> int:
        """Exact entries of a pair's key head that there is room for."""
        return max(1, min(n_slots - 1, self.n_retained(n_slots) + self.recent))

    def n_merged(self, n_slots: int) -> int:
        """Merged entries of a pair's key head that there is room for, 1 or more."""
        return max(1, n_slots - self.n_exact(n_slots))

    def merge(self, first: F32, second: F32) -> Merged:
        """Rows (…, d) of a pair's layers as one direction each, and both lengths."""
        return slerp(first, second, self.t)

    def bits_per_number(self, head_dim: int) -> float:
        """Of a cache half of whose layers are in pairs."""
        single = self.inner.bits_per_number(head_dim)
        return (1 - self.retain) * (0.75 * single + 0.5 * 32 / head_dim) + self.retain * (0.5 * single + 0.5 * 16)


def angles(first: F32, second: F32) -> F32:
    """Ω between rows (…, d), 0 to π; 0 to a row of zeros, which has any direction."""
    (ours, n), (theirs, m) = _units(first), _units(second)
    found = np.arccos(np.clip(np.einsum("...d,...d->...", ours, theirs), -1, 1))
    return np.where((n == 0) | (m == 0), np.float32(0), found)


def slerp(first: F32, second: F32, t: float) -> Merged:
    """The direction at ``t`` of the way from ``first`` to ``second``, rows (…, d), on the unit sphere.

    It is the linear one where the angle is about 0 or π, and the other row's where one is zero; of opposite rows half
    way it is the second's.
    """
    (ours, n), (theirs, m) = _units(first), _units(second)
    angle = angles(ours, theirs)
    sine = np.sin(angle)
    linear = sine < SMALL
    sine[linear] = 1
    weights = (np.where(linear, part, np.sin(part * angle) / sine) for part in (1 - t, t))
    before, behind = (np.asarray(weight, np.float32)[..., None] for weight in weights)
    direction, length = _units(before * ours + behind * theirs)
    lost = length < SMALL
    direction[lost] = np.where(m[..., None] == 0, ours, theirs)[lost]
    return Merged(direction, np.stack([n, m]))


def _units(rows: F32) -> tuple[F32, F32]:
    """Rows of length 1, and the lengths that they had; rows of zeros stay."""
    lengths: F32 = np.sqrt(np.einsum("...d,...d->...", rows, rows))
    units = np.divide(rows, lengths[..., None], out=np.zeros_like(rows), where=lengths[..., None] != 0)
    return units, lengths
