"""What policies keep of a long context: quality by stored bytes, beside the full cache and cheap imitations.

    python -m benchmarks kv.policies MODEL NAME --text FILE [--length 1024] [--shares 0.1 0.2 0.4] [--arms ARM ...]

An arm is a composition with KEEP for the number of entries that it keeps, ``"h2o(keep=KEEP) > q8"``, or SHARE for the
share of the prompt that this is, ``"elastic(ratio=SHARE)"``. Every arm answers the same prompts
(:mod:`barefoot.evals.long_context`), one layer at a time as the engine runs them, and goes on token by token, so that
what sends entries away while it decodes does so. ``sinks`` keeps the first four positions and the last ones, ``random``
draws; both look at nothing. Bytes are those of the cache while it decodes, positions and scores included, without the
prompt's passing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from barefoot.core.model import ModelSpec
from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.evals.long_context.continuation import Halves, diverge, reference
from barefoot.evals.long_context.drivers import Driver, Floats, Take
from barefoot.evals.long_context.prompts import chat_form
from barefoot.evals.long_context.suite import Size, Suite, answers, by_task, suite
from barefoot.evals.texts import read_text
from barefoot.io.chat import find_chat_template
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.plan.job import parse_kv
from benchmarks.harness import card, claim, save

SPARE = 512  # positions behind a prompt
CHUNK, N_LOGITS = 128, 64
ARMS = ("h2o(keep=KEEP)", "snapkv(keep=KEEP)", "sinks(keep=KEEP)", "random(keep=KEEP)")
LAST = "sinks(keep=KEEP,first=0)"
#: (arm, what it must not be worse than)
GATES = (
    *((ours, other) for ours in ARMS[:2] for other in ARMS[2:]),
    ("d2o(keep=KEEP)", LAST),
    ("d2o(keep=KEEP,mass=bias)", "h2o(keep=KEEP)"),
    ("elastic(ratio=SHARE)", LAST),
    ("kvmerger(keep=KEEP,alike=-1.0,mass=bias)", "h2o(keep=KEEP)"),
    ("kvmerger(keep=KEEP,alike=-1.0,mass=bias)", "sinks(keep=KEEP)"),
)
PAPER = {
    "h2o": "a fifth of the prompt matches the full cache (OPT, LLaMA, GPT-NeoX; HELM, lm-eval)",
    "snapkv": "1,024 entries of up to 380K keep needles (LWM-Text-Chat-1M)",
}


class Branch:
    """Another sequence of an engine, as a driver of its own."""

    def __init__(self, engine: Engine, sequence: int) -> None:
        self.spec: ModelSpec = engine.spec
        self._engine, self._sequence = engine, sequence

    def reset(self) -> None:
        self._engine.reset(self._sequence)

    def prefill(self, ids: Sequence[int], *, all_logits: Take | None = None) -> Floats:
        return self._engine.prefill(ids, sequence=self._sequence, all_logits=all_logits)

    def decode(self, token: int) -> Floats:
        return self._engine.decode(token, self._sequence)

    def truncate(self, n: int) -> None:
        self._engine.truncate(n, self._sequence)


@contextmanager
def forked(driver: Driver, n_held: int) -> Iterator[Driver]:
    """The engine's second sequence, with what the first one holds."""
    assert isinstance(driver, Engine)
    assert driver.position == n_held
    driver.fork(0, 1)
    yield Branch(driver, 1)


def engine(checkpoint: Checkpoint, kv: str, n_tokens: int, n_threads: int, n_sequences: int) -> Engine:
    config = EngineConfig(
        context=n_tokens + SPARE,
        kv=parse_kv(kv),
        chunk=CHUNK,
        activations="float32",
        n_logits=N_LOGITS,
        n_threads=n_threads,
        n_sequences=n_sequences,
    )
    return Engine(checkpoint, model_spec(checkpoint), config)


def answered(checkpoint: Checkpoint, kv: str, made: Suite, n_threads: int) -> dict[str, Any]:
    """What one arm answers, in how many bytes a sequence."""
    started = time.process_time()
    with engine(checkpoint, kv, made.n_tokens, n_threads, 2) as run:
        n_bytes = run.footprint.select(kind="kv", phase="decode").bytes // 2
        return {"kv_bytes": n_bytes, "cells": answers(run, made, forked), "seconds": time.process_time() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name", help="of the record: policies_NAME")
    parser.add_argument("--text", default="topics")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with Checkpoint(args.model) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
        form = chat_form(find_chat_template(checkpoint), tokenizer)
        size = Size(n_needles=1, n_lists=1, n_shared=2, n_copies=1)
        made = suite(read_text(args.text), tokenizer, form, args.length, size=size)
        sizes = [(share, round(share * args.length)) for share in args.shares]
        arms = ["f16"]
        arms += [named(arm, *size) for size in sizes for arm in args.arms]
        config = {"text": Path(args.text).name, "length": args.length, "shares": args.shares, "arms": arms}
        card(f"policies on {args.name}", config)
        references: list[Halves] = []
        full, results = None, {}
        for kv in arms:
            found = answered(checkpoint, kv, made, args.threads)
            full = full or found["cells"]
            with engine(checkpoint, kv, made.n_tokens, args.threads, 1) as run:
                references = references or [reference(run, passage) for passage in made.passages]
                along = diverge(run, made.passages, references)
            tasks = by_task(found["cells"], full)
            results[kv] = {
                "kv_bytes": found["kv_bytes"],
                "cpu_seconds": found["seconds"],
                "tasks": {task: {where: asdict(r) for where, r in inside.items()} for task, inside in tasks.items()},
                "continuation": along,
            }
            shares = "  ".join(f"{t} {r['all'].exact:.2f}/{r['all'].tokens:.2f}" for t, r in tasks.items())
            rise = along["nll"] - along["reference_nll"]
            print(f"  {kv:28} {found['kv_bytes'] / 2**20:6.2f} MiB  {shares}  NLL +{rise:.4f}", flush=True)
            record = {"config": config, "paper": PAPER, "results": results, "claims": claims(results, sizes)}
            save(f"kv/policies_{args.name}", record)


def claims(results: dict[str, Any], sizes: Sequence[tuple[float, int]]) -> list[dict[str, Any]]:
    """What the papers' own gates are here, for the arms that are there."""
    rise = {arm: each["continuation"]["nll"] - each["continuation"]["reference_nll"] for arm, each in results.items()}
    found = []
    for size in sizes:
        for ours, other in GATES:
            own, their = named(ours, *size), named(other, *size)
            if own in rise and their in rise:
                found.append(claim(f"rise of NLL: {own} less {their}", rise[own] - rise[their], at_most=0.0))
    return found


def named(arm: str, share: float, keep: int) -> str:
    return arm.replace("KEEP", str(keep)).replace("SHARE", str(share))


if __name__ == "__main__":
    main()
