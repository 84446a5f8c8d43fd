"""Speed of ``attention`` over packed KV: GB/s of KV read for one token, GFLOP/s for a prompt's chunk. For use by hand.

python benchmarks/ops/attention.py [--shape smollm2 ...] [--kv f16 ...] [--keys 8192 ...] [--threads 1 2]
    [--tokens 1 128 512] [--activations int8 float32]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from itertools import product

import numpy as np

from barefoot import ops
from barefoot.ops import kvrows
from benchmarks.harness import read_bandwidth

SHAPES = {"smollm2": (9, 3, 64), "wide": (32, 4, 64), "gemma3": (4, 1, 256)}  # heads, KV heads, head_dim
STORES_BYTES = 128 << 20  # stores in rotation, beyond the last-level cache of most machines


def measure(
    shape: tuple[int, int, int], fmt: str, n_keys: int, n_tokens: int, activations: str, repeats: int
) -> dict[str, object]:
    """Median over ``repeats`` of one call with ``n_keys`` keys before and among ``n_tokens`` queries."""
    n_heads, n_kv_heads, head_dim = shape
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((n_keys, n_kv_heads * head_dim)).astype(np.float32)
    store = np.zeros((n_kv_heads, n_keys, kvrows.row_bytes(fmt, head_dim)), np.uint8)
    other = np.zeros_like(store)
    ops.kv_append(rows, rows[::-1].copy(), store, other, fmt, n_keys, 0)
    n_copies = max(1, min(STORES_BYTES // (2 * store.size), repeats)) if n_tokens == 1 else 1
    stores = [(store.copy(), other.copy()) for _ in range(n_copies)]
    q = rng.standard_normal((n_tokens, n_heads * head_dim)).astype(np.float32)
    out = np.empty_like(q)
    scratch = np.empty(ops.attention_scratch_bytes(n_tokens, n_heads, n_kv_heads, head_dim, activations), np.uint8)
    seconds = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        ops.attention(
            q, *stores[i % n_copies], fmt, out, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim,
            capacity=n_keys, n_past=n_keys - n_tokens, n_tokens=n_tokens, scale=head_dim**-0.5, activations=activations,
            scratch=scratch,
        )  # fmt: skip
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    seen = n_tokens * (n_keys - n_tokens) + n_tokens * (n_tokens + 1) // 2
    result = {"us": round(1e6 * median, 1), "us_best": round(1e6 * min(seconds), 1)}
    if n_tokens == 1:
        return result | {"gb_per_s": round(2 * store.size / median / 1e9, 2)}
    return result | {"gflop_per_s": round(4 * seen * n_heads * head_dim / median / 1e9, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--kv", nargs="+", choices=kvrows.FORMATS, default=["f16", "q8", "q4"])
    parser.add_argument("--keys", nargs="+", type=int, default=[1024, 8192, 32768])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--activations", nargs="+", choices=("int8", "float32"), default=["int8"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    print(json.dumps({"machine": platform.processor() or platform.machine(), "backend": ops.backend()}))
    for n_threads in args.threads:
        ops.set_threads(n_threads)
        for n_tokens in args.tokens:
            for shape in args.shape:
                print(json.dumps({"read_gb_per_s": read_bandwidth(n_threads, 128 << 20), "threads": n_threads}))
                for n_keys, fmt, activations in product(args.keys, args.kv, args.activations):
                    case = {"shape": shape, "kv": fmt, "keys": n_keys, "tokens": n_tokens, "threads": n_threads}
                    found = measure(SHAPES[shape], fmt, n_keys, n_tokens, activations, args.repeats)
                    print(json.dumps(case | {"activations": activations} | found), flush=True)


if __name__ == "__main__":
    main()
