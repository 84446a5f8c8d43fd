"""Decoding behind a long prompt: tokens a second and bytes of compressed caches beside 16-bit rows.

    python -m benchmarks kv.long_decode MODEL NAME [--prefill 32000] [--decode 64] [--rounds 3] [--arms ARM ...]
        [--snapshots FOLDER]

``MODEL`` may be of random weights: what is timed doesn't depend on them. A round is one fresh process of each arm, in
turn; the prompt passes for real, so every cache is as its policy makes it. A ratio is the median of the rounds' own.
With --snapshots it passes once, which isn't timed, and every round goes on from the file that it was saved to.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import card, child, claim, read_bandwidth, rounds, save

WORKER = Path(__file__).parents[1] / "run" / "barefoot_worker.py"
SPARE = 512  # positions behind the prompt
WARM_UP = 8  # tokens
FULL = "f16"
ARMS = ("kivi(bits=2)", "snapkv(keep=4096)", "h2o(keep=4096)")
#: Of each policy or store: tokens a second over 16-bit rows at least, its bytes over theirs at most.
BOUNDS = {"kivi": (2.0, 0.22), "snapkv": (4.0, 0.15), "h2o": (4.0, 0.15)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name", help="of the record: long_decode_NAME")
    parser.add_argument("--prefill", type=int, default=32_000)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--snapshots", type=Path)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    args = parser.parse_args()
    config = {"prefill": args.prefill, "decode": args.decode, "threads": args.threads, "arms": [FULL, *args.arms]}
    kept: dict[str, str] = {}
    if args.snapshots:
        args.snapshots.mkdir(parents=True, exist_ok=True)
        kept = {arm: str(args.snapshots / f"{i}.safetensors") for i, arm in enumerate(config["arms"])}
    seen: dict[str, list[Mapping[str, float]]] = {}

    def once(arm: str) -> Mapping[str, float]:
        settings = {
            "model": args.model,
            "context": args.prefill + SPARE,
            "prefill": args.prefill,
            "warm_up": WARM_UP,
            "decode": args.decode,
            "n_threads": args.threads,
            "kv": arm,
            **({"snapshot": kept[arm]} if kept else {}),
        }
        return child(WORKER, settings)

    def timed(arm: str) -> Mapping[str, float]:
        seen.setdefault(arm, []).append(once(arm))
        return seen[arm][-1]

    for arm in kept:
        once(arm)
    facts = {**config, "read GB/s before": read_bandwidth(args.threads)}
    card(f"decoding behind {args.prefill} tokens", facts)
    results = rounds({arm: lambda arm=arm: timed(arm) for arm in config["arms"]}, args.rounds, warmup=0)
    ratios: dict[str, float] = {}
    claims: list[dict[str, Any]] = []
    for arm in args.arms:
        speeds = [
            own["decode_tokens_per_s"] / full["decode_tokens_per_s"]
            for own, full in zip(seen[arm], seen[FULL], strict=True)
        ]
        ratios[f"{arm}: tokens a second"] = statistics.median(speeds)
        ratios[f"{arm}: bytes"] = seen[arm][0]["kv_bytes"] / seen[FULL][0]["kv_bytes"]
        least, most = BOUNDS.get(arm.split("(")[0], (None, None))
        if least is not None:
            claims.append(
                claim(f"{arm}: tokens a second over f16's", ratios[f"{arm}: tokens a second"], at_least=least)
            )
            claims.append(claim(f"{arm}: bytes over f16's", ratios[f"{arm}: bytes"], at_most=most))
    record = {"config": config, "card": facts, "results": results, "ratios": ratios, "claims": claims}
    save(f"kv/long_decode_{args.name}", record)


if __name__ == "__main__":
    main()
