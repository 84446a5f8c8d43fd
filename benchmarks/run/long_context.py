"""Long context, barefoot beside llama.cpp on the same file: a prompt of 8,000 tokens, then decoding behind it.

    python -m benchmarks.run.long_context MODEL.gguf NAME [--peer-python PYTHON] [--rounds 3] [--bits 16 8 4]

For each number of bits of the KV cache (f16; q8 beside q8_0; q4 beside q4_0, with flash attention) a round is two fresh
processes, one of each, in turn; ratios are medians of the rounds' own ratios. ``--no-peer`` measures barefoot alone,
for lengths that a peer would take hours for.
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
PEER_KV = {16: "f16", 8: "q8_0", 4: "q4_0"}
OWN_KV = {16: "f16", 8: "q8", 4: "q4"}
#: What must hold: decode and prefill tokens a second over the peer's, at 8,000 positions.
DECODE_AT_LEAST = {16: 2.0, 8: 3.0, 4: 6.0}
PREFILL_AT_LEAST = {16: 2.0, 8: 4.0}
METRICS = ("prefill_tokens_per_s", "decode_tokens_per_s", "peak_mib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--bits", nargs="+", type=int, choices=OWN_KV, default=list(OWN_KV))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=0, help="rounds that don't count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=8000)
    parser.add_argument("--decode", type=int, default=64)
    args = parser.parse_args()

    base = {"model": args.model, "context": args.prefill + args.decode, "n_threads": args.threads}
    base |= {"prefill": args.prefill, "decode": args.decode}
    facts = {k: v for k, v in base.items() if k != "model"} | {
        "file": Path(args.model).name,
        "read GB/s before": read_bandwidth(args.threads),
    }
    card(f"run: long context, {args.name}", facts)

    runs: dict[str, list[Mapping[str, float]]] = {}

    def kept(name: str, worker: str, settings: dict[str, Any], python: str) -> Callable[[], Mapping[str, float]]:
        def measure() -> Mapping[str, float]:
            runs.setdefault(name, []).append(child(HERE / worker, base | settings, python))
            return runs[name][-1]

        return measure

    contenders = {}
    for bits in args.bits:
        own, peer = f"barefoot {OWN_KV[bits]}", f"llama.cpp {PEER_KV[bits]}"
        contenders[own] = kept(own, "barefoot_worker.py", {"kv": OWN_KV[bits]}, sys.executable)
        if not args.no_peer:
            contenders[peer] = kept(peer, "llama_cpp_worker.py", {"kv": PEER_KV[bits]}, args.peer_python)
    results = rounds(contenders, args.rounds, args.warmup)
    facts["read GB/s after"] = read_bandwidth(args.threads)

    ratios, claims = {}, []
    for bits in args.bits if not args.no_peer else ():
        pairs = list(zip(runs[f"barefoot {OWN_KV[bits]}"], runs[f"llama.cpp {PEER_KV[bits]}"], strict=True))
        for metric in METRICS:
            of_rounds = [own[metric] / peer[metric] for own, peer in pairs[args.warmup :]]
            ratios[f"{bits} bits: {metric}"] = round(statistics.median(of_rounds), 3)
        for what, bounds in (("decode", DECODE_AT_LEAST), ("prefill", PREFILL_AT_LEAST)):
            if bits in bounds:
                measured = ratios[f"{bits} bits: {what}_tokens_per_s"]
                text = f"{what} with {bits}-bit KV at {args.prefill} tokens over llama.cpp's {PEER_KV[bits]}"
                claims.append(claim(text, measured, at_least=bounds[bits]))
    save(
        f"run/long_context_{args.name}",
        {
            "config": base | {"model": Path(args.model).name, "rounds": args.rounds},
            "card": facts,
            "results": results,
            "ratios": ratios,
            "claims": claims,
        },
        "llama-cpp-python",
    )


if __name__ == "__main__":
    main()
