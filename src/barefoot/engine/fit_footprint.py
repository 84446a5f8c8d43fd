"""The bytes of a fit, in closed form: one stage's matrices, one matrix's solve, and one window of the text.

Phases: ``forward`` measures sensitivities, ``convert`` stores the embedding and the head, ``step`` a layer; reading and
writing hold no more than these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from barefoot.core.ledger import Footprint, Term, entry
from barefoot.core.model import ModelSpec, PartSpec, WeightSpec
from barefoot.engine.calibration import HESSIAN_COLUMNS, KNOWLEDGE, PIECE_TOKENS
from barefoot.engine.exact import ROLES, pass_bytes
from barefoot.engine.fitting import CHUNK_WEIGHTS, WITHOUT_TEXT, Fit
from barefoot.engine.layer_pass import STAGES
from barefoot.engine.placement import stored_bytes
from barefoot.engine.stacks import level_by_level
from barefoot.ops import blocks, kv_row_bytes
from barefoot.ops.grids import Grid
from barefoot.weights.solvers import Inputs, LayerSolver, Solver
from barefoot.weights.structures import Structure

# Of passing arrays; tests measure them.
PACK_BYTES_PER_WEIGHT = 5  # while codes become blocks
PART_BYTES_PER_WEIGHT = 5  # while a part becomes floats


def warm_up(spec: ModelSpec, solver: Solver, structures: Iterable[Structure] = ()) -> None:
    """Let libraries load and make their own buffers, which are then part of what the process has resident: BLAS, whose
    buffers are as wide as products are, LAPACK, what structures use, and PyTorch where the solver learns."""
    widest = max(w.cols for w in spec.weights if w.layer is not None)
    double = np.eye(512)
    np.matmul(double.astype(np.float32), np.ones((512, widest), np.float32))
    np.linalg.solve(double @ double, double[:, :128])
    np.linalg.cholesky(double)
    small = np.sin(np.arange(64 * 64, dtype=np.float32)).reshape(64, 64)
    for structure in structures:
        structure.solve(small, Inputs(np.ones(64, np.float32), np.eye(64, dtype=np.float32)))
    if isinstance(solver, LayerSolver):
        solver.warm_up()


def footprint(spec: ModelSpec, job: Fit) -> Footprint:
    """What ``engine.fitting.fit`` takes, beside the process's own bytes and those of ``warm_up``."""
    weights = {w.name: w for w in spec.weights}
    layers = [
        max(_layer(spec, job, weights, layer), _refining(spec, job, weights, layer)) for layer in range(spec.n_layers)
    ]
    outside = max(_outer(spec, job, w) for w in spec.weights if w.layer is None and w.group != "norm")
    result = entry("layer", "workspace", [Term("largest stage", 1, max(layers, default=0))], phases=("step",))
    result += entry("outer", "workspace", [Term("largest matrix", 1, outside)], phases=("convert",))
    return result


def fitted(spec: ModelSpec, job: Fit) -> ModelSpec:
    """The model as ``engine.fitting.fit`` will store it, with the most that structures take."""

    def stored(weight: WeightSpec) -> WeightSpec:
        how = job.formats.get(weight.name, "f32" if weight.group == "norm" else weight.format)
        if not isinstance(how, Structure):
            return replace(weight, format=how, packed_bytes=0)
        most = how.most(weight.rows, weight.cols)
        parts = (PartSpec(label, *part, f"{weight.name}.{label}") for label, part in most.parts.items())
        return replace(weight, format=most.format, parts=tuple(parts), packed_bytes=0)

    weights = tuple(map(stored, spec.weights))
    return replace(spec, weights=weights, stack=level_by_level(weights))


def _outer(spec: ModelSpec, job: Fit, weight: WeightSpec) -> int:
    """The embedding or the head, some rows of it at a time; or what measures its inputs before."""
    some = max(1, min(weight.rows, CHUNK_WEIGHTS // weight.cols))
    wanted = "nothing" if weight.name == "embed" and not spec.tied else job.wants(weight.name)
    hessian = 4 * weight.cols**2 if wanted in ("hessian", "drift") else 4 * weight.cols
    measuring = pass_bytes(spec, *job.texts.shape) if wanted != "nothing" and spec.tied else 0
    solving = packed_bytes(job, weight) * some // weight.rows + _solving(spec, job, weight, some * weight.cols)
    return hessian + max(measuring, solving)


def _solving(spec: ModelSpec, job: Fit, weight: WeightSpec, n: int) -> int:
    """``n`` weights of a matrix: as floats, beside the file's bytes, or codes and what choosing or packing takes."""
    stored, how = stored_bytes(weight) * n // weight.n_elements, job.formats.get(weight.name)
    if isinstance(how, Structure):
        return 4 * n + max(stored, how.workspace_bytes(weight.rows, weight.cols))
    choosing, packing = n + _solve_bytes(spec, job, weight, n // weight.cols), (1 + PACK_BYTES_PER_WEIGHT) * n
    return 4 * n + max(stored, choosing, packing)


def packed_bytes(job: Fit, weight: WeightSpec) -> int:
    """Bytes of a matrix as it will be stored, at most."""
    how = job.formats.get(weight.name, weight.format)
    if isinstance(how, Structure):
        return how.most(weight.rows, weight.cols).n_bytes
    return weight.rows * blocks.row_bytes(how, weight.cols)


def _solve_bytes(spec: ModelSpec, job: Fit, weight: WeightSpec, n_rows: int) -> int:
    grid = _grid(job, weight)
    solver = WITHOUT_TEXT if weight.name == "embed" and not spec.tied else job.solver
    return 0 if grid is None else solver.workspace_bytes(n_rows, weight.cols, grid)


def _layer(spec: ModelSpec, job: Fit, weights: Mapping[str, WeightSpec], layer: int) -> int:
    """The most that a layer takes in any of its stages: while inputs are measured, a matrix is solved, or the text
    passes on through what is stored."""
    window = job.texts.shape[1] if job.reads else 0
    d, ff, piece = spec.d_model, spec.d_ff, min(window, PIECE_TOKENS)
    q, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    store = 2 * window * spec.n_kv_heads * kv_row_bytes("f32", spec.head_dim)
    going = {  # what one window takes on its way into a stage
        "attn_in": 4 * window * 2 * d,
        "attn_out": 4 * window * (2 * d + 3 * q + 4 * kv) + store,
        "ffn_in": 4 * window * 2 * d,
        "ffn_out": 4 * (window * d + piece * (2 * d + 3 * ff)),
    }
    through = {"attn_out": "attn_in", "ffn_out": "ffn_in"}  # the matrices that it meets there

    def of(stage: str) -> list[WeightSpec]:
        return [weights[f"layers.{layer}.{role}"] for role in STAGES[stage]] if window else []

    def floats(stage: str) -> int:
        return sum(4 * w.n_elements for w in of(stage))

    def decoding(stage: str) -> int:
        """What comes beside these floats while parts are decoded, one by one, and added."""
        sums = (w.n_elements for w in of(stage) if isinstance(job.formats.get(w.name), Structure))
        return PART_BYTES_PER_WEIGHT * max(sums, default=0)

    kept = most = 0
    for stage, roles in STAGES.items():
        of_stage = [weights[f"layers.{layer}.{role}"] for role in roles]
        width = of_stage[0].cols
        wanted = max((job.wants(w.name) for w in of_stage), key=KNOWLEDGE.index)
        moments = adding = triangle = 4 * width
        if wanted in ("hessian", "drift"):
            step = min(width, HESSIAN_COLUMNS)
            moments, adding, triangle = 4 * width**2, 4 * width * step, 2 * width * (width + step)
        beside = 0  # the Hessian
        n_ways = 2 if wanted == "drift" else 1
        if wanted == "drift":
            alone = len(roles) == 1
            beside = 4 * (d * width if alone else width**2)
            at_once = piece if stage == "ffn_out" else window
            adding += 4 * at_once * width + (4 * (d * width + at_once * d) if alone else 0)
        arriving = going[stage]
        if stage in through:
            arriving = floats(through[stage]) + max(arriving, decoding(through[stage]))
        solving = max(_solving(spec, job, w, w.n_elements) for w in of_stage)
        packed = sum(packed_bytes(job, w) for w in of_stage)
        leaving = arriving + floats(stage) + max(4 * window * 2 * d, decoding(stage)) if stage in through else 0
        measuring = n_ways * arriving + triangle + beside + adding
        summing = moments + beside + triangle // 2
        solving += moments + beside + packed
        most = max(most, *(kept + each for each in (measuring, summing, solving, packed + leaving)))
        kept += packed
    return most


def _refining(spec: ModelSpec, job: Fit, weights: Mapping[str, WeightSpec], layer: int) -> int:
    """What a layer solver takes: the layer as it was, its text's hidden states before and behind it, how its matrices
    would be stored; and what learning takes, or what was found and the floats that it stands for."""
    if not isinstance(job.solver, LayerSolver):
        return 0
    matrices = {role: weights[f"layers.{layer}.{role}"] for role in ROLES}
    grids = {role: grid for role, w in matrices.items() if (grid := _grid(job, w)) is not None}
    n_weights = sum(w.n_elements for w in matrices.values())
    solutions = sum(
        matrices[role].n_elements + 4 * matrices[role].n_elements // grid.group * grid.n_params
        for role, grid in grids.items()
    )
    kept = sum(packed_bytes(job, w) for w in matrices.values())
    problem = 4 * n_weights + 2 * 4 * job.texts.size * spec.d_model + solutions
    learning = sum(term.bytes for term in job.solver.terms(spec, layer, grids, job.texts.shape[1]))
    return kept + problem + max(learning, solutions + 4 * n_weights)


def _grid(job: Fit, weight: WeightSpec) -> Grid | None:
    """What the codes of a matrix are chosen on; None where it keeps its blocks, or has others than those of a grid."""
    how = job.formats.get(weight.name)
    return None if how is None or isinstance(how, Structure) or how == weight.format else blocks.lookup(how).grid
