"""Look-up kernels (T-MAC, arXiv:2407.00088) against multiplying ones, one token: time by bits, shape and threads.

Contenders, all on this process's instruction set unless named otherwise, on the same weights:

* ``lut``: barefoot's look-up layout; ``panels`` and ``rows``: its int8 dot products, in both layouts;
* ``registers``: 2-bit codes unpacked to float32 in registers and multiplied-added, unpack_registers.c compiled here for
  AVX2; only beside the AVX2 kernels and with one thread;
* ``torch``: a float32 matrix-vector product, where torch is installed.

Each round times every contender once, in turn; a ratio is the median of the rounds' ratios, so that a slow spell of a
shared machine hits both sides. A matrix is the only one in use: what its caches hold is not read from memory.

python benchmarks/ops/lut.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[2]))

from barefoot import ops
from barefoot.ops import blocks
from benchmarks import harness

SHAPES = ((4096, 4096), (11008, 4096), (576, 1536), (1536, 576))
BITS = (1, 2, 3, 4)
Work = Callable[[], object]


def format_of(bits: int, n_cols: int) -> str:
    return f"int{bits}_g{64 if n_cols % 128 else 128}_asym"


def random_rows(name: str, rows: int, cols: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """All codes random, one scale and minimum for all groups."""
    raw = rng.integers(0, 256, (rows * blocks.n_blocks(name, cols), blocks.block_bytes(name)), dtype=np.uint8)
    raw[:, :4] = np.array([0.01, -0.02], np.float16).view(np.uint8)
    return raw.reshape(-1)


def registers_product(rows: int, cols: int) -> Work | None:
    """The C kernel on the same weights; None without a compiler. Its result is checked first."""
    library = Path(tempfile.mkdtemp()) / "unpack.so"
    source = Path(__file__).with_name("unpack_registers.c")
    compile_it = ["cc", "-O3", "-mavx2", "-mfma", "-mf16c", "-shared", "-fPIC", str(source), "-o", str(library)]
    try:
        subprocess.run(compile_it, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    name, rng = format_of(2, cols), np.random.default_rng(0)
    raw, group = random_rows(name, rows, cols, rng), blocks.block_elements(name)
    x, out = rng.standard_normal(cols).astype(np.float32), np.empty(rows, np.float32)
    sums = x.reshape(-1, group).sum(axis=1)
    multiply = ctypes.CDLL(str(library)).multiply
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (raw, x, sums, out)]
    sizes = (ctypes.c_long(rows), ctypes.c_long(cols // group), ctypes.c_int(group))

    def work(kept: object = (raw, x, sums, out)) -> None:
        multiply(pointers[0], *sizes, *pointers[1:])

    work()
    expected = blocks.decode(name, raw.reshape(rows, -1), cols) @ x
    if np.abs(out - expected).max() > 1e-4 * np.abs(expected).max():
        raise RuntimeError("unpack_registers.c computes another product")
    return work


def contenders(rows: int, cols: int, bits: int) -> dict[str, Work]:
    rng = np.random.default_rng(0)
    name = format_of(bits, cols)
    raw = random_rows(name, rows, cols, rng)
    x, out = rng.standard_normal((1, cols)).astype(np.float32), np.empty((1, rows), np.float32)
    scratch = np.empty(ops.matmul_scratch_bytes(1, cols, looks_up=True), np.uint8)

    def multiply(layout: str) -> Work:
        buffer = raw.copy()
        if layout != "rows":
            pack = ops.pack_lut if layout == "lut" else ops.pack_panels
            pack(name, raw, rows, cols, buffer)
        weight = ops.PackedWeight(name, rows, cols, buffer, layout)
        return lambda: ops.matmul(x, [weight], [out], scratch=scratch)

    return {
        "lut": multiply("lut"),
        "panels": multiply("panels"),
        "rows": multiply("rows"),
    }


def torch_product(rows: int, cols: int) -> Work | None:
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(ops.n_threads())
    matrix, vector = torch.randn(rows, cols), torch.randn(cols)
    return lambda: torch.mv(matrix, vector)


def race(works: dict[str, Work], n_rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for i in range(n_rounds + 2):
        for name, work in works.items():
            work()  # what the contender before left in the caches is not its own
            start = time.perf_counter()
            work()
            if i >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    n_rounds = parser.parse_args().rounds
    isas = [name for name in ("avx2", ops.isa()) if name in ops.available_isas()]
    config = {"shapes": SHAPES, "bits": BITS, "threads": (1, 2), "rounds": n_rounds, "isas": isas}
    bandwidth = harness.read_bandwidth(2)
    harness.card("look-up tables against dot products, one token", config | {"read GB/s": bandwidth})
    results, ratios = {}, {}
    for isa in isas:
        ops.set_isa(isa)
        for n_threads in (1, 2):
            ops.set_threads(n_threads)
            for rows, cols in SHAPES:
                works = {f"{n}{b}": w for b in BITS for n, w in contenders(rows, cols, b).items()}
                if isa == "avx2" and n_threads == 1 and (unpacking := registers_product(rows, cols)) is not None:
                    works["registers2"] = unpacking
                if (dense := torch_product(rows, cols)) is not None:
                    works["torch"] = dense
                seconds = race(works, n_rounds)
                key = f"{isa} {rows}x{cols} {n_threads} thread{'s' if n_threads > 1 else ''}"
                results[key] = {
                    n: {"us": harness.spread([round(1e6 * s, 2) for s in each])} for n, each in seconds.items()
                }
                found = {f"lut time, 4 bits / {b}": ratio(seconds, "lut4", f"lut{b}") for b in (1, 2)}
                for b in BITS:
                    for other in ("panels", "rows"):
                        found[f"{b} bits, {other} / lut"] = ratio(seconds, f"{other}{b}", f"lut{b}")
                    if dense is not None:
                        found[f"{b} bits, torch / lut"] = ratio(seconds, "torch", f"lut{b}")
                if "registers2" in works:
                    found["2 bits, registers / lut"] = ratio(seconds, "registers2", "lut2")
                ratios[key] = {name: round(value, 3) for name, value in found.items()}
                print(key, "  ".join(f"{n} {v['us']['median']:,.0f}" for n, v in results[key].items()), flush=True)
    claims = []
    for isa in isas:
        big = ratios[f"{isa} 4096x4096 1 thread"]
        claims += [
            harness.claim(f"{isa}: time(4 bits) / time(1 bit)", big["lut time, 4 bits / 1"], at_least=2.5),
            harness.claim(f"{isa}: time(4 bits) / time(2 bits)", big["lut time, 4 bits / 2"], at_least=1.5),
        ]
        if "2 bits, registers / lut" in big:
            unpacking = big["2 bits, registers / lut"]
            claims.append(harness.claim(f"{isa}: 2 bits, unpacking in registers / lut", unpacking, at_least=1.3))
        if "2 bits, torch / lut" in big:
            claims.append(harness.claim(f"{isa}: 2 bits, torch f32 / lut", big["2 bits, torch / lut"], at_least=3.0))
    notes = (
        "4096x4096 with one thread decides the claims. Against the int8 panels there is no claim: the ratios say where "
        "dot products win (below 1) and where look-ups do. Other work ran on the machine at the same time: ratios are "
        "medians over interleaved rounds, absolute times are not to be quoted."
    )
    record = {"config": config, "card": {"read_gb_s": bandwidth, "notes": notes}, "results": results}
    harness.save("ops/lut", record | {"ratios": ratios, "claims": claims}, "torch")


if __name__ == "__main__":
    main()
