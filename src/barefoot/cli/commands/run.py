"""``barefoot run``: an answer, a chat, or the answers to a file of prompts, inside a memory budget."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import select
import stat
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from barefoot.cli import arguments, batch, chat, console, models, progress
from barefoot.cli.outcome import Outcome
from barefoot.core.units import format_bytes

if TYPE_CHECKING:
    from barefoot.cli.conversation import Answer, Conversation
    from barefoot.core.ledger import Footprint, Kind
    from barefoot.core.model import ModelSpec
    from barefoot.engine.runner import Engine
    from barefoot.engine.sampling import SamplingParams
    from barefoot.io.inventory import Checkpoint
    from barefoot.plan.job import RunJob
    from barefoot.plan.reserved import Reserved
    from barefoot.plan.result import Plan

EXIT_INTERRUPTED = 130

DEFAULT_PROMPT = "In one sentence, why is the sky blue?"

HELP = "answer a prompt, chat, or answer a file of prompts, inside a memory budget"
EXAMPLES = (
    'barefoot run smollm2 "What is the capital of France?" --memory 128MiB --context 1024 --report',
    "barefoot run smollm2 --memory 256MiB",
    'cat CHANGELOG.md | barefoot run smollm2 "Summarize this:" --memory 256MiB',
    "barefoot run smollm2 --memory 128MiB --context 1024 --max-tokens 64 --json result.json",
    "barefoot run smollm2 --prompts questions.txt --batch 8 --memory 256MiB --context 512",
    "barefoot run smollm2 --plan plan.toml",
    'barefoot run smollm2 "What is the capital of France?" --adapter tuned/',
)
JSON_KEYS = {
    "text": "the answer (of a chat: the last one; of many prompts: null, see answers)",
    "finish_reason": "stop: the model or a stop string ended it; length: --max-tokens did; context; interrupted",
    "prompt_tokens": "tokens in the context when the answer began; of many prompts, their sum",
    "decode_tokens": "tokens of the answer; of many prompts, the sum",
    "answers": "index, text, finish_reason, prompt_tokens and decode_tokens of each answer",
    "budget_bytes": "what was allowed",
    "predicted_peak_bytes": "what the ledger adds up to in its largest phase",
    "measured_peak_bytes": "the operating system's high-water mark of the process; null where it keeps none",
    "reserved_bytes": "the process's own bytes before the job allocated anything, measured",
    "unaccounted_bytes": "measured minus predicted peak",
    "by_kind": "kind → predicted bytes in the largest phase, and those that were handed out",
    "phases": "phase → predicted bytes",
    "terms": "every entry of the ledger with its terms [name, count, bytes each]",
    "load_seconds": "reading the weights into place",
    "first_token_seconds": "from the start of the process's work to the first token, loading included",
    "prefill_tokens_per_second": "of the prompt, or of all prompts",
    "decode_tokens_per_second": "of the answer's tokens after the first; of many prompts, of all answers together",
    "predicted_prefill_tokens_per_second": "by the plan",
    "predicted_decode_tokens_per_second": "by the plan",
    "turns": "number of answers; more than one only in a chat, or of many prompts",
    "plan": "the plan, as `plan --json` writes it",
    "machine": "processor, cores, kernels",
    "versions": "of barefoot, Python and numpy",
}


def configure(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        type=arguments.text,
        help="what to answer; a chat without it. What is piped in follows it, or takes its place. With neither: "
        f'"{DEFAULT_PROMPT}"',
    )
    arguments.add_job(parser)
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="answer every line of FILE (-, or with --batch nothing: of what is piped in), --batch of them at once. A "
        'line is a prompt, or in a JSONL file an object with "prompt" or "messages". Answers are written in the order '
        f"in which they end, a line of JSON each: {', '.join(batch.LINE_KEYS)}",
    )
    parser.add_argument("--plan", metavar="FILE", help="run a plan that `plan --save` kept")
    text = parser.add_argument_group("the text")
    text.add_argument("--system", metavar="TEXT", type=arguments.text, help="how the model is to behave")
    text.add_argument("--raw", action="store_true", help="continue PROMPT as it is, without the model's chat format")
    text.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 takes the likeliest token; default 0"
    )
    text.add_argument(
        "--top-k", metavar="N", type=int, default=0, help="sample among the N likeliest; 0: all (default)"
    )
    text.add_argument("--top-p", metavar="P", type=float, default=1.0, help="among the likeliest that sum up to P")
    text.add_argument(
        "--min-p", metavar="P", type=float, default=0.0, help="among those at least P times the likeliest"
    )
    text.add_argument(
        "--repeat-penalty", metavar="X", type=float, default=1.0, help="divide the odds of recent tokens; default 1"
    )
    text.add_argument("--seed", metavar="N", type=int, default=0, help="of sampling; default 0")
    text.add_argument(
        "--stop",
        metavar="TEXT",
        type=arguments.text,
        action="append",
        default=[],
        help="end the answer here; may be repeated",
    )
    parser.add_argument(
        "--report", action="store_true", help="print the ledger: predicted, measured, unaccounted, by kind"
    )


def execute(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    sampling = _sampling(args)
    if args.plan:
        _take_saved_plan(args)
    conversations = batch.read(args, _piped) if batch.is_asked(args) else None
    prompt = _prompt(args) if conversations is None else None
    is_chat = conversations is None and prompt is None
    path = models.fetch(args.model)
    _prepare(is_chat)
    from barefoot.cli.budgets import Budgets
    from barefoot.cli.conversation import Conversation, encode, opening
    from barefoot.core.measure import release_free_memory
    from barefoot.engine.generate import Limits
    from barefoot.engine.specs import model_spec
    from barefoot.io.chat import find_chat_template
    from barefoot.io.inventory import Checkpoint
    from barefoot.io.tokenizer import load_tokenizer

    shown, keeps_texts = args.json != console.STDOUT, args.json is not None
    with Checkpoint(path) as checkpoint:
        spec = model_spec(checkpoint)
        job = arguments.job(args, spec)
        extra = sampling.footprint(spec.vocab_size)
        if conversations is not None:
            job = dataclasses.replace(job, batch=min(job.batch, len(conversations)))
            extra += batch.footprint(conversations, job, keeps_texts=keeps_texts)
            n_text_bytes = max(batch.text_bytes(conversations))
        else:
            n_text_bytes = 4 * job.context if prompt is None else len(prompt.encode())
        extra += models.tokenizer_footprint(checkpoint, n_text_bytes, is_chat=is_chat)
        plan, reserved = _plan(args, spec, job, extra)
        tokenizer = load_tokenizer(checkpoint)
        template = find_chat_template(checkpoint)
        if args.raw or template is None or not template.from_model:
            if not args.raw:
                console.print_note(f"{args.model} brings no chat format: it continues the text as a base model does")
            template = None
        ids, all_ids = None, None
        if conversations is not None:  # prompts that are too long are refused before weights are loaded
            all_ids = batch.encode_all(conversations, tokenizer, template, args.system, job.context)
        elif prompt is not None:
            ids = encode(tokenizer, template, [*opening(args.system), {"role": "user", "content": prompt}], job.context)
        release_free_memory()
        begun = time.perf_counter()
        with _load(checkpoint, spec, plan) as engine:
            loaded = time.perf_counter()
            budgets = Budgets(engine, spec, plan)
            if all_ids is not None:
                limits = Limits(job.max_tokens, sampling, args.stop, tokenizer.eos_ids)
                with progress.line() as report:
                    answers = batch.answer_all(
                        engine, all_ids, tokenizer, limits, _writer(shown), report, keeps_texts=keeps_texts
                    )
            else:
                conversation = Conversation(
                    engine,
                    tokenizer,
                    template,
                    sampling,
                    system=args.system,
                    stops=args.stop,
                    max_tokens=job.max_tokens,
                )
                ask = functools.partial(_ask, conversation, write=_writer(shown))
                if prompt is not None:
                    answers = [ask(prompt, ids=ids)]
                else:
                    answers = chat.chat(conversation, ask, budgets.allow if spec.stack else None)
            plan, used = budgets.largest
            handed_out: dict[Kind, int] = {**used, "reserved": reserved.bytes}
            handed_out["workspace"] = handed_out.get("workspace", 0) + tokenizer.resident_bytes()
    is_batch = all_ids is not None
    outcome = Outcome(plan, reserved, handed_out, answers, loaded - begun, begun - started, is_batch=is_batch)
    _tell(args, outcome)
    return EXIT_INTERRUPTED if _was_interrupted(answers, all_ids, is_chat=is_chat) else 0


def _was_interrupted(answers: list[Answer], prompts: Sequence[object] | None, *, is_chat: bool) -> bool:
    """Whether Ctrl-C ended the work; a chat goes on after it."""
    if prompts is not None:
        return len(answers) < len(prompts)
    return bool(answers) and answers[-1].finish_reason == "interrupted" and not is_chat


def _take_saved_plan(args: argparse.Namespace) -> None:
    """Let the saved plan state whatever the command line leaves open."""
    from barefoot.core.errors import InvalidInput
    from barefoot.ops.dispatch import format_layouts
    from barefoot.plan.job import format_weights
    from barefoot.plan.result import plan_from_toml

    plan = plan_from_toml(Path(args.plan).read_text(encoding="utf-8"))
    if plan.device != arguments.THIS_MACHINE:
        raise InvalidInput(f"{args.plan} was made for {plan.device}", cure="plan for this machine: leave --device out")
    if plan.model != args.model:
        raise InvalidInput(
            f"{args.plan} was made for {plan.model}, not for {args.model}", cure=f"barefoot run {plan.model} --plan …"
        )
    config = plan.config
    saved = {
        "memory": plan.budget["host"],
        "context": plan.job.context,
        "max_tokens": plan.job.max_tokens,
        "batch": plan.job.batch,
        "adapter": plan.job.adapter.path if plan.job.adapter is not None else None,
        "weights": format_weights(config.weights),
        "kv": str(config.kv),
        "chunk": config.chunk,
        "stream_layers": config.n_streamed_layers,
        "stream_head": config.stream_head,
        "stacked": config.n_stacked,
        "threads": config.n_threads,
        "activations": config.activations,
        "layouts": format_layouts(config.layouts),
    }
    for name, value in saved.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def _prompt(args: argparse.Namespace) -> str | None:
    """What to answer; None for a chat."""
    piped = _piped().strip()
    if args.prompt is not None:
        return f"{args.prompt}\n\n{piped}" if piped else str(args.prompt)
    if piped:
        return piped
    return None if sys.stdin is not None and sys.stdin.isatty() else DEFAULT_PROMPT


def _piped() -> str:
    """What comes through a pipe or from a file; nothing from a terminal or /dev/null."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # there is no standard input
        return ""
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return ""
    if os.name == "posix" and not select.select([sys.stdin], [], [], 1.0)[0]:
        console.print_note("reading standard input until its end …")
    return sys.stdin.read()


def _prepare(is_chat: bool) -> None:
    """Bring the process to where what is measured as reserved is all of it."""
    from barefoot.plan.warm import warm_up

    warm_up()
    if is_chat:
        chat.prepare()


def _plan(args: argparse.Namespace, spec: ModelSpec, job: RunJob, extra: Footprint) -> tuple[Plan, Reserved]:
    from barefoot.core.device import this_machine
    from barefoot.plan.compositions import drops, what_goes
    from barefoot.plan.planner import LOSSLESS, plan
    from barefoot.plan.quality import kv_loss
    from barefoot.plan.reserved import reserved_expected, reserved_now

    device = this_machine()
    reserved = reserved_now() or reserved_expected()
    budget, said_by = arguments.budget(args, device)
    if args.memory is None:
        console.print_note(f"budget: {format_bytes(budget.bytes['host'])}, {said_by}")
    stated = arguments.stated(args)
    found = plan(spec, job, budget, device, stated, reserved=reserved, extra=extra, model=args.model)
    kv = found.config.kv
    if stated.kv is None and kv_loss(spec, kv, job.context).kl > LOSSLESS:
        console.print_note(f"for want of memory, keys and values are kept as {kv}: {found.quality.sources['kv']}")
        if drops(kv):
            console.print_note(what_goes(kv, job.context))
    return found, reserved


def _load(checkpoint: Checkpoint, spec: ModelSpec, plan: Plan) -> Engine:
    from barefoot.engine.runner import Engine

    with progress.line() as report:
        return Engine(checkpoint, spec, plan.config, progress=lambda done, total: report(done, total, "loading"))


def _sampling(args: argparse.Namespace) -> SamplingParams:
    from barefoot.engine.sampling import SamplingParams

    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repeat_penalty,
        seed=args.seed,
    )


def _writer(shown: bool) -> Callable[[str], None]:
    """What puts text on standard output at once, if it is to be shown there."""

    def write(text: str) -> None:
        if shown:
            sys.stdout.write(text)
            sys.stdout.flush()

    return write


def _ask(
    conversation: Conversation, prompt: str, *, write: Callable[[str], None], ids: list[int] | None = None
) -> Answer:
    """One answer, streamed to standard output."""
    with progress.line() as report:
        answer = conversation.ask(prompt, write, report, ids=ids)
    write("\n")
    return answer


def _tell(args: argparse.Namespace, outcome: Outcome) -> None:
    """The ledger on standard error, the record where --json says."""
    if args.report:
        console.print_note("\n" + outcome.report())
    console.print_note(console.dim(outcome.summary(), sys.stderr))
    if args.json:
        console.write_json(outcome.to_json(), args.json)
