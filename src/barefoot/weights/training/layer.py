"""A decoder layer as one differentiable function of its weights, for every architecture that a ``ModelSpec`` describes.

The function is that of ``barefoot.engine.layer_pass``, which its tests hold it to: RMS norms (also behind each half,
and over the heads of q and k), rotations of either kind, grouped heads, sliding windows, soft caps, gated activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from barefoot.core.model import ModelSpec
from barefoot.ops.grids import F32
from barefoot.weights.solvers import LayerProblem

#: What becomes of activations at a place: ``attn_in``, ``attn_out``, ``ffn_in`` and ``ffn_out``, the inputs of
#: matrices, and ``q``, ``k`` and ``v``, turned already. Channels are the last axis.
Rounding = Callable[[str, Tensor], Tensor]


def unchanged(place: str, x: Tensor) -> Tensor:
    return x


def per_token(bits: int) -> Rounding:
    """Simulated activations of so many bits: each token's range (of each head, for q, k and v) in equal steps.

    As OmniQuant's dynamic asymmetric quantizer; probabilities are left alone. Gradients pass straight through.
    """

    def rounded(place: str, x: Tensor) -> Tensor:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        step = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
        nearest: Tensor = torch.round((x - low) / step) * step + low
        return x + (nearest - x).detach()

    return rounded


@dataclass(frozen=True)
class LayerFunction:
    """``layer(weights, x)``: hidden states (batch, n, d_model) float32 → the same, behind layer number ``layer``.

    Attributes
    ----------
    cos, sin : of positions 0 to n - 1 and on, float32 (≥ n, rot_dim / 2).
    compute : the type in which matrices are multiplied and attention runs; norms and sums between are float32.
    rounding : a simulated format of the activations.
    """

    spec: ModelSpec
    layer: int
    cos: Tensor
    sin: Tensor
    compute: torch.dtype = torch.float32
    rounding: Rounding = unchanged

    def __call__(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """``weights`` by role: matrices, biases, and norms as the factors that they multiply by."""
        a = self._seen("attn_in", self._norm(weights["attn_norm"], x))
        q, k, v = (self._product(weights, role, a) for role in "qkv")
        o = self._product(weights, "o", self._seen("attn_out", self._attend(weights, q, k, v)))
        x = self._behind(weights, "post_attn_norm", o).add_(x)  # nothing else needs what comes out of either
        f = self._seen("ffn_in", self._norm(weights["ffn_norm"], x))
        gate, up = self._product(weights, "gate", f), self._product(weights, "up", f)
        down = self._product(weights, "down", self._seen("ffn_out", self._gated(gate, up)))
        return self._behind(weights, "post_ffn_norm", down).add_(x)

    def _seen(self, place: str, x: Tensor) -> Tensor:
        """Activations as products meet them."""
        return self.rounding(place, x).to(self.compute)

    def _product(self, weights: Mapping[str, Tensor], role: str, x: Tensor) -> Tensor:
        y = (x @ weights[role].to(self.compute).T).float()
        return y + weights[f"{role}_bias"].reshape(-1) if f"{role}_bias" in weights else y

    def _norm(self, factors: Tensor, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], factors.reshape(-1), self.spec.norm_eps)

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return up * (F.silu(gate) if self.spec.activation == "silu" else F.gelu(gate, approximate="tanh"))

    def _behind(self, weights: Mapping[str, Tensor], role: str, x: Tensor) -> Tensor:
        return self._norm(weights[role], x) if role in weights else x

    def _attend(self, weights: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spec, (batch, n, _) = self.spec, q.shape
        q, k, v = (x.reshape(batch, n, -1, spec.head_dim) for x in (q, k, v))
        if "q_norm" in weights:
            q, k = self._norm(weights["q_norm"], q), self._norm(weights["k_norm"], k)
        q, k = self._turn(q), self._turn(k)
        q, k, v = (self._seen(place, x) for place, x in (("q", q), ("k", k), ("v", v)))
        return self._mix(q, k, v).reshape(batch, n, -1).float()

    def _mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention: q (batch, n, heads, head_dim), the last of as many as k and v are, which have fewer heads →
        the shape of q."""
        spec, n, n_keys = self.spec, q.shape[1], k.shape[1]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(spec.n_heads // spec.n_kv_heads, dim=1) for x in (k, v))
        window = self.spec.layers[self.layer].window
        if not spec.attn_softcap and (window is None or window >= n_keys) and n in (1, n_keys):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=n > 1, scale=spec.attn_scale)
            return out.transpose(1, 2)
        first = n_keys - n
        seen = torch.ones(n, n_keys, dtype=torch.bool).tril_(first).triu_(first + 1 - (window or n_keys)).to(q.device)
        if not spec.attn_softcap:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=spec.attn_scale)
        else:
            scores = (q @ k.transpose(-1, -2)).float() * spec.attn_scale
            scores = spec.attn_softcap * torch.tanh(scores / spec.attn_softcap)
            out = scores.masked_fill(~seen, -torch.inf).softmax(-1).to(self.compute) @ v
        return out.transpose(1, 2)

    def _turn(self, x: Tensor) -> Tensor:
        """Pairs of channels of x (batch, n, heads, head_dim) turned by their positions' angles."""
        n, half = x.shape[1], self.cos.shape[1]
        if not half:
            return x
        cos, sin = self.cos[:n, None], self.sin[:n, None]
        turning, still = x[..., : 2 * half], x[..., 2 * half :]
        interleaved = self.spec.layers[self.layer].rope.interleaved
        pairs = turning.reshape(*turning.shape[:-1], *((half, 2) if interleaved else (2, half)))
        a, b = pairs.unbind(-1 if interleaved else -2)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1 if interleaved else -2)
        return torch.cat([turned.flatten(-2), still], dim=-1)


def layer_function(
    problem: LayerProblem, compute: torch.dtype = torch.float32, rounding: Rounding = unchanged
) -> LayerFunction:
    """The function of a problem's layer."""
    cos, sin = map(torch.from_numpy, problem.rotations)
    return LayerFunction(problem.spec, problem.layer, cos, sin, compute, rounding)


def exact_outputs(problem: LayerProblem, function: LayerFunction | None = None) -> F32:
    """What the layer's own weights make of the quantized stream, (n_windows, n, d_model), window by window."""
    function = function or layer_function(problem)
    weights = {role: torch.from_numpy(w) for role, w in problem.weights.items()}
    with torch.no_grad():
        return np.stack([function(weights, torch.from_numpy(x[None]))[0].numpy() for x in problem.inputs])
