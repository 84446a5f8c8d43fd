"""qat — training with rounding in the loop, one layer at a time: codes, scales and minimums move together.

Quantization-aware training with the straight-through estimator (Gholami et al. 2021, arXiv:2103.13630, section III.G:
rounding's derivative taken as 1 inside the range and 0 outside), on one layer after the other against the layer of full
precision, as in the first phase of EfficientQAT (Chen et al. 2024, arXiv:2407.11062): all weights, scales and minimums
of the layer are learned, with the quantized stream as inputs and the full-precision stream as targets.

    ŵ = s × level(u) + m,  u = (w − m) / s        minimize the mean of (F(W, X) − F(Ŵ, X_q))²

What differs from both. A weight is learned as its position t between levels, w = s₀ t + m₀ with the scale and minimum
at the start, and scales and minimums relative to s₀, so that one learning rate suits every group and number of bits. It
begins where ``start`` left off: t is the weight's own position, moved no further than to within ``margin`` of a step of
the level that ``start`` chose, so that the first loss is that of ``start`` and undoing one of its choices takes a
short way. Minimums are stored in f16, not as whole numbers of steps. Uniform grids and tables of levels will do.

Bytes: while a layer is learned, for each of its weights 4 (t) + 4 (gradient) + 8 (moments of Adam), the rounded matrix
in the type of the products and its gradient; for each group 32; and the activations of ``batch`` windows. Nothing is
stored beside what the format stores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from barefoot.core.errors import InvalidInput
from barefoot.weights.solvers import LayerProblem, LayerSolution, LayerSolver, Precision, Solution, Steps

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Qat(LayerSolver, name="qat", papers=(14,), status="experimental"):
    """``epochs`` over the text, ``batch`` windows a step; learning rates in steps of a group, and relative to them."""

    start: str = "gptq"
    epochs: int = 2
    batch: int = 4
    rate: float = 0.004
    scale_rate: float = 0.001
    margin: float = 0.49
    seed: int = 0
    precision: Precision = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1 or self.batch < 1 or self.rate < 0 or self.scale_rate < 0 or not 0 <= self.margin < 0.5:
            raise InvalidInput(
                f"qat: expected epochs and batch of at least 1, rates of at least 0 and 0 <= margin < 0.5, got {self}"
            )

    def refine(self, problem: LayerProblem, steps: Steps | None = None) -> LayerSolution:
        import torch

        from barefoot.weights.training.blockwise import Schedule, learn

        student = Positions(problem, self)
        compute = getattr(torch, self.precision)
        errors = learn(problem, student, Schedule(self.epochs, self.batch, self.seed), steps, compute=compute)
        return LayerSolution(student.solutions(), {}, errors)


class Positions:
    """What is learned of each matrix: positions t (groups, group), and relative changes of scale and minimum."""

    def __init__(self, problem: LayerProblem, settings: Qat) -> None:
        import torch

        from barefoot.weights.training.grids import Levels

        self._problem, self._settings = problem, settings
        self._fixed = {r: torch.from_numpy(w) for r, w in problem.weights.items() if r not in problem.grids}
        self._learned: dict[str, tuple[Any, ...]] = {}
        for role, grid in problem.grids.items():
            levels, start = Levels.of(grid), problem.starts[role]
            params = torch.from_numpy(start.params.reshape(-1, start.params.shape[-1]))
            scale = params[:, :1].clone()
            minimum = params[:, 1:].clone() if levels.has_minimum else torch.zeros_like(scale)
            codes = torch.from_numpy(start.codes.reshape(-1, grid.group)).int()
            level, weight = levels.of_codes(codes), torch.from_numpy(problem.weights[role])
            step = torch.where(scale == 0, torch.ones_like(scale), scale)
            t = (weight.reshape(-1, grid.group) - minimum) / step
            near = settings.margin * levels.narrowest
            t = torch.clamp(t, level - near, level + near).requires_grad_()
            change, shift = torch.zeros_like(scale, requires_grad=True), torch.zeros_like(scale, requires_grad=True)
            self._learned[role] = (levels, (step, minimum), scale, t, change, shift)

    def groups(self) -> Sequence[tuple[list[Tensor], float]]:
        weights = [t for *_, t, _, _ in self._learned.values()]
        params = [p for *_, change, shift in self._learned.values() for p in (change, shift)]
        return (weights, self._settings.rate), (params, self._settings.scale_rate)

    def weights(self, dtype: Any) -> Mapping[str, Tensor]:
        rounded = {}
        for role, (levels, origin, _, t, _, _) in self._learned.items():
            rounded[role] = levels.rounded(t, *self._params(role), origin, dtype).reshape(
                self._problem.weights[role].shape
            )
        return {**self._fixed, **rounded}

    def _params(self, role: str) -> tuple[Tensor, Tensor]:
        """Scale and minimum as they are now, not rounded to f16."""
        _, (step, minimum), scale, _, change, shift = self._learned[role]
        return scale * (1 + change), minimum + step * shift

    def solutions(self) -> dict[str, Solution]:
        """What is stored."""
        return {
            role: levels.solution(t, *self._params(role), self._problem.weights[role].shape, origin)
            for role, (levels, origin, _, t, _, _) in self._learned.items()
        }
