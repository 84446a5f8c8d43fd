"""A model's pass in floats, a layer's matrices at a time: what fits and sensitivities measure in the exact model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.model import ModelSpec
from barefoot.engine.calibration import PIECE_TOKENS, pieces
from barefoot.engine.layer_pass import STAGES, LayerPass
from barefoot.engine.rows import decode as decode_blocks
from barefoot.engine.source import Source, factors, products

F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

ROLES = tuple(role for roles in STAGES.values() for role in roles)
TOGETHER_BYTES = 4 << 20  # of hidden states that go through a layer while it is there


def embedded(source: Source, spec: ModelSpec, texts: Ids, change: Callable[[F32], F32] | None = None) -> F32:
    """The hidden states (n_windows, window, d) that ``texts`` begin with; ``change`` may replace embeddings (n, d)."""
    ids, places = np.unique(texts, return_inverse=True)
    weight = source.weights["embed"]
    rows = decode_blocks(weight.format, np.concatenate([source.stored("embed", int(i), 1) for i in ids]), weight.cols)
    rows = rows if change is None else change(rows)
    rows *= np.float32(spec.embed_scale)
    return rows[places].reshape(*texts.shape, spec.d_model)


def last_states(
    source: Source, spec: ModelSpec, texts: Ids, progress: Callable[[int, int], None] | None = None
) -> Iterator[F32]:
    """The normed hidden states that the head meets, (window, d) each.

    Memory: ``pass_bytes``. ``progress`` gets the layers that were passed, and all.
    """
    norm = factors(spec, {"norm": source.floats("norm").view(np.uint8)})["norm"]
    step = together(spec, texts.shape[1])
    starts = range(0, len(texts), step)
    for number, start in enumerate(starts):
        hidden = embedded(source, spec, texts[start : start + step])
        for layer in range(spec.n_layers):
            if progress is not None:
                progress(number * spec.n_layers + layer, len(starts) * spec.n_layers)
            ExactLayer(source, spec, layer).run(hidden)
        for window in hidden:
            out = np.empty_like(window)
            ops.rmsnorm(window, norm, spec.norm_eps, out)
            yield out


def together(spec: ModelSpec, window: int) -> int:
    """Windows that go through a layer while it is there."""
    return max(1, TOGETHER_BYTES // (4 * window * spec.d_model))


def pass_bytes(spec: ModelSpec, n_windows: int, window: int) -> int:
    """What ``last_states`` holds at most: windows' hidden states, a layer's matrices, and a window's activations."""
    d, q, kv = spec.d_model, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    states = min(n_windows, together(spec, window)) * window * d
    return 4 * (states + d * (2 * q + 2 * kv + 3 * spec.d_ff) + window_elements(spec, window))


def window_elements(spec: ModelSpec, window: int) -> int:
    """Numbers that a window's way through a layer takes at most."""
    d, q, kv = spec.d_model, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    return max(window * (2 * d + 4 * q + 4 * kv), min(window, PIECE_TOKENS) * (3 * d + 3 * spec.d_ff))


class ExactLayer:
    """A layer with its matrices in float32."""

    def __init__(self, source: Source, spec: ModelSpec, layer: int) -> None:
        prefix = f"layers.{layer}."
        names = [n for n in source.weights if n.startswith(prefix)]
        roles = set(ROLES)
        vectors = {
            n.removeprefix(prefix): source.floats(n).view(np.uint8)
            for n in names
            if n.removeprefix(prefix) not in roles
        }
        self.prefix = prefix
        self.matrices = {role: source.floats(prefix + role) for role in ROLES}
        self._pass = LayerPass(spec, layer, factors(spec, vectors))

    def replaced(self, role: str, weight: F32) -> ExactLayer:
        """The same layer with another matrix."""
        other = copy.copy(self)
        other.matrices = self.matrices | {role: weight}
        return other

    def run(self, *streams: F32, squares: dict[str, F32] | None = None) -> None:
        """Pass streams (n_windows, window, d) through the layer, in place; keep the sums of squares of each input."""
        for stream in streams:
            for window in stream:  # they don't see one another
                self._pass_on(window, squares)

    def _pass_on(self, hidden: F32, squares: dict[str, F32] | None) -> None:
        there, matrices = self._pass, self.matrices

        def enter(stage: str, x: F32) -> list[F32]:
            if squares is not None:
                here = np.einsum("nc,nc->c", x, x)
                for name in (self.prefix + role for role in STAGES[stage]):
                    squares[name] = squares.get(name, np.float32(0)) + here
            return products(x, [matrices[role] for role in STAGES[stage]])

        attended = there.attend(*enter("attn_in", there.attn_in(hidden)))
        hidden[:] = there.after_attention(hidden, *enter("attn_out", attended))
        for x in pieces(hidden):
            active = there.activate(*enter("ffn_in", there.ffn_in(x)))
            x[:] = there.after_ffn(x, *enter("ffn_out", active))
