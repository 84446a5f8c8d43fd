"""SpQR's product of one token: bilevel groups plus sparse outliers against float32 and against plain integer groups.

    python -m benchmarks ops.spqr [--rounds 15] [--threads 2]

Matrices [4096, 11008] of 3 and 4 bits with 1 % of outliers, as the engine multiplies by them: codes by int8 dot
products, then the sparse part added in float32. Beside them float32 (torch) and integer groups of as many bits without
outliers; the imitation for the sparse part is scipy's CSR product in float32, where scipy is installed, added likewise.
Each round times every contender once, in turn; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse

import numpy as np

from barefoot import ops
from barefoot.ops import blocks, csr
from benchmarks import harness
from benchmarks.ops.lut import Work, contenders, race, ratio, torch_product

ROWS, COLS, SHARE = 4096, 11008, 0.01
PAPER = {"speed against f16 on a GPU, LLaMA": 1.15}


def panels(name: str, raw: np.ndarray) -> ops.PackedWeight:
    buffer = np.empty_like(raw.reshape(-1))
    ops.pack_panels(name, raw.reshape(-1), ROWS, COLS, buffer)
    return ops.PackedWeight(name, ROWS, COLS, buffer, "panels")


def products(bits: int) -> tuple[dict[str, Work], int]:
    """SpQR's product, the same with scipy's sparse one, and the bytes of a matrix. The first product is checked."""
    rng = np.random.default_rng(bits)
    dense = rng.standard_normal((ROWS, COLS), np.float32)
    name = f"bilevel{bits}"
    raw = blocks.encode(name, dense)
    mask = rng.random((ROWS, COLS), np.float32) < SHARE
    entries = csr.encode(dense, mask)
    weight, part = panels(name, raw), ops.Part(csr.KIND.name, ROWS, COLS, entries)
    x, out = rng.standard_normal((1, COLS), np.float32), np.empty((1, ROWS), np.float32)
    scratch = np.empty(
        max(ops.matmul_scratch_bytes(1, COLS), csr.KIND.scratch_bytes(1, ROWS, COLS, ops.n_threads())), np.uint8
    )

    def codes() -> None:
        ops.matmul(x, [weight], [out], scratch=scratch)

    def spqr() -> None:
        codes()
        ops.part_matmul(x, part, out, add=True, scratch=scratch)

    spqr()
    expected = x @ (blocks.decode(name, raw, COLS) + csr.decode(ROWS, COLS, entries)).T
    # Inputs are rounded to 8 bits for the codes.
    if np.abs(out - expected).max() > 0.02 * np.abs(expected).max():
        raise RuntimeError("the kernel computes another product")
    works: dict[str, Work] = {f"spqr{bits}": spqr, f"spqr{bits}, codes alone": codes}
    try:
        from scipy.sparse import csr_matrix
    except ImportError:
        return works, raw.nbytes + entries.nbytes
    sparse = csr_matrix(csr.decode(ROWS, COLS, entries))

    def with_scipy() -> None:
        codes()
        np.add(out[0], sparse @ x[0], out=out[0])

    works[f"spqr{bits}, scipy's sparse product"] = with_scipy
    return works, raw.nbytes + entries.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    ops.set_threads(args.threads)
    works, n_bytes = {}, {}
    for bits in (3, 4):
        found, n_bytes[f"spqr{bits}"] = products(bits)
        works |= found
        works[f"int{bits}"] = contenders(ROWS, COLS, bits)["panels"]
    if (dense := torch_product(ROWS, COLS)) is not None:
        works["torch"], n_bytes["torch"] = dense, 4 * ROWS * COLS
    config = {"rows": ROWS, "cols": COLS, "outliers": SHARE, "threads": args.threads, "rounds": args.rounds}
    facts = {"isa": ops.isa(), "read GB/s": harness.read_bandwidth(args.threads), "bytes": n_bytes}
    harness.card("SpQR, one token", config | facts)
    seconds = race(works, args.rounds)
    results = {name: {"us": harness.spread([round(1e6 * s, 2) for s in each])} for name, each in seconds.items()}
    for name, each in results.items():
        print(f"  {name:<32} {each['us']['median']:>10,.0f} us")
    pairs = [(other, f"spqr{bits}") for bits in (3, 4) for other in works if other not in (f"spqr{bits}",)]
    ratios = {f"{slow} / {fast}": round(ratio(seconds, slow, fast), 3) for slow, fast in pairs}
    claims = [
        harness.claim(f"spqr of {bits} bits is faster than torch float32, times", ratios[f"torch / spqr{bits}"],
                      at_least=1.0)
        for bits in (3, 4) if "torch" in works
    ]  # fmt: skip
    record = {"config": config, "card": facts, "paper": PAPER, "results": results, "ratios": ratios, "claims": claims}
    harness.save("ops/spqr", record, "torch", "scipy")


if __name__ == "__main__":
    main()
