"""Decoding several sequences together, barefoot beside llama.cpp on the same file: tokens a second of all of them.

    python -m benchmarks.run.batch MODEL.gguf NAME [--peer-python PYTHON] [--rounds 5] [--batches 1 2 4 8 16]

A round is two fresh processes, one of each, in turn. Each holds as many sequences as the largest batch, of ``--prompt``
tokens, and decodes ``--decode`` tokens of the first 1, 2, 4 … of them together, beginning at the same positions each
time. Ratios are medians of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import card, child, claim, read_bandwidth, rounds, save

HERE = Path(__file__).parent
PEER_KV = {"f16": "f16", "q8": "q8_0", "q4": "q4_0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--kv", choices=PEER_KV, default="f16")
    args = parser.parse_args()

    base: dict[str, Any] = {"model": args.model, "n_threads": args.threads, "batches": args.batches}
    base |= {"prefill": args.prompt, "decode": args.decode, "context": args.prompt + args.decode}
    facts = {k: v for k, v in base.items() if k != "model"} | {
        "kv": f"{args.kv} beside {PEER_KV[args.kv]}",
        "file": Path(args.model).name,
        "read GB/s before": read_bandwidth(args.threads),
    }
    card(f"run: batches, {args.name}", facts)
    runs: dict[str, list[Mapping[str, float]]] = {}

    def contender(name: str, worker: str, kv: str, python: str) -> Callable[[], Mapping[str, float]]:
        def measure() -> Mapping[str, float]:
            runs.setdefault(name, []).append(child(HERE / worker, base | {"kv": kv}, python))
            return runs[name][-1]

        return measure

    contenders = {
        "barefoot": contender("barefoot", "barefoot_batch_worker.py", args.kv, sys.executable),
        "llama.cpp": contender("llama.cpp", "llama_cpp_batch_worker.py", PEER_KV[args.kv], args.peer_python),
    }
    warmup = 1
    results = rounds(contenders, args.rounds, warmup)
    facts["read GB/s after"] = read_bandwidth(args.threads)

    def ratio(metric: str) -> float:
        pairs = zip(runs["barefoot"][warmup:], runs["llama.cpp"][warmup:], strict=True)
        return round(statistics.median(own[metric] / peer[metric] for own, peer in pairs), 3)

    metrics = [f"batch_{n}_tokens_per_s" for n in args.batches]
    ratios = {metric: ratio(metric) for metric in (*metrics, "peak_mib")}
    claims = [
        claim(f"decode of {n} sequences over llama.cpp's", ratios[metric], at_least=1.0)
        for n, metric in zip(args.batches, metrics, strict=True)
    ]
    claims.append(claim("peak resident memory over llama.cpp's", ratios["peak_mib"], at_most=1.0))
    save(
        f"run/batch_{args.name}",
        {
            "config": base | {"model": Path(args.model).name, "kv": args.kv, "rounds": args.rounds},
            "card": facts,
            "results": results,
            "ratios": ratios,
            "claims": claims,
        },
        "llama-cpp-python",
    )


if __name__ == "__main__":
    main()
