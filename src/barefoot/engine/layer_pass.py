"""One layer's pass in float32, in stages, with whatever matrices the caller multiplies by.

Fitting looks at the inputs of each matrix and replaces matrices between stages, so here the products are the caller's:

    a = attn_in(x);  q, k, v = a Wqᵀ, a Wkᵀ, a Wvᵀ;  h = attend(q, k, v)
    x = after_attention(x, h Woᵀ);  f = ffn_in(x);  g = activate(f Wgᵀ, f Wuᵀ);  x = after_ffn(x, g Wdᵀ)

All arrays are float32 (n_tokens, width) and hold one window of text, from its first token on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.model import ModelSpec
from barefoot.engine.rope import inverse_frequencies

F32 = npt.NDArray[np.float32]

#: The stages at which matrices meet the same input: roles by the name of their input, in the order of a pass.
STAGES: Mapping[str, tuple[str, ...]] = {
    "attn_in": ("q", "k", "v"),
    "attn_out": ("o",),
    "ffn_in": ("gate", "up"),
    "ffn_out": ("down",),
}


@dataclass(frozen=True)
class LayerPass:
    """``vectors``: norms and biases by role, norms as the factors that they multiply by."""

    spec: ModelSpec
    layer: int
    vectors: Mapping[str, F32]

    def __call__(self, x: F32, weights: Mapping[str, F32]) -> F32:
        """The whole layer, with ``weights`` by role, (outputs, inputs)."""
        a = self.attn_in(x)
        a = self.attend(*(a @ weights[role].T for role in STAGES["attn_in"]))
        x = self.after_attention(x, a @ weights["o"].T)
        f = self.ffn_in(x)
        return self.after_ffn(x, self.activate(f @ weights["gate"].T, f @ weights["up"].T) @ weights["down"].T)

    def attn_in(self, x: F32) -> F32:
        return self._norm(x, "attn_norm")

    def attend(self, q: F32, k: F32, v: F32) -> F32:
        """The heads' outputs, (n, n_heads × head_dim); q and k are changed."""
        spec, layer = self.spec, self.spec.layers[self.layer]
        n, row_bytes = len(q), ops.kv_row_bytes("f32", spec.head_dim)
        for role, each in (("q", q), ("k", k), ("v", v)):
            if f"{role}_bias" in self.vectors:
                ops.add_(each, self.vectors[f"{role}_bias"])
        cos, sin = rotations(spec, self.layer, n)
        for role, each, heads in (("q", q, spec.n_heads), ("k", k, spec.n_kv_heads)):
            if f"{role}_norm" in self.vectors:
                ops.head_rmsnorm(each, heads, spec.head_dim, self.vectors[f"{role}_norm"], spec.norm_eps)
            ops.rope(each, heads, spec.head_dim, cos, sin, interleaved=layer.rope.interleaved)
        store = np.empty((2, spec.n_kv_heads, n, row_bytes), np.uint8)
        ops.kv_append(k, v, store[0], store[1], "f32", n, 0)
        out = np.empty_like(q)
        scratch = np.empty(ops.attention_scratch_bytes(n, spec.n_heads, spec.n_kv_heads, spec.head_dim), np.uint8)
        ops.attention(
            q,
            store[0],
            store[1],
            "f32",
            out,
            n_heads=spec.n_heads,
            n_kv_heads=spec.n_kv_heads,
            head_dim=spec.head_dim,
            capacity=n,
            n_past=0,
            n_tokens=n,
            scale=spec.attn_scale,
            window=layer.window or 0,
            softcap=spec.attn_softcap,
            scratch=scratch,
        )
        return out

    def after_attention(self, x: F32, o: F32) -> F32:
        return x + self._norm(o, "post_attn_norm") if "post_attn_norm" in self.vectors else x + o

    def ffn_in(self, x: F32) -> F32:
        return self._norm(x, "ffn_norm")

    def activate(self, gate: F32, up: F32) -> F32:
        """activation(gate) × up, in the place of ``gate``."""
        ops.glu(gate, up, gate, activation=self.spec.activation)
        return gate

    def after_ffn(self, x: F32, down: F32) -> F32:
        return x + self._norm(down, "post_ffn_norm") if "post_ffn_norm" in self.vectors else x + down

    def _norm(self, x: F32, role: str) -> F32:
        out = np.empty_like(x)
        ops.rmsnorm(x, self.vectors[role], self.spec.norm_eps, out)
        return out


def rotations(spec: ModelSpec, layer: int, n: int) -> tuple[F32, F32]:
    """Cosines and sines of positions 0 to n - 1, float32 (n, rot_dim / 2) each."""
    rope = spec.layers[layer].rope
    angles = np.arange(n, dtype=np.float32)[:, None] * inverse_frequencies(rope, n)
    factor = np.float32(rope.attention_factor)
    return np.cos(angles) * factor, np.sin(angles) * factor
