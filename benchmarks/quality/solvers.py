"""What each solver leaves of the error of a product, and what that costs a whole model.

    python -m benchmarks quality.solvers REFERENCE.gguf NAME --text TEST --fit-text TRAIN --work DIR [--fits]
        [--layers 2 14 26] [--gptq-python PYTHON] [--hqq-python PYTHON]

REFERENCE is a dithered file of floats (quality.dithered). For some matrices of some layers, with the inputs that they
meet in the exact model: tr (W - Ŵ) H (W - Ŵ)ᵀ / tr W H Wᵀ, H once of the text that the solver saw and once of another
one; geometric means over the matrices. Peers run in interpreters that have them, on the same weights and inputs. With
``--fits`` whole models too, all matrices in one format: KL to the reference on the other text.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from barefoot.core.registry import techniques
from barefoot.core.spec import parse_composition
from barefoot.engine.calibration import measure
from barefoot.engine.fitting import Fit, fit
from barefoot.engine.layer_pass import STAGES, LayerPass
from barefoot.engine.source import Source, factors
from barefoot.engine.specs import model_spec
from barefoot.evals.scoring import spread_windows, text_windows
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.ops import blocks
from barefoot.weights.solvers import Inputs, Solver
from benchmarks.harness import card, child, claim, save
from benchmarks.quality.frontier import Judge

F32 = npt.NDArray[np.float32]
WINDOW = 512
ROLES = ("q", "o", "up", "down")
FORMATS = ("int2_g64_asym", "bilevel2", "q2_k", "int3_g64_asym", "bilevel3", "q3_k", "int4_g64_asym", "q4_k")
FIT_FORMATS = ("int2_g64_asym", "int3_g64_asym", "int4_g64_asym")
SOLVERS = (
    "range",
    "hqq",
    "mse",
    "mse(weighted=true)",
    "gptq(refine=false,sweeps=0)",
    "gptq(sweeps=0)",
    "gptq(sweeps=1)",
    "gptq",
    "gptq(damp=0.1)",
)
WORKER = Path(__file__).with_name("solver_worker.py")


@dataclass(frozen=True)
class Problem:
    """A matrix, inputs (n, cols) that solvers see, and H of others."""

    name: str
    weight: F32
    inputs: F32
    held: F32


def problems(
    path: str, layers: list[int], seen: npt.NDArray[np.int32], other: npt.NDArray[np.int32]
) -> Iterator[Problem]:
    """Some matrices of ``layers`` and what they meet in the exact model; texts are windows of ids."""
    with Checkpoint(path) as checkpoint:
        spec = model_spec(checkpoint)
        source, embed = Source(checkpoint, spec), next(w for w in spec.weights if w.name == "embed")
        table = source.floats(embed.name)
        hidden = [table[ids] * np.float32(spec.embed_scale) for ids in (*seen, *other)]
        for layer in range(max(layers) + 1):
            prefix = f"layers.{layer}."
            vectors = {
                w.name.removeprefix(prefix): source.floats(w.name).view(np.uint8)
                for w in spec.weights
                if w.layer == layer and w.group == "norm"
            }
            exact = LayerPass(spec, layer, factors(spec, vectors))
            weights = {role: source.floats(prefix + role) for role in itertools.chain(*STAGES.values())}

            of_stage = functools.partial(_problems, layer if layer in layers else None, weights, len(seen))
            x = [exact.attn_in(h) for h in hidden]
            yield from of_stage("attn_in", x)
            x = [exact.attend(*(a @ weights[role].T for role in "qkv")) for a in x]
            yield from of_stage("attn_out", x)
            hidden = [exact.after_attention(h, a @ weights["o"].T) for h, a in zip(hidden, x, strict=True)]
            x = [exact.ffn_in(h) for h in hidden]
            yield from of_stage("ffn_in", x)
            x = [exact.activate(a @ weights["gate"].T, a @ weights["up"].T) for a in x]
            yield from of_stage("ffn_out", x)
            hidden = [exact.after_ffn(h, a @ weights["down"].T) for h, a in zip(hidden, x, strict=True)]


def _problems(layer: int | None, weights: dict[str, F32], n_seen: int, stage: str, x: list[F32]) -> Iterator[Problem]:
    for role in () if layer is None else STAGES[stage]:
        if role in ROLES:
            held = measure(x[n_seen:], "hessian")
            assert held is not None
            assert held.hessian is not None
            yield Problem(f"{layer}.{role}", weights[role], np.concatenate(x[:n_seen]), held.hessian)


def left(weight: F32, stored: F32, hessian: F32) -> float:
    off = weight - stored
    return float(np.einsum("rc,rc->", off @ hessian, off) / np.einsum("rc,rc->", weight @ hessian, weight))


def solver_of(text: str) -> Solver:
    (solver,) = parse_composition(text, techniques("weights.solvers"), "weights.solvers")
    assert isinstance(solver, Solver)
    return solver


def ours(problem: Problem, hessian: F32) -> Iterator[tuple[str, str, F32]]:
    """Format, solver, and what is stored."""
    known = Inputs(np.diag(hessian).copy(), hessian)
    for format_id, text in itertools.product(FORMATS, SOLVERS):
        grid = blocks.lookup(format_id).grid
        assert grid is not None
        if problem.weight.shape[1] % grid.block == 0:
            yield format_id, text, solver_of(text).solve(problem.weight, grid, known).weights(grid)


def peers(problem: Problem, args: argparse.Namespace) -> Iterator[tuple[str, str, F32]]:
    """The same by other packages; their groups store a scale and a zero point of as many bits as the codes."""
    given, back = Path(args.work) / "problem.npz", Path(args.work) / "stored.npy"
    np.savez(given, weight=problem.weight, inputs=problem.inputs)
    for name, python in (("gptqmodel", args.gptq_python), ("hqq", args.hqq_python)):
        for bits in (2, 3, 4) if python else ():
            child(WORKER, {"peer": name, "problem": str(given), "bits": bits, "group": 64, "out": str(back)}, python)
            yield f"int{bits}_g64_asym", name, np.load(back)


def fits(args: argparse.Namespace, texts: npt.NDArray[np.int32], judged: list[list[int]]) -> dict[str, float]:
    """KL of whole models, all matrices in one format, the embedding in 8 bits."""
    judge, found = Judge(args.reference, judged, Path(args.work)), {}
    for format_id, text in itertools.product(FIT_FORMATS, SOLVERS):
        target = Path(args.work) / "fit"
        shutil.rmtree(target, ignore_errors=True)
        with Checkpoint(args.reference) as checkpoint:
            spec = model_spec(checkpoint)
            formats = {w.name: format_id for w in spec.weights if w.group in ("attn", "ffn")}
            formats["embed"] = "int8_g64_asym"
            fit(checkpoint, spec, Fit(formats, solver_of(text), texts), target).finish({})
        found[f"{format_id} {text}"] = judge(f"{format_id} {text}", lambda path=str(target): (path, 0)).kl
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference")
    parser.add_argument("name")
    parser.add_argument("--text", required=True)
    parser.add_argument("--fit-text", required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--fit-tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 14, 26])
    parser.add_argument("--fits", action="store_true")
    parser.add_argument("--gptq-python")
    parser.add_argument("--hqq-python")
    parser.add_argument("--work", required=True)
    args = parser.parse_args()
    Path(args.work).mkdir(parents=True, exist_ok=True)
    with Checkpoint(args.reference) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    seen = spread_windows(Path(args.fit_text).read_text(), tokenizer, WINDOW, args.fit_tokens // WINDOW)
    other = spread_windows(Path(args.text).read_text(), tokenizer, WINDOW, args.tokens // WINDOW)
    settings = {"layers": args.layers, "roles": list(ROLES), "tokens seen": seen.size, "tokens held out": other.size}
    card(f"solvers on {args.name}", settings)
    errors: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for problem in problems(args.reference, args.layers, seen, other):
        hessian = problem.inputs.T @ problem.inputs / np.float32(len(problem.inputs))
        for format_id, text, stored in itertools.chain(ours(problem, hessian), peers(problem, args)):
            pair = left(problem.weight, stored, hessian), left(problem.weight, stored, problem.held)
            errors.setdefault(format_id, {}).setdefault(text, []).append(pair)
            print(f"  {problem.name:8} {format_id:15} {text:28} {pair[0]:.5f} {pair[1]:.5f}", flush=True)
    means = {
        format_id: {
            text: dict(zip(("seen", "held_out"), np.exp(np.log(pairs).mean(axis=0)).round(6).tolist(), strict=True))
            | {"matrices": len(pairs)}
            for text, pairs in by.items()
        }
        for format_id, by in errors.items()
    }
    three = {text: each["held_out"] for text, each in means["int3_g64_asym"].items()}
    ratios = {"gptq / gptq without sweeps": round(three["gptq"] / three["gptq(sweeps=0)"], 3)}
    ratios |= {
        f"gptq / {name}": round(three["gptq"] / three[name], 3) for name in ("gptqmodel", "hqq") if name in three
    }
    claims = [
        claim(
            "GPTQ beats weighted rounding at 3 bits", three["gptq(sweeps=0)"] / three["mse(weighted=true)"], at_most=0.8
        ),
        claim("sweeps lower what GPTQ leaves at 3 bits", ratios["gptq / gptq without sweeps"], at_most=0.97),
    ]
    if "gptqmodel" in three:
        claims.append(claim("error against gptqmodel's at 3 bits", ratios["gptq / gptqmodel"], at_most=1.0))
    results = {"errors": means}
    if args.fits:
        judged = text_windows(Path(args.text).read_text(), tokenizer, WINDOW, args.tokens)
        results["kl"] = fits(args, seen, judged)
    save(f"quality/solvers_{args.name}", {"config": settings, "results": results, "ratios": ratios, "claims": claims})


if __name__ == "__main__":
    main()
