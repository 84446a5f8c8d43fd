"""What each composition of the KV cache costs in quality: KL to the full 16-bit cache, behind prompts of real text.

    python -m benchmarks quality.kv MODEL NAME --text FILE [--lengths 1024 2048] [--passages 12 8]

Stores, policies at shares of the prompt over 16 bits, and pairs of both. Each prompt passes as the engine runs it, is
compressed, and what follows is decoded token by token, so that what sends entries away while it decodes does so
(:mod:`barefoot.evals.long_context.continuation`). Prompts of a second length show how far a share of one length speaks
for another.

Stores keep activations in float32. What policies lose is larger by far, and most of it lies in few passages, so they
take more passages, and int8 activations, which are faster; ``floor`` is what a 32-bit cache
seems to lose then, from rounding alone. The record's ``stores`` and ``policies`` are what benchmarks/quality/table.py
puts into the planner's table; ``pairs`` says how far the sum of a policy's and a store's loss is from what both
together lose.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

from barefoot.engine.config import Activations, EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.evals.long_context.continuation import Passage, diverge, passages, reference
from barefoot.evals.texts import read_text
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.plan.job import parse_kv
from benchmarks.harness import card, claim, save

REFERENCE, EXACT = "f16", "f32"
STORES = ("q8", "q4", "q3", "q2", "bfp4", "bfp4(sort=true)", "comet", "kivi(bits=4)", "kivi(bits=3)", "kivi")
POLICIES = ("snapkv(keep=KEEP)", "h2o(keep=KEEP)")
PARTS = (2, 4, 8, 16)  # one in so many entries stays
PAIRS = (
    ("snapkv(keep=KEEP)", "q8"),
    ("snapkv(keep=KEEP)", "q4"),
    ("snapkv(keep=KEEP)", "kivi(bits=4)"),
    ("h2o(keep=KEEP)", "q4"),
)
PAIRED_PART = 4
CHUNK = 128

Found = dict[str, dict[str, float]]  # by composition


class Measure:
    """Passages, and what the full cache says of them."""

    def __init__(self, checkpoint: Checkpoint, texts: list[Passage], activations: Activations, n_threads: int) -> None:
        self.checkpoint, self.texts, self.activations, self.n_threads = checkpoint, texts, activations, n_threads
        with self._engine(REFERENCE) as run:
            self.references = [reference(run, text) for text in texts]

    def __call__(self, kv: str) -> dict[str, float]:
        started = time.process_time()
        with self._engine(kv) as run:
            n_bytes = run.footprint.select(kind="kv", phase="decode").bytes
            found = diverge(run, self.texts, self.references)
        length, rise = len(self.texts[0].prompt), found["nll"] - found["reference_nll"]
        print(f"  {length:5} {kv:34} {n_bytes / 2**20:6.2f} MiB  KL {found['kl_mean']:.5f}  NLL {rise:+.4f}")
        return {"kv_bytes": n_bytes, **found, "cpu_seconds": time.process_time() - started}

    def _engine(self, kv: str) -> Engine:
        n_tokens = len(self.texts[0].prompt) + len(self.texts[0].continuation)
        config = EngineConfig(n_tokens, parse_kv(kv), {}, CHUNK, self.activations, n_threads=self.n_threads)
        return Engine(self.checkpoint, model_spec(self.checkpoint), config)


def composed(policy: str, keep: int, store: str = REFERENCE) -> str:
    return policy.replace("KEEP", str(keep)) + ("" if store == REFERENCE else f" > {store}")


def summary(stores: Found, policies: dict[int, Found]) -> dict[str, Any]:
    """The planner's rows, and the claims: KL falls with what stays, and policy and store add up."""
    kl = {n: {kv: round(r["kl_mean"], 5) for kv, r in found.items()} for n, found in policies.items()}
    of_stores = {REFERENCE: 0.0} | {kv: round(r["kl_mean"], 5) for kv, r in stores.items()}
    points: dict[str, list[list[float]]] = {}
    pairs: dict[str, dict[str, float]] = {}
    claims = []
    for n, found in kl.items():
        for policy in POLICIES:
            there = [(n // part, found[kv]) for part in PARTS if (kv := composed(policy, n // part)) in found]
            points.setdefault(policy, []).extend([n, keep, loss] for keep, loss in there)
            rises = [b - a for (_, a), (_, b) in itertools.pairwise(there)]
            if rises:
                claims.append(
                    claim(f"{policy}, {n:,} tokens: least rise of KL at half as many", min(rises), at_least=0)
                )
        for policy, store in PAIRS:
            together = composed(policy, n // PAIRED_PART, store)
            if together in found:
                added = found[composed(policy, n // PAIRED_PART)] + of_stores[store]
                pairs[together] = {"together": found[together], "added": round(added, 5)}
                ratio = found[together] / added
                claims.append(claim(f"{together}: KL / sum of both", ratio, at_least=0.75, at_most=1.25))
    floor = {str(n): found[EXACT] for n, found in kl.items() if EXACT in found}
    return {"stores": of_stores, "policies": points, "pairs": pairs, "floor": floor, "claims": claims}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name", help="of the record: kv_NAME")
    parser.add_argument("--text", default="topics")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048], help="stores and pairs take the first")
    parser.add_argument("--passages", type=int, nargs="+", default=[12, 8], help="of each length, for policies")
    parser.add_argument("--store-passages", type=int, default=4)
    parser.add_argument("--scored", type=int, default=64, help="tokens behind each prompt")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with Checkpoint(args.model) as checkpoint:
        spec, tokenizer, text = model_spec(checkpoint), load_tokenizer(checkpoint), read_text(args.text)
        config = {key: value for key, value in vars(args).items() if key not in ("model", "name", "threads")} | {
            "text": Path(args.text).name,
            "parameters": spec.n_parameters,
            "n_layers": spec.n_layers,
            "n_windows": sum(layer.window is not None for layer in spec.layers),
        }
        card(f"what caches of {args.name} lose", config)
        stores: Found = {}
        policies: dict[int, Found] = {}

        def keep_record() -> None:
            results = {"stores": stores, **{str(n): found for n, found in policies.items()}}
            save(f"quality/kv_{args.name}", {"config": config, "results": results, **summary(stores, policies)})

        first = args.lengths[0]
        measure = Measure(
            checkpoint, passages(text, tokenizer, first, args.scored, args.store_passages), "float32", args.threads
        )
        for store in STORES:
            stores[store] = measure(store)
        keep_record()
        for length, n_passages in zip(args.lengths, args.passages, strict=True):
            texts = passages(text, tokenizer, length, args.scored, n_passages)
            measure, found = Measure(checkpoint, texts, "int8", args.threads), policies.setdefault(length, {})
            arms = [EXACT, *(composed(policy, length // part) for policy in POLICIES for part in PARTS)]
            if length == first:
                arms += [composed(policy, length // PAIRED_PART, store) for policy, store in PAIRS]
            for kv in arms:
                found[kv] = measure(kv)
            keep_record()


if __name__ == "__main__":
    main()
