"""``barefoot tune``: adapters for a model, trained inside a budget."""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from barefoot.cli import arguments, console, models, teachers
from barefoot.cli.tuning_data import HELD_OUT_TOKENS, TuningData
from barefoot.core.units import format_bytes, parse_bytes, parse_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from barefoot.adapters import Adapter
    from barefoot.adapters.pruning import Pruning
    from barefoot.core.model import ModelSpec
    from barefoot.io.inventory import Checkpoint
    from barefoot.plan.tuning import TunePlan, TuneStated
    from barefoot.train.driver.loop import Data, Step
    from barefoot.train.lesson import Lesson

LENGTH, BATCH, EPOCHS, RATE, WARM_UP = 512, 8, 1.0, 2e-4, 0.03
AT_ONCE = 128 << 10  # arrays of so many bytes go back to the system as soon as they are freed
SLACK_BYTES = 48 << 20  # page tables, and what is free between small arrays
METRICS, PICTURE = "metrics.jsonl", "loss.png"
BAR = 20

HELP = "fine-tune a model that would not fit: adapters over the base as it is stored"
EXAMPLES = (
    "barefoot tune smollm2 chats.jsonl --memory 700MiB -o tuned",
    'barefoot tune smollm2 book.txt --adapter "lora(rank=8)" --length 256 --steps 200 -o tuned',
    'barefoot tune smollm2 chats.jsonl --prune "taylor(ratio=0.35)" --memory 500MiB -o tuned',
    "barefoot tune smollm2 chats.jsonl --memory 1GiB -o tuned --plan",
    "barefoot tune two-bits/ book.txt --teacher smollm2 -o repaired",
    "barefoot run smollm2 --adapter tuned",
)
JSON_KEYS = {
    "model": "what was tuned",
    "output": "the folder of the adapter",
    "plan": "base, adapter, pruning, parameters of what is trained beside, optimizer, loss, activations, "
    "micro_batch_tokens, needed_bytes, by_phase, seconds_per_step, footprint",
    "alternatives": "the same of the other combinations, without their footprints",
    "budget_bytes": "what was allowed",
    "steps": "of the optimizer",
    "skipped": "those of them that were not finite, and changed nothing",
    "loss": "nats a predicted token, of the last step; with a teacher its loss, the divergence and a share of them; "
    "null for a plan alone",
    "held_out": "nats a predicted token of what wasn't trained on, at the end; null without any",
    "best": "the lowest held-out loss, whose adapter is in the folder",
    "tokens_per_s": "trained tokens a second",
    "predicted_peak_bytes": "of the process",
    "measured_peak_bytes": "its high-water mark",
    "seconds": "of this process's training",
}


def configure(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    parser.add_argument("data", metavar="DATA", help="JSONL of chats, completions or texts; or a plain text file")
    parser.add_argument(
        "--teacher", metavar="MODEL", help="a model of the same words to imitate, as the one that MODEL was made from"
    )
    parser.add_argument(
        "-o", "--output", metavar="DIR", required=True, help="the adapter's folder; one that was begun goes on"
    )
    parser.add_argument(
        "--memory", metavar="SIZE", type=parse_bytes, help="bytes that may be used; default what is available"
    )
    parser.add_argument("--plan", action="store_true", help="only say what it would take, and what else it could be")
    job = parser.add_argument_group("the job")
    job.add_argument(
        "--length",
        metavar="N",
        type=parse_count,
        default=LENGTH,
        help=f"tokens of a document, at most; default {LENGTH}",
    )
    job.add_argument(
        "--batch", metavar="N", type=int, default=BATCH, help=f"documents of that length in a step; default {BATCH}"
    )
    size = job.add_mutually_exclusive_group()
    size.add_argument("--steps", metavar="N", type=parse_count, help="of the optimizer")
    size.add_argument(
        "--epochs", metavar="X", type=float, default=EPOCHS, help=f"times through the data; default {EPOCHS:g}"
    )
    job.add_argument("--held-out", metavar="FILE", help="data to evaluate on; default a twentieth of DATA")
    job.add_argument("--train-on", choices=("answers", "all"), default="answers", help="which tokens are predicted")
    job.add_argument("--rate", metavar="X", type=float, default=RATE, help=f"learning rate; default {RATE:g}")
    job.add_argument("--schedule", choices=("cosine", "linear", "constant"), default="cosine")
    job.add_argument(
        "--clip", metavar="X", type=float, default=1.0, help="largest norm of the gradients; 0 for any; default 1"
    )
    job.add_argument("--seed", metavar="N", type=int, default=0)
    job.add_argument("--evaluate-every", metavar="N", type=int, help="steps; default a tenth of all")
    job.add_argument("--tensorboard", action="store_true", help="write what is measured for TensorBoard too, into DIR")
    job.add_argument("--save-every", metavar="N", type=int, default=50, help="steps between states on disk; default 50")
    stated = parser.add_argument_group("decided already (what is left out, the planner chooses)")
    stated.add_argument("--adapter", metavar="SPEC", default="lora", help='as in "lora(rank=8)"; default lora')
    stated.add_argument("--weights", metavar="SPEC", help="format of the base, as in nf4; default as it is stored")
    stated.add_argument(
        "--prune",
        metavar="SPEC",
        help='train beside a copy without so many units, as in "taylor(ratio=0.5)", "drawn(ratio=0.5)", or a folder '
        "that was tuned so; default the whole base",
    )
    stated.add_argument("--loss", metavar="SPEC", help='"plain" or "cce"; "lrec" with a teacher')
    stated.add_argument("--optimizer", metavar="SPEC", help='"adamw", or "paged(resident=4)": 4 MiB of it in memory')
    stated.add_argument("--activations", choices=("keep", "recompute"), help="what a pass keeps for its backward")
    stated.add_argument("--micro-batch", metavar="N", type=parse_count, help="tokens that pass at once")
    stated.add_argument("--compute", choices=("float32", "bfloat16"), default="float32", help="type of products")
    stated.add_argument("--threads", metavar="N", type=int, help="compute threads; default all")


def execute(args: argparse.Namespace) -> int:
    from barefoot.core.device import this_machine
    from barefoot.core.measure import return_freed_memory
    from barefoot.engine.specs import model_spec
    from barefoot.io.inventory import Checkpoint
    from barefoot.plan.tuning import Question, TuneJob

    return_freed_memory(AT_ONCE)
    output = Path(args.output)
    with Checkpoint(models.fetch(args.model)) as checkpoint, teachers.opened(args.teacher) as teacher:
        spec = model_spec(checkpoint)
        length = min(args.length, spec.context_length)
        job = TuneJob(length, args.batch * length)
        device = this_machine()
        budget, source = arguments.budget(args, device)
        allowed = budget.bytes["host"]
        # Read before PyTorch is there, in a small process.
        data = None if args.plan else TuningData(args, checkpoint, length, teacher)
        held_out = HELD_OUT_TOKENS if data is None else data.n_held_out(job.step_tokens)
        lesson = teachers.lesson(spec, teacher, job.step_tokens, held_out)
        stated = _stated(args, checkpoint, spec, lesson)
        question = Question(spec, job, _adapter(args.adapter), stated, device, _reserved(args))
        plan, others = question.choose(allowed)
        if data is None:
            return _finish(args, _record(args, plan, others, allowed))
        console.print_note(_summary(plan, allowed, source, data))
        result = _train(args, checkpoint, spec, plan, data, output, teacher)
        return _finish(args, {**_record(args, plan, others, allowed), **result})


def _technique(text: str, family: str) -> Any:
    from barefoot.core.registry import techniques
    from barefoot.core.spec import parse_composition

    (found,) = parse_composition(text, techniques(family), family)
    return found


def _adapter(text: str) -> Adapter:
    return cast("Adapter", _technique(text, "adapters"))


def _pruning(text: str, checkpoint: Checkpoint, spec: ModelSpec) -> Pruning:
    """Of a folder, or by a spec string."""
    from barefoot.adapters.pruning.files import NAME, read_units
    from barefoot.core.errors import InvalidInput
    from barefoot.engine.source import source_key

    if (Path(text) / NAME).is_file():
        return read_units(Path(text), spec, source_key(checkpoint))
    found = cast("Pruning", _technique(text, "adapters.pruning"))
    if not found.layers(spec):
        raise InvalidInput(
            f"{found} cuts nothing: {spec.name} has {spec.n_layers} layers, of which the first {found.first} and the "
            f"last {found.last} stay whole",
            cure=f'as in --prune "{found.name}(ratio={found.ratio},first=1,last=1)"',
        )
    return found


def _stated(args: argparse.Namespace, checkpoint: Checkpoint, spec: ModelSpec, lesson: Lesson | None) -> TuneStated:
    from barefoot.plan.job import parse_weights
    from barefoot.plan.tuning import TuneStated

    loss = None if args.loss is None else _technique(args.loss, "train.losses")
    optimizer = None if args.optimizer is None else _technique(args.optimizer, "optim")
    formats = None if args.weights is None else parse_weights(args.weights)
    pruning = None if args.prune is None else _pruning(args.prune, checkpoint, spec)
    return TuneStated(formats, args.activations, loss, args.micro_batch, args.compute, pruning, optimizer, lesson)


def _reserved(args: argparse.Namespace) -> int:
    """Bytes of this process when PyTorch has done once what a step does, on little."""
    import importlib.util

    from barefoot import ops
    from barefoot.core.measure import release_free_memory
    from barefoot.plan.reserved import reserved_now
    from barefoot.plan.tuning import RESERVED_BYTES
    from barefoot.train.metrics import require_tensorboard
    from barefoot.weights.training import require_torch

    if args.plan and importlib.util.find_spec("torch") is None:
        return RESERVED_BYTES + SLACK_BYTES
    require_torch("a model")
    from barefoot.train.driver.warm_up import warm_up

    if args.tensorboard:
        require_tensorboard()
    n_threads = args.threads or ops.n_threads()
    warm_up(n_threads)
    release_free_memory()
    now = reserved_now()
    return (RESERVED_BYTES if now is None else now.bytes) + SLACK_BYTES


def _train(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    plan: TunePlan,
    data: TuningData,
    output: Path,
    teacher: Checkpoint | None,
) -> dict[str, Any]:
    import hashlib

    from barefoot.core.measure import peak_resident
    from barefoot.engine.source import source_key
    from barefoot.train.driver.cutting import fingerprint, kept_units
    from barefoot.train.driver.learner import learner
    from barefoot.train.driver.loop import Settings, Trainer
    from barefoot.train.driver.teacher import Lessons, Teacher
    from barefoot.train.metrics import Metrics, read, tensorboard
    from barefoot.train.schedule import Schedule

    tuning = plan.tuning
    per_step = max(1, round(args.batch * tuning.length / tuning.n_tokens))
    data.begin(tuning.n_tokens, per_step)
    steps = args.steps or data.n_steps(args.epochs)
    schedule = Schedule(args.schedule, WARM_UP)
    output.mkdir(parents=True, exist_ok=True)
    data.keep(output)
    kept = kept_units(checkpoint, spec, tuning, args.seed, output, data.first)
    facts = (
        source_key(checkpoint), data.documents.fingerprint(), str(tuning.adapter), plan.base, fingerprint(kept),
        tuning.compute, tuning.length, tuning.n_tokens, per_step, steps, args.rate, str(schedule), args.clip, args.seed,
        args.held_out, None if teacher is None else (source_key(teacher), str(tuning.loss)),
    )  # fmt: skip
    identity = hashlib.sha256(repr(facts).encode()).hexdigest()
    settings = Settings(
        steps,
        lambda step: args.rate * schedule.share(step, steps),
        clip=args.clip,
        evaluate_every=args.evaluate_every or max(1, steps // 10),
        save_every=args.save_every,
        seed=args.seed,
    )
    decoder = learner(checkpoint, spec, tuning, args.seed, kept)

    def write() -> None:
        decoder.write(output, args.model)

    trainer = Trainer(decoder, tuning.loss, settings, identity, output, optimizer=tuning.optimizer, keep_best=write)
    held_out = list(data.held_out(tuning.n_tokens))
    data.go_on(cast("dict[str, int] | None", trainer.progress.data))
    source: Data = data
    if tuning.lesson is not None and teacher is not None:
        parent = Teacher(teacher, tuning.lesson.spec, compute=tuning.compute)
        source, held_out = Lessons(data, parent), parent.taught(held_out)
    if trainer.progress.step:
        console.print_note(f"going on behind step {trainer.progress.step} of {steps}")
    started, n_tokens, last = time.perf_counter(), 0, None
    writer = tensorboard(output, trainer.progress.step) if args.tensorboard else None
    with Metrics(output / METRICS, trainer.progress.step, writer) as metrics, _shown(steps, plan) as show:
        for step in trainer.run(source, held_out):
            last, n_tokens = step, n_tokens + step.n_tokens
            held = {} if step.held_out is None else {"held_out_loss": step.held_out}
            metrics.write(
                step.step, loss=step.loss, rate=step.rate, norm=step.norm, tokens=step.n_tokens,
                seconds=step.seconds, **held,
            )  # fmt: skip
            show(step)
            if settings.save_every and step.step % settings.save_every == 0:
                metrics.sync()
    seconds = time.perf_counter() - started
    if not held_out:
        write()
    _draw(output, read(output / METRICS))
    progress = trainer.progress
    return {
        "steps": progress.step,
        "skipped": progress.skipped,
        "loss": None if last is None else last.loss,
        "held_out": None if last is None else last.held_out,
        "best": progress.best,
        "tokens_per_s": n_tokens / seconds if n_tokens else None,
        "measured_peak_bytes": peak_resident(),
        "seconds": seconds,
    }


@contextlib.contextmanager
def _shown(steps: int, plan: TunePlan) -> Iterator[Callable[[Step], None]]:
    """A line of how far it is, how well, how fast, and in how much of the predicted memory."""
    from barefoot.cli import progress
    from barefoot.core.measure import resident

    with progress.line() as report:

        def show(step: Step) -> None:
            now = resident()
            full = 0 if now is None else min(BAR, round(BAR * now.total / plan.needed))
            memory = f"[{'#' * full}{'.' * (BAR - full)}] {format_bytes(now.total if now else 0)}"
            speed = step.n_tokens / step.seconds
            report(step.step, steps, f"step {step.step}/{steps}  loss {step.loss:.4f}  {speed:.0f} tokens/s  {memory} ")

        yield show


def _draw(output: Path, lines: Iterator[dict[str, Any]]) -> None:
    """A picture of the losses where matplotlib is installed; drawn last, in the memory that training has left."""
    from barefoot.cli.picture import over_steps
    from barefoot.core.errors import BackendMissing

    with contextlib.suppress(BackendMissing):
        over_steps(str(output / PICTURE), output.name, lines)


def _record(args: argparse.Namespace, plan: TunePlan, others: list[TunePlan], budget: int) -> dict[str, Any]:
    brief = [{k: v for k, v in each.to_json().items() if k != "footprint"} for each in others]
    return {
        "model": args.model,
        "output": args.output,
        "plan": plan.to_json(),
        "alternatives": brief,
        "budget_bytes": budget,
        "predicted_peak_bytes": plan.needed,
    }


def _summary(plan: TunePlan, budget: int, source: str, data: TuningData) -> str:
    tuning, seen = plan.tuning, data.documents.statistics
    pruned = "" if tuning.pruning is None else f" without {tuning.pruning}, {plan.n_parameters:,} parameters"
    return (
        f"{seen.n_documents:,} documents, {seen.n_tokens:,} tokens, {seen.n_learned / seen.n_tokens:.0%} of them "
        f"learned; {seen.n_cut:,} cut, {seen.n_dropped:,} dropped\n"
        f"{tuning.adapter} over {plan.base}{pruned}, {tuning.optimizer}, {tuning.loss}, "
        f"activations {tuning.activations}, "
        f"{tuning.n_tokens:,} tokens at once\n"
        f"{format_bytes(plan.needed)} of {format_bytes(budget)} ({source}), most of it in the {plan.phase} pass"
    )


def _finish(args: argparse.Namespace, result: dict[str, Any]) -> int:
    ordered = {key: result.get(key) for key in JSON_KEYS}
    if args.json:
        console.write_json(ordered, args.json)
    if args.json != console.STDOUT:
        _show(args, ordered)
    return 0


def _show(args: argparse.Namespace, result: dict[str, Any]) -> None:
    plans = [result["plan"], *result["alternatives"]]
    if args.plan:
        listed = [
            (
                "→" if each is result["plan"] else "",
                each["base"],
                each["optimizer"],
                each["activations"],
                each["loss"],
                f"{each['micro_batch_tokens']:,}",
                format_bytes(each["needed_bytes"]),
                f"{each['seconds_per_step']:.1f} s",
            )
            for each in plans
        ]
        header = ("", "base", "optimizer", "activations", "loss", "tokens at once", "needs", "a step")
        print(console.table(listed, header=header, right=(5, 6, 7)))
        return
    from barefoot.adapters import Beside

    measured = result["measured_peak_bytes"]
    rows = [("steps", f"{result['steps']:,}")]
    if result["skipped"]:
        rows.append(("skipped", f"{result['skipped']:,} of them, whose gradients were not finite"))
    if result["loss"] is not None:
        rows.append(("loss", f"{result['loss']:.4f} nats a predicted token"))
    if result["best"] is not None:
        rows.append(("held out", f"{result['best']:.4f} at best"))
    if result["tokens_per_s"]:
        rows.append(("speed", f"{result['tokens_per_s']:.0f} tokens/s"))
    if measured:
        predicted = result["predicted_peak_bytes"]
        rows.append(("memory", f"{format_bytes(measured)} of {format_bytes(predicted)} predicted"))
    print(console.table(rows))
    if isinstance(_adapter(args.adapter), Beside):  # what the engine runs
        print(f"\nbarefoot run {args.model} --adapter {args.output}")
