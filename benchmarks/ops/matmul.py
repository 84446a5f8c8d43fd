"""Speed of ``matmul`` by weight format: GB/s of weights for one token, GOPS for a prompt. For use by hand.

python benchmarks/ops/matmul.py [--format q4_1 ...] [--tokens 1 512] [--threads 2] [--activations int8]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import numpy as np

from barefoot import ops
from barefoot.ops import blocks, cases

ROWS, COLS = 2048, 2048
COPIES_BYTES = 256 << 20  # weights in rotation, beyond the last-level cache of most machines


def measure(name: str, n_tokens: int, activations: str, repeats: int) -> dict[str, object]:
    """Median over ``repeats`` of one product with a fresh [2048, 2048] weight each time."""
    rng = np.random.default_rng(0)
    first = cases.random_packed(name, ROWS, COLS, rng).reshape(-1)
    n_copies = max(1, min(COPIES_BYTES // first.size, repeats)) if n_tokens < 8 else 1
    weights = [ops.PackedWeight(name, ROWS, COLS, first.copy()) for _ in range(n_copies)]
    x = rng.standard_normal((n_tokens, COLS)).astype(np.float32)
    out = np.empty((n_tokens, ROWS), np.float32)
    scratch = np.empty(ops.matmul_scratch_bytes(n_tokens, COLS, activations), np.uint8)
    seconds = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        ops.matmul(x, [weights[i % n_copies]], [out], activations=activations, scratch=scratch)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    return {
        "format": name,
        "n_tokens": n_tokens,
        "activations": activations,
        "milliseconds": 1e3 * median,
        "gigabytes_per_second": first.size / median / 1e9,
        "gigaops_per_second": 2 * n_tokens * ROWS * COLS / median / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", nargs="+", default=list(blocks.names()), choices=blocks.names())
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 512])
    parser.add_argument("--activations", default="int8", choices=["int8", "float32"])
    parser.add_argument("--threads", type=int, default=ops.n_threads())
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    ops.set_threads(arguments.threads)
    print(f"{ops.backend()}, {ops.n_threads()} threads, [{ROWS}, {COLS}], {platform.machine()}")
    results = []
    for name in arguments.format:
        for n_tokens in arguments.tokens:
            r = measure(name, n_tokens, arguments.activations, arguments.repeats)
            results.append(r)
            print(
                f"{name:16} {n_tokens:5} tokens  {r['milliseconds']:9.3f} ms"
                f"  {r['gigabytes_per_second']:7.2f} GB/s  {r['gigaops_per_second']:8.1f} GOPS"
            )
    print(json.dumps({"backend": ops.backend(), "threads": ops.n_threads(), "results": results}))


if __name__ == "__main__":
    main()
