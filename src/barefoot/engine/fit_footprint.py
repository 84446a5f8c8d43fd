"""The bytes of a fit, in closed form: one layer's matrices, one matrix's solve, and the text's hidden states.

Phases: ``forward`` measures sensitivities, ``convert`` stores the embedding and the head, ``step`` a layer; reading and
writing hold no more than these.
"""

from __future__ import annotations

from collections.abc import Mapping

from barefoot.core.ledger import Footprint, Term, entry
from barefoot.core.model import ModelSpec, WeightSpec
from barefoot.engine.fitting import CHUNK_WEIGHTS, Fit
from barefoot.engine.layer_pass import STAGES
from barefoot.engine.placement import stored_bytes
from barefoot.ops import blocks, kv_row_bytes
from barefoot.weights.structures import Structure


def footprint(spec: ModelSpec, job: Fit) -> Footprint:
    """What ``engine.fitting.fit`` takes, beside the process's own bytes; for solvers that need no PyTorch."""
    weights = {w.name: w for w in spec.weights}
    hidden = job.texts.size * spec.d_model * 4 if job.reads else 0
    layers = [_layer(spec, job, weights, layer) for layer in range(spec.n_layers)]
    outside = [w for w in spec.weights if w.layer is None and w.group != "norm"]
    result = entry("layer", "workspace", [Term("largest stage", 1, max(layers, default=0))], phases=("step",))
    result += entry(
        "outer", "workspace", [Term("largest matrix", 1, max(_outer(job, w) for w in outside))], phases=("convert",)
    )
    if hidden:
        result += entry("hidden", "activations", [Term("hidden states", 1, hidden)], phases=("convert", "step"))
    return result


def _outer(job: Fit, weight: WeightSpec) -> int:
    """The embedding or the head: its packed rows, and some of them at a time as they were and as floats."""
    some = max(1, min(weight.rows, CHUNK_WEIGHTS // weight.cols)) * weight.cols
    stored = stored_bytes(weight) * some // weight.n_elements
    return packed_bytes(job, weight) + some * (4 + 1 + 4) + stored


def packed_bytes(job: Fit, weight: WeightSpec) -> int:
    """Bytes of a matrix as it will be stored; of a structure those of 8 bits a weight."""
    how = job.formats.get(weight.name, weight.format)
    return weight.n_elements if isinstance(how, Structure) else weight.rows * blocks.row_bytes(how, weight.cols)


def _solve_bytes(job: Fit, weight: WeightSpec) -> int:
    how = job.formats.get(weight.name)
    if isinstance(how, Structure) or how is None:
        return 0
    grid = blocks.lookup(how).grid
    return 0 if grid is None else job.solver.workspace_bytes(weight.rows, weight.cols, grid)


def _layer(spec: ModelSpec, job: Fit, weights: Mapping[str, WeightSpec], layer: int) -> int:
    """The most that a layer takes in any of its stages."""
    tokens = job.texts.size if job.reads else 0
    window = job.texts.shape[1] if tokens else 0
    d, ff = spec.d_model, spec.d_ff
    q, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    kept = 0  # matrices of the layer that are packed already
    most = 0
    between = 0  # decoded matrices that a stage leaves for the next one
    attended = 4 * tokens * q
    for stage, roles in STAGES.items():
        of_stage = [weights[f"layers.{layer}.{role}"] for role in roles]
        width = of_stage[0].cols
        measured = 2 * 4 * width**2 if any(job.wants(w.name) == "hessian" for w in of_stage) else 4 * width
        passing = 4 * window * _widest(stage, d, q, kv, ff) if tokens else 0
        passing += 2 * window * spec.n_kv_heads * kv_row_bytes("f32", spec.head_dim) if stage == "attn_out" else 0
        held = kept + between + (attended if stage in ("attn_out",) and tokens else 0)
        solving = max(
            4 * w.n_elements + stored_bytes(w) + w.n_elements + packed_bytes(job, w) + _solve_bytes(job, w)
            for w in of_stage
        )
        decoded = sum(4 * w.n_elements for w in of_stage) if tokens else 0
        kept += sum(packed_bytes(job, w) for w in of_stage)
        most = max(most, held + measured + max(passing, solving), held + decoded + passing)
        between = decoded if stage in ("attn_in", "ffn_in") else 0
    return most + (attended if tokens else 0)


def _widest(stage: str, d: int, q: int, kv: int, ff: int) -> int:
    """Float32 numbers of a token that are alive at once while a window passes through a stage."""
    return {"attn_in": 2 * d + 2 * q + 2 * kv, "attn_out": 3 * q + 4 * kv + 2 * d, "ffn_in": 3 * d}.get(
        stage, 2 * d + 3 * ff
    )
