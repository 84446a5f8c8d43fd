"""Keys and values both by channel in 4 bits (COMET's KV4): what they lose, and how many sequences fit.

    python -m benchmarks kv.comet MODEL NAME --text FILE [--length 1024] [--passages 4]

KL to the 16-bit cache behind prompts of real text, token by token (as benchmarks/quality/kv.py measures it), beside
KIVI in 4 bits, which has values by token, and rows quantized by token: all with their bytes. Then the sequences of 1k
and 8k tokens that a budget for keys and values holds, less what all of them share: from the footprint, and from what an
engine allocates for two of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from barefoot.core.model import ModelSpec
from barefoot.engine.config import EngineConfig
from barefoot.engine.footprint import footprint
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.evals.long_context.continuation import passages
from barefoot.evals.texts import read_text
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.plan.job import parse_kv
from benchmarks.harness import card, claim, save
from benchmarks.quality.kv import CHUNK, REFERENCE, Measure

STORE, BY_TOKEN, VALUES_BY_TOKEN = "comet", "q4", "kivi(bits=4)"
ARMS = (STORE, "comet(group=64)", "comet(group=32)", VALUES_BY_TOKEN, "kivi(bits=4,group=128)", BY_TOKEN, "q8")
BUDGET = 16 << 30
TIMES = {1024: 2.7, 8192: 3.5}  # the brief's, against half precision
SHARED = ("kv workspace", "prompt", "chooser")


def sequences(checkpoint: Checkpoint, spec: ModelSpec, kv: str, context: int) -> dict[str, int]:
    """Of ``context`` tokens in the budget: bytes of each, stated and allocated, and how many there are."""
    configs = [EngineConfig(context, parse_kv(kv), {}, CHUNK, "float32", n_threads=1, n_sequences=n) for n in (1, 2)]
    stated = [footprint(spec, config).select(kind="kv", phase="decode").bytes for config in configs]
    with Engine(checkpoint, spec, configs[1]) as engine:
        allocated = engine.arena.used_by_owner()["kv"] // 2
        shared = sum(n for owner, n in engine.arena.used_by_owner().items() if owner in SHARED)
    each = stated[1] - stated[0]
    return {
        "bytes": each,
        "allocated_bytes": allocated,
        "shared_bytes": shared,
        "in_budget": (BUDGET - shared) // each,
        "in_budget_as_allocated": (BUDGET - shared) // allocated,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name", help="of the record: kv_comet_NAME")
    parser.add_argument("--text", required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--passages", type=int, default=4)
    parser.add_argument("--scored", type=int, default=64, help="tokens behind each prompt")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with Checkpoint(args.model) as checkpoint:
        spec, tokenizer, text = model_spec(checkpoint), load_tokenizer(checkpoint), read_text(args.text)
        config = {key: value for key, value in vars(args).items() if key not in ("model", "name", "threads")} | {
            "text": Path(args.text).name,
            "head_dim": spec.head_dim,
            "budget": BUDGET,
        }
        card(f"4 bits by channel on {args.name}", config)
        found: dict[str, Any] = {}
        for context in TIMES:
            for kv in (REFERENCE, STORE):
                found[f"{kv} of {context} tokens"] = held = sequences(checkpoint, spec, kv, context)
                print(f"  {context:5} {kv:8} {held}")
        texts = passages(text, tokenizer, args.length, args.scored, args.passages)
        measure = Measure(checkpoint, texts, "float32", args.threads)
        found |= {kv: measure(kv) for kv in ARMS}
    claims = []
    for context, times in TIMES.items():
        full, ours = (found[f"{kv} of {context} tokens"] for kv in (REFERENCE, STORE))
        for how in ("in_budget", "in_budget_as_allocated"):
            measured = ours[how] / full[how]
            claims.append(claim(f"{context:,} tokens: sequences {how} / f16's", measured, at_least=times))
    kl = {kv: found[kv]["kl_mean"] for kv in ARMS}
    claims.append(claim(f"KL of {STORE} / of {BY_TOKEN}", kl[STORE] / kl[BY_TOKEN], at_most=1.0))
    claims.append(claim(f"KL of {STORE} / of {VALUES_BY_TOKEN}", kl[STORE] / kl[VALUES_BY_TOKEN], at_most=1.0))
    save(f"kv/comet_{args.name}", {"config": config, "results": found, "claims": claims})


if __name__ == "__main__":
    main()
