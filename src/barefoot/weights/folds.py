"""Folds: changes of a layer's weights that leave its function as it is, up to the rounding of the products.

A *layer* maps roles to arrays: matrices (outputs, inputs), biases, and norms as the factors that they multiply by
(1 + w where a file stores w). A fold returns a new mapping with the changed arrays; nothing is written to. Only
operators, ``reshape`` and indexing are used, so arrays may be numpy's or PyTorch's, and gradients reach the factors.

================== ============================================ ==============================================
fold               what changes, for factors s                   why the function stays
================== ============================================ ==============================================
norm_to_matrices   norm / s, columns of its matrices × s         (x / s) ⊙ s = x
values_to_output   rows of v (and bias) / s, columns of o × s    attention mixes tokens, never channels; a key-value
                                                                 head's s serves all query heads that share it
queries_to_keys    rows of q (and bias) / s, rows of k × s       q · k; both channels of a pair that RoPE turns have
                                                                 the same s, so turning and scaling commute
up_to_down         rows of up / s, columns of down × s           act(gate) ⊙ up is linear in up
permute_ffn        rows of gate and up, columns of down          channels of the feed-forward layer have no order
permute_values     rows of v, columns of o, within a head        as above
================== ============================================ ==============================================

Not here, because the function would change: shifts (an RMS norm has no bias to take them up); scales of gate (the
activation is not linear) and of o or down (what they write is added to the residual stream, or normed); an order of
rotated pairs (each has a frequency of its own); with norms over the heads of q and k, factors in the rows (the norm
takes them out) or factors that differ from head to head (the norm has one weight for all of them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.model import ModelSpec

Array = Any  # numpy's or PyTorch's
Layer = Mapping[str, Array]
Order = npt.NDArray[np.int64]

#: Norms, and the matrices that read what they give.
READERS: Mapping[str, tuple[str, ...]] = {"attn_norm": ("q", "k", "v"), "ffn_norm": ("gate", "up")}


@dataclass(frozen=True)
class Heads:
    """How the rows of q, k and v are channels of heads, of which the first ``rot_dim`` turn in pairs."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rot_dim: int
    interleaved: bool

    @classmethod
    def of(cls, spec: ModelSpec, layer: int) -> Heads:
        rope = spec.layers[layer].rope
        return cls(spec.n_heads, spec.n_kv_heads, spec.head_dim, rope.dim, rope.interleaved)

    @property
    def n_free(self) -> int:
        """Factors of a head that RoPE leaves free: one for each pair, one for each channel that doesn't turn."""
        return self.head_dim - self.rot_dim // 2

    @property
    def factor_of_channel(self) -> Order:
        """For each channel of a head, which of the free factors is its own: pairs first."""
        half = self.rot_dim // 2
        pairs = np.arange(half).repeat(2) if self.interleaved else np.tile(np.arange(half), 2)
        return np.concatenate([pairs, np.arange(half, self.n_free)])


def norm_to_matrices(layer: Layer, norm: str, factors: Array) -> dict[str, Array]:
    """``norm`` is a key of ``READERS``; factors (d_model,)."""
    _expect("factors of " + norm, factors, layer[norm].shape)
    readers = {role: layer[role] * factors for role in READERS[norm]}
    return {**layer, norm: layer[norm] / factors, **readers}


def values_to_output(layer: Layer, heads: Heads, factors: Array) -> dict[str, Array]:
    """factors (n_kv_heads, head_dim)"""
    _expect("factors of values", factors, (heads.n_kv_heads, heads.head_dim))
    changed = _rows(layer, "v", 1 / factors.reshape(-1))
    o = layer["o"].reshape(-1, heads.n_kv_heads, heads.n_heads // heads.n_kv_heads, heads.head_dim)
    return {**layer, **changed, "o": (o * factors[:, None, :]).reshape(layer["o"].shape)}


def queries_to_keys(layer: Layer, heads: Heads, factors: Array) -> dict[str, Array]:
    """factors (n_kv_heads, heads.n_free), pairs first; (1, heads.n_free) where q and k are normed.

    Raises
    ------
    Incompatible : factors for each head where one norm serves all heads.
    """
    normed = "q_norm" in layer
    if normed and factors.shape[0] != 1:
        raise Incompatible(
            f"one norm serves all heads of q and k, so they share their factors; got those of {factors.shape[0]} heads",
            cure="use one row of factors",
        )
    _expect("factors of keys", factors, (1 if normed else heads.n_kv_heads, heads.n_free))
    channels = factors[:, heads.factor_of_channel]
    if normed:
        return {**layer, "q_norm": layer["q_norm"] / channels[0], "k_norm": layer["k_norm"] * channels[0]}
    shape = (heads.n_kv_heads, heads.n_heads // heads.n_kv_heads, heads.head_dim)
    q = layer["q"].reshape(*shape, -1) / channels[:, None, :, None]
    changed = {"q": q.reshape(layer["q"].shape), **_rows(layer, "k", channels.reshape(-1))}
    if "q_bias" in layer:
        bias = layer["q_bias"].reshape(shape) / channels[:, None, :]
        changed["q_bias"] = bias.reshape(layer["q_bias"].shape)
    return {**layer, **changed}


def up_to_down(layer: Layer, factors: Array) -> dict[str, Array]:
    """factors (d_ff,)"""
    _expect("factors of up", factors, (len(layer["up"]),))
    return {**layer, **_rows(layer, "up", 1 / factors), "down": layer["down"] * factors}


def permute_ffn(layer: Layer, order: Order) -> dict[str, Array]:
    """Channel i of the result is channel ``order[i]``; order (d_ff,)."""
    _expect_order(order[None], (1, len(layer["up"])))
    return {**layer, "gate": layer["gate"][order], "up": layer["up"][order], "down": layer["down"][:, order]}


def permute_values(layer: Layer, heads: Heads, order: Order) -> dict[str, Array]:
    """Channel i of key-value head h becomes its channel ``order[h, i]``; order (n_kv_heads, head_dim)."""
    _expect_order(order, (heads.n_kv_heads, heads.head_dim))
    rows = (order + heads.head_dim * np.arange(heads.n_kv_heads)[:, None]).reshape(-1)
    by_head = np.repeat(order, heads.n_heads // heads.n_kv_heads, axis=0)
    columns = (by_head + heads.head_dim * np.arange(heads.n_heads)[:, None]).reshape(-1)
    changed = {"v": layer["v"][rows], "o": layer["o"][:, columns]}
    if "v_bias" in layer:
        changed["v_bias"] = layer["v_bias"][..., rows]
    return {**layer, **changed}


def _rows(layer: Layer, role: str, factors: Array) -> dict[str, Array]:
    """A matrix with its rows scaled, and its bias where there is one."""
    changed = {role: layer[role] * factors[:, None]}
    if f"{role}_bias" in layer:
        changed[f"{role}_bias"] = layer[f"{role}_bias"] * factors
    return changed


def _expect(what: str, factors: Array, shape: tuple[int, ...]) -> None:
    if tuple(factors.shape) != tuple(shape):
        raise InvalidInput(f"{what} must have shape {tuple(shape)}, got {tuple(factors.shape)}")


def _expect_order(order: Order, shape: tuple[int, int]) -> None:
    _expect("the order of channels", order, shape)
    if not np.array_equal(np.sort(order, axis=1), np.broadcast_to(np.arange(shape[1]), shape)):
        raise InvalidInput("the order of channels must name each of them once")
