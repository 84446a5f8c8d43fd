"""``barefoot kv-compare``: what is lost of a long context over the bytes of its cache, for stores and policies."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from barefoot.cli import arguments, console, models, picture, progress
from barefoot.core.units import format_bytes, parse_count
from barefoot.evals.texts import BUILT_IN

if TYPE_CHECKING:
    from barefoot.core.model import ModelSpec
    from barefoot.engine.runner import Engine
    from barefoot.evals.frontier import Point
    from barefoot.evals.long_context.continuation import Halves, Passage
    from barefoot.io.inventory import Checkpoint

CONTEXT, SCORED, PASSAGES = 1024, 128, 4
CHUNK = 128  # tokens of a prompt that pass at once
SHARES = (0.1, 0.2, 0.4)
REFERENCE = "f16"

HELP = "draw what is lost of a long context over the bytes of its cache"
EXAMPLES = (
    "barefoot kv-compare smollm2 --context 2048",
    "barefoot kv-compare smollm2 --kv q8 'h2o(keep=KEEP) > q8' 'sinks(keep=KEEP) > q8' --png cache.png",
    "barefoot kv-compare smollm2 --context 1024 --shares 0.25 --text wiki.test.raw --json cache.json",
)
JSON_KEYS = {
    "model": "whose caches these are",
    "text": "what was measured on",
    "context": "tokens of the prompts",
    "tokens": "tokens behind them that were scored, one by one",
    "reference": "the cache that the others are measured against",
    "reference_perplexity": "of the model with it",
    "points": "name, n_bytes, kl and perplexity of each composition; n_bytes are those of the cache of one sequence",
    "frontier": "names of the points that no other one beats, by rising bytes",
    "refused": "compositions that do not go together, and why",
}


def configure(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    parser.add_argument(
        "--context", metavar="N", type=parse_count, default=CONTEXT, help=f"tokens of the prompts; default {CONTEXT}"
    )
    parser.add_argument(
        "--kv",
        metavar="SPEC",
        nargs="+",
        help="what to compare; KEEP stands for each share in tokens, SHARE for itself; default: everything",
    )
    parser.add_argument(
        "--shares",
        metavar="X",
        type=float,
        nargs="+",
        default=list(SHARES),
        help="of the prompt, that KEEP and SHARE stand for",
    )
    parser.add_argument("--text", metavar="FILE", default=BUILT_IN, help=f"what to measure on; default {BUILT_IN}")
    parser.add_argument(
        "--tokens", metavar="N", type=parse_count, default=SCORED, help=f"scored behind each prompt; default {SCORED}"
    )
    parser.add_argument(
        "--passages", metavar="N", type=parse_count, default=PASSAGES, help=f"prompts; default {PASSAGES}"
    )
    parser.add_argument("--png", metavar="FILE", help="draw the picture; needs matplotlib")


def execute(args: argparse.Namespace) -> int:
    from barefoot.core.errors import Incompatible, InvalidInput
    from barefoot.engine.specs import model_spec
    from barefoot.evals.frontier import frontier
    from barefoot.evals.long_context.continuation import passages
    from barefoot.evals.texts import read_text
    from barefoot.io.inventory import Checkpoint
    from barefoot.io.tokenizer import load_tokenizer
    from barefoot.plan.job import parse_kv

    if not all(0 < share < 1 for share in args.shares):
        raise InvalidInput(f"shares lie between 0 and 1, got {' '.join(map(str, args.shares))}")
    if args.png:
        picture.pyplot()  # before the work, so that it isn't lost
    refused: dict[str, str] = {}
    points: list[Point] = []
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint(models.fetch(args.model)))
        report = stack.enter_context(progress.line())
        spec = model_spec(checkpoint)
        texts = passages(read_text(args.text), load_tokenizer(checkpoint), args.context, args.tokens, args.passages)
        measure = _Measure(checkpoint, spec, texts)
        names = list(dict.fromkeys([REFERENCE, *_compositions(args.kv or _everything(), args.shares, args.context)]))
        for name in names:  # what can't be read ends it before the work
            with contextlib.suppress(Incompatible):
                parse_kv(name)
        for done, name in enumerate(names):
            report(done, len(names), name)
            try:
                points.append(measure(name))
            except Incompatible as error:
                refused[name] = str(error)
    result = {
        "model": args.model,
        "text": Path(args.text).name,
        "context": args.context,
        "tokens": sum(text.n_scored for text in texts),
        "reference": REFERENCE,
        "reference_perplexity": points[0].perplexity,
        "points": [asdict(p) for p in sorted(points, key=lambda p: p.n_bytes)],
        "frontier": [p.name for p in frontier(points)],
        "refused": refused,
    }
    if args.png:
        shown = [p for p in points if p.name != REFERENCE]
        picture.over_bytes(args.png, args.model, shown, "cache of a sequence, MiB", f"KL to {REFERENCE}, nats a token")
    if args.json:
        console.write_json(result, args.json)
    if args.json != console.STDOUT:
        _show(result, spec)
    return 0


def _everything() -> Iterator[str]:
    """Every store; every policy over half precision, 4 bits, and keys by channel."""
    from barefoot.core.registry import techniques

    yield from techniques("kv.stores")
    for policy, technique in techniques("kv.policies").items():
        budget = "keep=KEEP" if "keep" in technique.knobs() else "ratio=SHARE"
        yield from (f"{policy}({budget}){store}" for store in ("", " > q4", " > kivi(bits=4)"))


def _compositions(specs: Sequence[str] | Iterator[str], shares: Sequence[float], n_tokens: int) -> Iterator[str]:
    for spec in specs:
        for share in shares if "KEEP" in spec or "SHARE" in spec else (0,):
            yield spec.replace("KEEP", str(round(share * n_tokens))).replace("SHARE", str(share))


class _Measure:
    """KL to the reference along the passages, token by token, and perplexity; the reference comes first."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, texts: list[Passage]) -> None:
        self.checkpoint, self.spec, self.texts = checkpoint, spec, texts
        self._references: list[Halves] = []

    def __call__(self, name: str) -> Point:
        from barefoot.evals.frontier import Point
        from barefoot.evals.long_context.continuation import diverge, reference

        with self._engine(name) as engine:
            n_bytes = engine.footprint.select(kind="kv", phase="decode").bytes
            if not self._references:
                self._references = [reference(engine, text) for text in self.texts]
            found = diverge(engine, self.texts, self._references)
        return Point(name, n_bytes, found["kl_mean"], found["perplexity"])

    def _engine(self, name: str) -> Engine:
        from barefoot.engine.config import EngineConfig
        from barefoot.engine.runner import Engine
        from barefoot.ops import n_threads
        from barefoot.plan.job import parse_kv

        text = self.texts[0]
        config = EngineConfig(
            context=len(text.prompt) + len(text.continuation),
            kv=parse_kv(name),
            chunk=min(CHUNK, len(text.prompt)),
            activations="float32",
            n_threads=n_threads(),
        )
        return Engine(self.checkpoint, self.spec, config)


def _show(result: dict[str, Any], spec: ModelSpec) -> None:
    best = set(result["frontier"])
    full = next(p["n_bytes"] for p in result["points"] if p["name"] == result["reference"])
    rows = [
        (
            ("* " if p["name"] in best else "  ") + p["name"],
            format_bytes(p["n_bytes"]),
            f"{p['n_bytes'] / full:.3f}",
            f"{p['kl']:.5f}",
            f"{p['perplexity']:.3f}",
        )
        for p in result["points"]
    ]
    print(console.table(rows, header=("  keys and values", "bytes", "share", "KL", "perplexity"), right=(1, 2, 3, 4)))
    print(
        f"\n* nothing smaller is better; {result['tokens']:,} tokens behind prompts of {result['context']:,}, "
        f"decoded one by one; share and KL are of {result['reference']}"
    )
    for name, reason in result["refused"].items():
        print(f"  {name}: {reason}")
