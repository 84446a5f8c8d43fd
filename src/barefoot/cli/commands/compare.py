"""``barefoot compare``: the quality of a model over its bytes, in every format and fitted to sizes."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from barefoot.cli import arguments, console, models, picture, progress
from barefoot.core.units import format_bytes, parse_bytes, parse_count
from barefoot.evals.texts import BUILT_IN, PROBE_WINDOW, PROBE_WINDOWS

if TYPE_CHECKING:
    from barefoot.core.model import ModelSpec
    from barefoot.engine.config import EngineConfig
    from barefoot.evals.frontier import Point
    from barefoot.io.inventory import Checkpoint
    from barefoot.io.tokenizer import Tokenizer
    from barefoot.weights.solvers import Solver

WINDOW, TOKENS, FIT_TOKENS = 512, 2048, 16384
SIZES = (0.8, 0.97, 1.03, 1.2)  # of --memory, to which the model is fitted

HELP = "draw the quality of a model over its bytes, for all formats"
EXAMPLES = (
    "barefoot compare smollm2 --formats 'int?_g64_*'",
    "barefoot compare smollm2 --memory 80MiB --png frontier.png --keep fits",
    "barefoot compare smollm2 --memory 60MiB --text wiki.test.raw --fit-text wiki.train.raw --json frontier.json",
)
JSON_KEYS = {
    "model": "what was stored in all these ways",
    "text": "what quality was measured on",
    "reference_perplexity": "of the model as it comes",
    "points": "name, n_bytes, kl and perplexity of each way of storing it",
    "frontier": "names of the points that no other one beats, by rising bytes",
    "memory": "the size that was asked for, or null",
    "expected": "KL and perplexity to expect of a fit to that size, from the fits around it; or null",
}


def configure(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    parser.add_argument(
        "--memory", metavar="SIZE", type=parse_bytes, help="bytes of the weights: fit to sizes around it"
    )
    parser.add_argument("--formats", metavar="PATTERN", default="*", help="block formats to compare; default: all")
    parser.add_argument("--solver", metavar="SPEC", default="gptq", help="of the fits; default gptq")
    parser.add_argument("--text", metavar="FILE", default=BUILT_IN, help=f"what to measure on; default {BUILT_IN}")
    parser.add_argument("--fit-text", metavar="FILE", help="what fits look at; default --text, its other half")
    parser.add_argument(
        "--tokens", metavar="N", type=parse_count, default=TOKENS, help=f"measured on; default {TOKENS}"
    )
    parser.add_argument(
        "--fit-tokens", metavar="N", type=parse_count, default=FIT_TOKENS, help=f"fits look at; default {FIT_TOKENS}"
    )
    parser.add_argument("--keep", metavar="DIR", help="where fits are kept, and found again")
    parser.add_argument("--png", metavar="FILE", help="draw the picture; needs matplotlib")


def execute(args: argparse.Namespace) -> int:
    from barefoot.engine.specs import model_spec
    from barefoot.evals.frontier import between, frontier
    from barefoot.evals.scoring import text_windows
    from barefoot.evals.texts import read_text
    from barefoot.io.inventory import Checkpoint
    from barefoot.io.tokenizer import load_tokenizer

    if args.png:
        picture.pyplot()  # before the work, so that it isn't lost
    text = read_text(args.text)
    # Without a text of their own fits look at the first half, and quality is measured on the second.
    fit_text, text = (
        (read_text(args.fit_text), text) if args.fit_text else (text[: len(text) // 2], text[len(text) // 2 :])
    )
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint(models.fetch(args.model)))
        report = stack.enter_context(progress.line())
        spec, tokenizer = model_spec(checkpoint), load_tokenizer(checkpoint)
        measure = _Measure(checkpoint, spec, text_windows(text, tokenizer, WINDOW, args.tokens), report)
        points = list(_uniform(spec, args.formats, measure))
        fitted: list[Point] = []
        expected: Point | None = None
        if args.memory is not None:
            folder = Path(args.keep or stack.enter_context(tempfile.TemporaryDirectory()))
            n_bytes, fits = _fits(args, checkpoint, spec, tokenizer, fit_text, folder, measure, report)
            fitted = list(fits)
            expected = between(fitted, n_bytes)
    best = frontier([*points, *fitted])
    result = {
        "model": args.model,
        "text": Path(args.text).name,
        "reference_perplexity": measure.reference_perplexity,
        "points": [asdict(p) for p in sorted([*points, *fitted], key=lambda p: p.n_bytes)],
        "frontier": [p.name for p in best],
        "memory": args.memory,
        "expected": None if expected is None else {"kl": expected.kl, "perplexity": expected.perplexity},
    }
    if args.png:
        labels = "weights, MiB", "KL to the model as it comes, nats a token"
        picture.over_bytes(args.png, args.model, points, *labels, line=fitted, mark=args.memory)
    if args.json:
        console.write_json(result, args.json)
    if args.json != console.STDOUT:
        _show(result, spec)
    return 0


class _Measure:
    """KL to the model as it comes, and perplexity, of any way of storing it."""

    def __init__(
        self, checkpoint: Checkpoint, spec: ModelSpec, texts: list[list[int]], report: progress.Report
    ) -> None:
        self.checkpoint, self.spec, self.texts, self.report = checkpoint, spec, texts, report
        self.reference_perplexity = float("nan")

    def __call__(
        self,
        name: str,
        n_bytes: int,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        layout: str | None = None,
    ) -> Point:
        from barefoot.engine.runner import Engine
        from barefoot.evals.frontier import Point
        from barefoot.evals.scoring import score

        with (
            Engine(self.checkpoint, self.spec, _config(self.spec, None)) as reference,
            Engine(checkpoint, spec, _config(spec, layout)) as engine,
        ):
            found = score(self.texts, engine, reference, lambda done, total: self.report(done, total, name))
        self.reference_perplexity = found["reference_perplexity"]
        return Point(name, n_bytes, found["kl_mean"], found["perplexity"])


def _config(spec: ModelSpec, layout: str | None) -> EngineConfig:
    from barefoot.core.model import MATRIX_GROUPS
    from barefoot.engine.config import EngineConfig
    from barefoot.ops import n_threads
    from barefoot.plan.job import parse_kv
    from barefoot.weights.formats.blocks import Blocks

    return EngineConfig(
        context=WINDOW,
        kv=parse_kv("f32"),
        weights={} if layout is None else dict.fromkeys(MATRIX_GROUPS, Blocks(layout)),
        chunk=128,
        activations="float32",
        n_logits=32,
        n_threads=n_threads(),
    )


def _uniform(spec: ModelSpec, pattern: str, measure: _Measure) -> Iterator[Point]:
    """All matrices in one format, rounded as they are loaded; those that can't have it keep 8 bits."""
    from barefoot.engine.allocation import candidates, vector_bytes
    from barefoot.ops import blocks

    matrices = [w for w in spec.weights if w.group != "norm"]
    for layout in candidates():
        if fnmatch(layout, pattern) and all(w.cols % blocks.block_elements(layout) == 0 for w in matrices):
            n_bytes = vector_bytes(spec) + sum(w.rows * blocks.row_bytes(layout, w.cols) for w in matrices)
            yield measure(layout, n_bytes, measure.checkpoint, spec, layout)


def _fits(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    text: str,
    folder: Path,
    measure: _Measure,
    report: progress.Report,
) -> tuple[int, Iterator[Point]]:
    """The bytes that a fit to ``--memory`` comes to, and the model fitted to sizes around it, as ``barefoot fit``
    does."""
    from barefoot.core.registry import techniques
    from barefoot.core.spec import parse_composition
    from barefoot.engine.allocation import choose, measured_options, vector_bytes
    from barefoot.engine.fitting import Fit, fit
    from barefoot.engine.placement import stored_bytes
    from barefoot.engine.source import Source
    from barefoot.engine.specs import model_spec
    from barefoot.evals.scoring import spread_windows
    from barefoot.io.inventory import Checkpoint

    (solver,) = cast("tuple[Solver]", parse_composition(args.solver, techniques("weights.solvers"), "weights.solvers"))
    texts = spread_windows(text, tokenizer, WINDOW, args.fit_tokens // WINDOW)
    probes = spread_windows(text, tokenizer, PROBE_WINDOW, PROBE_WINDOWS)
    choices = measured_options(Source(checkpoint, spec), spec, probes, folder / "sensitivity.json", report)

    def fitted(share: float) -> Point:
        chosen = choose(spec, choices, int(share * args.memory))
        job = Fit({name: option.name for name, option in chosen.items()}, solver, texts)
        path = folder / f"{int(share * args.memory)}-{job.key(checkpoint)[:12]}"
        if not (path / "config.json").is_file():
            fit(checkpoint, spec, job, path, report).finish({"solver": str(solver)})
        with Checkpoint(path) as small:
            its_spec = model_spec(small)
            n_bytes = sum(map(stored_bytes, its_spec.weights))
            bits = 8 * n_bytes / spec.n_parameters
            return measure(f"fit, {bits:.2f} bits", n_bytes, small, its_spec)

    n_bytes = vector_bytes(spec) + sum(option.n_bytes for option in choose(spec, choices, args.memory).values())
    return n_bytes, map(fitted, SIZES)


def _show(result: dict[str, Any], spec: ModelSpec) -> None:
    best = set(result["frontier"])
    rows = [
        (
            ("* " if p["name"] in best else "  ") + p["name"],
            format_bytes(p["n_bytes"]),
            f"{8 * p['n_bytes'] / spec.n_parameters:.2f}",
            f"{p['kl']:.5f}",
            f"{p['perplexity']:.3f}",
        )
        for p in result["points"]
    ]
    print(console.table(rows, header=("  format", "weights", "bits", "KL", "perplexity"), right=(1, 2, 3, 4)))
    print(f"\n* nothing smaller is better; as it comes the model has perplexity {result['reference_perplexity']:.3f}")
    if result["expected"] is not None:
        expected = result["expected"]
        print(
            f"at {format_bytes(result['memory'])} expect KL {expected['kl']:.5f} and perplexity "
            f"{expected['perplexity']:.3f} of: barefoot fit {result['model']} --memory {result['memory']} -o DIR"
        )
