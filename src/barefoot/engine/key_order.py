"""K-sort: the channels of keys in the order of their sizes, so that those that share an exponent are alike.

Accurate Block Quantization in LLMs with Outliers (Trukhanov and Soloveychik 2024, arXiv:2403.20137). In blocks that
share an exponent a large channel takes the precision of all others, and a few channels of keys are large at every
position. Of each layer and key head, channels come in the order of

    s_c² = g_c² (Σ_j (W_cj n_j)² + b_c²)

with the matrix and the bias of keys, the norm n before them and g over them: how large keys would be if what is normed
were white.

Keys and queries are put in that order when they have been rotated: q · k is a sum over channels, so that scores are the
same, and weights, frequencies, norms and adapters stay as they are. Bytes, of L layers with H key heads of d channels:
2 L H d. A store of blocks of n channels gains where n < d; heads of one block are left alone.

*Differs from the paper*: it permutes rows of the weights at compile time, which must keep the pairs of RoPE together.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from barefoot.core.ledger import Footprint, Term, entry
from barefoot.core.lifetimes import ALIGNMENT
from barefoot.core.model import ModelSpec
from barefoot.core.units import round_up
from barefoot.engine.arena import Arena
from barefoot.engine.rows import decode, read_rows
from barefoot.io.inventory import Checkpoint
from barefoot.kv.stores import KVStore
from barefoot.ops import blocks
from barefoot.ops.kvrows import GROUP

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]

FLOATS = 4  # bytes of each number of a key head's rows while they are read


def is_sorted(spec: ModelSpec, kv: KVStore) -> bool:
    """Whether the store asks for it, and it changes anything."""
    return kv.sorts_keys and spec.head_dim > GROUP


def by_size(sizes: F32) -> U16:
    """Channels of each head, largest first: sizes (..., head_dim) to uint16 of that shape."""
    return np.argsort(-sizes, axis=-1, kind="stable").astype(np.uint16)


def read_orders(checkpoint: Checkpoint, spec: ModelSpec, kv: KVStore, arena: Arena) -> U16 | None:
    """The orders of channels, (n_layers, n_kv_heads, head_dim), in the arena; None where they stay as they are."""
    if not is_sorted(spec, kv):
        return None
    shape = spec.n_layers, spec.n_kv_heads, spec.head_dim
    orders = arena.take("key order", 2 * math.prod(shape)).view(np.uint16).reshape(shape)
    for layer in range(spec.n_layers):
        orders[layer] = by_size(sizes_by_weights(checkpoint, spec, layer))
    return orders


def sizes_by_weights(checkpoint: Checkpoint, spec: ModelSpec, layer: int) -> F32:
    """s² of the channels of a layer's keys, (n_kv_heads, head_dim)."""
    weights = {w.name.rsplit(".", 1)[-1]: w for w in spec.weights if w.layer == layer}

    def vector(role: str) -> F32:
        found = decode(weights[role].format, read_rows(checkpoint, weights[role]), weights[role].cols)[0]
        return np.asarray(found + np.float32(spec.norm_plus_one)) if role.endswith("norm") else found

    key, norm = weights["k"], vector("attn_norm")
    squares = np.empty((spec.n_kv_heads, spec.head_dim), np.float32)
    for head, own in enumerate(squares):
        rows = decode(key.format, read_rows(checkpoint, key, head * spec.head_dim, spec.head_dim), key.cols)
        rows *= norm
        own[:] = np.einsum("cj,cj->c", rows, rows)
    if "k_bias" in weights:
        squares += np.square(vector("k_bias")).reshape(squares.shape)
    if "k_norm" in weights:
        squares *= np.square(vector("k_norm"))
    return squares


def key_order_footprint(spec: ModelSpec, kv: KVStore) -> Footprint:
    """The orders, and a head's rows while they are read."""
    if not is_sorted(spec, kv):
        return Footprint()
    keys = [w for w in spec.weights if w.name.endswith(".k")]
    stored = max(spec.head_dim * blocks.row_bytes(w.format, w.cols) + w.packed_bytes for w in keys)
    n_channels = spec.n_layers * spec.n_kv_heads * spec.head_dim
    orders = Term("orders", 1, round_up(2 * n_channels, ALIGNMENT))
    rows = Term("rows", 1, 2 * stored + FLOATS * spec.head_dim * spec.d_model)
    return entry("key order", "workspace", [orders], phases=("load", "prefill", "decode")) + entry(
        "key sorter", "workspace", [rows], phases=("load",)
    )
