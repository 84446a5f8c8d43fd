"""Scissorhands: whether importance persists, and what a cache of few entries loses of text, beside cheap imitations.

    python -m benchmarks kv.scissorhands MODEL NAME --text FILE [--tokens 2048] [--keep 512] [--persist 4] [--texts 4]
        [--generate 5000]

Persistence, of --persist texts, in each layer that sees all positions and each query head: a token is important in some
steps if one of them gives it more than an even share. Of the tokens of the first half that are important in the second,
the share that already was in the first, beside what a draw of as many would have: the share of all of the first half
that was important there. With and without a token's own step.

Likelihood: texts of --tokens, of which the first --keep are a prompt that every arm keeps whole and the others are
decoded, one sequence a text; the full cache passes them as a prompt. ``by lot`` drops as many as ours at the same
times, and keeps the same newest ones. The last positions alone, those with the first four (``sinks``) and ``h2o`` have
as many entries as fit the bytes of ours. In rows of 4 bits ours keeps a fifth of the tokens.

Bytes are allocated ones of a sequence, positions and strikes included; layers with a window, which no policy rules, are
counted apart. Then what a cache holds while --generate tokens are generated. But for persistence, weights and
activations are in 8 bits, the full cache's too, to be done sooner.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from barefoot.core.measure import resident
from barefoot.core.model import ModelSpec
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.evals.divergence import nll
from barefoot.evals.scoring import spread_windows
from barefoot.evals.texts import read_text
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.kv.policies import F32, I32, Policy, Seen
from barefoot.kv.policies.h2o import H2O
from barefoot.kv.policies.scissorhands import Scissorhands
from barefoot.kv.policies.sinks import Sinks
from barefoot.kv.ruled import Ruled
from barefoot.kv.stores import KVStore
from barefoot.kv.stores.f16 import HalfStore
from barefoot.kv.stores.q4 import Int4Store
from barefoot.plan.job import parse_weights
from benchmarks.harness import card, claim, save
from benchmarks.kv.captured import attended
from benchmarks.kv.in_step import CHUNK, engine, in_step

OURS, LOT, LAST, SINKS, HEAVY = "scissorhands", "by lot", "last positions", "first and last positions", "h2o"
IN_4_BITS = "scissorhands, a fifth in 4 bits"
PART = 5  # one token in so many stays there
EVERY, FROM = 500, 1000  # generated tokens
IN_8_BITS: dict[str, Any] = {"weights": parse_weights("int(bits=8)"), "activations": "int8"}
PAPER = "up to 5 times smaller without loss of perplexity (OPT on C4), 20 times with 4 bits; persistence above 0.95"


@dataclass(frozen=True)
class ByLot(Scissorhands):
    """As many go at the same times, of those that are not among the newest."""

    def choose(self, seen: Seen) -> I32:
        return super().choose(drawn(seen))

    def evict(self, seen: Seen) -> I32:
        return super().evict(drawn(seen))


def drawn(seen: Seen) -> Seen:
    lots = np.random.default_rng((seen.layer, seen.n_tokens)).random(seen.position.shape, np.float32)
    return replace(seen, observed=lots)


def persistence(model: str, texts: Sequence[list[int]]) -> dict[str, Any]:
    """Means over texts, by layer and query head: persistence, and the same of a draw."""
    found: dict[str, list[list[tuple[float, float]]]] = {"all steps": [], "without its own step": []}
    for ids in texts:
        half, even = len(ids) // 2, 1 / np.arange(1, len(ids) + 1)[:, None]
        each: dict[str, list[tuple[float, float]]] = {way: [] for way in found}
        for layer in attended(model, ids):
            for head in range(len(layer.q)):
                important = layer.shares(head) > even
                for way, of_heads in each.items():
                    if way != "all steps":
                        np.fill_diagonal(important, False)
                    before, later = important[:half, :half].any(axis=0), important[half:, :half].any(axis=0)
                    of_heads.append((float(before[later].mean()) if later.any() else 1.0, float(before.mean())))
        for way, of_heads in each.items():
            found[way].append(of_heads)
    summary = {}
    for way, of_texts in found.items():
        ratio, draw = np.mean(of_texts, axis=0).T
        summary[way] = {
            "persistence": float(ratio.mean()),
            "of_a_draw": float(draw.mean()),
            "heads": len(ratio),
            "above": float((ratio > draw).mean()),
            "not_below": float((ratio >= draw).mean()),
            "persistence_by_head": ratio.round(4).tolist(),
            "of_a_draw_by_head": draw.round(4).tolist(),
        }
    return summary


def as_large(make: Callable[[int], Policy], like: Ruled, spec: ModelSpec, context: int) -> Ruled:
    """The most entries of another policy that take no more bytes, in the same store."""

    def n_bytes(kv: Ruled) -> int:
        return sum(term.bytes for term in kv.layout(spec, context, CHUNK).terms())

    keep = next(n for n in range(context, 0, -1) if n_bytes(Ruled(make(n), like.store)) <= n_bytes(like))
    return Ruled(make(keep), like.store)


def arms_of(spec: ModelSpec, n_tokens: int, keep: int) -> dict[str, Ruled]:
    ours = Ruled(Scissorhands(keep=keep), HalfStore())
    return {
        OURS: ours,
        LOT: Ruled(ByLot(keep=keep), HalfStore()),
        LAST: as_large(lambda n: Sinks(keep=n, first=0), ours, spec, n_tokens),
        SINKS: as_large(lambda n: Sinks(keep=n), ours, spec, n_tokens),
        HEAVY: as_large(lambda n: H2O(keep=n), ours, spec, n_tokens),
        IN_4_BITS: Ruled(Scissorhands(keep=round(n_tokens / PART)), Int4Store()),
    }


def allocated(run: Engine) -> dict[str, int]:
    """Bytes of one sequence, in layers that see all positions and in those with a window."""
    n, ruled = run.config.n_sequences, Ruled.ruled(run.spec)
    windows = sum(array.nbytes for i, pair in run.kv.arrays.items() if i not in ruled for array in pair) // n
    return {"kv_bytes": run.arena.used_by_owner()["kv"] // n - windows, "window_bytes": windows}


def full_cache(checkpoint: Checkpoint, texts: Sequence[list[int]], n_threads: int) -> tuple[F32, dict[str, int]]:
    """Nats of the tokens behind the first, (texts, tokens - 1), and bytes."""
    found = np.zeros((len(texts), len(texts[0]) - 1), np.float32)
    with engine(checkpoint, HalfStore(), len(texts[0]), 1, n_threads, **IN_8_BITS) as run:
        for number, ids in enumerate(texts):

            def take(start: int, logits: F32, number: int = number) -> None:
                follow = np.array(texts[number][start + 1 : start + 1 + len(logits)])
                found[number, start : start + len(follow)] = nll(logits[: len(follow)], follow)

            run.reset()
            run.prefill(ids, all_logits=take)
        return found, allocated(run)


def decoded(
    checkpoint: Checkpoint, kv: KVStore, texts: Sequence[list[int]], n_prompt: int, n_threads: int
) -> tuple[F32, dict[str, int]]:
    """Nats of the tokens behind the prompt's own and the one it foresees, (texts, …), and bytes."""
    found = np.zeros((len(texts), len(texts[0]) - n_prompt - 1), np.float32)

    def take(number: int, at: int, logits: F32) -> None:
        found[number, at - n_prompt - 1] = nll(logits, np.array([texts[number][at]]))[0]

    with engine(checkpoint, kv, len(texts[0]), len(texts), n_threads, **IN_8_BITS) as run:
        in_step(run, texts, n_prompt, take)
        return found, allocated(run)


def generated(checkpoint: Checkpoint, kv: KVStore, prompt: list[int], n: int, n_threads: int) -> list[dict[str, int]]:
    """Bytes of the cache, entries of the first layer and resident bytes of the process, along the way."""
    found = []
    with engine(checkpoint, kv, len(prompt) + n, 1, n_threads, **IN_8_BITS) as run:
        logits = run.prefill(prompt)
        assert run._by_layer is not None
        storage = run._by_layer.caches[0].storage
        for done in range(1, n + 1):
            logits = run.decode(int(logits.argmax()))
            if done % EVERY == 0 and done >= FROM:
                process = resident()
                at_rest = {} if process is None else {"resident": process.total}
                found.append({"tokens": done, **allocated(run), "entries": storage.n(0), **at_rest})
                print(f"  {found[-1]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name", help="of the record: kv_scissorhands_NAME")
    parser.add_argument("--text", default="topics")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--keep", type=int, default=512)
    parser.add_argument("--persist", type=int, default=4, help="texts of which persistence is measured")
    parser.add_argument("--texts", type=int, default=4, help="texts of which likelihood is measured")
    parser.add_argument("--generate", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    config = {key: value for key, value in vars(args).items() if key not in ("model", "name")}
    config["text"] = Path(args.text).name
    card(f"scissorhands on {args.name}", config)
    results: dict[str, Any] = {}
    with Checkpoint(args.model) as checkpoint:
        spec, tokenizer, text = model_spec(checkpoint), load_tokenizer(checkpoint), read_text(args.text)
        results["persistence"] = persistence(
            args.model, spread_windows(text, tokenizer, args.tokens, args.persist).tolist()
        )
        for way, found in results["persistence"].items():
            print(
                f"  {way}: " + "  ".join(f"{k} {v:.4f}" for k, v in found.items() if isinstance(v, float)), flush=True
            )
        texts = spread_windows(text, tokenizer, args.tokens, args.texts).tolist()
        full, held = full_cache(checkpoint, texts, args.threads)
        results["text"] = {
            "full": {**held, "nll": float(full.mean()), "nll_behind": float(full[:, args.keep :].mean())}
        }
        for name, kv in arms_of(spec, args.tokens, args.keep).items():
            prompt = min(args.keep, kv.policy.keep) if kv.policy else args.keep
            behind, held = decoded(checkpoint, kv, texts, prompt, args.threads)
            whole = np.concatenate([full[:, :prompt], behind], axis=1)
            results["text"][name] = {
                "kv": str(kv),
                **held,
                "nll": float(whole.mean()),
                "nll_behind": float(whole[:, args.keep :].mean()),
                "nll_by_text": whole.mean(axis=1).round(4).tolist(),
            }
            print(f"  {name:28} {results['text'][name]}", flush=True)
        ours = arms_of(spec, args.generate, args.keep)[OURS]
        results["generated"] = generated(checkpoint, ours, texts[0][:64], args.generate, args.threads)
    record = {"config": config, "paper": PAPER, "results": results}
    save(f"kv/scissorhands_{args.name}", {**record, "claims": claims(results)})


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    text, found = results["text"], []
    for way, each in results["persistence"].items():
        found.append(claim(f"layers' heads that persist more than a draw, {way}", each["above"], at_least=0.9))
    for metric, where in (("nll", "all tokens"), ("nll_behind", "tokens behind the prompt")):
        for other in (LAST, LOT):
            less = text[OURS][metric] - text[other][metric]
            found.append(claim(f"NLL of {where}: ours less {other}", less, at_most=0.0))
        found.append(
            claim(f"NLL of {where}: ours / the full cache's", text[OURS][metric] / text["full"][metric], at_most=1.1)
        )
    times = text["full"]["kv_bytes"] / text[IN_4_BITS]["kv_bytes"]
    found.append(claim("a fifth of the tokens in 4 bits: the full cache's bytes / ours", times, at_least=12))
    sizes = [each["kv_bytes"] + each["window_bytes"] for each in results["generated"]]
    last = results["generated"][-1]["tokens"]
    found.append(
        claim(f"bytes by which the cache changes from {FROM:,} to {last:,} tokens", max(sizes) - min(sizes), at_most=0)
    )
    return found


if __name__ == "__main__":
    main()
