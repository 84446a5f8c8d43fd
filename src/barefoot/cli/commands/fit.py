"""``barefoot fit``: the best model that takes so many bytes, written as a folder that runs."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from barefoot.cli import arguments, console, models, progress
from barefoot.core.model import MATRIX_GROUPS
from barefoot.core.units import format_bytes, parse_bytes, parse_count
from barefoot.evals.texts import BUILT_IN, PROBE_WINDOW, PROBE_WINDOWS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from barefoot.core.model import ModelSpec
    from barefoot.engine.config import EngineConfig
    from barefoot.engine.fitting import Fit, Ids
    from barefoot.io.inventory import Checkpoint
    from barefoot.weights.solvers import Solver
    from barefoot.weights.structures import Structure

WINDOW, TOKENS = 512, 16384
SORT_WINDOWS = 2  # of the text, whose perplexity orders the blocks of a stack
SOLVERS = "gptq", "gptq(drift=0)"  # the first one that memory has room for
CONTEXT = 1024
SLACK_BYTES = 7680 << 10  # page tables, and what libraries keep between calls: 5 MiB were measured above the count
RETURNED = 512  # of the memory allowed: arrays larger than this part go back to the system as soon as they are freed
UNLIMITED = 2 << 30  # what is taken for allowed where nothing is said
LEAST_WINDOW = 128  # tokens, below which a fit is refused rather than made worse
SENSITIVITY = "fit-sensitivity.json"

HELP = "make a model smaller: the best one that takes so many bytes"
EXAMPLES = (
    "barefoot fit smollm2 --memory 80MiB -o small",
    "barefoot fit smollm2 --bits 3.2 -o small --text wiki.train.raw",
    'barefoot fit smollm2 --weights "int(bits=4,group=64)" --solver hqq -o small',
    'barefoot fit smollm2 --weights "ffn=bitstack attn=bitstack embed=int(bits=8)" -o stack',
)
JSON_KEYS = {
    "model": "what was fitted",
    "output": "the folder",
    "weight_bytes": "of the fitted weights",
    "bits_per_weight": "weight_bytes over the number of weights",
    "formats": "format → bytes of the matrices that have it",
    "solver": "what chose the codes",
    "predicted_cost": "nats a token that rounding should cost, when formats were chosen here; null if they were stated",
    "run_bytes": "what a run takes with everything resident and a context of run_context tokens",
    "least_run_bytes": "of a stack: with the first block of each matrix alone; else the same",
    "run_context": "tokens",
    "predicted_peak_bytes": "of the fit, predicted",
    "measured_peak_bytes": "of the fit: the process's high-water mark",
    "seconds": "of the whole fit; of the last part where it was resumed",
}


def configure(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="the folder to write")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--memory", metavar="SIZE", type=parse_bytes, help="bytes of the fitted weights, and of the fit itself"
    )
    size.add_argument("--bits", metavar="B", type=float, help="bits a weight, over all of the model's weights")
    size.add_argument(
        "--weights",
        metavar="SPEC",
        help='formats instead of a size: of all matrices, as in "int(bits=4)", or by group, as in run; or structures '
        "of the layers' matrices, as in bitstack(blocks=8)",
    )
    parser.add_argument(
        "--fit-memory", metavar="SIZE", type=parse_bytes, help="bytes of the fit itself, where they are not --memory"
    )
    parser.add_argument(
        "--solver",
        metavar="SPEC",
        help=f"what chooses the codes; default {SOLVERS[0]}, or {SOLVERS[1]} where memory has no room for it",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        default=BUILT_IN,
        help=f"what the model reads meanwhile, a text file; default {BUILT_IN}: the English of Python's help topics",
    )
    parser.add_argument(
        "--tokens", metavar="N", type=parse_count, default=TOKENS, help=f"of the text, at most; default {TOKENS}"
    )
    parser.add_argument("--window", metavar="N", type=parse_count, default=WINDOW, help=f"default {WINDOW}")
    parser.add_argument("--threads", metavar="N", type=int, help="compute threads; default all")


def execute(args: argparse.Namespace) -> int:
    from barefoot.evals.encode import spread

    started = time.perf_counter()
    output, source = Path(args.output), models.fetch(args.model)
    wanted = [(args.window, args.tokens // args.window), (PROBE_WINDOW, PROBE_WINDOWS)]
    texts, probes = spread(source, args.text, wanted)  # before all else, while this process is small

    from barefoot.core.measure import peak_resident
    from barefoot.engine.fitting import fit
    from barefoot.engine.specs import model_spec
    from barefoot.io.inventory import Checkpoint
    from barefoot.ops import set_threads

    if args.threads:
        set_threads(args.threads)
    with Checkpoint(source) as checkpoint, progress.line() as report:
        spec = model_spec(checkpoint)
        job, cost, predicted = _job(args, checkpoint, spec, texts, probes, report)
        folder = fit(checkpoint, spec, job, output, report)
        record = {
            "model": args.model,
            "solver": str(job.solver),
            "tokens": int(job.texts.size),
            "formats": {name: str(how) for name, how in job.formats.items()},
            "predicted_cost": cost,
        }
        folder.finish(record)
        _sort(output, job.texts, report)
        (output / SENSITIVITY).unlink(missing_ok=True)
    result = {
        "model": args.model,
        "output": str(output),
        **_sizes(output),
        "solver": str(job.solver),
        "predicted_cost": cost,
        **_run_needs(output),
        "predicted_peak_bytes": predicted,
        "measured_peak_bytes": peak_resident(),
        "seconds": time.perf_counter() - started,
    }
    if args.json:
        console.write_json(result, args.json)
    if args.json != console.STDOUT:
        _show(result)
    return 0


def _job(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    texts: Ids,
    probes: Ids,
    report: progress.Report,
) -> tuple[Fit, float | None, int]:
    """What to do with each matrix; what rounding should cost where that was chosen here; and the predicted peak."""
    from barefoot.core.registry import techniques
    from barefoot.core.spec import parse_composition
    from barefoot.engine.allocation import choose, measured_options
    from barefoot.engine.fit_state import key_of
    from barefoot.engine.fitting import Fit
    from barefoot.engine.sensitivity import workspace_bytes
    from barefoot.engine.source import Source
    from barefoot.io.tokenizer_files import export_bytes

    stated = (args.solver,) if args.solver else SOLVERS
    solvers = cast(
        "list[Solver]",
        [parse_composition(each, techniques("weights.solvers"), "weights.solvers")[0] for each in stated],
    )
    formats = {} if args.weights is None else _stated(args.weights, spec)
    limit = args.fit_memory or args.memory
    reserved = _reserved(spec, solvers[0], formats, limit or UNLIMITED)
    writing = reserved + (export_bytes(checkpoint.config) if checkpoint.kind == "gguf" else 0)
    if limit is not None and writing > limit:
        raise _too_much("writing the tokenizer", writing, limit)

    def begun(job: Fit) -> bool:
        return job.key(checkpoint) == key_of(Path(args.output))

    if args.weights is not None:
        job = _within(limit, reserved, spec, [Fit(formats, solver, texts) for solver in solvers], begun)
        return job, None, max(_peak(reserved, spec, job)[0], writing)
    probing = reserved + workspace_bytes(spec, *probes.shape)
    if limit is not None and probing > limit:
        raise _too_much("measuring what rounding costs", probing, limit)
    choices = measured_options(Source(checkpoint, spec), spec, probes, Path(args.output) / SENSITIVITY, report)
    chosen = choose(spec, choices, _budget(args, spec))
    jobs = [Fit({n: o.name for n, o in chosen.items()}, solver, texts) for solver in solvers]
    job = _within(limit, reserved, spec, jobs, begun)
    return job, sum(o.cost for o in chosen.values()), max(_peak(reserved, spec, job)[0], writing, probing)


def _reserved(spec: ModelSpec, solver: Solver, formats: Mapping[str, str | Structure], limit: int) -> int:
    """Bytes of the process before the fit allocates anything, PyTorch's among them where the solver learns, and the
    allocator's slack."""
    from barefoot.core.measure import KEPT_FREE, return_freed_memory
    from barefoot.engine.fit_footprint import warm_up
    from barefoot.plan.reserved import reserved_expected, reserved_now
    from barefoot.weights.structures import Structure

    at_once = min(max(256 << 10, limit // RETURNED), 4 << 20)
    return_freed_memory(at_once)
    warm_up(spec, solver, {how for how in formats.values() if isinstance(how, Structure)})
    return (reserved_now() or reserved_expected()).bytes + SLACK_BYTES + KEPT_FREE * at_once


def _peak(reserved: int, spec: ModelSpec, job: Fit) -> tuple[int, str]:
    """The predicted peak of a fit, or of sorting the stack that it leads to, and which of them it is."""
    from barefoot.engine import footprint as running
    from barefoot.engine.fit_footprint import fitted, footprint
    from barefoot.evals.scoring import workspace_bytes

    fitting, small = footprint(spec, job).peak()[1], fitted(spec, job)
    sorting = 0
    if small.stack:
        engine = running.footprint(small, _sorting(job.texts.shape[1]))
        sorting = engine.peak()[1] + workspace_bytes(spec.vocab_size)
    return reserved + max(fitting, sorting), "the fit" if fitting >= sorting else "sorting the stack"


def _within(
    limit: int | None, reserved: int, spec: ModelSpec, jobs: Sequence[Fit], begun: Callable[[Fit], bool]
) -> Fit:
    """The first of the jobs that the limit has room for; if it is none, with their text in shorter windows. One that is
    begun and was interrupted goes on, whatever a few pages more or less would change.

    Raises
    ------
    OverBudget : not even with windows of ``LEAST_WINDOW``.
    """
    if limit is None:
        return jobs[0]
    least = None
    every = [each for first in jobs for each in _shorter(first)]
    for job in [*filter(begun, every), *every]:
        peak, what = _peak(reserved, spec, job)
        if peak <= limit or begun(job):
            return job
        least = (peak, what) if least is None else min(least, (peak, what))
    assert least is not None
    solved = any(isinstance(how, str) for how in jobs[0].formats.values())
    raise _too_much(least[1], least[0], limit, "; the solver mse takes least" if solved else "")


def _shorter(job: Fit) -> Iterator[Fit]:
    """The job, and where it reads text the same with windows of half the length, and so on."""
    from dataclasses import replace

    yield job
    n_windows, window = job.texts.shape
    while job.reads and window % 2 == 0 and window >= 2 * LEAST_WINDOW:
        n_windows, window = 2 * n_windows, window // 2
        yield replace(job, texts=job.texts.reshape(n_windows, window))


def _too_much(what: str, needed: int, limit: int, or_else: str = "") -> Exception:
    from barefoot.core.errors import OverBudget

    return OverBudget(
        f"{what} takes {format_bytes(needed)}, {format_bytes(limit)} are allowed",
        needed=needed,
        available=limit,
        cure=f"allow it more: --fit-memory {-(-needed // 2**20)}MiB{or_else}",
    )


def _budget(args: argparse.Namespace, spec: ModelSpec) -> int:
    """Bytes of all weights."""
    return int(args.memory) if args.bits is None else int(args.bits * spec.n_parameters / 8)


def _stated(text: str, spec: ModelSpec) -> dict[str, str | Structure]:
    """The format or structure of each matrix that ``text`` says something about."""
    from barefoot.core.registry import techniques
    from barefoot.plan.job import parse_groups
    from barefoot.weights.formats import WeightFormat

    by_group = parse_groups(text, {**techniques("weights.formats"), **techniques("weights.structures")})
    found: dict[str, str | Structure] = {}
    for weight in spec.weights:
        how = by_group.get(weight.group)
        if isinstance(how, WeightFormat):
            found[weight.name] = how.layout(weight.format)
        elif how is not None and weight.layer is not None:  # sums are there for the matrices of layers
            found[weight.name] = cast("Structure", how)
    return found


def _sort(output: Path, texts: Ids, report: progress.Report) -> None:
    """Put the residual blocks of a stack, if it is one, into the order in which to load them."""
    from barefoot.engine.runner import Engine
    from barefoot.engine.specs import model_spec
    from barefoot.engine.stacks import write_order
    from barefoot.evals.sorting import sort_stack
    from barefoot.io.inventory import Checkpoint

    with Checkpoint(output) as checkpoint:
        spec = model_spec(checkpoint)
        if not spec.stack:
            return
        windows = texts[:SORT_WINDOWS].tolist()
        with Engine(checkpoint, spec, _sorting(len(windows[0]))) as engine:
            write_order(output, sort_stack(engine, windows, progress=report))


def _sorting(window: int) -> EngineConfig:
    """How a stack runs while it is sorted."""
    from barefoot.engine.config import EngineConfig
    from barefoot.kv.stores.f16 import HalfStore
    from barefoot.ops import n_threads

    chunk = max(1, window // 2)
    return EngineConfig(window, HalfStore(), chunk=chunk, n_logits=min(16, chunk), n_threads=n_threads())


def _sizes(output: Path) -> dict[str, Any]:
    """What the folder takes, by format."""
    from barefoot.engine.placement import piece_bytes
    from barefoot.engine.specs import model_spec
    from barefoot.io.inventory import Checkpoint

    with Checkpoint(output) as checkpoint:
        spec = model_spec(checkpoint)
    formats: dict[str, int] = {}
    for weight in spec.weights:
        names = weight.format, *(part.kind for part in weight.parts)
        for name, n_bytes in zip(names, piece_bytes(weight, weight.parts), strict=True):
            formats[name] = formats.get(name, 0) + n_bytes
    formats.pop("zero", None)
    total = sum(formats.values())
    return {"weight_bytes": total, "bits_per_weight": 8 * total / spec.n_parameters, "formats": formats}


def _run_needs(output: Path) -> dict[str, int]:
    """The memory in which the fitted model runs with all of its weights resident, and without any of its stack."""
    from barefoot.engine.specs import model_spec
    from barefoot.io.inventory import Checkpoint
    from barefoot.plan.job import RunJob, Stated
    from barefoot.plan.planner import smallest_budget
    from barefoot.weights.formats.stored import Stored

    with Checkpoint(output) as checkpoint:
        spec = model_spec(checkpoint)
        tokenizer = models.tokenizer_footprint(checkpoint, models.TYPICAL_PROMPT_BYTES)
    context = min(CONTEXT, spec.context_length)
    stored = dict.fromkeys(MATRIX_GROUPS, Stored())

    def needed(n_stacked: int | None) -> int:
        stated = Stated(weights=stored, streamed_layers=0, stream_head=False, n_stacked=n_stacked)
        found = smallest_budget(spec, RunJob(context, context // 2), stated=stated, extra=tokenizer)
        assert found is not None
        return found

    return {"run_bytes": needed(len(spec.stack) or None), "least_run_bytes": needed(None), "run_context": context}


def _show(result: dict[str, Any]) -> None:
    largest = sorted(result["formats"].items(), key=lambda item: -item[1])
    rows = [
        ("weights", f"{format_bytes(result['weight_bytes'])}, {result['bits_per_weight']:.3f} bits each"),
        ("formats", ", ".join(f"{name} {format_bytes(n)}" for name, n in largest[:6])),
        ("runs in", f"{format_bytes(result['run_bytes'])} with a context of {result['run_context']:,} tokens"),
    ]
    if result["least_run_bytes"] < result["run_bytes"]:
        rows.append(("as a stack", f"in any memory from {format_bytes(result['least_run_bytes'])} on"))
    if result["predicted_cost"] is not None:
        rows.append(("rounding", f"expected to cost {result['predicted_cost']:.4f} nats a token"))
    print(console.table(rows))
    run_mib = -(-result["run_bytes"] // 2**20)
    print(f"\nbarefoot run {result['output']} --memory {run_mib}MiB --context {result['run_context']}")
