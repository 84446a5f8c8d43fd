"""``barefoot plan``: what a job needs, what fits, how fast and how good; nothing is loaded."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from barefoot.cli import arguments, console

HELP = "say what a model needs and how it fits into a budget, without loading it"
EXAMPLES = (
    "barefoot plan smollm2 --memory 128MiB --context 1024",
    'barefoot plan smollm2 --memory 160MiB --weights "ffn=int(bits=3)" --kv q8',
    "barefoot plan llama-3.1-70b --device rtx-4090 --memory 24GB",
    'barefoot plan llama-3.1-8b --device "8x h100" --context 1M',
)
JSON_KEYS = {
    "fits": "whether any plan fits",
    "needed_bytes": "peak of the recommended plan; when nothing fits, of the smallest one",
    "available_bytes": "the budget, in the place that computes",
    "candidates": "the best plan of each quality tier, best quality first",
    "recommended": "the first candidate, or null",
    "command": "the command that runs the recommended plan, or null",
    "kv": "what the recommended plan's cache can be, its own first, then by rising KL: kv, bytes (of all sequences), "
    "passing_bytes (beside them, for prompts), n_kept (positions), kl (of the cache alone), tier, estimated, source",
    "alternatives": "only when nothing fits: what would, each with its command",
    "model": "name, architecture, n_parameters, n_layers",
}


def configure(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser, shapes_suffice=True)
    arguments.add_job(parser)
    parser.add_argument(
        "--device",
        metavar="NAME",
        default=arguments.THIS_MACHINE,
        help='a machine of the table that `barefoot doctor --devices` lists, as in rtx-4090 or "8x h100"',
    )
    parser.add_argument("--save", metavar="FILE", help="keep the plan as TOML, for `run --plan`")
    parser.add_argument("--all", action="store_true", help="show every candidate, and what the cache could be")


def execute(args: argparse.Namespace) -> int:
    from barefoot.cli import report
    from barefoot.cli.models import load_shapes
    from barefoot.core.device import parse_device
    from barefoot.plan.compositions import priced
    from barefoot.plan.planner import candidates, refuse

    device = parse_device(args.device)
    shapes = load_shapes(args.model)
    spec = shapes.spec
    job = arguments.job(args, spec)
    budget, said_by = arguments.budget(args, device)
    case = (spec, job, budget, device, arguments.stated(args))
    plans = candidates(*case, extra=shapes.tokenizer, model=args.model)
    if not plans:
        raise refuse(*case, extra=shapes.tokenizer, model=args.model).error()
    best = plans[0]
    caches = priced(spec, job, best.config, by_layer=best.place == "host")
    if args.save:
        Path(args.save).write_text(best.to_toml(), encoding="utf-8")
    if args.json:
        place = best.place
        console.write_json(
            {
                "fits": True,
                "needed_bytes": best.needed[place],
                "available_bytes": best.budget[place],
                "candidates": [plan.to_json() for plan in plans],
                "recommended": best.to_json(),
                "command": best.command,
                "kv": [cache.to_json() for cache in caches],
                "model": {
                    "name": spec.name,
                    "architecture": spec.arch,
                    "n_parameters": spec.n_parameters,
                    "n_layers": spec.n_layers,
                },
            },
            args.json,
        )
    if args.json == console.STDOUT:
        return 0
    print(console.bold(report.model_line(args.model, spec), sys.stdout))
    print(f"on {device.title}; budget {said_by}; {report.job_line(job)}")
    report.print_section(report.bytes_table(best.footprint, best.place))
    print(console.bold(report.budget_line(best), sys.stdout))
    report.print_section(report.choices_table(best))
    report.print_section(report.candidates_table(plans, everything=args.all))
    if args.all:
        report.print_section(report.caches_table(caches))
    report.print_section(best.command)
    if args.save:
        console.print_note(f"saved as {args.save}")
    return 0
