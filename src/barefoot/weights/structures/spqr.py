"""spqr — small groups whose scales have scales, and the few weights that hurt most kept apart, sparse.

SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression (Dettmers et al. 2023,
arXiv:2306.03078). With H = mean of x xᵀ of a matrix's inputs, column k counts as D_k of
``solvers.hessian.feedback``, one over the square of the paper's [chol(H⁻¹)]_kk. Algorithm 1, group after group of 16
columns, on the targets that GPTQ's feedback leaves:

1. *Likely outliers*: weights without which the other 15 of their group fit a grid so much better that the group's
   error, each weight counting as D_k, falls by more than τ. They don't take part in the next step.
2. Scale and zero point of each group, both quantized (``ops.bilevel``): what codes are chosen on.
3. Column by column, codes are chosen and their errors passed on. A weight with D_k (w − ŵ)² > τ is an *outlier*: what
   its code misses is stored in float16 (``ops.csr``), and nothing but what that misses is passed on.

τ is ``tau`` × the mean over columns of D_k × variance of the column, or with ``tau=0`` the one that leaves the share
``outliers`` of the weights: guessed from what 1 and 3 say of the weights without feedback, and corrected by what it led
to. More than this share are never kept, so bytes are bounded before anything is solved.

Bytes of a (rows, cols) matrix with n ≤ outliers × rows × cols entries: rows × cols / 64 × (5 + 8 bits), and with any
outliers 4 (rows + 1 + n). Bits a weight: bits + 0.625 + 32 n / (rows cols) + 32 / cols, as the paper's formula has it
for groups of 16 and 16 and statistics of 3 bits; 3.945 + 32 / cols for 3 bits and 1 %.

Where rounding before it has moved the matrix's inputs, what is solved is the matrix that makes up for it best, with
``drift`` as its ridge, as in :mod:`barefoot.weights.solvers.gptq`; 0 leaves it out.

*Differs from the paper*: it does not look at drift. Scales are grouped along the row (``ops.bilevel``). Grids are
fitted by least error, not by range. Outliers store what is missing behind their codes, not the weights. A group's
weights other than its extremes are outliers only by their own error. No order by activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput
from barefoot.ops import blocks, csr
from barefoot.ops.bilevel import BITS, ELEMENTS, GROUP, MOST, Bilevel, nearest_step, step_of
from barefoot.ops.grids import to_f16
from barefoot.weights.solvers import Inputs, Knowledge
from barefoot.weights.solvers.hessian import corrected, corrected_bytes, feedback, feedback_bytes, mixing_bytes
from barefoot.weights.structures import Matrix, Stored, Structure

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

OUTLIERS = "outliers"  # the label of the sparse part
GROUP_BYTES = 1360  # for each row, while a group is taken apart; a test measures it
TRIES = 3  # of finding τ, before the number of outliers is cut
ENOUGH, AIMED = 0.93, 0.97  # of the outliers that there may be: what a try must find, and what it goes for


@dataclass(frozen=True)
class Spqr(Structure, name="spqr", papers=(58,), status="stable"):
    bits: int = 3
    outliers: float = 0.01
    tau: float = 0.0
    damp: float = 0.01
    drift: float = 0.3

    @property
    def wants(self) -> Knowledge:  # type: ignore[override]
        return "drift" if self.drift else "hessian"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InvalidInput(f"spqr: bits must be one of {', '.join(map(str, BITS))}, got {self.bits}")
        knobs = (("outliers", self.outliers, 0.25), ("tau", self.tau, 1000.0), ("drift", self.drift, 1000.0))
        for knob, got, most in knobs:
            if not 0 <= got <= most:
                raise InvalidInput(f"spqr: {knob} must lie between 0 and {most:g}, got {got}")
        if not 0 < self.damp < 10:
            raise InvalidInput(f"spqr: damp must lie between 0 and 10, got {self.damp}")

    def most(self, rows: int, cols: int) -> Stored:
        n = self.most_outliers(rows, cols)
        parts = {OUTLIERS: (csr.KIND.name, csr.n_bytes(rows, n))} if n else {}
        name = Bilevel(self.bits).name
        return Stored(name, rows * blocks.row_bytes(name, cols), parts)

    def most_outliers(self, rows: int, cols: int) -> int:
        return int(self.outliers * rows * cols)

    def workspace_bytes(self, rows: int, cols: int) -> int:
        """The matrix that makes up for drift, and beside it the factor; or M, a group's arrays, and of the weight's
        size: itself on its side, errors, what outliers add, and what weights lose."""
        found = 4 if self.outliers and not self.tau else 3
        solving = max(
            feedback_bytes(cols, ELEMENTS), mixing_bytes(cols, ELEMENTS) + rows * (GROUP_BYTES + 4 * found * cols)
        )
        return max(corrected_bytes(rows, cols), 4 * rows * cols + solving) if self.drift else solving

    def solve(self, weight: F32, inputs: Inputs | None) -> Matrix:
        assert inputs is not None
        assert inputs.hessian is not None
        form, (rows, cols) = Bilevel(self.bits), weight.shape
        blocks.row_bytes(form.name, cols)
        weight = corrected(weight, inputs, self.drift)
        job = Feedback(form, *feedback(inputs.hessian, self.damp, ELEMENTS))
        codes, rest = self._solved(job, np.ascontiguousarray(weight.T), self.most_outliers(rows, cols))
        kept = {OUTLIERS: (csr.KIND.name, csr.encode(rest, rest != 0))} if rest.any() else {}
        return Matrix(form.name, codes, kept)

    def _solved(self, job: Feedback, columns: F32, most: int) -> tuple[U8, F32]:
        """As :meth:`Feedback.solve`, for the τ of these knobs."""
        if not most:
            return job.solve(columns, np.inf, 0)
        if self.tau:
            unit = float((columns.var(axis=1) * job.importance).mean())
            return job.solve(columns, self.tau * unit, most)
        losses, aim = job.losses(columns).reshape(-1), self.outliers
        for _ in range(TRIES):
            codes, rest = job.solve(columns, _exceeded_by(losses, aim), columns.size)
            n = int(np.count_nonzero(rest))
            if ENOUGH * most <= n <= most:
                return codes, rest
            aim = float(min(aim * AIMED * most / max(n, 1), 1.0))
            del codes, rest  # before the next ones come
        return job.solve(columns, _exceeded_by(losses, aim), most)


def _exceeded_by(losses: F32, share: float) -> float:
    """What this share of ``losses`` (n,) passes."""
    at = min(int((1 - share) * losses.size), losses.size - 1)
    return float(np.partition(losses, at)[at])


@dataclass(frozen=True)
class Feedback:
    """Algorithm 1 for one Hessian. ``mixing`` and ``importance`` are M, in panels of a block's columns, and D of
    ``feedback``.

    Inside, matrices stand on their sides, (cols, rows): a column of the weight is contiguous.
    """

    form: Bilevel
    mixing: Sequence[F32]
    importance: F32

    def solve(self, columns: F32, threshold: float, most: int) -> tuple[U8, F32]:
        """Blocks uint8 (rows, row_bytes), and what outliers add to them, float32 (rows, cols), zero elsewhere.

        ``threshold`` is τ; ``most`` outliers are kept, those of earlier columns first.
        """
        form = self.form
        cols, rows = columns.shape
        errors, rest = np.empty_like(columns), np.zeros_like(columns)
        solved = np.empty((rows, cols // ELEMENTS, form.n_bytes), np.uint8)
        for block, (start, mixing) in enumerate(zip(range(0, cols, ELEMENTS), self.mixing, strict=True)):
            stop = start + ELEMENTS
            targets = columns[start:stop] + mixing[:start].T @ errors[:start]
            unit = self._unit(targets, start, threshold)
            scales, codes = [unit], []
            for group in range(start, stop, GROUP):
                x, counts = self._without_outliers(targets[group - start : group - start + GROUP], group, threshold)
                step, zero, _ = form.span(x, counts)
                scales.append(form.search(x, counts, step_of(unit), step, zero))
                scale, zero = form.scale_of(unit, scales[-1])
                for k in range(group, group + GROUP):
                    target = targets[k - start]
                    code = form.round(target, scale, zero)
                    held = scale * (code.astype(np.float32) - zero)
                    missed = target - held
                    outlier = self._largest(self.importance[k] * missed**2, threshold, most)
                    rest[k] = np.where(outlier, to_f16(missed), 0)
                    most -= int(np.count_nonzero(rest[k]))
                    errors[k] = columns[k] - (held + rest[k])
                    targets[k - start + 1 :] += mixing[k, k + 1 - start :, None] * errors[k]
                    codes.append(code)
            solved[:, block] = form.join(np.empty((rows, 0), np.uint8), np.stack(scales, 1), np.stack(codes, 1))
        del errors
        return solved.reshape(rows, -1), np.ascontiguousarray(rest.T)

    def losses(self, columns: F32) -> F32:
        """About what τ must lie below for each weight to be an outlier, (cols, rows): 1 and 3 without feedback."""
        found = np.empty_like(columns)
        for first in range(0, len(columns), GROUP):
            x = columns[first : first + GROUP]
            counts = np.repeat(self.importance[first : first + GROUP, None], x.shape[1], axis=1)
            scale, zero, _ = self.form.span(x, counts)
            missed = x - scale * (self.form.round(x, scale, zero).astype(np.float32) - zero)
            found[first : first + GROUP] = np.maximum(self.gains(x, counts), counts * missed**2)
        return found

    def _unit(self, targets: F32, start: int, threshold: float) -> U8:
        """The codes (rows,) of the unit of a block's scales, so that the widest of its groups has the largest code."""
        steps: Iterable[F32] = (
            self.form.span(*self._without_outliers(targets[g : g + GROUP], start + g, threshold))[0]
            for g in range(0, ELEMENTS, GROUP)
        )
        return nearest_step(np.max(list(steps), axis=0) / np.float32(MOST))

    def _without_outliers(self, x: F32, first: int, threshold: float) -> tuple[F32, F32]:
        """The group of targets x (16, rows) from column ``first`` on, likely outliers replaced by the mean of the
        others, and how much each weight counts: D_k, and outliers nothing."""
        counts = np.repeat(self.importance[first : first + GROUP, None], x.shape[1], axis=1)
        if np.isinf(threshold):
            return x, counts
        likely = self.gains(x, counts) > threshold
        counts[likely] = 0
        mean = x.sum(axis=0, where=~likely) / np.maximum(GROUP - likely.sum(axis=0), 1).astype(np.float32)
        return np.where(likely, mean, x), counts

    def gains(self, x: F32, counts: F32) -> F32:
        """By how much a group's error falls without each weight, (16, rows): of the least and the largest one, without
        which the range is another; 0 for the others."""
        *_, base = self.form.span(x, counts)
        gains, every = np.zeros_like(x), np.arange(x.shape[1])
        for at in (x.argmin(axis=0), x.argmax(axis=0)):
            others, their_counts = x.copy(), counts.copy()
            others[at, every] = (x.sum(axis=0) - x[at, every]) / (GROUP - 1)
            their_counts[at, every] = 0
            gains[at, every] = base - self.form.span(others, their_counts)[2]
        return gains

    @staticmethod
    def _largest(losses: F32, threshold: float, most: int) -> Mask:
        """Where ``losses`` pass the threshold; only the ``most`` largest, where there are more."""
        chosen = losses > threshold
        if np.count_nonzero(chosen) > most:
            chosen = np.zeros(len(losses), np.bool_)
            chosen[np.argsort(-losses, kind="stable")[:most]] = True
        return chosen
