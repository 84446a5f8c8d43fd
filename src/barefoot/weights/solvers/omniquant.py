"""omniquant — learned clipping and learned equivalent transformations, by the error of a whole layer.

OmniQuant (Shao et al. 2024, arXiv:2308.13137). Weights are not trained; what is learned are the parameters of their
rounding, layer by layer, with the quantized stream as inputs and the full-precision stream as targets (equation 1).

Learned weight clipping (LWC, equation 2): the levels of each group reach from σ(l) min(w) to σ(u) max(w), so

    s = (σ(u) max(w) − σ(l) min(w)) / (2^b − 1),   ŵ = s × level((w − m) / s) + m,   m = σ(l) min(w)

with logits l = u = 4 at first (σ = 0.98). Learned equivalent transformation (LET, equations 3 to 5): what flows from
one part of the layer to the next is divided by factors, and the matrices that read it are multiplied by them, as
:mod:`barefoot.weights.folds` does it: from the norms to the matrices behind them, from v to o, and from q to k. At
first a factor is max|activation|^α / max|weight|^(1−α); from q to k it is 1. In the end all factors lie in norms,
biases and matrices: the model has no operation more than before.

What differs from the paper. Minimums are f16 numbers, not whole numbers of steps; on symmetric grids and tables the
larger end decides. Factors are exp(θ), so they stay positive, shared by the channels that RoPE turns together and by
heads that share keys and values. No shifts: RMS norms have no bias to take them up. The loss of the paper's 2-bit runs,
‖F(W, X) − Ŷ‖² + ‖F(W, X_q) − Ŷ‖², is that of their mean as the target, but for a constant (``augmented``).

Bytes: nothing is stored beside what the format stores. While a layer is learned, each of its weights takes its rounded
value and the gradient of that, with ``transform`` 4 more; each group 72; and there are the activations of ``batch``
windows: :meth:`LayerSolver.terms`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from barefoot.core.errors import InvalidInput
from barefoot.core.ledger import Term
from barefoot.ops.grids import F32
from barefoot.weights import folds
from barefoot.weights.solvers import LayerProblem, LayerSolution, LayerSolver, Precision, Solution, Steps

if TYPE_CHECKING:
    from torch import Tensor

FIRST_LOGIT = 4.0
LEAST = 1e-5  # of the magnitudes that first factors are made of


@dataclass(frozen=True)
class OmniQuant(LayerSolver, name="omniquant", papers=(13,), status="experimental"):
    """``transform`` learns factors too, as the paper does where activations are rounded to ``activation_bits`` (32:
    they are not). ``epochs`` over the text, ``batch`` windows a step."""

    start: str = "range"
    epochs: int = 20
    batch: int = 1
    rate: float = 0.01
    transform: bool = False
    transform_rate: float = 0.005
    alpha: float = 0.5
    activation_bits: int = 32
    augmented: bool = False
    seed: int = 0
    precision: Precision = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1 or self.batch < 1 or min(self.rate, self.transform_rate) < 0 or not 0 <= self.alpha <= 1:
            raise InvalidInput(
                "omniquant: expected epochs and batch of at least 1, rates of at least 0 and alpha from 0 to 1, "
                f"got {self}"
            )
        if not 2 <= self.activation_bits <= 32:
            raise InvalidInput(f"omniquant: activation_bits must lie between 2 and 32, got {self.activation_bits}")

    def _learned(self, n_weights: int, n_groups: int, largest: int) -> tuple[Term, ...]:
        ends = Term("ends of groups", n_groups, 18 * 4)
        if not self.transform:
            return (ends,)
        return ends, Term("transformed weights", n_weights, 4), Term("gradient of one of them", largest, 4)

    def refine(self, problem: LayerProblem, steps: Steps | None = None) -> LayerSolution:
        import torch

        from barefoot.weights.training.blockwise import Schedule, learn
        from barefoot.weights.training.layer import exact_outputs, per_token, unchanged

        rounding = per_token(self.activation_bits) if self.activation_bits < 32 else unchanged
        student = Clipped(problem, self)
        if self.augmented:
            targets = (problem.targets + exact_outputs(problem)) / np.float32(2)
            problem = replace(problem, targets=targets)
        compute = getattr(torch, self.precision)
        schedule = Schedule(self.epochs, self.batch, self.seed)
        errors = learn(problem, student, schedule, steps, compute=compute, rounding=rounding)
        return LayerSolution(student.matrices(), student.vectors(), errors)


class Clipped:
    """What is learned: logits of the ends of each group, and logarithms of the factors of each fold."""

    def __init__(self, problem: LayerProblem, settings: OmniQuant) -> None:
        import torch

        from barefoot.weights.training.grids import Levels

        self._settings, self._grids = settings, problem.grids
        self._heads = folds.Heads.of(problem.spec, problem.layer)
        self._exact = {role: torch.from_numpy(w) for role, w in problem.weights.items()}
        self._levels = {role: Levels.of(grid) for role, grid in problem.grids.items()}
        self._ends = {
            role: torch.full((2, problem.weights[role].size // grid.group, 1), FIRST_LOGIT, requires_grad=True)
            for role, grid in problem.grids.items()
        }
        self._factors = first_factors(problem, settings.alpha) if settings.transform else {}

    def groups(self) -> Sequence[tuple[list[Tensor], float]]:
        clipping = (list(self._ends.values()), self._settings.rate)
        return (
            [clipping, (list(self._factors.values()), self._settings.transform_rate)] if self._factors else [clipping]
        )

    def weights(self, dtype: Any) -> Mapping[str, Tensor]:
        layer = self.transformed()
        rounded = {
            role: self._levels[role].rounded(*self._clipped(role, layer), dtype=dtype).reshape(layer[role].shape)
            for role in self._grids
        }
        return {**layer, **rounded}

    def matrices(self) -> dict[str, Solution]:
        """What is stored."""
        import torch

        with torch.no_grad():
            layer = self.transformed()
            return {
                role: self._levels[role].solution(*self._clipped(role, layer), tuple(layer[role].shape))
                for role in self._grids
            }

    def vectors(self) -> dict[str, F32]:
        """Norms and biases that took up factors."""
        layer = self.transformed()
        return {r: w.detach().numpy() for r, w in layer.items() if w.ndim == 1 and w is not self._exact[r]}

    def transformed(self) -> Mapping[str, Tensor]:
        """The layer with all factors folded into it, not rounded."""
        layer: Mapping[str, Tensor] = self._exact
        for site, logs in self._factors.items():
            factors = logs.exp()
            if site == "v":
                layer = folds.values_to_output(layer, self._heads, factors)
            elif site == "q":
                layer = folds.queries_to_keys(layer, self._heads, factors)
            else:
                layer = folds.norm_to_matrices(layer, site, factors)
        return layer

    def _clipped(self, role: str, layer: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The groups of a matrix, with their scales and minimums."""
        groups = layer[role].reshape(-1, self._grids[role].group)
        low, high = self._ends[role].sigmoid()
        scale, minimum = self._levels[role].spanning(
            low * groups.amin(dim=1, keepdim=True), high * groups.amax(dim=1, keepdim=True)
        )
        return groups, scale, minimum


def first_factors(problem: LayerProblem, alpha: float) -> dict[str, Tensor]:
    """Logarithms of the factors of every fold that only changes what the problem may change, by where they begin."""
    import torch

    heads = folds.Heads.of(problem.spec, problem.layer)
    weights = {role: torch.from_numpy(w) for role, w in problem.weights.items()}
    peaks = activation_peaks(problem)

    def first(activation: Tensor, *readers: Tensor) -> Tensor:
        weight = torch.stack([w.abs().amax(dim=0) for w in readers]).amax(dim=0).reshape(activation.shape)
        return alpha * activation.clamp(min=LEAST).log() - (1 - alpha) * weight.clamp(min=LEAST).log()

    found = {}
    for norm, readers in folds.READERS.items():
        if all(role in problem.grids for role in readers):
            place = "attn_in" if norm == "attn_norm" else "ffn_in"
            found[norm] = first(peaks[place], *(weights[role] for role in readers))
    if {"v", "o"} <= problem.grids.keys():
        shape = (heads.n_kv_heads, heads.n_heads // heads.n_kv_heads, heads.head_dim)
        shared = peaks["attn_out"].reshape(shape).amax(dim=1)
        o = weights["o"].reshape(-1, *shape).abs().amax(dim=(0, 2))
        found["v"] = first(shared, o.reshape(1, -1))
    normed = "q_norm" in problem.weights
    if normed or {"q", "k"} <= problem.grids.keys():
        found["q"] = torch.zeros(1 if normed else heads.n_kv_heads, heads.n_free)
    return {site: logs.requires_grad_() for site, logs in found.items()}


def activation_peaks(problem: LayerProblem) -> dict[str, Tensor]:
    """The largest magnitude of each channel of a matrix's inputs, by place, on the quantized stream."""
    import torch

    from barefoot.weights.training.layer import exact_outputs, layer_function

    peaks: dict[str, Tensor] = {}

    def seen(place: str, x: Tensor) -> Tensor:
        peak = x.abs().amax(dim=tuple(range(x.ndim - 1)))
        peaks[place] = torch.maximum(peaks[place], peak) if place in peaks else peak
        return x

    exact_outputs(problem, layer_function(problem, rounding=seen))
    return peaks
