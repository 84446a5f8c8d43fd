"""Solvers: which codes and parameters a matrix gets on the grid of its format.

A solver sees one matrix at a time, with what calibration knows about its inputs, and works on plain arrays. Formats
don't know solvers, and solvers know formats only through :class:`barefoot.ops.grids.Grid`. A *layer solver* solves
matrices as another solver does, and then refines all of a layer's together, by what the layer makes of the text.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from barefoot import ops
from barefoot.core.errors import InvalidInput, unknown_name
from barefoot.core.ledger import Term
from barefoot.core.model import ModelSpec
from barefoot.core.registry import techniques
from barefoot.core.technique import Technique
from barefoot.ops.grids import F32, U8, Grid, Table, Uniform
from barefoot.weights.training import TILE, require_torch

Knowledge = Literal["nothing", "squares", "hessian", "drift"]


@dataclass(frozen=True)
class Inputs:
    """What calibration measured of a matrix's inputs x, float32 (n, cols).

    ``squares`` : mean of x², (cols,). ``hessian`` : mean of x xᵀ, (cols, cols), or None where no solver wants it.
    ``drift`` : with x' what the exact model has there, mean of (x' − x) xᵀ, (cols, cols). ``missing`` : with y and y'
    what the matrix makes of them, or the hidden states with that added, mean of (y' − y) xᵀ, (rows, cols). One of them,
    or neither where nothing drifts.
    """

    squares: F32
    hessian: F32 | None = None
    drift: F32 | None = None
    missing: F32 | None = None


@dataclass(frozen=True)
class Solution:
    """``codes`` uint8 (rows, cols), and ``params`` float32 (rows, blocks, k): what the grid stores for each block."""

    codes: U8
    params: F32

    def weights(self, grid: Grid) -> F32:
        """What is stored, float32 (rows, cols)."""
        params = expanded(grid, self.params)
        values = grid.values(self.codes.reshape(-1, grid.group), params.reshape(-1, params.shape[2]))
        return values.reshape(self.codes.shape)


class Solver(Technique):
    """The role. ``wants`` says what calibration must measure; without it, a fit needs no text at all."""

    wants: ClassVar[Knowledge] = "nothing"

    @abstractmethod
    def solve(self, weight: F32, grid: Grid, inputs: Inputs | None) -> Solution:
        """Codes and parameters for ``weight`` float32 (rows, cols); cols must be whole groups of the grid.

        ``inputs`` is what ``wants`` asks for; it may be None only for ``"nothing"``.
        """

    def workspace_bytes(self, rows: int, cols: int, grid: Grid) -> int:
        """The most that ``solve`` takes at a time beside the weight, what was measured, and the codes."""
        return 8 * rows * (cols // grid.group) * grid.n_params


ROLE = Solver


@dataclass(frozen=True)
class LayerProblem:
    """A layer that is to be stored, and what it should do.

    Attributes
    ----------
    spec, layer : the model, and the layer's number in it.
    weights : by role, float32: matrices (rows, cols), biases (n,), and norms (n,) as the factors that they multiply by;
        of full precision where they have a grid, and else as they are stored.
    grids : of the matrices that are to be chosen, by role.
    starts : how they would be stored if each were solved by itself.
    inputs : hidden states before the layer, with all that lies before as it is stored, (n_windows, n, d_model).
    targets : hidden states behind the layer if nothing were rounded, neither here nor before; of the same shape.
    rotations : cosines and sines of positions, (n, rot_dim / 2) each.
    """

    spec: ModelSpec
    layer: int
    weights: Mapping[str, F32]
    grids: Mapping[str, Grid]
    starts: Mapping[str, Solution]
    inputs: F32
    targets: F32
    rotations: tuple[F32, F32]


@dataclass(frozen=True)
class LayerSolution:
    """``matrices``: of every grid of the problem. ``vectors``: norms and biases that changed, as in ``weights``.
    ``errors``: relative to the targets, on text that was not learned from, at the start and at the end."""

    matrices: Mapping[str, Solution]
    vectors: Mapping[str, F32]
    errors: tuple[float, float]


Precision = Literal["bfloat16", "float32"]  # in which products are computed while a layer is learned
Steps = Callable[[int, int], None]  # done, in all


class LayerSolver(Solver):
    """A solver that starts from what the solver named ``start`` finds."""

    start: str
    batch: int
    precision: Precision

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise unknown_name(f"precision of {self.name}", self.precision, get_args(Precision))
        known = [name for name, cls in techniques("weights.solvers").items() if not issubclass(cls, LayerSolver)]
        if self.start not in known:
            raise InvalidInput(f"{self.name}: start must be one of {', '.join(known)}, got {self.start!r}")

    @staticmethod
    def learns(grid: Grid) -> bool:
        """Whether parameters of a grid can move by little steps: those of powers of two, for one, can't."""
        return isinstance(grid, Uniform | Table)

    @property
    def first(self) -> Solver:
        """What each matrix is solved by at first, and those outside layers for good."""
        solver = techniques("weights.solvers")[self.start]()
        assert isinstance(solver, Solver)
        return solver

    @property
    def wants(self) -> Knowledge:  # type: ignore[override]
        """Never nothing: the text is needed in any case."""
        return "squares" if self.first.wants == "nothing" else self.first.wants

    def solve(self, weight: F32, grid: Grid, inputs: Inputs | None) -> Solution:
        return self.first.solve(weight, grid, inputs)

    def terms(self, spec: ModelSpec, layer: int, grids: Mapping[str, Grid], window: int) -> tuple[Term, ...]:
        """Memory while a layer is refined, beside the problem's own arrays.

        ``grids`` as in :class:`LayerProblem`; ``window`` is the number of tokens of one.
        """
        shapes = {w.name.rsplit(".", 1)[-1]: w.n_elements for w in spec.weights if w.layer == layer}
        n_weights = sum(shapes[role] for role in grids)
        n_groups = sum(shapes[role] // grid.group for role, grid in grids.items())
        product_bytes = 2 if self.precision == "bfloat16" else 4
        largest = max((shapes[role] for role in grids), default=0)
        activations = 4 * self.batch * window * (10 * spec.d_model + 5 * spec.n_heads * spec.head_dim + 4 * spec.d_ff)
        # Gradients of weights come when the forward pass's own temporaries, a quarter, are gone.
        gradients = product_bytes * largest + 4 * 4 * TILE
        terms = [
            Term("rounded weights", n_weights, product_bytes),
            Term("activations", activations, 1),
            Term("gradient of a matrix, in tiles", max(0, gradients - activations // 4), 1),
            *self._learned(n_weights, n_groups, largest),
        ]
        seen = spec.layers[layer].window
        if spec.attn_softcap or (seen is not None and seen < window):
            # Attention with a mask keeps its scores, before and behind the softmax, and makes their gradients.
            terms.append(Term("scores", self.batch * window * window * spec.n_heads, 4 * 4))
        return tuple(terms)

    def warm_up(self) -> None:
        """Load PyTorch, and let it learn a step, so that its own buffers are there."""
        require_torch(str(self))
        import torch

        x = torch.ones(256, 256, dtype=getattr(torch, self.precision), requires_grad=True)
        torch.autograd.grad((x @ x).softmax(1).sum(), x)

    @abstractmethod
    def _learned(self, n_weights: int, n_groups: int, largest: int) -> tuple[Term, ...]:
        """Parameters with their gradients, moments and first values, and what they are made from. ``largest``: weights
        of the largest matrix."""

    @abstractmethod
    def refine(self, problem: LayerProblem, steps: Steps | None = None) -> LayerSolution:
        """The layer's matrices on their grids. Needs PyTorch."""


def solve_groups(weight: F32, grid: Grid, params: F32) -> Solution:
    """Every weight to its nearest level, for what is stored of the parameters, (rows, blocks, k)."""
    codes = np.empty(weight.shape, np.uint8)
    ops.round_groups(weight, grid, expanded(grid, params), codes)
    return Solution(codes, params)


def expanded(grid: Grid, params: F32) -> F32:
    """Parameters of groups, (rows, groups, p), that ``params`` (rows, blocks, k) store."""
    found = grid.expand(params.reshape(-1, params.shape[2]))
    return np.ascontiguousarray(found.reshape(len(params), -1, found.shape[2]))


def stored(grid: Grid, params: F32) -> F32:
    """What to store, (rows, blocks, k), for groups that should have the parameters (rows, groups, p)."""
    found = grid.store(params.reshape(-1, grid.block // grid.group, params.shape[2]))
    return found.reshape(len(params), -1, found.shape[1])


def plain(weight: F32, grid: Grid) -> F32:
    """What to store, (rows, blocks, k), for levels that span the range of each group."""
    params = grid.plain(weight.reshape(-1, grid.group))
    return stored(grid, params.reshape(len(weight), -1, params.shape[1]))
