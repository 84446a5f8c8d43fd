"""concurrency — how many users one machine serves, and what each costs it.

Challenges in Deploying Long-Context Transformers: A Theoretical Peak Performance Analysis (Fu 2024, arXiv:2405.08944).
With M bytes of memory, W of weights, A of activations, KV(S) of one user's keys and values at S tokens:

    users that fit      C = floor((M − W − A) / KV(S))
    prefill             FLOPs(S) / peak,  FLOPs(S) = the operator table's, causal halves taken
    decode of T tokens  T × (W + Σ KV) / bandwidth while memory-bound
    critical batch      peak / bandwidth tokens: weights of 2 bytes and 2 operations a weight stop being the bound there
    context switch      2 × KV(S) / link: one user's out, another's in; or a new prefill, whichever is cheaper

All at the machine's theoretical peak: bounds, not forecasts. This module is the only place that computes C.
"""

from __future__ import annotations

from dataclasses import dataclass

from barefoot.core.device import GB, Compute, Device
from barefoot.core.model import ModelSpec
from barefoot.engine.config import EngineConfig
from barefoot.kv.stores import KVStore
from barefoot.plan.operators import layout_of, n_pairs
from barefoot.plan.roofline import rates


@dataclass(frozen=True)
class Serving:
    """What one machine gives users of ``context`` tokens each.

    ``recompute_seconds`` is a new prefill in place of a switch; ``switch_seconds`` is what a switch costs at its best.
    """

    context: int
    weight_bytes: int
    kv_bytes: int
    n_users: int
    prefill_seconds: float
    transfer_seconds: float
    decode_seconds_per_token: float
    critical_batch: float

    @property
    def switch_seconds(self) -> float:
        """Moving both users' keys and values, or computing them again: the cheaper."""
        return min(self.transfer_seconds, self.prefill_seconds)


def users_that_fit(memory_bytes: int, weight_bytes: int, activation_bytes: int, kv_bytes: int) -> int:
    """floor((memory − weights − activations) / KV of one user), never below 0."""
    return max(0, memory_bytes - weight_bytes - activation_bytes) // kv_bytes


def user_kv_bytes(spec: ModelSpec, kv: KVStore, context: int, chunk: int = 1) -> int:
    """Keys and values of one user: window layers keep their window, the others everything."""
    return sum(kv.layer_bytes(spec, layer, context, chunk) for layer in range(spec.n_layers))


def prefill_operations(spec: ModelSpec, n: int) -> int:
    """Multiplications and additions of all products in a prefill of ``n`` tokens; logits of the last one only."""
    matrices = sum(w.n_elements for w in spec.weights if w.rows > 1 and w.layer is not None)
    pairs = sum(n_pairs(n, 0, layer.window) for layer in spec.layers)
    head = spec.vocab_size * spec.d_model
    return 2 * n * matrices + 4 * spec.n_heads * spec.head_dim * pairs + 2 * head


def serving(
    spec: ModelSpec,
    config: EngineConfig,
    device: Device,
    *,
    activation_bytes: int = 0,
    batch: int = 1,
    memory_bytes: int | None = None,
    link_gb_s: float | None = None,
) -> Serving:
    """The bounds for users of ``config.context`` tokens each, of whom ``batch`` decode together.

    Parameters
    ----------
    activation_bytes : memory that neither weights nor keys and values may take.
    memory_bytes : memory to share out; the device's when None.
    link_gb_s : bandwidth to where idle users wait; the device's link (or disk, without accelerator) when None.
    """
    from barefoot.ops import blocks

    place = device.place
    machine = rates(device)
    weights = sum(w.rows * blocks.row_bytes(layout_of(w, config, place), w.cols) for w in spec.weights)
    kv = user_kv_bytes(spec, config.kv, config.context, config.chunk)
    memory = device.memory_bytes[place] if memory_bytes is None else memory_bytes
    link = machine.slow if link_gb_s is None else link_gb_s * GB
    kind: Compute = "f16" if place == "accelerator" else "f32"
    return Serving(
        context=config.context,
        weight_bytes=weights,
        kv_bytes=kv,
        n_users=users_that_fit(memory, weights, activation_bytes, kv),
        prefill_seconds=prefill_operations(spec, config.context) / machine.peaks[kind],
        transfer_seconds=2 * kv / link,
        decode_seconds_per_token=(weights + batch * kv) / machine.memory,
        critical_batch=machine.peaks[kind] / machine.memory,
    )
