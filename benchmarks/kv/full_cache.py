"""What the full cache itself can do with a long context, in rows of 16, 8 and 4 bits: the yardstick of all policies.

    python -m benchmarks.kv.full_cache MODEL NAME --text FILE [--lengths 512 1024 2048] [--kv f16 q8 q4] [--threads 1]

Needles by depth, key-value lists by depth, facts in a shared context in turn and apart, copies of random words, and
divergence along real text: :mod:`barefoot.evals.long_context`. The first store is the reference of the others. None
of them evicts, so what is scored passes in chunks. Answers are taken with inputs rounded to 8 bits, as ``run`` computes
them; divergence with float32 inputs, since that rounding would move it more than a cache of 8 bits does.

Beside the tasks, on the first store: whether greedy decoding says the code of a needle when no opening is given to it,
for each wording that was tried.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from barefoot.engine.config import Activations, EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.evals.long_context.continuation import Halves, diverge, reference, reference_bytes
from barefoot.evals.long_context.drivers import going_back
from barefoot.evals.long_context.facts import Wording, needle
from barefoot.evals.long_context.prompts import Form, chat_form
from barefoot.evals.long_context.sessions import generate, in_turn
from barefoot.evals.long_context.suite import Cells, Suite, answers, by_task, suite
from barefoot.evals.texts import read_text
from barefoot.io.chat import find_chat_template
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import Tokenizer, load_tokenizer
from barefoot.plan.job import parse_kv
from benchmarks.harness import card, claim, save

SPARE = 512  # positions behind a prompt: continuations, copies, questions and answers in turn
CHUNK, N_LOGITS = 128, 64
FREE_TOKENS = 32
WORDINGS = {
    "access code": Wording(),
    "access code, 6 digits": Wording(n_digits=6),
    "magic number": Wording(
        fact="The special magic number of the {noun} is {code}.",
        question="What is the special magic number of the {noun}?",
        opening="The special magic number of the {noun} is ",
    ),
    "based on the text": replace(Wording(), question="Based on the text above, what is the access code of the {noun}?"),
}


def engine(checkpoint: Checkpoint, kv: str, n_tokens: int, n_threads: int, activations: Activations) -> Engine:
    config = EngineConfig(
        context=n_tokens + SPARE,
        kv=parse_kv(kv),
        chunk=CHUNK,
        activations=activations,
        n_logits=N_LOGITS,
        n_threads=n_threads,
    )
    return Engine(checkpoint, model_spec(checkpoint), config)


def at_length(checkpoint: Checkpoint, made: Suite, stores: list[str], n_threads: int) -> dict[str, Any]:
    """All stores on the same prompts; the first is the reference."""
    found: dict[str, Any] = {}
    full: Cells | None = None
    references: list[Halves] = []
    for kv in stores:
        started = time.process_time()
        with engine(checkpoint, kv, made.n_tokens, n_threads, "int8") as run:
            n_bytes = run.footprint.select(kind="kv", phase="decode").bytes
            mine = answers(run, made, going_back, stepwise=False)
        full = full or mine
        with engine(checkpoint, kv, made.n_tokens, n_threads, "float32") as run:
            references = references or [reference(run, passage, stepwise=False) for passage in made.passages]
            along = diverge(run, made.passages, references, stepwise=False)
        tasks = by_task(mine, full)
        found[kv] = {
            "kv_bytes": n_bytes,
            "cpu_seconds": time.process_time() - started,
            "tasks": {task: {where: asdict(r) for where, r in inside.items()} for task, inside in tasks.items()},
            "continuation": along,
        }
        print(f"  {made.n_tokens} {kv}: {short(found[kv])}", flush=True)
    return found


def short(result: dict[str, Any]) -> str:
    shares = (f"{task} {r['all']['exact']:.2f}/{r['all']['tokens']:.2f}" for task, r in result["tasks"].items())
    return f"{'  '.join(shares)}  KL {result['continuation']['kl_mean']:.2e}  {result['cpu_seconds']:.0f} s"


def wordings(run: Engine, text: str, tokenizer: Tokenizer, form: Form, n_tokens: int, n: int) -> dict[str, Any]:
    """For each wording: needles at ``n`` depths that are answered after an opening, and said freely."""
    found = {}
    stops = frozenset(tokenizer.eos_ids)
    for name, wording in WORDINGS.items():
        made = [needle(text, tokenizer, form, n_tokens, (i + 0.5) / n, 9000 + i, wording) for i in range(n)]
        opened = [in_turn(run, each)[0] for each in made]
        said = [tokenizer.decode(generate(run, each, FREE_TOKENS, stops)) for each in made]
        codes = [tokenizer.decode(each.turns[0].answer) for each in made]
        found[name] = {
            "n": n,
            "opened": sum(answer.exact for answer in opened) / n,
            "said": sum(code in text for code, text in zip(codes, said, strict=True)) / n,
            "log_probability": sum(answer.log_probability for answer in opened) / n,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("name", help="of the record: full_cache_NAME")
    parser.add_argument("--text", default="topics")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--kv", nargs="+", default=["f16", "q8", "q4"])
    parser.add_argument("--wordings-at", type=int, default=1536, help="tokens of the needles of other wordings")
    parser.add_argument("--wordings", type=int, default=4, help="needles of each wording")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    text = read_text(args.text)
    with Checkpoint(args.model) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
        form = chat_form(find_chat_template(checkpoint), tokenizer)
        suites = [suite(text, tokenizer, form, n_tokens) for n_tokens in args.lengths]
        n_vocab, n_scored = tokenizer.n_vocab, sum(p.n_scored for p in suites[0].passages)
        facts = {
            "model": Path(args.model).name,
            "text": Path(args.text).name,
            "prompts of at most": f"{args.lengths} tokens",
            "stores": " ".join(args.kv),
            "chat template": form.templated,
            "needles, lists, shared, copies": [
                len(s) for s in (suites[0].needles, suites[0].lists, suites[0].shared, suites[0].copies)
            ],
            "tokens scored along text": n_scored,
            "bytes of their references": reference_bytes(n_scored, n_vocab),
        }
        card("full caches on long contexts", facts)
        results = {str(made.n_tokens): at_length(checkpoint, made, args.kv, args.threads) for made in suites}
        with engine(checkpoint, args.kv[0], args.wordings_at, args.threads, "int8") as run:
            tried = wordings(run, text, tokenizer, form, args.wordings_at, args.wordings)
    tasks = [results[str(n)][args.kv[0]]["tasks"] for n in args.lengths]
    claims = [
        claim(
            f"{task}: share that the full cache answers, at its worst length",
            min(each[task]["all"]["tokens" if task == "copy" else "exact"] for each in tasks),
            at_least=0.5,
        )
        for task in tasks[0]
    ]
    config = {"lengths": args.lengths, "kv": args.kv, "wordings_at": args.wordings_at, "threads": args.threads}
    record = {"config": config, "card": facts, "results": results, "wordings": tried, "claims": claims}
    save(f"kv/full_cache_{args.name}", record)


if __name__ == "__main__":
    main()
