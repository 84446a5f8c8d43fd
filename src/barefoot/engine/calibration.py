"""What the matrices of a layer meet as text passes through it, and what solvers want to know of that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot.engine.fit_state import Stream
from barefoot.engine.layer_pass import LayerPass
from barefoot.engine.source import products
from barefoot.weights.solvers import Inputs, Knowledge

F32 = npt.NDArray[np.float32]
Met = tuple[F32, F32]  # hidden states (n, d), and what a stage's matrices meet there, (n, cols)

KNOWLEDGE: tuple[Knowledge, ...] = ("nothing", "squares", "hessian", "drift")  # each contains the ones before
PIECE_TOKENS = 64  # that are in the widest part of a layer at a time
HESSIAN_COLUMNS = 128  # that are added to at a time


@dataclass(frozen=True)
class Passage:
    """A stream's way through a layer: ``before`` it, half-way and then ``behind`` it in the other stream.

    ``matrices`` gives those of a stage, as this stream meets them. What lies between two matrices is made again each
    time rather than kept.
    """

    there: LayerPass
    before: Stream
    behind: Stream
    matrices: Callable[[str], list[F32]]

    def meets(self, stage: str) -> Iterator[Met]:
        """Some tokens at a time, those of all windows."""
        there = self.there
        if stage == "attn_in":
            yield from ((h, there.attn_in(h)) for h in self.before)
        elif stage == "attn_out":
            qkv = self.matrices("attn_in")
            yield from ((h, there.attend(*products(there.attn_in(h), qkv))) for h in self.before)
        elif stage == "ffn_in":
            yield from ((h, there.ffn_in(h)) for h in self.behind)
        else:
            gate_up = self.matrices("ffn_in")
            yield from ((x, self._active(x, gate_up)) for h in self.behind for x in pieces(h))

    def pass_attention(self) -> None:
        """Once the matrices up to ``attn_out`` are known."""
        o = self.matrices("attn_out")
        for i, (h, a) in enumerate(self.meets("attn_out")):
            self.behind[i] = self.there.after_attention(h, *products(a, o))

    def pass_ffn(self) -> None:
        """Once all matrices are known."""
        gate_up, down = self.matrices("ffn_in"), self.matrices("ffn_out")
        for i, h in enumerate(self.behind):
            for x in pieces(h):
                x[:] = self.there.after_ffn(x, *products(self._active(x, gate_up), down))
            self.behind[i] = h

    def _active(self, x: F32, gate_up: list[F32]) -> F32:
        return self.there.activate(*products(self.there.ffn_in(x), gate_up))


def pieces(window: F32) -> Iterator[F32]:
    """Views of some tokens at a time of a window (n, d)."""
    return (window[start : start + PIECE_TOKENS] for start in range(0, len(window), PIECE_TOKENS))


def measure(inputs: Iterable[F32], wanted: Knowledge) -> Inputs | None:
    """What a solver wants to know of inputs, (n, cols) each; None when it wants nothing. Nothing drifts here."""
    if wanted == "nothing":
        return None
    if wanted == "squares":
        return Inputs(_squares(inputs))
    moments = _Moments()
    for x in inputs:
        moments.add(x)
    return moments.inputs()


def measure_drift(stored: Iterable[Met], exact: Iterable[Met], alone: F32 | None, adds: bool) -> Inputs:
    """What is met behind all that is stored, and how far that is from what the exact model meets there.

    ``alone``: the matrix, where it is the only one that meets these inputs; what it misses takes less memory than how
    they drift. ``adds``: its product is added to the hidden states as it is, and so it can make up for theirs too.
    """
    moments = _Moments()
    for (h, x), (h_exact, x_exact) in zip(stored, exact, strict=True):
        moments.add(x)
        drift: F32 = x_exact - x
        if alone is None:
            moments.drift = _added(moments.drift, drift, x)
            continue
        missing = drift @ alone.T
        if adds:
            missing += h_exact
            missing -= h
        moments.missing = _added(moments.missing, missing, x)
    return moments.inputs()


def _squares(inputs: Iterable[F32]) -> F32:
    total: F32 = np.zeros(1, np.float32)
    n = 0
    for x in inputs:
        total = total + np.einsum("nc,nc->c", x, x)
        n += len(x)
    return total / np.float32(n)


class _Moments:
    """Sums of products of inputs. Of xᵀ x only the lower triangle is added up, a panel of columns at a time."""

    def __init__(self) -> None:
        self.n = 0
        self.panels: list[F32] = []
        self.drift: F32 | None = None
        self.missing: F32 | None = None

    def add(self, x: F32) -> None:
        self.n += len(x)
        starts = range(0, x.shape[1], HESSIAN_COLUMNS)
        if not self.panels:
            self.panels = [
                np.zeros((x.shape[1] - start, min(HESSIAN_COLUMNS, x.shape[1] - start)), np.float32) for start in starts
            ]
        for start, panel in zip(starts, self.panels, strict=True):
            panel += x[:, start:].T @ x[:, start : start + HESSIAN_COLUMNS]

    def inputs(self) -> Inputs:
        scale = np.float32(1 / self.n)
        for total in (self.drift, self.missing):
            if total is not None:
                total *= scale
        hessian = self._hessian()
        hessian *= scale
        return Inputs(np.diag(hessian).copy(), hessian, self.drift, self.missing)

    def _hessian(self) -> F32:
        cols = len(self.panels[0])
        hessian = np.empty((cols, cols), np.float32)
        while self.panels:  # they leave as the square fills
            panel = self.panels.pop()
            start = cols - len(panel)
            hessian[start:, start : start + panel.shape[1]] = panel
            hessian[start : start + panel.shape[1], start:] = panel.T
        return hessian


def _added(total: F32 | None, left: F32, right: F32) -> F32:
    """``total`` + leftᵀ right, a panel of columns at a time."""
    total = np.zeros((left.shape[1], right.shape[1]), np.float32) if total is None else total
    for start in range(0, right.shape[1], HESSIAN_COLUMNS):
        panel = slice(start, start + HESSIAN_COLUMNS)
        total[:, panel] += left.T @ right[:, panel]
    return total
