"""Quality at equal bytes over the whole file: our fits against llama.cpp's files, HQQ and GPTQ.

    python -m benchmarks quality.frontier REFERENCE.gguf NAME --text TEST --fit-text TRAIN [--bits 2.5 3 3.5 4 4.5]
        [--llama-python PYTHON] [--hqq-python PYTHON] [--gptq-python PYTHON] [--solver SPEC] [--work DIR]

REFERENCE is a dithered file of floats (quality.dithered), so that no grid is privileged. Each peer runs in an
interpreter that has it; a peer without one is left out. Importance matrices are the mean squares of the inputs on the
same text that fits look at. Every contender is measured on its weights alone: they are decoded to floats, and the same
engine computes with float32 activations. Bits count every stored byte of every tensor, embedding included. What is
measured stands in DIR/points.json too, and a benchmark that was interrupted goes on behind it: remove what other code
has measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from barefoot.core.registry import techniques
from barefoot.core.spec import parse_composition
from barefoot.engine.allocation import choose, measured_options
from barefoot.engine.config import EngineConfig
from barefoot.engine.fitting import Fit, fit
from barefoot.engine.placement import stored_bytes
from barefoot.engine.runner import Engine
from barefoot.engine.sensitivity import input_squares
from barefoot.engine.source import Source
from barefoot.engine.specs import model_spec
from barefoot.evals.divergence import Divergence
from barefoot.evals.frontier import Point, between, frontier
from barefoot.evals.scoring import spread_windows, text_windows
from barefoot.evals.texts import PROBE_WINDOW, PROBE_WINDOWS
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.kv.stores.f32 import FloatStore
from benchmarks.harness import card, child, claim, save
from benchmarks.quality.dithered import write_floats

HERE = Path(__file__).parent
WINDOW = 512
LLAMA_CPP = (
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q4_k_m",
    "q4_k_s",
    "q4_0",
    "iq4_xs",
    "q3_k_m",
    "q3_k_s",
    "q2_k",
    "q2_k_s",
    "iq2_s",
)
NEED_IMPORTANCE = ("q2_k_s", "iq2_s")
# Of HQQ and GPTQ: bits and group, and bits of the embedding beside them.
GRIDS = (
    (4, 64, 4), (4, 64, 8), (3, 64, 4), (3, 64, 8), (3, 32, 4), (3, 32, 8), (2, 64, 4), (2, 32, 4),
    (3, 64, 3), (3, 64, 2), (2, 64, 2),
)  # fmt: skip


class Judge:
    """KL to the reference and perplexity on one text; the reference's logits are computed once and kept on disk."""

    def __init__(self, reference: str, texts: list[list[int]], work: Path) -> None:
        self.texts = texts
        self._points = work / "points.json"
        rows = sum(len(ids) - 1 - len(ids) // 2 for ids in texts)
        with Checkpoint(reference) as checkpoint:
            vocabulary = model_spec(checkpoint).vocab_size
        self._kept = np.memmap(work / "reference.logits", np.float32, "w+", shape=(rows, vocabulary))
        done = 0
        for tile, _ in self._tiles(reference):
            self._kept[done : done + len(tile)] = tile
            done += len(tile)

    def __call__(self, name: str, make: Callable[[], tuple[str, int]]) -> Point:
        """The point of that name, where it is not known yet of what ``make`` returns: a model and its bytes."""
        known = json.loads(self._points.read_text()) if self._points.is_file() else {}
        if name not in known:
            path, n_bytes = make()
            divergence, done = Divergence(), 0
            for tile, targets in self._tiles(path):
                kept = self._kept[done : done + len(tile)]
                for row in range(0, len(tile), 4):
                    some = slice(row, row + 4)
                    divergence.add(kept[some], tile[some], targets[some])
                done += len(tile)
            found = divergence.summary
            known[name] = n_bytes, found["kl_mean"], found["perplexity"]
            self._points.write_text(json.dumps(known))
        point = Point(name, *known[name])
        print(
            f"  {name}: {point.n_bytes / 1e6:.1f} MB, KL {point.kl:.4f}, perplexity {point.perplexity:.2f}", flush=True
        )
        return point

    def _tiles(self, path: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        config = EngineConfig(
            context=WINDOW, chunk=128, n_logits=32, kv=FloatStore(), activations="float32", n_threads=2
        )
        with Checkpoint(path) as checkpoint, Engine(checkpoint, model_spec(checkpoint), config) as engine:
            for ids in self.texts:
                half, tiles = len(ids) // 2, []
                engine.reset()
                engine.prefill(ids[:half])
                engine.prefill(ids[half:-1], all_logits=lambda _, logits, tiles=tiles: tiles.append(logits.copy()))
                yield np.concatenate(tiles), np.asarray(ids[half + 1 :], np.int64)


def llama_cpp_points(
    reference: str, python: str, squares: dict[str, np.ndarray], judge: Judge, work: Path
) -> list[Point]:
    """llama.cpp's files, with and without importance, decoded to floats by the gguf package."""
    np.savez(work / "imatrix.npz", **squares)

    def quantized(kind: str, important: bool) -> tuple[str, int]:
        small, floats = str(work / "small.gguf"), str(work / "floats.gguf")
        settings = {"source": reference, "to": small, "type": kind}
        settings |= {"imatrix": str(work / "imatrix.npz")} if important else {}
        child(HERE.parent / "models/requantize.py", settings, python, timeout=7200)
        tensors = {t.name: t for t in gguf.GGUFReader(small).tensors}
        shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()}

        def decoded(name: str) -> np.ndarray:
            each = tensors[name]
            return gguf.quants.dequantize(each.data, each.tensor_type).astype(np.float32).reshape(shapes[name])

        write_floats(reference, floats, shapes, decoded)
        return floats, sum(int(t.n_bytes) for t in tensors.values())

    found = []
    for kind in LLAMA_CPP:
        for important in [True] if kind in NEED_IMPORTANCE else [False] if kind == "q8_0" else [False, True]:
            found.append(
                judge(f"llama.cpp {kind}" + " imatrix" * important, functools.partial(quantized, kind, important))
            )
    return found


def worker_points(
    name: str, worker: str, python: str, dense: Path, texts: Path, n_vectors: int, judge: Judge, work: Path
) -> list[Point]:
    """A peer that reads a folder of floats and writes one of the floats that its codes mean."""
    target = work / "peer"

    def quantized(bits: int, group: int, embed_bits: int) -> tuple[str, int]:
        shutil.rmtree(target, ignore_errors=True)
        settings = {"source": str(dense), "to": str(target), "bits": bits, "group": group, "texts": str(texts)}
        settings |= {"embed_bits": embed_bits, "layers": str(work)}
        return str(target), child(HERE / worker, settings, python, timeout=7200)["n_bytes"] + n_vectors

    return [
        judge(
            f"{name} {bits} bits, groups of {group}, embedding {embed_bits} bits",
            functools.partial(quantized, bits, group, embed_bits),
        )
        for bits, group, embed_bits in GRIDS
    ]


def our_points(reference: str, args: argparse.Namespace, judge: Judge, work: Path) -> list[Point]:
    """Fits at the stated bits, formats allocated by measured sensitivity."""
    (solver,) = parse_composition(args.solver, techniques("weights.solvers"), "weights.solvers")
    with Checkpoint(reference) as checkpoint:
        spec, tokenizer, text = model_spec(checkpoint), load_tokenizer(checkpoint), Path(args.fit_text).read_text()
        probes = spread_windows(text, tokenizer, PROBE_WINDOW, PROBE_WINDOWS)
        choices = measured_options(Source(checkpoint, spec), spec, probes, work / "sensitivity.json")
        texts = spread_windows(text, tokenizer, WINDOW, args.fit_tokens // WINDOW)

        def fitted(bits: float) -> tuple[str, int]:
            chosen = choose(spec, choices, int(bits * spec.n_parameters / 8))
            target = work / f"fit-{bits}"
            job = Fit({name: option.name for name, option in chosen.items()}, solver, texts)
            fit(checkpoint, spec, job, target).finish({})
            with Checkpoint(target) as done:
                return str(target), sum(map(stored_bytes, model_spec(done).weights))

        return [judge(f"barefoot {bits} bits, {args.solver}", functools.partial(fitted, bits)) for bits in args.bits]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference")
    parser.add_argument("name")
    parser.add_argument("--text", required=True)
    parser.add_argument("--fit-text", required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--fit-tokens", type=int, default=16384)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 3.0, 3.5, 4.0, 4.5])
    parser.add_argument("--solver", default="gptq")
    parser.add_argument("--llama-python")
    parser.add_argument("--hqq-python")
    parser.add_argument("--gptq-python")
    parser.add_argument("--work", required=True)
    args = parser.parse_args()
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    with Checkpoint(args.reference) as checkpoint:
        spec, tokenizer = model_spec(checkpoint), load_tokenizer(checkpoint)
        fit_text = Path(args.fit_text).read_text()
        texts = spread_windows(fit_text, tokenizer, WINDOW, args.fit_tokens // WINDOW)
        np.save(work / "texts.npy", texts)
        sources = {w.name: w.source for w in spec.weights}
        squares = {sources[n]: v for n, v in input_squares(Source(checkpoint, spec), spec, texts).items()}
        dense = work / "dense"
        if not (dense / "config.json").is_file():
            floats = {w.name: "f32" for w in spec.weights if w.group != "norm"}
            (plain,) = parse_composition("range", techniques("weights.solvers"), "weights.solvers")
            fit(checkpoint, spec, Fit(floats, plain, np.empty((0, 0), np.int32)), dense).finish({})
        judged = text_windows(Path(args.text).read_text(), tokenizer, WINDOW, args.tokens)
    card(f"frontier of {args.name}", {"parameters": spec.n_parameters, "windows": len(judged), "solver": args.solver})
    judge = Judge(args.reference, judged, work)
    peers: list[Point] = []
    n_vectors = sum(4 * w.n_elements for w in spec.weights if w.group == "norm")
    if args.llama_python:
        peers += llama_cpp_points(args.reference, args.llama_python, squares, judge, work)
    for name, worker, python in (
        ("HQQ", "hqq_worker.py", args.hqq_python),
        ("GPTQ", "gptq_worker.py", args.gptq_python),
    ):
        if python:
            peers += worker_points(name, worker, python, dense, work / "texts.npy", n_vectors, judge, work)
    ours = our_points(args.reference, args, judge, work)
    claims, ratios = [], {}
    for bits, point in zip(args.bits, ours, strict=True):
        # The best peer of no more bytes, and what lies between peers at just these bytes.
        below = [p.kl for p in peers if p.n_bytes <= point.n_bytes * 1.002]
        expected = between(frontier(peers), point.n_bytes)
        at_equal = min([*below, *([expected.kl] if expected else [])], default=math.inf)
        if at_equal == math.inf:
            print(f"  no peer takes as few bytes as {bits} bits a weight")
            continue
        ratios[f"KL over the best peer's at {bits} bits"] = round(point.kl / at_equal, 4)
        claims.append(claim(f"KL over the best peer's at {bits} bits", point.kl / at_equal, at_most=1.0))
        claims.append(claim(f"the same, the aim at {bits} bits", point.kl / at_equal, at_most=0.7))
    results = {
        p.name: {
            "bytes": p.n_bytes,
            "bits": round(8 * p.n_bytes / spec.n_parameters, 3),
            "kl": p.kl,
            "perplexity": p.perplexity,
        }
        for p in [*ours, *peers]
    }
    record: dict[str, Any] = {
        "config": {"solver": args.solver, "fit_tokens": args.fit_tokens, "tokens": args.tokens, "window": WINDOW},
        "card": {"reference": args.name, "n_parameters": spec.n_parameters},
        "results": results,
        "ratios": ratios,
        "claims": claims,
    }
    (work / "record.json").write_text(json.dumps(record, indent=1))
    save(f"quality/frontier_{args.name}", record, "gguf")


if __name__ == "__main__":
    main()
