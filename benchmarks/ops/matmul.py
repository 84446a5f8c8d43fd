"""Speed of ``matmul`` by weight format, layout and tokens, over all matrices of a model's body. For use by hand.

python -m benchmarks.ops.matmul [--shape smollm2 tinyllama] [--format q4_0 ...] [--tokens 1 512] [--threads 2]

One row of a round multiplies every matrix of the body once, layer by layer, so that few tokens read from memory what a
model reads; the layouts alternate within a round, and the read bandwidth of the machine is taken beside each round.
Medians; GB/s are bytes of weights, to be held against the bandwidth of the same rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np

from barefoot import ops
from barefoot.ops import blocks, cases, panels
from benchmarks.harness import read_bandwidth

#: Layers, and the matrices [rows, cols] of a layer: qkv, o, gate and up, down.
SHAPES = {
    "smollm2": (30, ((960, 576), (576, 576), (3072, 576), (576, 1536))),
    "tinyllama": (22, ((2560, 2048), (2048, 2048), (11264, 2048), (2048, 5632))),
}


def body(shape: str, name: str, layout: str, n_tokens: int, activations: str) -> tuple[Callable[[], None], int]:
    """A function that runs the whole body once, and the bytes of its weights."""
    n_layers, matrices = SHAPES[shape]
    rng = np.random.default_rng(0)
    layers = [[_weight(name, rows, cols, layout, rng) for rows, cols in matrices] for _ in range(n_layers)]
    x = {cols: rng.standard_normal((n_tokens, cols)).astype(np.float32) for _, cols in matrices}
    out = {rows: np.empty((n_tokens, rows), np.float32) for rows, _ in matrices}
    sizes = [ops.matmul_scratch_bytes(n_tokens, cols, activations) for cols in x]
    scratch = np.empty(max(sizes), np.uint8)
    program = ops.Program()
    for weight in (w for layer in layers for w in layer):
        program.matmul(x[weight.cols], [weight], [out[weight.rows]], activations=activations, scratch=scratch)
    return lambda: program.run(n_tokens, 0), sum(w.n_bytes for layer in layers for w in layer)


def _weight(name: str, rows: int, cols: int, layout: str, rng: np.random.Generator) -> ops.PackedWeight:
    tile = cases.random_packed(name, 16, cols, rng)
    raw = np.ascontiguousarray(np.tile(tile, (rows // 16, 1)))
    if layout == "panels":
        packed = np.empty(raw.size, np.uint8)
        ops.pack_panels(name, raw, rows, cols, packed)
        raw = packed
    return ops.PackedWeight(name, rows, cols, raw.reshape(-1), layout=layout)


def measure(shape: str, name: str, n_tokens: int, activations: str, repeats: int) -> list[dict[str, object]]:
    """A record for each layout of the format: medians over ``repeats`` rounds, after one that is not counted."""
    matrices = SHAPES[shape][1]
    has_panels = all(panels.supports(name, rows, cols) for rows, cols in matrices)
    runs = {n: body(shape, name, n, n_tokens, activations) for n in ("rows", *(("panels",) if has_panels else ()))}
    seconds: dict[str, list[float]] = {layout: [] for layout in runs}
    bandwidth = []
    for _ in range(repeats + 1):
        bandwidth.append(read_bandwidth(ops.n_threads()))
        for layout, (run, _) in runs.items():
            start = time.perf_counter()
            run()
            seconds[layout].append(time.perf_counter() - start)
    n_weights = SHAPES[shape][0] * sum(rows * cols for rows, cols in matrices)
    records = []
    for layout, (_, n_bytes) in runs.items():
        median = statistics.median(seconds[layout][1:])
        records.append(
            {
                "shape": shape,
                "format": name,
                "layout": layout,
                "n_tokens": n_tokens,
                "activations": activations,
                "milliseconds": 1e3 * median,
                "gigabytes_per_second": n_bytes / median / 1e9,
                "read_bandwidth": statistics.median(bandwidth[1:]),
                "gigaops_per_second": 2 * n_tokens * n_weights / median / 1e9,
                "load_average": os.getloadavg()[0],
            }
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["smollm2"], choices=SHAPES)
    parser.add_argument("--format", nargs="+", default=list(blocks.names()), choices=blocks.names())
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 512])
    parser.add_argument("--activations", default="int8", choices=["int8", "float32"])
    parser.add_argument("--threads", type=int, default=ops.n_threads())
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    ops.set_threads(arguments.threads)
    print(f"{ops.backend()}, {ops.n_threads()} threads, {platform.machine()}")
    results = []
    for shape in arguments.shape:
        fitting = [f for f in arguments.format if all(c % blocks.block_elements(f) == 0 for _, c in SHAPES[shape][1])]
        for name in fitting:
            for n_tokens in arguments.tokens:
                for r in measure(shape, name, n_tokens, arguments.activations, arguments.repeats):
                    results.append(r)
                    print(
                        f"{shape:10} {name:16} {r['layout']:7} {n_tokens:4} tokens {r['milliseconds']:9.2f} ms"
                        f" {r['gigabytes_per_second']:7.2f} of {r['read_bandwidth']:5.1f} GB/s"
                        f" {r['gigaops_per_second']:8.1f} GOPS  load {r['load_average']:.1f}"
                    )
    print(json.dumps({"backend": ops.backend(), "threads": ops.n_threads(), "results": results}))


if __name__ == "__main__":
    main()
