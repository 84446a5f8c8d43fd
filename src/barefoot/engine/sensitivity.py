"""How much a model's predictions change when one matrix is rounded: what an allocation of bytes is to minimise.

For a small change δz of the last normed hidden state, KL(p ‖ p') = ½ δzᵀ F δz with F = Wᵀ (diag p − p pᵀ) W, W the head
and p the predicted distribution: the Fisher information of the logits. F is taken as its mean over the text. Each
matrix is rounded by itself, to a format that all are probed with, and the change is followed through the later layers,
so that what comes after a matrix counts, not only its own error. A matrix that is also the head changes logits as well:
½ of the variance, under p, of the change of a token's logits.

Other formats are taken to cost in proportion to their error, inputs weighted by their mean squares: an error that is
twice as large costs twice as much. That holds near the reference and ranks formats far from it.

Second-order sensitivities as in Q-BERT (Shen et al. 2019, arXiv:1909.05840) without its Hessian eigenvalues: changes
are measured on the output itself, and the Fisher matrix of d_model × d_model is small enough to be exact in its mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.model import ModelSpec
from barefoot.engine.exact import ROLES, ExactLayer, embedded, window_elements
from barefoot.engine.source import Source, factors
from barefoot.ops import blocks

F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
Progress = Callable[[int, int, str], None]  # layers done, in all, and which is next

PROBE = {32: "int3_g32_asym", 64: "int3_g64_asym"}  # the larger group where it divides the columns
TILE_ROWS = 1024  # of the head that are held as float32
ROUNDED_AT_A_TIME = 1 << 16  # weights


@dataclass
class Sensitivity:
    """What was found, by the name of a matrix.

    Attributes
    ----------
    cost : nats a token when the matrix is rounded to ``probe_of`` its columns, all others exact.
    squares : mean squares of its inputs, (cols,).
    """

    cost: dict[str, float] = field(default_factory=dict)
    squares: dict[str, F32] = field(default_factory=dict)


def probe_of(cols: int) -> str:
    """The format that a matrix of so many columns is probed with."""
    return PROBE[64 if cols % 64 == 0 else 32]


def rounded(weight: F32, format_id: str) -> F32:
    out, step = np.empty_like(weight), max(1, ROUNDED_AT_A_TIME // weight.shape[1])
    for start in range(0, len(weight), step):
        some = weight[start : start + step]
        out[start : start + step] = blocks.decode(format_id, blocks.encode(format_id, some), weight.shape[1])
    return out


def sensitivity(
    source: Source,
    spec: ModelSpec,
    texts: Ids,
    known: Mapping[str, float] | None = None,
    keep: Callable[[Mapping[str, float]], None] | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure every matrix on ``texts``, int32 (n_windows, window).

    Memory: ``workspace_bytes``.

    Parameters
    ----------
    known : costs that an earlier, interrupted call has handed to ``keep``, which gets all costs after each layer.
    """
    report = progress or (lambda done, total, label: None)
    found = Sensitivity(dict(known or {}))
    n_layers, total = spec.n_layers, 2 * spec.n_layers + 1
    hidden = embedded(source, spec, texts)
    for layer in range(n_layers):
        report(layer, total, f"reading layer {layer}")
        ExactLayer(source, spec, layer).run(hidden, squares=found.squares)
    head = _Head(source, spec, hidden)
    found.squares[head.name] = np.einsum("td,td->d", head.z, head.z)
    for squares in found.squares.values():
        squares /= np.float32(texts.size)
    hidden = embedded(source, spec, texts)
    for layer in range(n_layers):
        report(n_layers + layer, total, f"probing layer {layer}")
        here = ExactLayer(source, spec, layer)
        names = [f"layers.{layer}.{role}" for role in here.matrices]
        if not all(name in found.cost for name in names):
            streams = [hidden.copy() for _ in here.matrices]
            for role, stream in zip(here.matrices, streams, strict=True):
                weight = here.matrices[role]
                here.replaced(role, rounded(weight, probe_of(weight.shape[1]))).run(stream)
                del weight
            here.run(hidden)
            del here
            for later in range(layer + 1, n_layers):
                ExactLayer(source, spec, later).run(*streams)  # one layer's matrices at a time
            found.cost |= {name: head.cost(stream) for name, stream in zip(names, streams, strict=True)}
            if keep is not None:
                keep(found.cost)
        else:
            here.run(hidden)
    report(total - 1, total, "probing the embedding")
    if "embed" not in found.cost:
        stream = embedded(source, spec, texts, lambda rows: rounded(rows, probe_of(spec.d_model)))
        for layer in range(n_layers):
            ExactLayer(source, spec, layer).run(stream)
        costs = {"embed": head.cost(stream)}
        costs[head.name] = costs.get(head.name, 0.0) + head.cost_of_rounding()
        found.cost |= costs
        if keep is not None:
            keep(found.cost)
    return found


def input_squares(source: Source, spec: ModelSpec, texts: Ids) -> dict[str, F32]:
    """Mean squares of the inputs of each layer's matrices on ``texts``, (cols,) by name: an importance matrix."""
    found: dict[str, F32] = {}
    hidden = embedded(source, spec, texts)
    for layer in range(spec.n_layers):
        ExactLayer(source, spec, layer).run(hidden, squares=found)
    return {name: squares / np.float32(texts.size) for name, squares in found.items()}


def workspace_bytes(spec: ModelSpec, n_windows: int, window: int) -> int:
    """What ``sensitivity`` holds at most: eight streams, seven of them a layer's changes; a layer's matrices and one of
    them rounded; a window's activations; and the head, or its tiles while its Fisher matrix is made."""
    tokens, d = n_windows * window, spec.d_model
    q, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    matrices = d * (2 * q + 2 * kv + 3 * spec.d_ff)
    widest = max(d * spec.d_ff, d * q)
    head = d * d + tokens * d
    making = min(TILE_ROWS, spec.vocab_size) * (4 * d + 3 * tokens) + d * d + 2 * tokens * d
    probing = (
        (len(ROLES) + 1) * tokens * d + matrices + widest + max(window_elements(spec, window), 2 * ROUNDED_AT_A_TIME)
    )
    return 4 * (head + max(probing, making))


class _Head:
    """The reference's predictions, and what changes of the last hidden states cost.

    Attributes
    ----------
    name : of the matrix of the logits.
    z : normed hidden states, (n_tokens, d).
    """

    def __init__(self, source: Source, spec: ModelSpec, hidden: F32) -> None:
        self.name = "embed" if spec.tied else "head"
        self._source, self._spec = source, spec
        self._rows = source.weights[self.name].rows
        norm = factors(spec, {"norm": source.floats("norm").view(np.uint8)})["norm"]
        self._norm = norm
        self.z = self._normed(hidden)
        self._log_total = self._log_totals()
        self._fisher = self._mean_fisher()

    def cost(self, hidden: F32) -> float:
        """Nats a token when the last hidden states become ``hidden``."""
        change = self._normed(hidden) - self.z
        return 0.5 * float(np.einsum("td,de,te->", change, self._fisher, change, optimize=True)) / len(change)

    def cost_of_rounding(self) -> float:
        """Nats a token when this matrix is rounded as far as the logits go."""
        mean, square = np.zeros(len(self.z)), np.zeros(len(self.z))
        for tile in self._tiles():
            error = rounded(tile, probe_of(tile.shape[1]))
            error -= tile
            p = self._probabilities(tile)
            change = self.z @ error.T
            mean += np.einsum("tv,tv->t", p, change)
            square += np.einsum("tv,tv,tv->t", p, change, change)
            del error, p, change
        return 0.5 * float(np.mean(square - mean**2))

    def _normed(self, hidden: F32) -> F32:
        x = hidden.reshape(-1, hidden.shape[-1])
        out = np.empty_like(x)
        ops.rmsnorm(x, self._norm, self._spec.norm_eps, out)
        return out

    def _tiles(self) -> Iterator[F32]:
        for first in range(0, self._rows, TILE_ROWS):
            yield self._source.floats(self.name, first, min(TILE_ROWS, self._rows - first))

    def _logits(self, tile: F32) -> F32:
        logits = self.z @ tile.T
        cap = np.float32(self._spec.logit_softcap)
        return cap * np.tanh(logits / cap) if cap else logits

    def _probabilities(self, tile: F32) -> F32:
        logits = self._logits(tile)
        logits -= self._log_total[:, None]
        return np.exp(logits, out=logits)

    def _log_totals(self) -> F32:
        """The logarithm of the sum of the exponentials of each token's logits."""
        total: F32 = np.full(len(self.z), -np.inf, np.float32)
        for tile in self._tiles():
            logits = self._logits(tile)
            most = logits.max(axis=1)
            np.logaddexp(total, most + np.log(np.exp(logits - most[:, None]).sum(axis=1)), out=total)
        return total

    def _mean_fisher(self) -> F32:
        """The mean over tokens of Wᵀ (diag p − p pᵀ) W; of a softcap's derivative nothing is counted."""
        n, d = self.z.shape
        fisher, mean = np.zeros((d, d), np.float32), np.zeros((n, d), np.float32)
        for tile in self._tiles():
            p = self._probabilities(tile)
            fisher += (tile * p.sum(axis=0)[:, None]).T @ tile
            mean += p @ tile
        fisher -= mean.T @ mean
        fisher /= np.float32(n)
        return fisher
