"""SnapKV on needles: what still answers behind a compressed prompt, and the attention to a fact that is kept.

    python -m benchmarks kv.snapkv MODEL NAME --text FILE [--prompts 60] [--length 1024] [--keep 256] [--window 32]

Each prompt is real text with one fact in its first 60 %, the question last. It passes once for each arm, since the
engine compresses layer by layer while it passes; attention in the pass is that of all tokens, so every arm chooses from
the same. Behind it come the answer's opening and the right answer, of which no arm sends anything away before all of it
is foreseen. Slots for these belong to SnapKV's bytes, so the other arms keep as many entries of the prompt more: all
have the same bytes, h2o 4 more an entry.

Mass: of what a query gives to a fact's tokens under the full cache, the part that goes to those that are kept; the mean
over prompts, layers and query heads that give them more than 5 %. The query is the question's last one, or the one that
foresees the code's first digit, behind the opening.

Weights are stored in 8 bits and inputs rounded, as ``run`` computes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.evals.divergence import nll
from barefoot.evals.long_context.facts import needle
from barefoot.evals.long_context.prompts import chat_form
from barefoot.evals.long_context.reach import reach
from barefoot.evals.long_context.sessions import Answer, Session, Turn
from barefoot.evals.texts import read_text
from barefoot.io.chat import find_chat_template
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.kv.policies import I32
from barefoot.kv.slots import Slots
from barefoot.plan.job import parse_kv, parse_weights
from benchmarks.harness import card, claim, save
from benchmarks.kv.captured import F32, F64, Attended, capturing

ROOM = 16  # for the opening and the answer
DEEPEST = 0.6
LOOKS = 0.05  # of a head's mass, from which on it looks at a fact
OURS, NO_POOLING = "snapkv(keep=KEEP,window=WINDOW,room=ROOM)", "snapkv(keep=KEEP,window=WINDOW,room=ROOM,kernel=1)"
SINKS = "sinks(keep=MORE)"
ARMS = (
    OURS, NO_POOLING, "snapkv(keep=KEEP,window=WINDOW,room=ROOM,kernel=13)", SINKS, "random(keep=MORE)",
    "h2o(keep=MORE)",
)  # fmt: skip
QUERIES = ("the question's last", "the one before the code")
PAPER = (
    "1,024 entries of up to 380K keep needles (LWM-Text-Chat-1M); 8.2 times smaller caches at 16K, LongBench on a par"
)


def opened(checkpoint: Checkpoint, kv: str, context: int, n_threads: int) -> Engine:
    config = EngineConfig(
        context=context,
        kv=parse_kv(kv),
        weights=parse_weights("int(bits=8)"),
        chunk=128,
        n_logits=64,
        n_threads=n_threads,
    )
    return Engine(checkpoint, model_spec(checkpoint), config)


def slots(engine: Engine) -> Slots:
    """The first sequence's entries, of the layers that a policy rules."""
    assert engine._by_layer is not None
    storage = engine._by_layer.caches[0].storage
    assert isinstance(storage, Slots)
    return storage


def kv_bytes(engine: Engine) -> dict[str, int]:
    """Of the cache: what its terms state, what its arrays hold, and rows of windows, which are part of both."""
    terms = engine.config.kv.terms(engine.spec, engine.config.context, engine.config.chunk)
    entries = sum(array.nbytes for region in slots(engine).regions for array in region.by_entry.values())
    windows = sum(array.nbytes for pair in engine.kv.arrays.values() for array in pair)
    return {"predicted": sum(term.bytes for term in terms), "held": entries + windows, "windows": windows}


def foreseen(engine: Engine, turn: Turn) -> Answer:
    """The answer behind the prompt that has passed."""
    rows: list[F32] = []
    fed = [*turn.opening, *turn.answer[:-1]]
    assert len(fed) < ROOM
    engine.prefill(fed, all_logits=lambda _, logits: rows.append(logits.copy()))
    targets = np.asarray(turn.answer, np.int64)
    logits = np.concatenate(rows)[-len(targets) :]
    return Answer(tuple(nll(logits, targets).tolist()), tuple((logits.argmax(-1) == targets).tolist()))


def fact_of(session: Session) -> range:
    """Where in the prompt the fact stands, which the opening and the answer repeat. How its first token is written
    depends on what comes before it."""
    (turn,), prompt = session.turns, session.prompt
    said = (turn.opening + turn.answer)[1:]
    (start,) = (i for i in range(len(prompt)) if prompt[i : i + len(said)] == said)
    return range(start - 1, start + len(said))


def looked(layers: Sequence[Attended], session: Session) -> F64:
    """Shares that each of ``QUERIES`` gives to the fact's tokens, (queries, layers, n_heads, tokens)."""
    last, fact = len(session.prompt) - 1, fact_of(session)
    rows = [0, len(session.turns[0].opening)]
    found = [
        [layer.shares(head, last)[rows, fact.start : fact.stop] for head in range(len(layer.q))] for layer in layers
    ]
    return np.array(found).transpose(2, 0, 1, 3)


def recovered(shares: F64, kept: Sequence[I32], fact: range) -> list[list[float]]:
    """For each query, of each head that looks at the fact: the part of its mass that goes to what is kept."""
    there = np.array([[np.isin(fact, own) for own in layer] for layer in kept])
    there = there.repeat(shares.shape[2] // there.shape[1], axis=1)
    mass = shares.sum(axis=-1)
    part = (shares * there).sum(axis=-1) / mass
    return [part[i][mass[i] > LOOKS].tolist() for i in range(len(QUERIES))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name", help="of the record: snapkv_NAME")
    parser.add_argument("--text", default="topics")
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--keep", type=int, default=256)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    config = {**vars(args), "model": Path(args.model).name, "text": Path(args.text).name, "room": ROOM}
    card(f"needles under SnapKV on {args.name}", config)
    context = args.length + ROOM
    knobs = {"KEEP": args.keep, "WINDOW": args.window, "ROOM": ROOM, "MORE": args.keep + ROOM - 1}
    results: dict[str, Any] = {}
    with Checkpoint(args.model) as checkpoint:
        tokenizer, text = load_tokenizer(checkpoint), read_text(args.text)
        form = chat_form(find_chat_template(checkpoint), tokenizer)
        depths = [(i + 0.5) / args.prompts * DEEPEST for i in range(args.prompts)]
        sessions = [needle(text, tokenizer, form, args.length, depth, i) for i, depth in enumerate(depths)]
        spec = model_spec(checkpoint)
        full: list[Answer] = []
        shares: list[F64] = []
        with opened(checkpoint, f"sinks(keep={context})", context, args.threads) as run:  # keeps everything
            results["full"] = {"kv_bytes": kv_bytes(run)}
            for session in sessions:
                run.reset()
                with capturing(run) as layers:
                    run.prefill(session.prompt)
                    full.append(foreseen(run, session.turns[0]))
                shares.append(looked(layers, session))
        results["full"]["needles"] = asdict(reach(full, full))
        print(f"  full: {reach(full, full).exact:.2f} of {len(full)}", flush=True)
        exact: dict[str, F64] = {}
        for arm in ARMS:
            kv = arm
            for knob, value in knobs.items():
                kv = kv.replace(knob, str(value))
            answers: list[Answer] = []
            parts: list[list[float]] = [[] for _ in QUERIES]
            with opened(checkpoint, kv, context, args.threads) as run:
                n_bytes = kv_bytes(run)
                for session, share in zip(sessions, shares, strict=True):
                    run.reset()
                    run.prefill(session.prompt)
                    kept = [slots(run).position(layer).copy() for layer in range(share.shape[1])]
                    for part, some in zip(parts, recovered(share, kept, fact_of(session)), strict=True):
                        part += some
                    answers.append(foreseen(run, session.turns[0]))
            found = reach(answers, full)
            exact[arm] = np.array([a.exact for a, whole in zip(answers, full, strict=True) if whole.exact], np.float64)
            results[arm] = {
                "kv": kv,
                "kv_bytes": n_bytes,
                "needles": asdict(found),
                "mass": {
                    query: {"recovered": float(np.mean(part)), "heads": len(part)}
                    for query, part in zip(QUERIES, parts, strict=True)
                    if part
                },
            }
            masses = "  ".join(f"{each['recovered']:.3f} ({each['heads']})" for each in results[arm]["mass"].values())
            share_of = found.exact_of_valid or 0
            print(f"  {kv:50} {n_bytes['held'] / 2**20:6.2f} MiB  {share_of:.2f}  mass {masses}", flush=True)
        of_entry = 2 * 2 * spec.head_dim + 4  # two halves' rows, a position
        n_layers = shares[0].shape[1]
        formula = n_layers * spec.n_kv_heads * (args.keep + ROOM) * of_entry + results[OURS]["kv_bytes"]["windows"]
    record = {"config": config, "paper": PAPER, "results": results}
    save(f"kv/snapkv_{args.name}", {**record, "claims": claims(results, exact, formula)})


def claims(results: dict[str, Any], exact: dict[str, F64], formula: int) -> list[dict[str, Any]]:
    own, sinks = results[OURS], results[SINKS]
    n_bytes = own["kv_bytes"]
    same = {
        "bytes that arrays hold, less those predicted": n_bytes["held"] - n_bytes["predicted"],
        "bytes that arrays hold, less the formula's": n_bytes["held"] - formula,
        "bytes that arrays hold with sinks, less those with snapkv": sinks["kv_bytes"]["held"] - n_bytes["held"],
    }
    found = [claim("needles that the full cache answers", results["full"]["needles"]["exact"], at_least=0.5)]
    found += [claim(what, apart, at_least=0, at_most=0) for what, apart in same.items()]
    if len(exact[OURS]):
        more = exact[NO_POOLING] - exact[OURS]
        noise = 2 * float(more.std()) / len(more) ** 0.5
        found += [
            claim("snapkv: of those, answered", own["needles"]["exact_of_valid"], at_least=0.7),
            claim("sinks: of those, answered", sinks["needles"]["exact_of_valid"], at_most=0.1),
            claim("no pooling: answered, less those with", float(more.mean()), at_most=round(noise, 4)),
        ]
    if QUERIES[0] in own["mass"]:
        kept = own["mass"][QUERIES[0]]["recovered"]
        found.append(claim(f"snapkv: mass on the fact that is kept, of {QUERIES[0]}", kept, at_least=0.9))
    return found


if __name__ == "__main__":
    main()
