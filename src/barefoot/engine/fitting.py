"""Fitting a model to its formats, layer by layer: in memory are one stage's matrices and the text's hidden states.

For each layer, stage by stage (q k v, o, gate up, down): measure the inputs that the matrices meet, with everything
before them already stored in its format; solve; go on with what is stored. So errors are seen, and partly undone, by
all that follows. After each layer its file and the hidden states are on disk, and an interrupted fit goes on there; the
same settings give the same bytes, whether interrupted or not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.errors import InvalidInput
from barefoot.core.model import ModelSpec
from barefoot.engine.layer_pass import STAGES, LayerPass
from barefoot.engine.rows import decode, read_rows
from barefoot.engine.saving import Matrix, ModelFolder
from barefoot.io.files import atomic_writer
from barefoot.io.inventory import Checkpoint
from barefoot.ops import PackedWeight, blocks
from barefoot.weights.formats import WeightFormat
from barefoot.weights.solvers import Inputs, Knowledge, Solver
from barefoot.weights.solvers.mse import Mse

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Progress = Callable[[int, int, str], None]  # matrices done, in all, and which is next

STATE = "fit-state.npz"
ROWS = 4096  # of a matrix that are solved at a time where rows don't depend on each other
WITHOUT_TEXT = Mse()  # solves what meets no inputs: the embedding


@dataclass(frozen=True)
class Fit:
    """What a fit does: the format of each matrix by name, the solver, and the text (windows of ids) that it looks at.

    Matrices that are not named keep the file's own blocks. No text is needed when the solver wants nothing.
    """

    formats: Mapping[str, WeightFormat]
    solver: Solver
    texts: Sequence[Sequence[int]] = ()

    def key(self, checkpoint: Checkpoint) -> str:
        """What two runs must share for one to go on where the other stopped."""
        content = {
            "formats": {name: str(fmt) for name, fmt in sorted(self.formats.items())},
            "solver": str(self.solver),
            "texts": [list(ids) for ids in self.texts],
            "source": [checkpoint.path.name, checkpoint.file_bytes, _header_digest(checkpoint)],
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _header_digest(checkpoint: Checkpoint) -> str:
    tensors = sorted((t.name, t.type, t.shape, t.offset, t.shard) for t in checkpoint.tensors.values())
    return hashlib.sha256(repr(tensors).encode()).hexdigest()


def fit(checkpoint: Checkpoint, spec: ModelSpec, job: Fit, path: Path, progress: Progress | None = None) -> ModelFolder:
    """Write the fitted model into the folder ``path``; its tokenizer, record and index come with ``finish``.

    Raises
    ------
    Incompatible : a format that a matrix can't have, or a solver that the format has no grid for.
    CorruptFile : the source can't be read.
    """
    return _Fitting(checkpoint, spec, job, path, progress or (lambda done, total, label: None)).run()


class _Fitting:
    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, job: Fit, path: Path, progress: Progress) -> None:
        self.checkpoint, self.spec, self.job = checkpoint, spec, job
        self.folder = ModelFolder(path, checkpoint, spec)
        self.state, self.key = path / STATE, job.key(checkpoint)
        self.progress = progress
        self.weights = {w.name: w for w in spec.weights}
        self.total = sum(w.group != "norm" for w in spec.weights)
        self.done = 0

    def run(self) -> ModelFolder:
        start, hidden = self._resume()
        if start == 0:
            embed = self._solved("embed", None)
            self.folder.write(0, {"embed": embed})
            hidden = self._embedded(embed)
            start = self._keep(1, hidden)
        for layer in range(start - 1, self.spec.n_layers):
            hidden = self._layer(layer, hidden)
            start = self._keep(layer + 2, hidden)
        self._tail(hidden)
        self.state.unlink(missing_ok=True)
        return self.folder

    # --- interruption -----------------------------------------------------------------------------------------------

    def _resume(self) -> tuple[int, list[F32]]:
        """The number of files that are there, and the hidden states behind them."""
        if not self.state.exists():
            return 0, []
        with np.load(self.state, allow_pickle=False) as kept:
            if str(kept["key"]) != self.key:
                raise InvalidInput(
                    f"{self.folder.path} holds another fit that was interrupted",
                    cure=f"repeat its command to go on with it, or remove {self.state}",
                )
            n = int(kept["n_files"])
            hidden = list(kept["hidden"])
        self.done = sum(w.group != "norm" and self.folder.shard_of(w) < n for w in self.spec.weights)
        return n, hidden

    def _keep(self, n_files: int, hidden: list[F32]) -> int:
        with atomic_writer(self.state) as file:
            states = np.stack(hidden) if hidden else np.empty(0, np.float32)
            np.savez(file, key=np.array(self.key), n_files=np.array(n_files), hidden=states)
        return n_files

    # --- the stages -------------------------------------------------------------------------------------------------

    def _embedded(self, embed: Matrix) -> list[F32]:
        """The hidden states that the text begins with: of the embedding as it is stored now."""
        if self.job.solver.wants == "nothing":
            return []
        weight = self.weights["embed"]
        packed = PackedWeight(embed.format, weight.rows, weight.cols, embed.rows.reshape(-1))
        hidden = [np.empty((len(ids), weight.cols), np.float32) for ids in self.job.texts]
        for ids, out in zip(self.job.texts, hidden, strict=True):
            ops.embed(np.asarray(ids, np.int32), packed, out, scale=self.spec.embed_scale)
        return hidden

    def _layer(self, layer: int, hidden: list[F32]) -> list[F32]:
        prefix = f"layers.{layer}."
        vectors = {
            name.removeprefix(prefix): self._read(name)[0]
            for name, weight in self.weights.items()
            if weight.layer == layer and weight.group == "norm"
        }
        shift = np.float32(self.spec.norm_plus_one)
        factors = {role: v + shift if role.endswith("norm") else v for role, v in vectors.items()}
        there = LayerPass(self.spec, layer, factors)
        kept = {prefix + role: Matrix("f32", v.reshape(1, -1).view(np.uint8)) for role, v in vectors.items()}

        def solve(stage: str, inputs: list[F32]) -> list[F32]:
            """Store the matrices of a stage, and return them as they are stored."""
            seen = measure(inputs, self.job.solver.wants)
            result = []
            for role in STAGES[stage]:
                kept[prefix + role] = self._solved(prefix + role, seen)
                if inputs:
                    result.append(self._decoded(prefix + role, kept[prefix + role]))
            return result

        x = [there.attn_in(h) for h in hidden]
        qkv = solve("attn_in", x)
        x = [there.attend(*(a @ w.T for w in qkv)) for a in x]
        o = solve("attn_out", x)
        hidden = [there.after_attention(h, a @ o[0].T) for h, a in zip(hidden, x, strict=True)]
        x = [there.ffn_in(h) for h in hidden]
        gate_up = solve("ffn_in", x)
        x = [there.activate(*(a @ w.T for w in gate_up)) for a in x]
        down = solve("ffn_out", x)
        hidden = [there.after_ffn(h, a @ down[0].T) for h, a in zip(hidden, x, strict=True)]
        self.folder.write(layer + 1, kept)
        return hidden

    def _tail(self, hidden: list[F32]) -> None:
        """The last norm, and the head where it is not the embedding."""
        norm = self._read("norm")
        kept = {"norm": Matrix("f32", norm.view(np.uint8))}
        if "head" in self.weights:
            factor = norm[0] + np.float32(self.spec.norm_plus_one)
            x = [np.empty_like(h) for h in hidden]
            for h, out in zip(hidden, x, strict=True):
                ops.rmsnorm(h, factor, self.spec.norm_eps, out)
            kept["head"] = self._solved("head", measure(x, self.job.solver.wants))
        self.folder.write(self.folder.n_shards - 1, kept)

    # --- one matrix -------------------------------------------------------------------------------------------------

    def _solved(self, name: str, inputs: Inputs | None) -> Matrix:
        """The matrix in its format."""
        weight = self.weights[name]
        self.progress(self.done, self.total, name)
        self.done += 1
        fmt = self.job.formats.get(name)
        layout = weight.format if fmt is None else fmt.layout(weight.format)
        if layout == weight.format:
            return Matrix(layout, self._read_stored(name))
        grid = blocks.lookup(layout).grid
        solver = self.job.solver
        if inputs is None and solver.wants != "nothing":
            solver = WITHOUT_TEXT
        # Rows are independent; without a Hessian to factor they may as well be solved a few at a time.
        step = weight.rows if inputs is not None and inputs.hessian is not None else ROWS
        packed = np.empty((weight.rows, blocks.row_bytes(layout, weight.cols)), np.uint8)
        for start in range(0, weight.rows, step):
            some = self._read(name, start, min(step, weight.rows - start))
            if grid is None:
                packed[start : start + step] = blocks.encode(layout, some)
            else:
                solution = solver.solve(some, grid, inputs)
                packed[start : start + step] = blocks.pack(layout, solution.codes, solution.params)
        return Matrix(layout, packed)

    def _read_stored(self, name: str, first: int = 0, n_rows: int | None = None) -> U8:
        return read_rows(self.checkpoint, self.weights[name], first, n_rows)

    def _read(self, name: str, first: int = 0, n_rows: int | None = None) -> F32:
        """Rows of a weight of the source, float32."""
        weight = self.weights[name]
        return decode(weight.format, self._read_stored(name, first, n_rows), weight.cols)

    def _decoded(self, name: str, matrix: Matrix) -> F32:
        return decode(matrix.format, matrix.rows, self.weights[name].cols)


def measure(inputs: Sequence[F32], wanted: Knowledge) -> Inputs | None:
    """What a solver wants to know of inputs (n, cols) each; None when it wants nothing."""
    if wanted == "nothing" or not inputs:
        return None
    n, cols = sum(map(len, inputs)), inputs[0].shape[1]
    if wanted == "squares":
        return Inputs(sum((np.einsum("nc,nc->c", x, x) for x in inputs), np.zeros(cols, np.float32)) / np.float32(n))
    hessian = np.zeros((cols, cols), np.float32)
    for x in inputs:
        hessian += x.T @ x
    hessian /= np.float32(n)
    return Inputs(np.diag(hessian).copy(), hessian)
