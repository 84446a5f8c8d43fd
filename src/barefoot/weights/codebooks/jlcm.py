"""JLCM: codebooks for groups of like rows, learned together with the mapping of weights to codewords.

Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings (Yvinec et al. 2023,
arXiv:2309.17361). A matrix W (M, N) becomes codes I of b bits and levels of the group g(i) = ⌊i G / M⌋ of row i
(:mod:`barefoot.weights.codebooks.ordering` puts like rows together)::

    ŵ_ij = C[g(i), I_ij]            n_groups codebooks of 2^b codewords      ("codebooks")
    ŵ_ij = s_g(i) C[I_ij]           one codebook, n_groups scales            ("scales")

Codewords, scales and mappings are learned by gradient descent on what a block of layers computes, with inputs from the
prefix that is already compressed. The gradient of a codeword is the sum of g = ∂L/∂ŵ over its weights. Each weight has
a logit for every codeword, 0 for the current one, and moves to the largest::

    θ_k = u sign(C_k - ŵ) φ(|C_k - ŵ| / δ) - max(0, |v - C_k| - |v - ŵ|) / δ      δ the mean gap of the codewords

u, the pressure on the weight, follows -g by Adam; v is where the weight started, or ŵ once it has moved, with u = 0.
JLCM's point is φ: the plain straight-through gradient has φ(d) = d, which grows with the distance, so that weights jump
to the far end of the codebook. A φ that *falls*, here 1 / (1 + d), makes the search *proximal*.

**Stored**: ⌈M N b / 8⌉ + 2 · 2^b G bytes ("scales": 2 · 2^b + 2 G), all numbers f16, and where no consumer can follow
the order of the rows ⌈M ⌈log2 G⌉ / 8⌉ for the group of each. Learning takes v, u and two moments, 16 bytes a weight.

*Differs from the paper*: the exact expression of its φ could not be read, this one has the stated property; that all
logits of a weight share one pressure and one Adam is ours (an Adam for each would undo φ, being free of scale).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput
from barefoot.weights import bitstream
from barefoot.weights.arrays import Array, namespace
from barefoot.weights.codebooks.clusters import clusters
from barefoot.weights.codebooks.ordering import group_of_rows

if TYPE_CHECKING:
    import torch

F32 = npt.NDArray[np.float32]
Shared = Literal["codebooks", "scales"]
NUMBER_BYTES = 2
LOOKS = 9


@dataclass(frozen=True)
class Jlcm:
    """``per_group`` : what each group of rows has of its own. The rates of ``n_steps`` of Adam are such that a steady
    gradient takes a codeword ``travel`` standard deviations of the matrix far, and the pressure on a weight
    ``mapping_travel`` gaps between codewords; 0 keeps the mapping frozen."""

    bits: int = 3
    n_groups: int = 8
    per_group: Shared = "codebooks"
    n_steps: int = 200
    travel: float = 0.05
    mapping_travel: float = 0.4

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise InvalidInput(f"jlcm: codes of 1 to 8 bits, got {self.bits}")
        if self.n_groups < 1 or self.n_steps < 0 or self.travel < 0 or self.mapping_travel < 0:
            raise InvalidInput("jlcm: at least one group, and no negative steps or travels")
        if self.per_group not in get_args(Shared):
            raise InvalidInput(f"jlcm: per_group is codebooks or scales, got {self.per_group!r}")

    def n_bytes(self, shape: tuple[int, int], absorbed: bool = True) -> int:
        """Bytes of a stored matrix; ``absorbed``: its consumer follows the order of the rows."""
        n_levels = 1 << self.bits
        own = n_levels * self.n_groups if self.per_group == "codebooks" else n_levels + self.n_groups
        group_map = 0 if absorbed else bitstream.n_bytes(shape[0], (self.n_groups - 1).bit_length())
        return bitstream.n_bytes(shape[0] * shape[1], self.bits) + NUMBER_BYTES * own + group_map


@dataclass(frozen=True)
class Mapped:
    """``codes`` (M, N); ``table`` (G, K) ascending, with ``scales`` (G,) one (1, K). numpy, or torch when learned."""

    codes: Array
    table: Array
    scales: Array | None = None

    def levels(self) -> Array:
        """The codewords of each group, (G, K)."""
        return self.table if self.scales is None else self.scales[:, None] * self.table

    def weights(self) -> Array:
        """(M, N)"""
        levels = self.levels()
        rows = group_of_rows(len(self.codes), len(levels))
        # Codes of row i count from the first codeword of its group.
        first = namespace(self.codes).asarray(rows * levels.shape[1])[:, None]
        return levels.reshape(-1)[self.codes + first]


def initial(knobs: Jlcm, weight: F32, importance: F32 | None = None) -> Mapped:
    """Clusters of each group's weights, elements counting as ``importance`` (cols,), such as mean squared inputs.

    ``weight`` (M, N) float32, its rows in the order that is to be stored.
    """
    rows = group_of_rows(len(weight), knobs.n_groups)
    mass = None if importance is None else np.broadcast_to(importance, weight.shape)
    n_levels = 1 << knobs.bits
    if knobs.per_group == "codebooks":
        parts = [rows == g for g in range(knobs.n_groups)]
        table = np.stack([clusters(weight[p], n_levels, None if mass is None else mass[p]) for p in parts])
        return _nearest(weight, Mapped(np.empty(0), table))
    size = np.sqrt(np.bincount(rows, (weight.astype(np.float64) ** 2).mean(axis=1)) / np.bincount(rows))
    scales = np.where(size > 0, size, 1).astype(np.float32)
    table = clusters(weight / scales[rows][:, None], n_levels, mass)[None]
    return _nearest(weight, Mapped(np.empty(0), table, scales))


def stored(mapped: Mapped) -> Mapped:
    """As it will be read back: numbers in f16."""
    scales = None if mapped.scales is None else mapped.scales.astype(np.float16).astype(np.float32)
    return Mapped(mapped.codes, mapped.table.astype(np.float16).astype(np.float32), scales)


def pack(knobs: Jlcm, mapped: Mapped) -> tuple[npt.NDArray[np.uint8], ...]:
    """The bytes, as streams: codes, numbers. With the map of the rows, if any, ``n_bytes`` of them."""
    numbers = [part for part in (mapped.table, mapped.scales) if part is not None]
    flat = np.concatenate([part.astype(np.float16).reshape(-1) for part in numbers])
    return bitstream.pack(mapped.codes, knobs.bits), flat.view(np.uint8)


def unpack(knobs: Jlcm, shape: tuple[int, int], codes: npt.NDArray[np.uint8], numbers: npt.NDArray[np.uint8]) -> Mapped:
    """The inverse of ``pack``.

    Raises
    ------
    CorruptFile : a stream of the wrong size.
    """
    n_levels = 1 << knobs.bits
    n_tables = knobs.n_groups if knobs.per_group == "codebooks" else 1
    found = bitstream.unpack(codes, knobs.bits, shape[0] * shape[1]).reshape(shape).astype(np.int64)
    n_numbers = n_tables * n_levels + (knobs.n_groups if knobs.per_group == "scales" else 0)
    # Through the stream, which checks the size.
    values = bitstream.unpack(numbers, 16, n_numbers).view(np.float16).astype(np.float32)
    table, scales = values[: n_tables * n_levels].reshape(n_tables, n_levels), values[n_tables * n_levels :]
    return Mapped(found, table, scales if knobs.per_group == "scales" else None)


def _nearest(weight: F32, mapped: Mapped) -> Mapped:
    """Every weight to the nearest codeword of its row's group."""
    levels = mapped.levels()
    rows = group_of_rows(len(weight), len(levels))
    codes = np.empty(weight.shape, np.int64)
    for g, own in enumerate(levels):
        codes[rows == g] = np.searchsorted((own[1:] + own[:-1]) / 2, weight[rows == g])
    return replace(mapped, codes=codes)


Weighting = Callable[[Array], Array]


def proximal(distance: Array) -> Array:
    """φ of JLCM: near codewords first. ``distance`` in gaps."""
    return 1 / (1 + distance)


def straight_through(distance: Array) -> Array:
    """φ that JLCM replaces: far codewords first."""
    return distance


def moved(codes: Array, levels: Array, place: Array, pressure: Array, weighting: Weighting) -> Array:
    """The code of the largest logit for each weight.

    ``codes`` (M, N), ``levels`` (M, K) of each row, ``place`` v and ``pressure`` u (M, N).
    """
    xp = namespace(levels)
    n_levels = levels.shape[1]
    gap = (levels[:, -1:] - levels[:, :1]) / max(n_levels - 1, 1)
    gap = xp.where(gap > 0, gap, xp.ones_like(gap))
    now = xp.take_along_axis(levels, codes, 1) if xp is np else xp.gather(levels, 1, codes)
    best, largest = codes, xp.zeros_like(place)
    here = xp.abs(place - now)
    for k in range(n_levels):
        step = levels[:, k : k + 1] - now
        farther = xp.clip(xp.abs(place - levels[:, k : k + 1]) - here, 0, None)
        logit = (pressure * xp.sign(step) * weighting(xp.abs(step) / gap) - farther / gap) * (codes != k)
        best = xp.where(logit > largest, xp.zeros_like(codes) + k, best)
        largest = xp.where(logit > largest, logit, largest)
    return best


def learn(
    knobs: Jlcm,
    weights: Mapping[str, F32],
    start: Mapping[str, Mapped],
    forward: Callable[[dict[str, torch.Tensor], torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    batch: int = 256,
    seed: int = 0,
    weighting: Weighting = proximal,
) -> dict[str, Mapped]:
    """Codewords and mappings of the matrices of one block, learned together.

    The best of some looks at the whole calibration set, the first of them before any step: never worse than the start.

    Parameters
    ----------
    knobs : steps and travels; groups are those of ``start``.
    weights, start : matrices by name, and where to begin (:func:`initial`).
    forward : what the block computes of the matrices by name and a batch of inputs.
    inputs, targets : (n, …) calibration inputs from the compressed prefix, and what the original block made of its own.
    """
    import torch

    learned = {name: _Learned(knobs, weights[name], m) for name, m in start.items()}
    optimizer = torch.optim.Adam([group for m in learned.values() for group in m.parameters()])
    generator = torch.Generator().manual_seed(seed)
    best, least = dict(start), float("inf")

    def look() -> None:
        nonlocal best, least
        found = {name: m.result() for name, m in learned.items()}
        error = _error(found, forward, inputs, targets, batch)
        if error < least:
            best, least = found, error

    for step in range(knobs.n_steps):
        if step % max(knobs.n_steps // LOOKS, 1) == 0:
            look()
        picked = torch.randint(0, len(inputs), (min(batch, len(inputs)),), generator=generator)
        for group in optimizer.param_groups:
            # Falls to 0, and adds up to the travel.
            group["lr"] = group["travel"] * 2 / knobs.n_steps * (1 - step / knobs.n_steps)
        optimizer.zero_grad()
        current = {name: m.weights() for name, m in learned.items()}
        loss = ((forward(current, inputs[picked]) - targets[picked]) ** 2).mean()
        torch.autograd.backward(loss)
        for name, m in learned.items():
            m.pressure.grad = current[name].grad
        optimizer.step()
        for m in learned.values():
            m.move(weighting)
    look()
    return best


def _error(found: Mapping[str, Mapped], forward: Any, inputs: torch.Tensor, targets: torch.Tensor, batch: int) -> float:
    import torch

    with torch.no_grad():
        weights = {name: torch.from_numpy(m.weights()) for name, m in found.items()}
        parts = zip(torch.split(inputs, batch), torch.split(targets, batch), strict=True)
        return sum(float(((forward(weights, x) - y) ** 2).sum()) for x, y in parts)


class _Learned:
    """One matrix while it is learned, in units of its standard deviation, so that one rate serves every matrix."""

    def __init__(self, knobs: Jlcm, weight: F32, start: Mapped) -> None:
        import torch

        self.knobs = knobs
        self.unit = float(weight.std()) or 1.0
        self.rows = torch.from_numpy(group_of_rows(len(weight), len(start.levels())))
        self.codes = torch.from_numpy(start.codes.copy())
        self.place = torch.from_numpy(weight / self.unit)
        self.pressure = torch.zeros_like(self.place)
        self.table = torch.from_numpy(start.table / (self.unit if start.scales is None else 1)).requires_grad_()
        self.scales = None if start.scales is None else torch.from_numpy(start.scales / self.unit).requires_grad_()

    def parameters(self) -> list[dict[str, Any]]:
        numbers = [p for p in (self.table, self.scales) if p is not None]
        return [
            {"params": numbers, "travel": self.knobs.travel},
            {"params": [self.pressure], "travel": self.knobs.mapping_travel},
        ]

    def weights(self) -> torch.Tensor:
        weights: torch.Tensor = Mapped(self.codes, self.table, self.scales).weights() * self.unit
        weights.retain_grad()
        return weights

    def move(self, weighting: Weighting) -> None:
        """Codewords stay in order; weights move and start anew."""
        import torch

        with torch.no_grad():
            self.table.copy_(torch.sort(self.table, dim=1).values)
            levels = Mapped(self.codes, self.table, self.scales).levels()[self.rows]
            codes = moved(self.codes, levels, self.place, self.pressure, weighting)
            has_moved = codes != self.codes
            self.place = torch.where(has_moved, torch.gather(levels, 1, codes), self.place)
            self.pressure[has_moved] = 0
            self.codes = codes

    def result(self) -> Mapped:
        scales = None if self.scales is None else (self.scales.detach() * self.unit).numpy()
        table = self.table.detach() * (self.unit if scales is None else 1)
        return stored(Mapped(self.codes.numpy(), table.numpy(), scales))
