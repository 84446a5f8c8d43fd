"""Number formats that are not uniform against integers: BitMoD, minifloats, NF4, block floating point with K-sort.

    python -m benchmarks weights.number_formats MODEL NAME [--group 64] [--text FILE] [--windows 3] [--runs RUN ...]

First groups of random numbers, as the papers' claims are stated: squared errors of BitMoD over those of asymmetric
integers and of the plain minifloat, of one fixed special value (the cheap imitation), and with the paper's scales of
8 bits. Then MODEL, a GGUF file or folder (a dithered one: benchmarks/quality/dithered.py): KL to it and perplexity with
all matrices of its layers in one format, by the engine. A run is ``LAYOUT`` or ``LAYOUT SOLVER``; these stand for what
no format stores, and are computed as float32 matrices:

    bitmod*:paper     scales of 8 bits below one f16 scale a row, as in the paper
    bitmod*:fixed     the same special value in all groups
    bfp*:sorted       columns of down in the order of their norms, as folds.permute_ffn would make it
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from barefoot.core.model import ModelSpec
from barefoot.core.registry import techniques
from barefoot.core.spec import parse_composition
from barefoot.engine.config import EngineConfig
from barefoot.engine.fitting import Fit, fit
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.evals.scoring import score, text_windows
from barefoot.evals.texts import BUILT_IN, read_text
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.ops import blocks, levels
from barefoot.ops.grids import F32, Grid, Special, Table, Uniform
from barefoot.weights.formats.bfp import by_size
from barefoot.weights.solvers import Inputs, Solver
from barefoot.weights.solvers.range import Range
from barefoot.weights.structures import Matrix, Structure
from benchmarks.harness import card, claim, save

WINDOW, FIT_WINDOWS = 512, 12
RUNS = (
    "int3_g{g}_asym", "int3_g{g}_sym", "e2m0_g{g}", "bitmod3_g{g}", "bitmod3_g{g}:paper", "bitmod3_g{g}:fixed",
    "int3_g{g}_asym mse", "e2m0_g{g} mse", "bitmod3_g{g} mse", "int3_g{g}_asym gptq", "bitmod3_g{g} gptq",
    "int4_g{g}_asym", "int4_g{g}_sym", "e2m1_g{g}", "nf4_g{g}", "bitmod4_g{g}", "bitmod4_g{g}:fixed",
    "int4_g{g}_asym mse", "nf4_g{g} mse", "bitmod4_g{g} mse",
    "bfp4_g32", "bfp4_g32:sorted", "bfp4_g32 mse", "int4_g32_sym", "bfp8_g32", "e4m3_g{g}", "int8_g{g}_sym",
)  # fmt: skip


# --- what no format stores ---


def paper_scales(grid: Special, weight: F32) -> F32:
    """BitMoD with scales of 8 bits in units of a row's largest scale / 255 (arXiv:2411.11745, section III.C)."""
    x = weight.reshape(-1, grid.group)
    scales = grid.plain(x).reshape(len(weight), -1)
    unit = np.abs(scales).max(axis=1, keepdims=True).astype(np.float16).astype(np.float32) / 255
    stored = unit * np.clip(np.rint(scales / unit), -255, 255)
    result = np.empty_like(x)
    for which, table in enumerate(Table((*grid.table[:half], s, *grid.table[half + 1 :]), grid.group)
                                  for half, s in ((len(grid.table) // 2, s) for s in grid.specials)):  # fmt: skip
        rows = (scales.astype(np.float16).view(np.uint16) & 1).reshape(-1) == which
        params = stored.reshape(-1, 1)[rows]
        result[rows] = table.values(table.round(x[rows], params), params)
    return result.reshape(weight.shape)


def fixed_special(grid: Special, weight: F32) -> F32:
    """BitMoD without its choice: the special value inside the range, positive."""
    x = weight.reshape(-1, grid.group)
    params = next(grid.kinds(x.min(axis=1), x.max(axis=1)))
    return grid.values(grid.round(x, params), params).reshape(weight.shape)


def plain(grid: Grid, weight: F32) -> F32:
    x = weight.reshape(-1, grid.group)
    params = grid.plain(x)
    return grid.values(grid.round(x, params), params).reshape(weight.shape)


def sorted_columns(grid: Grid, weight: F32) -> F32:
    """Rounded in the order of the columns' norms, and put back: what the folded model computes."""
    order = by_size(np.linalg.norm(weight, axis=0))
    result = np.empty_like(weight)
    result[:, order] = plain(grid, np.ascontiguousarray(weight[:, order]))
    return result


HOW = {"paper": paper_scales, "fixed": fixed_special, "sorted": sorted_columns}


@dataclass(frozen=True)
class InFloat(Structure, name="in_float"):
    """A matrix of float32 that was rounded by one of ``HOW``."""

    layout: str
    how: str

    def solve(self, weight: F32, inputs: Inputs | None) -> Matrix:
        grid = blocks.lookup(self.layout).grid
        return Matrix("f32", HOW[self.how](grid, weight).view(np.uint8))  # type: ignore[operator]


# --- random groups ---


def random_groups() -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(0)
    draws = {"normal": rng.standard_normal, "laplace": lambda size: rng.laplace(size=size),
             "student t5": lambda size: rng.standard_t(5, size=size)}  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    for bits in (3, 4):
        grid = blocks.lookup(f"bitmod{bits}_g128").grid
        assert isinstance(grid, Special)
        minifloat = Table(levels.minifloat_table(2, bits - 3), 128)
        for name, draw in draws.items():
            x = draw((512, 1024)).astype(np.float32)
            special = np.square(x - plain(grid, x)).mean()
            others = {
                "integers, asymmetric": plain(Uniform(bits, 128), x),
                "plain minifloat": plain(minifloat, x),
                "one fixed special value": fixed_special(grid, x),
                "the paper's scales": paper_scales(grid, x),
            }
            found[f"{bits} bits, {name}"] = {
                f"squared error / {k}": round(float(special / np.square(x - v).mean()), 4) for k, v in others.items()
            }
    return found


# --- a model ---


def job_of(run: str, spec: ModelSpec, texts: np.ndarray) -> Fit:
    layout, _, solver = run.partition(" ")
    layout, _, how = layout.partition(":")
    solvers = techniques("weights.solvers")
    chosen = parse_composition(solver, solvers, "solver")[0] if solver else Range()
    assert isinstance(chosen, Solver)
    formats: dict[str, str | Structure] = {}
    for weight in spec.weights:
        if weight.layer is not None and weight.group != "norm":
            changed = how and (how != "sorted" or weight.name.endswith(".down"))
            formats[weight.name] = InFloat(layout, how) if changed else layout
    return Fit(formats=formats, solver=chosen, texts=texts)


def measured(run: str, model: str, texts: list[list[int]], fit_texts: np.ndarray) -> dict[str, float]:
    config = {"context": WINDOW, "kv": techniques("kv.stores")["f16"](), "n_threads": 2, "chunk": 128, "n_logits": 64}
    with tempfile.TemporaryDirectory() as folder, Checkpoint(model) as checkpoint:
        spec = model_spec(checkpoint)
        job = job_of(run, spec, fit_texts)
        start = time.perf_counter()
        fit(checkpoint, spec, job, Path(folder)).finish({})
        fitted = time.perf_counter() - start
        with (
            Checkpoint(folder) as there,
            Engine(there, model_spec(there), EngineConfig(**config)) as engine,  # type: ignore[arg-type]
            Engine(checkpoint, spec, EngineConfig(**config, activations="float32")) as exact,  # type: ignore[arg-type]
        ):
            result = score(texts, engine, exact)
    layout = run.partition(" ")[0].partition(":")[0]
    return {"bits a weight": blocks.bits_per_weight(layout), **result, "fit seconds": round(fitted, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name")
    parser.add_argument("--group", type=int, default=64, help="of the runs without one of their own")
    parser.add_argument("--text", default=BUILT_IN)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--runs", nargs="*", default=RUNS)
    args = parser.parse_args()

    runs = [run.format(g=args.group) for run in args.runs]
    with Checkpoint(args.model) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    text = read_text(args.text)
    texts = text_windows(text, tokenizer, WINDOW, args.windows * WINDOW)
    others = text_windows(text[len(text) // 2 :], tokenizer, WINDOW, FIT_WINDOWS * WINDOW)
    settings = {"text": Path(args.text).name, "windows": len(texts), "window": WINDOW, "activations": "int8",
                "windows of the fits": len(others)}  # fmt: skip
    card(f"number formats on {args.name}", settings | {"runs": len(runs)})
    synthetic = random_groups()
    results: dict[str, dict[str, float]] = dict(synthetic)
    for run in runs:
        results[run] = measured(run, args.model, texts, np.asarray(others, np.int32))
        print(f"  {run:28}", "  ".join(f"{k} {v:.5g}" for k, v in results[run].items()), flush=True)

    def ratio(a: str, b: str) -> list[float]:
        a, b = a.format(g=args.group), b.format(g=args.group)
        return [round(results[a]["kl_mean"] / results[b]["kl_mean"], 4)] if a in results and b in results else []

    claims = [
        claim("3 bits: squared error of BitMoD over asymmetric integers, normal",
              synthetic["3 bits, normal"]["squared error / integers, asymmetric"], at_most=0.87),
        claim("the same, Laplace",
              synthetic["3 bits, laplace"]["squared error / integers, asymmetric"], at_most=0.75),
    ]  # fmt: skip
    pairs = [
        ("bitmod3_g{g}", "int3_g{g}_asym", 0.9),
        ("bitmod3_g{g}", "e2m0_g{g}", 0.9),
        ("bitmod3_g{g}", "bitmod3_g{g}:fixed", 0.95),
        ("bitmod3_g{g} mse", "int3_g{g}_asym mse", 1.0),
        ("bitmod3_g{g} gptq", "int3_g{g}_asym gptq", 1.0),
        ("bitmod4_g{g}", "int4_g{g}_asym", 1.0),
        ("bitmod4_g{g}", "e2m1_g{g}", 0.9),
        ("nf4_g{g}", "int4_g{g}_sym", 1.0),
        ("bfp4_g32:sorted", "bfp4_g32", 1.0),
    ]
    for a, b, most in pairs:
        claims += [
            claim(f"KL of {a.format(g=args.group)} over {b.format(g=args.group)}", r, at_most=most) for r in ratio(a, b)
        ]
    save(f"weights/number_formats_{args.name}", {"config": settings, "results": results, "claims": claims})


if __name__ == "__main__":
    main()
