"""``barefoot eval``: perplexity of a model on a text, and its divergence from a reference."""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from barefoot.cli import arguments, console, models, progress
from barefoot.core.units import format_bytes, parse_bytes, parse_count
from barefoot.evals.texts import BUILT_IN

if TYPE_CHECKING:
    from barefoot.core.model import ModelSpec
    from barefoot.engine.config import EngineConfig

WINDOW, TOKENS = 512, 8192
LOGIT_BYTES = 16 << 20  # of one engine's logits at a time
CHUNK = 128

HELP = "measure a model on a text: perplexity, and the divergence from a reference"
EXAMPLES = (
    "barefoot eval smollm2 --tokens 4096",
    "barefoot eval fitted/ --reference smollm2 --text wiki.test.raw",
    'barefoot eval smollm2 --weights "int(bits=3)" --reference smollm2 --json eval.json',
    "barefoot eval fitted/ --driver torch --reference fitted/",
)
JSON_KEYS = {
    "model": "what was measured",
    "reference": "what it was compared with, or null",
    "driver": "what computed the model: engine or torch",
    "text": "the text's name",
    "window": "tokens of a window; the second half of each is scored",
    "n_tokens": "tokens scored",
    "perplexity": "of the model",
    "reference_perplexity": "of the reference",
    "kl_mean": "mean of KL(reference ‖ model) over the scored tokens, in nats",
    "kl_p99": "its 99th percentile",
    "same_top": "share of tokens whose likeliest successor is the same in both",
    "weight_bytes": "of the model's weights as they were held",
    "bits_per_weight": "weight_bytes over the number of weights",
    "peak_bytes": "the process's high-water mark",
    "seconds": "of scoring, loading not included",
}


def configure(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    parser.add_argument("--reference", metavar="MODEL", help="what to compare with, in float32")
    parser.add_argument(
        "--text",
        metavar="FILE",
        default=BUILT_IN,
        help=f"a text file; default {BUILT_IN}: the English of Python's own help topics",
    )
    parser.add_argument("--window", metavar="N", type=parse_count, default=WINDOW, help=f"default {WINDOW}")
    parser.add_argument(
        "--tokens", metavar="N", type=parse_count, default=TOKENS, help=f"of the text that are used; default {TOKENS}"
    )
    parser.add_argument(
        "--driver",
        choices=("engine", "torch"),
        default="engine",
        help="what computes the model; torch: transformers' modules, in float32, of a folder; default engine",
    )
    parser.add_argument("--memory", metavar="SIZE", type=parse_bytes, help="bytes that may be used; engine only")
    parser.add_argument("--weights", metavar="SPEC", help="convert the model at loading, as in run; engine only")
    parser.add_argument("--kv", metavar="SPEC", help="the model's KV store; default f16; engine only")
    arguments.add_adapter(parser)
    parser.add_argument("--threads", metavar="N", type=int, help="compute threads; default all")
    parser.add_argument(
        "--activations",
        choices=("int8", "float32"),
        help="inputs of the model's matrices; default float32; engine only",
    )


def execute(args: argparse.Namespace) -> int:
    from barefoot.core.measure import peak_resident
    from barefoot.engine.runner import Engine
    from barefoot.engine.specs import model_spec
    from barefoot.evals.scoring import score, text_windows
    from barefoot.evals.texts import read_text
    from barefoot.evals.torch_driver import TorchModel
    from barefoot.io.inventory import Checkpoint
    from barefoot.io.tokenizer import load_tokenizer

    if args.driver != "engine":
        _check_options(args)
    text = read_text(args.text)
    with contextlib.ExitStack() as stack:
        checkpoints = [stack.enter_context(Checkpoint(models.fetch(n))) for n in (args.model, args.reference) if n]
        specs = [model_spec(checkpoint) for checkpoint in checkpoints]
        configs = [_config(args, spec, is_reference=i > 0) for i, spec in enumerate(specs)]
        _check_memory(args, specs, configs)
        texts = text_windows(text, load_tokenizer(checkpoints[0]), args.window, args.tokens)
        with progress.line() as report:

            def engine(i: int) -> Engine:
                def loading(done: int, total: int) -> None:
                    report(done, total, "loading")

                return stack.enter_context(Engine(checkpoints[i], specs[i], configs[i], progress=loading))

            model: Engine | TorchModel
            if args.driver == "torch":
                model = stack.enter_context(TorchModel(checkpoints[0].path, specs[0], configs[0]))
                weight_bytes = model.weight_bytes
            else:
                model = engine(0)
                weight_bytes = model.arena.used().get("weights", 0)
            reference = engine(1) if args.reference else None
            started = time.perf_counter()
            found = score(texts, model, reference, lambda done, total: report(done, total, "scoring"))
        seconds = time.perf_counter() - started
    result = {
        "model": args.model,
        "reference": args.reference,
        "driver": args.driver,
        "text": Path(args.text).name,
        "window": args.window,
        **found,
        "weight_bytes": weight_bytes,
        "bits_per_weight": 8 * weight_bytes / specs[0].n_parameters,
        "peak_bytes": peak_resident(),
        "seconds": seconds,
    }
    if args.json:
        console.write_json(result, args.json)
    if args.json != console.STDOUT:
        _show(result)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Refuse what only the engine can do."""
    from barefoot.core.errors import InvalidInput

    for option in ("memory", "weights", "kv", "activations", "adapter"):
        if getattr(args, option) is not None:
            raise InvalidInput(
                f"--{option} says how the engine computes, and --driver is {args.driver}", cure=f"leave --{option} out"
            )


def _config(args: argparse.Namespace, spec: ModelSpec, *, is_reference: bool) -> EngineConfig:
    from barefoot.engine.config import EngineConfig
    from barefoot.ops import n_threads
    from barefoot.plan.job import parse_kv, parse_weights

    n_logits = max(1, min(64, args.window, LOGIT_BYTES // (4 * spec.vocab_size)))
    return EngineConfig(
        context=args.window,
        kv=parse_kv("f32" if is_reference else args.kv or "f16"),
        weights={} if is_reference or args.weights is None else parse_weights(args.weights),
        chunk=min(CHUNK, args.window),
        activations="float32" if is_reference else args.activations or "float32",
        adapter=None if is_reference else arguments.adapter(args, spec),
        n_logits=n_logits,
        n_threads=args.threads or n_threads(),
    )


def _check_memory(args: argparse.Namespace, specs: list[ModelSpec], configs: list[EngineConfig]) -> None:
    """Refuse before anything is loaded what would not fit."""
    from barefoot.core.errors import OverBudget
    from barefoot.engine.footprint import footprint
    from barefoot.evals.scoring import workspace_bytes
    from barefoot.plan.reserved import reserved_expected, reserved_now

    reserved = (reserved_now() or reserved_expected()).bytes
    engines = sum(footprint(spec, config).peak()[1] for spec, config in zip(specs, configs, strict=True))
    needed = reserved + engines + workspace_bytes(specs[0].vocab_size)
    if args.memory is not None and needed > args.memory:
        raise OverBudget(
            f"scoring {args.model} takes {format_bytes(needed)}, {format_bytes(args.memory)} are allowed",
            needed=needed,
            available=args.memory,
            cure=f"allow {format_bytes(needed)}" + (", or leave --reference out" if args.reference else ""),
        )


def _show(result: dict[str, Any]) -> None:
    rows = [
        ("perplexity", f"{result['perplexity']:.3f}"),
        ("tokens scored", f"{result['n_tokens']:,} of {result['text']}"),
        ("weights", f"{format_bytes(result['weight_bytes'])}, {result['bits_per_weight']:.3f} bits each"),
    ]
    if result["reference"] is not None:
        rows[1:1] = [
            ("reference", f"{result['reference_perplexity']:.3f}, {result['reference']}"),
            ("KL divergence", f"{result['kl_mean']:.5f} nats a token, 99% below {result['kl_p99']:.4f}"),
            ("same likeliest token", f"{result['same_top']:.1%}"),
        ]
    print(console.table(rows))
