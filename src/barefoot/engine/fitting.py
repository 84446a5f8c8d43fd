"""Fitting a model to its formats, layer by layer: in memory are one stage's matrices and one window of text.

First the embedding: where it is the head too, it is solved for the inputs that the head has in the exact model, since
what rounding does to logits costs more than what it does to a layer's input. Then, for each layer, stage by stage
(q k v, o, gate up, down): measure the inputs that the matrices meet, with everything before them already stored in its
format, and, for solvers that undo it, how far they are from those of the exact model; solve; go on with what is stored.
So errors are seen, and partly undone, by all that follows. A layer solver then refines the layer as a whole.

Hidden states, where needed those of the exact model too, are on disk (:mod:`barefoot.engine.fit_state`), and an
interrupted fit goes on behind the last whole layer; the same settings give the same bytes, whether interrupted or not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.model import ModelSpec
from barefoot.engine.calibration import KNOWLEDGE, Passage, measure, measure_drift
from barefoot.engine.exact import ROLES, embedded, last_states
from barefoot.engine.fit_state import FitState, Stream
from barefoot.engine.layer_pass import STAGES, LayerPass, rotations
from barefoot.engine.rows import decode as decode_blocks
from barefoot.engine.saving import ModelFolder, Pieces
from barefoot.engine.source import Source, decode, factors, source_key
from barefoot.io.inventory import Checkpoint
from barefoot.ops import blocks
from barefoot.ops.grids import Grid
from barefoot.weights.solvers import Inputs, Knowledge, LayerProblem, LayerSolver, Solution, Solver
from barefoot.weights.solvers.mse import Mse
from barefoot.weights.structures import Matrix, Structure
from barefoot.weights.training import require_torch

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int32]
Progress = Callable[[int, int, str], None]  # matrices done, in all, and which is next

CHUNK_WEIGHTS = 1 << 20  # that are solved at a time where rows don't depend on each other
WITHOUT_TEXT = Mse()  # solves what meets no inputs: an embedding that is not the head


@dataclass(frozen=True)
class Fit:
    """What a fit does.

    Attributes
    ----------
    formats : by the name of a matrix its block format or its structure; those not named keep the file's own blocks.
    solver : chooses the codes of block formats.
    texts : what the model reads meanwhile, int32 (n_windows, window); none is needed where nothing is measured.
    """

    formats: Mapping[str, str | Structure]
    solver: Solver
    texts: Ids

    def wants(self, name: str) -> Knowledge:
        """What must be measured of a matrix's inputs."""
        how = self.formats.get(name)
        if isinstance(how, Structure):
            return how.wants
        return "nothing" if how is None or blocks.lookup(how).grid is None else self.solver.wants

    @property
    def reads(self) -> bool:
        """Whether any text is needed."""
        return any(self.wants(name) != "nothing" for name in self.formats)

    @property
    def follows(self) -> bool:
        """Whether the exact model's hidden states go along."""
        return isinstance(self.solver, LayerSolver) or any(self.wants(name) == "drift" for name in self.formats)

    def key(self, checkpoint: Checkpoint) -> str:
        """What two runs must share for one to go on where the other stopped."""
        content = {
            "formats": {name: str(how) for name, how in sorted(self.formats.items())},
            "solver": str(self.solver),
            "texts": self.texts.tolist(),
            "source": source_key(checkpoint),
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def fit(checkpoint: Checkpoint, spec: ModelSpec, job: Fit, path: Path, progress: Progress | None = None) -> ModelFolder:
    """Write the fitted model into the folder ``path``; its tokenizer, record and index come with ``finish``.

    Raises
    ------
    Incompatible : a format that a matrix can't have.
    InvalidInput : text is needed and there is none, or ``path`` holds another fit that was interrupted.
    CorruptFile : the source can't be read.
    BackendMissing : the solver learns, and PyTorch is not installed.
    """
    if job.reads and not job.texts.size:
        raise InvalidInput(f"{job.solver} looks at text, and there is none", cure="give text, or a solver without it")
    if isinstance(job.solver, LayerSolver):
        _check_learning(spec, job, job.solver)
    return _Fitting(checkpoint, spec, job, path, progress or (lambda done, total, label: None)).run()


def _check_learning(spec: ModelSpec, job: Fit, solver: LayerSolver) -> None:
    require_torch(str(solver))
    for weight in spec.weights:
        how = job.formats.get(weight.name)
        if weight.layer is not None and isinstance(how, str) and how != weight.format:
            grid = blocks.lookup(how).grid
            if grid is not None and not solver.learns(grid):
                raise Incompatible(
                    f"{solver} can't learn the parameters of {how}, which {weight.name} is to have",
                    cure=f"use the solver {solver.start}, or a format of integers or of a table of levels",
                )


class _Fitting:
    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, job: Fit, path: Path, progress: Progress) -> None:
        self.source, self.spec, self.job = Source(checkpoint, spec), spec, job
        self.folder = ModelFolder(path, checkpoint, spec)
        shape = job.texts.shape if job.reads else (0, 0)
        self.state = FitState(path, job.key(checkpoint), (1 + job.follows, shape[0], shape[1], spec.d_model))
        self.progress = progress
        self.total = sum(w.group != "norm" for w in spec.weights)
        self.done = 0

    def run(self) -> ModelFolder:
        with self.state as state:
            self.done = sum(w.group != "norm" and self.folder.shard_of(w) < state.n_files for w in self.spec.weights)
            for abandoned in self.folder.path.glob(".*.part"):  # by an earlier run that was killed
                abandoned.unlink()
            if state.n_files == 0:
                with state.advance() as streams:
                    self.folder.write(0, {"embed": self._solved("embed", self._seen_by_head())})
                    for number, stream in enumerate(streams):
                        self._embed(stream, as_stored=number == 0)
            for layer in range(state.n_files - 1, self.spec.n_layers):
                with state.advance() as behind:
                    self._layer(layer, state.streams, behind)
            self._tail(state.streams[0])
        self.state.path.unlink()
        return self.folder

    # --- the stages -------------------------------------------------------------------------------------------------

    def _embed(self, hidden: Stream, as_stored: bool) -> None:
        """The hidden states that the text begins with: of the embedding as it is stored now, or as it was."""
        cols = self.source.weights["embed"].cols
        for i in range(len(hidden)):
            if as_stored:
                tokens, places = np.unique(self.job.texts[i], return_inverse=True)
                floats = decode_blocks(self._layout("embed"), self.folder.rows("embed", tokens), cols)
                floats *= np.float32(self.spec.embed_scale)
                hidden[i] = floats[places]
            else:
                hidden[i] = embedded(self.source, self.spec, self.job.texts[i : i + 1])[0]

    def _seen_by_head(self) -> Inputs | None:
        """What the embedding meets where it is the head too: the exact model's last hidden states."""
        wanted = self.job.wants("embed") if self.spec.tied and self._changes("embed") else "nothing"
        states = last_states(self.source, self.spec, self.job.texts, self._reading)
        return measure(states, wanted)

    def _reading(self, done: int, total: int) -> None:
        self.progress(self.done, self.total, f"embed, after {done} of {total} layers")

    def _layer(self, layer: int, before: list[Stream], behind: list[Stream]) -> None:
        """Store a layer, and pass hidden states through it: the first stream as it is stored, a second one, where a
        solver compares them, as it was."""
        prefix = f"layers.{layer}."
        vectors = {
            weight.name.removeprefix(prefix): self._vector(weight.name)
            for weight in self.spec.weights
            if weight.layer == layer and weight.group == "norm"
        }
        kept = {prefix + role: Matrix("f32", rows) for role, rows in vectors.items()}
        there = LayerPass(self.folder.target, layer, factors(self.folder.target, vectors))

        def stored(stage: str) -> list[F32]:
            """Matrices as they are stored; none where no text goes through them."""
            names = [prefix + role for role in STAGES[stage] if self.job.reads]
            return [decode(kept[name], self.source.weights[name].cols) for name in names]

        def exact(stage: str) -> list[F32]:
            return [self._exact(prefix + role) for role in STAGES[stage]]

        ways = [Passage(there, *each) for each in zip(before, behind, (stored, exact), strict=False)]
        for stage, roles in STAGES.items():
            seen = self._seen(stage, [prefix + role for role in roles], ways)
            for role in roles:
                found = self._solved(prefix + role, seen)
                kept[prefix + role] = found.together() if isinstance(found, Pieces) else found
            del seen
            for way in ways:
                if stage == "attn_out":
                    way.pass_attention()
                elif stage == "ffn_out":
                    way.pass_ffn()
        if isinstance(self.job.solver, LayerSolver):
            self._refine(there, kept, before, behind)
        self.folder.write(layer + 1, kept)

    def _seen(self, stage: str, names: list[str], ways: list[Passage]) -> Inputs | None:
        """What the solvers of a stage's matrices want to know."""
        wanted = max(map(self.job.wants, names), key=KNOWLEDGE.index)
        if wanted != "drift":
            return measure((x for _, x in ways[0].meets(stage)), wanted)
        norm = {"attn_out": "post_attn_norm", "ffn_out": "post_ffn_norm"}.get(stage)
        adds = norm is not None and norm not in ways[0].there.vectors
        alone = self._exact(names[0]) if len(names) == 1 else None
        return measure_drift(ways[0].meets(stage), ways[1].meets(stage), alone, adds)

    def _exact(self, name: str) -> F32:
        return self.source.floats(name, order=self.folder.row_order(name))

    def _refine(self, there: LayerPass, kept: dict[str, Matrix], before: list[Stream], behind: list[Stream]) -> None:
        """Choose the matrices of a layer anew, all together; both streams are passed through it."""
        solver, prefix = self.job.solver, f"layers.{there.layer}."
        assert isinstance(solver, LayerSolver)
        grids = {r: grid for r in ROLES if (grid := self._grid(prefix + r)) is not None}
        if not grids:
            return
        cols = {r: self.source.weights[prefix + r].cols for r in ROLES}
        weights = {r: self._exact(prefix + r) for r in grids}
        starts = {r: blocks.unpack(kept[prefix + r].format, kept[prefix + r].rows) for r in grids}
        stored = {r: decode(kept[prefix + r], cols[r]) for r in ROLES if r not in grids}
        inputs = before[0].whole()
        problem = LayerProblem(
            spec=there.spec,
            layer=there.layer,
            weights={**weights, **stored, **there.vectors},
            grids=grids,
            starts={r: Solution(*start) for r, start in starts.items()},
            inputs=inputs,
            targets=behind[1].whole(),
            rotations=rotations(there.spec, there.layer, inputs.shape[1]),
        )
        found = solver.refine(problem)
        for role, solution in found.matrices.items():
            layout = kept[prefix + role].format
            kept[prefix + role] = Matrix(layout, blocks.pack(layout, solution.codes, solution.params))
            stored[role] = decode(kept[prefix + role], cols[role])
        for role, vector in found.vectors.items():
            shift = np.float32(there.spec.norm_plus_one and role.endswith("norm"))
            kept[prefix + role] = Matrix("f32", (vector - shift).reshape(1, -1).view(np.uint8))
        refined = LayerPass(there.spec, there.layer, {**there.vectors, **found.vectors})
        for i, h in enumerate(inputs):
            behind[0][i] = refined(h, stored)

    def _tail(self, hidden: Stream) -> None:
        """The last norm, and the head where it is not the embedding."""
        norm = self._vector("norm")
        kept: dict[str, Matrix | Pieces] = {"norm": Matrix("f32", norm)}
        if "head" in self.source.weights:
            factor = factors(self.folder.target, {"norm": norm})["norm"]

            def normed() -> Iterator[F32]:
                for h in hidden:
                    out = np.empty_like(h)
                    ops.rmsnorm(h, factor, self.spec.norm_eps, out)
                    yield out

            kept["head"] = self._solved("head", measure(normed(), self.job.wants("head")))
        self.folder.write(self.folder.n_shards - 1, kept)

    def _vector(self, name: str) -> U8:
        """A norm or a bias as it will be stored, in float32."""
        return self.folder.arranged(name, self.source.floats(name).view(np.uint8))

    # --- one matrix -------------------------------------------------------------------------------------------------

    def _solved(self, name: str, inputs: Inputs | None) -> Matrix | Pieces:
        """The matrix as it will be stored, its rows as Hugging Face has them; in pieces where it can be large."""
        self.progress(self.done, self.total, name)
        self.done += 1
        weight, how = self.source.weights[name], self.job.formats.get(name)
        order = self.folder.row_order(name)
        if isinstance(how, Structure):
            return how.solve(self._exact(name), inputs)
        layout = self._layout(name)
        together = weight.layer is not None and inputs is not None and inputs.hessian is not None
        if order is not None or together:  # a Hessian's factor is made once
            if self._changes(name):
                return Matrix(layout, self._packed(name, self._exact(name), inputs))
            return Matrix(layout, self.folder.arranged(name, self.source.stored(name)))
        return Pieces(layout, (weight.rows, blocks.row_bytes(layout, weight.cols)), self._pieces(name, inputs))

    def _pieces(self, name: str, inputs: Inputs | None) -> Iterator[U8]:
        """Some rows at a time, as they will be stored."""
        weight = self.source.weights[name]
        step = max(1, CHUNK_WEIGHTS // weight.cols)
        for start in range(0, weight.rows, step):
            n = min(step, weight.rows - start)
            if self._changes(name):
                yield self._packed(name, self.source.floats(name, start, n), inputs)
            else:
                yield self.source.stored(name, start, n)

    def _packed(self, name: str, weight: F32, inputs: Inputs | None) -> U8:
        """Rows of a matrix in its new format, uint8 (n, row_bytes)."""
        layout, grid, solver = self._layout(name), self._grid(name), self.job.solver
        if grid is None:
            return blocks.encode(layout, weight)
        if inputs is None and solver.wants != "nothing":
            solver = WITHOUT_TEXT
        solution = solver.solve(weight, grid, inputs)
        return blocks.pack(layout, solution.codes, solution.params)

    def _layout(self, name: str) -> str:
        """The block format that a matrix without a structure will have."""
        how = self.job.formats.get(name)
        return how if isinstance(how, str) else self.source.weights[name].format

    def _changes(self, name: str) -> bool:
        return self._layout(name) != self.source.weights[name].format

    def _grid(self, name: str) -> Grid | None:
        """What the solver chooses a matrix's codes on; None where it chooses none."""
        if isinstance(self.job.formats.get(name), Structure) or not self._changes(name):
            return None
        return blocks.lookup(self._layout(name)).grid
