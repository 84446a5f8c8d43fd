"""lamda — a small core between two projections taken from the matrix itself, one of which soon stops learning.

LaMDA and LaMDA++ (Azizi, Kundu, Pedram 2024, arXiv:2406.12832). LoRA trains two factors as wide as the matrix, and the
inner one needs the whole input for its gradient. With the r largest singular values of a frozen matrix W = U Σ Vᵀ,

    y = x W_resᵀ + ((x Aᵀ) S) B        A = V_rᵀ (r, inputs), S = diag(σ_1 … σ_r) (r, r), B = U_rᵀ (r, outputs)

where W_res = W − U_r Σ_r V_rᵀ, so that training begins with the model as it is. A never learns, S always does, and of
B's rows after t of T steps, with t_i = ceil(eta T),

    r_t = ceil(r (t_i − t) / t_i), and 0 from t_i on                                   (section 3.2: linearly to 0)

frozen in the order of their singular values. What is frozen has no gradient, no moments, and nothing is kept for it.

``init="spectral"`` stores W_res in the base's format: rounding it errs less than rounding W, whose largest part is in
the adapter. ``init="zero_core"`` leaves the base as it is and begins with S = 0: the base may then be shared.

``ranks="spectrum"`` is LaMDA++: of the matrices of one role and shape, the third whose r largest singular values hold
least of Σ σ² gets rank 3r/2, the third where they hold most r/2, the others r. The ranks' sum is that of equal ranks,
and which ranks there are doesn't depend on the weights, so bytes are known before they are read.

Arrays of a matrix, float32: A r × inputs, S r², B r × outputs, of whose rows r_t learn: gradients 4 (r² + r_t outputs)
bytes, moments twice that. Kept for the backward pass: r + r_t numbers a token, and never the input. Its making takes
the matrix, what is left of it, and the smaller Gram matrix (k, k) with its eigenvectors in float64 (LAPACK's syevd).

The file of the adapter is LoRA's: A is the same before and after, so that A and (S B − S_0 B_0)ᵀ are a pair of rank r
relative to the model as it was, which ``barefoot run MODEL --adapter DIR`` takes. What the base lost when W_res was
rounded is not in it.

Differs from the paper: its released code freezes a share of one row a step in place of one of r, and has neither the
decomposition nor LaMDA++; the steps above are the paper's text as far as it could be read. Thirds are ours.
Dropout is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt

from barefoot.adapters import F32, Beside, Factor, Original, Targets
from barefoot.core.errors import InvalidInput
from barefoot.core.ledger import Term
from barefoot.core.model import ModelSpec, WeightSpec

Order = Literal["largest_first", "smallest_first"]
Init = Literal["spectral", "zero_core"]
Ranks = Literal["uniform", "spectrum"]


@dataclass(frozen=True)
class LaMDA(Beside, name="lamda", papers=(12,)):
    """``order`` : which of B's rows are frozen first, by singular value."""

    rank: int = 32
    eta: float = 0.3
    order: Order = "largest_first"
    init: Init = "spectral"
    ranks: Ranks = "uniform"
    targets: Targets = "all"
    keeps_inputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check()
        if not 0 <= self.eta <= 1:
            raise InvalidInput(f"lamda: eta must lie between 0 and 1, got {self.eta}")
        for knob, known in (("order", Order), ("init", Init), ("ranks", Ranks)):
            if getattr(self, knob) not in get_args(known):
                names = ", ".join(get_args(known))
                raise InvalidInput(f"lamda: {knob} must be one of {names}, got {getattr(self, knob)!r}")

    @property
    def scale(self) -> float:
        return 1.0

    def rows_learning(self, rank: int, step: int, steps: int) -> int:
        """r_t, of B's rows."""
        end = math.ceil(round(self.eta * steps, 6))  # 0.1 × 30 is above 3
        return -(-rank * (end - step) // end) if step < end else 0

    def beside(self, weight: WeightSpec, rank: int, step: int = 0, steps: int = 1) -> tuple[Factor, ...]:
        if rank > min(weight.rows, weight.cols):
            raise InvalidInput(
                f"{self}: {weight.name} ({weight.rows}, {weight.cols}) has no {rank} singular values",
                cure="use a smaller rank",
            )
        learning = self.rows_learning(rank, step, steps)
        found = [
            Factor(f"{weight.name}.A", rank, weight.cols, trained=False),
            Factor(f"{weight.name}.S", rank, rank),
            Factor(f"{weight.name}.B", learning, weight.rows),
            Factor(f"{weight.name}.B", rank - learning, weight.rows, trained=False),
        ]
        return tuple(factor for factor in found if factor.rows)

    def kept(self, rank: int, step: int = 0, steps: int = 1) -> int:
        return rank + self.rows_learning(rank, step, steps)

    def ranks_of(self, spec: ModelSpec, original: Original | None = None) -> dict[str, int]:
        if self.ranks == "uniform":
            return super().ranks_of(spec)
        alike: dict[tuple[str, int, int], dict[str, float]] = {}
        for weight in self.matrices(spec):
            key = (weight.name.rpartition(".")[2], weight.rows, weight.cols)
            share = 0.0 if original is None else energy(squares(original(weight)), self.rank)
            alike.setdefault(key, {})[weight.name] = share
        return {name: rank for group in alike.values() for name, rank in allocate(group, self.rank).items()}

    def load_terms(self, spec: ModelSpec) -> tuple[Term, ...]:
        matrices = self.matrices(spec)
        largest = max(w.n_elements for w in matrices)
        side = max(min(w.rows, w.cols) for w in matrices)
        return (
            Term("a matrix, what is left of it, and that in pieces", 3 * largest, 4),
            Term("its Gram matrix in float32", side**2, 4),
            Term("and in float64, its eigenvectors, and LAPACK's workspace", 4 * side**2 + 8 * side, 8),
        )

    def module(self, base: Any, weight: WeightSpec, rank: int, original: Original, random: Any) -> Any:
        from barefoot.adapters.driver.spectral import Spectral

        self.beside(weight, rank)  # or it raises
        return Spectral(base, weight, self, rank, original)


def squares(w: F32) -> F32:
    """The squares of the singular values of w (rows, cols), largest first."""
    found: F32 = np.maximum(np.linalg.eigvalsh(_gram(w))[::-1], 0).astype(np.float32)
    return found


def energy(squares: F32, rank: int) -> float:
    """The share of Σ σ² that the first ``rank`` hold; 1 where there is nothing."""
    total = float(squares.sum(dtype=np.float64))
    return float(squares[:rank].sum(dtype=np.float64)) / total if total else 1.0


def allocate(shares: Mapping[str, float], rank: int) -> dict[str, int]:
    """Ranks by name: less where the first ``rank`` singular values hold most already. Their mean is ``rank``."""
    low, third = max(1, rank // 2), len(shares) // 3
    peaked = sorted(shares, key=lambda name: -shares[name])
    ranks = dict.fromkeys(shares, rank)
    ranks |= dict.fromkeys(peaked[:third], low)
    return ranks | dict.fromkeys(peaked[len(peaked) - third :], 2 * rank - low)


def principal(w: F32, rank: int) -> tuple[F32, F32, F32]:
    """A (rank, inputs) and B (rank, outputs), with orthonormal rows, and the singular values (rank,) of w (outputs,
    inputs): the vectors of one side from the smaller Gram matrix, those of the other by a product."""
    _, vectors = np.linalg.eigh(_gram(w))
    mine = np.ascontiguousarray(vectors[:, : -rank - 1 : -1].T, np.float32)
    of_inputs = w.shape[1] <= w.shape[0]
    theirs = mine @ w.T if of_inputs else mine @ w
    values: F32 = np.linalg.norm(theirs, axis=1)
    theirs /= np.maximum(values, np.finfo(np.float32).tiny)[:, None]
    return (mine, theirs, values) if of_inputs else (theirs, mine, values)


def _gram(w: F32) -> npt.NDArray[np.float64]:
    return (w.T @ w if w.shape[1] <= w.shape[0] else w @ w.T).astype(np.float64)
