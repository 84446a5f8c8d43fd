"""Quality over memory of a stack of residual blocks, beside GPTQ at fixed sizes and cheap imitations.

    python -m benchmarks weights.bitstack MODEL --calibration FILE --text FILE --work DIR [--blocks 8]

MODEL is a dithered GGUF file, whose weights privilege no grid. The matrices of the layers are fitted, the embedding
gets 8 bits everywhere; bytes are those of the layers' matrices in memory. Every model is a folder below DIR and runs in
the engine, a stack at a number of its blocks; folders that are there already are used again. KL is to the model as it
was, on second halves of windows of the text.

Imitations: a plain SVD of the signed weights with as many f16 numbers as fit a stack's bytes; levels whose blocks come
layer by layer, or in random order; blocks that leave the inputs out. ``stretch=1`` is the paper's own step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from barefoot.core.units import MIB
from barefoot.engine.config import EngineConfig
from barefoot.engine.fitting import Fit, fit
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.engine.stacks import level_by_level, write_order
from barefoot.evals.scoring import score, spread_windows, text_windows
from barefoot.evals.sorting import sort_stack
from barefoot.evals.texts import read_text
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.kv.stores.f16 import HalfStore
from barefoot.ops import n_threads, signs
from barefoot.weights.solvers.gptq import Gptq
from barefoot.weights.solvers.range import Range
from barefoot.weights.structures import Matrix, Structure
from barefoot.weights.structures.bitstack import BitStack, channel_scales, rank_for
from benchmarks.harness import card, claim, save

CALIBRATION_WINDOW, WINDOW = 512, 512
EMBEDDING = "int8_g32_sym"


@dataclass(frozen=True)
class PlainSvd(Structure):
    """The imitation: the scaled weights by an SVD of f16 factors, of as many bytes as a stack of ``blocks``."""

    blocks: int

    wants = "squares"
    name = "plain_svd"

    def __str__(self) -> str:
        return f"plain_svd(blocks={self.blocks})"

    def solve(self, weight: np.ndarray, inputs: Any) -> Matrix:
        rows, cols = weight.shape
        scales = channel_scales(inputs.squares)
        rank = self.blocks * signs.block_bytes(rows, cols, rank_for(rows, cols, 16)) // (2 * (rows + cols))
        u, s, vt = np.linalg.svd(weight * scales, full_matrices=False)
        left, right = (u * np.sqrt(s))[:, :rank].astype(np.float16), (np.sqrt(s)[:, None] * vt / scales)[:rank]
        dense = left.astype(np.float32) @ right.astype(np.float16).astype(np.float32)
        return Matrix("f32", np.ascontiguousarray(dense).view(np.uint8))


@dataclass(frozen=True)
class Setting:
    model: str
    work: Path
    calibration: np.ndarray
    texts: list[list[int]]

    def folder(self, name: str, how: str | Structure, solver: Any = None) -> Path:
        """The model with the matrices of its layers so; fitted unless it is there."""
        path = self.work / name
        if not (path / "config.json").exists():
            start = time.process_time()
            with Checkpoint(self.model) as checkpoint:
                spec = model_spec(checkpoint)
                formats = {w.name: how for w in spec.weights if w.layer is not None and w.group != "norm"}
                job = Fit({**formats, "embed": EMBEDDING}, solver or Range(), self.calibration)
                fit(checkpoint, spec, job, path).finish({"model": Path(self.model).name})
            print(f"  fitted {name} in {time.process_time() - start:.0f} s of processor time", flush=True)
        return path

    def engine(self, path: str | Path, **changes: Any) -> Engine:
        config = {"chunk": WINDOW // 2, "n_logits": 32, "n_threads": n_threads(), "activations": "float32"} | changes
        with Checkpoint(path) as checkpoint:
            return Engine(checkpoint, model_spec(checkpoint), EngineConfig(WINDOW, HalfStore(), **config))

    def measured(self, run: Engine, reference: Engine) -> dict[str, float]:
        found = score(self.texts, run, reference)
        owners = ("weights.attn", "weights.ffn", "stack")
        n_bytes = sum(e.bytes for e in run.footprint if e.owner in owners)
        return {"mib": n_bytes / MIB, **{key: found[key] for key in ("kl_mean", "perplexity", "same_top")}}


def area(points: list[dict[str, float]]) -> float:
    """Under log-perplexity over MiB, by trapezoids, over the width."""
    x, y = ([p[key] for p in points] for key in ("mib", "perplexity"))
    return float(np.trapezoid(np.log(y), x) / (x[-1] - x[0]))


def shuffled(spec: Any, seed: int) -> list[str]:
    """The stack level by level, each level in random order."""
    levels: dict[str, list[str]] = {}
    for part in level_by_level(spec.weights):
        levels.setdefault(part.label, []).append(part.source)
    generator = random.Random(seed)
    return [name for level in levels.values() for name in generator.sample(level, len(level))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--windows", type=int, default=32, help="of calibration")
    parser.add_argument("--sorted", type=int, default=2, help="windows of calibration whose perplexity sorts")
    parser.add_argument("--scored", type=int, default=4, help="windows that are scored")
    parser.add_argument("--seeds", type=int, default=3, help="random orders")
    parser.add_argument("--name", default="smollm2")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    with Checkpoint(args.model) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    calibration = spread_windows(read_text(args.calibration), tokenizer, CALIBRATION_WINDOW, args.windows)
    texts = text_windows(read_text(args.text), tokenizer, WINDOW, WINDOW * args.scored)
    setting = Setting(args.model, args.work, calibration, texts)
    config = {
        "model": Path(args.model).name,
        "blocks": args.blocks,
        "calibration": f"{len(calibration)} windows of {CALIBRATION_WINDOW} tokens",
        "sorting": f"perplexity of {args.sorted} of these windows, one level measured",
        "scored": f"the second halves of {len(texts)} windows of {WINDOW} tokens, float32 activations",
    }
    card("a stack of residual blocks over the memory axis", config)
    results: dict[str, list[dict[str, float]]] = {}

    def keep(name: str, found: dict[str, float]) -> None:
        results.setdefault(name, []).append({key: round(value, 4) for key, value in found.items()})
        print(f"  {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True)

    with setting.engine(args.model) as reference:

        def walk(name: str, path: Path, sizes: list[int]) -> None:
            with setting.engine(path, n_stacked=sizes[0]) as run:
                for n in sizes:
                    run.resize(n)
                    keep(name, setting.measured(run, reference))

        path = setting.folder("bitstack", BitStack(blocks=args.blocks))
        if "stack" not in json.loads((path / "barefoot.json").read_text()):
            start = time.process_time()
            with setting.engine(path, activations="int8") as run:
                order = sort_stack(run, calibration[: args.sorted].tolist())
            write_order(path, order)
            print(f"  sorted in {time.process_time() - start:.0f} s of processor time", flush=True)
        with Checkpoint(path) as checkpoint:
            spec = model_spec(checkpoint)
        order, each = [p.source for p in spec.stack], len(spec.stack) // (args.blocks - 1)
        levels = [each * n for n in range(args.blocks)]
        fine = [each + each * n // 4 for n in range(2 * 4 + 1)]  # levels 2 to 4 by quarters
        walk("bitstack", path, sorted({*levels, *fine}))
        layerwise = [p.source for p in level_by_level(spec.weights)]
        others = {"layer by layer": layerwise, **{f"random order {i}": shuffled(spec, i) for i in range(args.seeds)}}
        try:
            for name, names in others.items():
                write_order(path, names)
                walk(f"imitation: {name}", path, fine)
        finally:
            write_order(path, order)
        walk("paper: stretch=1", setting.folder("plain", BitStack(blocks=args.blocks, stretch=1)), levels)
        walk("imitation: no scales", setting.folder("unscaled", BitStack(blocks=4, scale=False)), levels[1:4])
        for n in (2, 3, 4):
            with setting.engine(setting.folder(f"svd{n}", PlainSvd(n))) as run:
                there = results["bitstack"][sorted({*levels, *fine}).index(levels[n - 1])]["mib"]
                keep("imitation: plain SVD", {**setting.measured(run, reference), "mib": there})
        for bits in (2, 3, 4):
            layout = f"int{bits}_g64_asym"
            for label, solver in (("gptq", Gptq()), ("rtn", Range())):
                with setting.engine(setting.folder(f"{label}{bits}", layout, solver)) as run:
                    keep(f"{label} {layout}", setting.measured(run, reference))
    at = {name: {round(p["mib"]): p for p in points} for name, points in results.items()}
    whole = [round(results["paper: stretch=1"][n]["mib"]) for n in range(args.blocks)]
    inside = [p for p in results["bitstack"] if whole[1] <= round(p["mib"]) <= whole[3]]
    save(
        f"weights/bitstack-{args.name}",
        {"config": config, "results": results, "claims": claims(results, at, whole, inside)},
    )


def claims(results: Any, at: Any, whole: list[int], inside: list[dict[str, float]]) -> list[dict[str, Any]]:
    """What the paper says of models of 7 billion weights and more, as far as it can hold for a small one."""

    def ratio(level: int, ours: str, other: str, key: str = "kl_mean") -> float:
        n = whole[level - 1]
        return at[ours][n][key] / at[other][n][key]

    curve = [at["bitstack"][n]["perplexity"] for n in whole[1:]]
    rest = [points for name, points in results.items() if name.startswith("imitation: random")]
    two_bits = results["gptq int2_g64_asym"][0]
    near = min(results["bitstack"], key=lambda p: abs(p["mib"] - two_bits["mib"]))
    found = [
        claim(
            "perplexity over that of the level before, at most, levels 3 on",
            max(b / a for a, b in itertools.pairwise(curve)),
            at_most=1.02,
        ),
        claim(
            "area under log-perplexity, levels 2 to 4, of the sorted stack over layer by layer",
            area(inside) / area(results["imitation: layer by layer"]),
            at_most=1.0,
        ),
        claim(
            "the same over the mean of random orders",
            area(inside) / float(np.mean([area(p) for p in rest])),
            at_most=1.0,
        ),
        claim("paper: KL about 2 bits over GPTQ's", near["kl_mean"] / two_bits["kl_mean"], at_most=1.0),
    ]
    found += [
        claim(f"level {n}: KL over that of a plain SVD", ratio(n, "bitstack", "imitation: plain SVD"), at_most=0.7)
        for n in (2, 3, 4)
    ]
    found += [
        claim(f"level {n}: KL with scales over without", ratio(n, "bitstack", "imitation: no scales"), at_most=1.0)
        for n in (2, 3, 4)
    ]
    found += [
        claim(f"level {n}: KL of stretched steps over the paper's", ratio(n, "bitstack", "paper: stretch=1"), at_most=1)
        for n in (3, 4, 6, 8)
    ]
    return found


if __name__ == "__main__":
    main()
