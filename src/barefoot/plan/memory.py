"""The bytes of a job on accelerators and their host; on a host alone the engine states them itself."""

from __future__ import annotations

from collections import Counter

from barefoot.core.device import Device
from barefoot.core.ledger import Footprint, Phase, Place, Term, entry
from barefoot.core.model import ModelSpec
from barefoot.core.units import MIB
from barefoot.engine.config import EngineConfig
from barefoot.engine.stacks import loaded, n_stacked
from barefoot.ops import blocks
from barefoot.plan.job import RunJob
from barefoot.plan.operators import Site, layer_place, layout_of

RUN_PHASES: tuple[Phase, ...] = ("load", "prefill", "decode")
# Driver context and matrix-library workspaces of each accelerator; assumed, there is no process to measure.
ACCELERATOR_RUNTIME_BYTES = 512 * MIB


def layer_kv_bytes(spec: ModelSpec, config: EngineConfig, layer: int, batch: int) -> int:
    """Bytes of one layer's keys and values for all sequences."""
    return batch * config.kv.layer_bytes(spec, layer, config.context, config.chunk)


def accelerator_footprint(
    spec: ModelSpec, config: EngineConfig, job: RunJob, device: Device, n_host_layers: int
) -> Footprint:
    """A model on accelerators, its last ``n_host_layers`` layers with their keys and values in host memory.

    Numbers are sums over all accelerators: weights and KV are shared out, activations and the runtime repeat on each.
    """
    site = Site("accelerator", 2, n_host_layers)
    weights: Counter[tuple[Place, str, int]] = Counter()
    for w in loaded(spec, n_stacked(spec, config)).weights:
        at = site.place if w.layer is None else layer_place(spec, w.layer, config, site)
        layout = layout_of(w, config, at)
        n_blocks = w.rows * (w.cols // blocks.block_elements(layout))
        weights[at, f"{w.group} {layout}", blocks.block_bytes(layout)] += n_blocks
        for part in w.parts:
            weights[at, f"{w.group} {part.kind}", 1] += part.n_bytes
    kv: Counter[Place] = Counter()
    for layer in range(spec.n_layers):
        kv[layer_place(spec, layer, config, site)] += layer_kv_bytes(spec, config, layer, job.batch)
    total = Footprint()
    for at in dict.fromkeys(place for place, _, _ in weights):
        terms = [Term(f"{name} blocks", n, size) for (place, name, size), n in weights.items() if place == at]
        total += entry("model", "weights", terms, phases=RUN_PHASES, place=at)
        if kv[at]:
            total += entry(str(config.kv), "kv", [Term("keys and values", kv[at], 1)], phases=RUN_PHASES, place=at)
    added: Counter[Place] = Counter()
    layer_of = {w.name: w.layer for w in spec.weights if w.layer is not None}
    for name, part in config.adapter.parts if config.adapter is not None else ():
        added[layer_place(spec, layer_of[name], config, site)] += part.n_bytes
    for at, n_bytes in added.items():
        total += entry("adapter", "adapter", [Term("factors", n_bytes, 1)], phases=RUN_PHASES, place=at)
    n = device.n_accelerators
    heads, ffn = (2 * spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim, 2 * spec.d_ff
    widest = 2 * spec.d_model + max(heads, ffn)  # residual and normed input, beside the wider half of a layer
    tokens = max(config.chunk, job.batch)
    activations = [Term("activations of a token", n * tokens, widest * site.activation_bytes)]
    total += entry("model", "activations", activations, phases=("prefill", "decode"), place="accelerator")
    logits = [Term("logits", job.batch * spec.vocab_size, 4)]
    total += entry("model", "logits", logits, phases=("prefill", "decode"), place="accelerator")
    runtime = [Term("driver and libraries (assumed)", n, ACCELERATOR_RUNTIME_BYTES)]
    return total + entry("accelerator", "reserved", runtime, phases=RUN_PHASES, place="accelerator")
