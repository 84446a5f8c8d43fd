"""Bit planes (AP-GEMM, arXiv:2409.17870), one token: time by bits of weights and activations, beside int8 and float32.

Contenders, each with its own copy of the weights:

* ``W2A2`` and so on: barefoot's bit planes, a step for each 128 columns, on this process's instruction set; also as
  ``W2A2 avx512-vnni``, the same without an instruction that counts bits;
* ``panels2`` and so on: weights of as many bits times int8 activations, barefoot's panels;
* ``torch``: a float32 matrix-vector product, where torch is installed.

Each round times every contender once, in turn; a ratio is the median of the rounds' ratios. A contender runs once
before it is timed, so weights that fit a cache are read from it: at 4096 by 11008, those of 1 and 2 bits fit some L3.

python -m benchmarks ops.planes [--rounds 15] [--threads 2]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from barefoot import ops
from barefoot.ops import planes
from benchmarks import harness
from benchmarks.ops.lut import Work, contenders, race, ratio, torch_product

ROWS, COLS, GROUP = 4096, 11008, 128
PAIRS = ((1, 1), (1, 2), (2, 2), (3, 4), (4, 8))  # bits of weights, of activations
WITHOUT_COUNTING = "avx512-vnni"


def plane_product(weight_bits: int, activation_bits: int) -> tuple[Work, int]:
    """One token times random planes, and the bytes of the planes. The first product is checked."""
    rng = np.random.default_rng(0)
    fmt = planes.PlaneFormat.bipolar(weight_bits, GROUP)
    n_bytes = fmt.n_bytes(16, COLS)
    codes = rng.integers(0, fmt.levels + 1, (16, COLS), dtype=np.uint8)
    tile = planes.pack(fmt, codes, np.full((16, fmt.n_groups(COLS)), 0.01, np.float16))
    weight = planes.PlaneWeight(fmt, ROWS, COLS, np.tile(tile.buffer, ROWS // 16))
    x, out = rng.standard_normal((1, COLS)).astype(np.float32), np.empty((1, ROWS), np.float32)
    scratch = np.empty(ops.plane_scratch_bytes(1, COLS, activation_bits, GROUP), np.uint8)

    def work() -> None:
        ops.plane_matmul(x, weight, out, activation_bits=activation_bits, scratch=scratch)

    work()
    expected = planes.product(x, tile, activation_bits)
    if np.abs(out.reshape(-1, 16) - expected).max() > 1e-5 * np.abs(expected).max():
        raise RuntimeError("the kernel computes another product")
    return work, n_bytes * (ROWS // 16)


def on_isa(name: str, work: Work) -> Work:
    def switched() -> None:
        before = ops.isa()
        ops.set_isa(name)
        work()
        ops.set_isa(before)

    return switched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    ops.set_threads(arguments.threads)
    works: dict[str, Work] = {}
    n_bytes: dict[str, int] = {}
    for weight_bits, activation_bits in PAIRS:
        name = f"W{weight_bits}A{activation_bits}"
        works[name], n_bytes[name] = plane_product(weight_bits, activation_bits)
    if ops.isa() != WITHOUT_COUNTING and WITHOUT_COUNTING in ops.available_isas():
        works[f"W2A2 {WITHOUT_COUNTING}"] = on_isa(WITHOUT_COUNTING, works["W2A2"])
    for bits in sorted({weight_bits for weight_bits, _ in PAIRS}):
        works[f"panels{bits}"] = contenders(ROWS, COLS, bits)["panels"]
    if (dense := torch_product(ROWS, COLS)) is not None:
        works["torch"] = dense
        n_bytes["torch"] = 4 * ROWS * COLS
    config = {"rows": ROWS, "cols": COLS, "threads": arguments.threads, "rounds": arguments.rounds, "isa": ops.isa()}
    card = {"read GB/s": harness.read_bandwidth(arguments.threads), "bytes": n_bytes}
    harness.card("bit planes, one token", config | card)
    seconds = race(works, arguments.rounds)
    results = {n: {"us": harness.spread([round(1e6 * s, 2) for s in each])} for n, each in seconds.items()}
    for name, each in results.items():
        print(f"  {name:<20} {each['us']['median']:>10,.0f} us")
    pairs = [("W2A2", "W1A2"), ("W3A4", "W2A2"), *((f"panels{w}", f"W{w}A{a}") for w, a in PAIRS)]
    pairs += [("torch", name) for name in n_bytes if "torch" in works and name != "torch"]
    ratios = {f"{slow} / {fast}": round(ratio(seconds, slow, fast), 3) for slow, fast in pairs}
    claims = [
        harness.claim("W1A2 is faster than W2A2, times", ratios["W2A2 / W1A2"], at_least=1.0),
        harness.claim("W2A2 is faster than W3A4, times", ratios["W3A4 / W2A2"], at_least=1.0),
    ]
    if "torch" in works:
        claims.append(harness.claim("W2A2 is faster than torch float32, times", ratios["torch / W2A2"], at_least=2.0))
    notes = "Against int8 panels of the same bits there is no claim: those ratios say where planes win (above 1)."
    record = {"config": config, "card": card | {"notes": notes}, "results": results, "ratios": ratios, "claims": claims}
    harness.save("ops/planes", record, "torch")


if __name__ == "__main__":
    main()
