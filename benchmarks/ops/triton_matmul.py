"""Triton kernels on a GPU: W4A16, W2A16 and bit planes beside torch's float16 product, with bytes a second.

Each contender multiplies x (n_tokens, cols) with the same weight [rows, cols], its own copy, and is checked against
the float64 product of what it stores. ``torch`` is torch.matmul in float16. ``W2A2 popcount`` is the other way to
multiply planes, by XOR and population count on ordinary cores, for one token and one group of all columns: what the
8-bit tensor cores are measured against (``barefoot.ops.triton.plane_matmul`` says why they were chosen). Caches are
flushed before every run. Needs a CUDA device, torch and triton.

    python -m benchmarks ops.triton_matmul [--shape 4096x4096,11008x4096] [--tokens 1,16,256,4096]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.testing import do_bench

from barefoot.ops import PackedWeight, blocks, cases, planes
from barefoot.ops.triton.panel_matmul import PanelWeight, panel_matmul
from barefoot.ops.triton.plane_matmul import DevicePlanes, plane_matmul
from benchmarks import harness

FORMATS = ("int8_g128_sym", "int4_g128_sym", "int4_g64_asym", "int3_g64_asym", "int2_g128_sym", "int2_g64_asym")
PAIRS = ((1, 1), (1, 2), (2, 2), (3, 4), (2, 8), (4, 8), (8, 8))
GROUP = 128
ROWS = 16  # that are made and checked; the weight repeats them
QUANTILES = (0.5, 0.1, 0.9)

Work = Callable[[], torch.Tensor]


@triton.jit
def _popcount(x, words, out, n_words, W_BITS: tl.constexpr, X_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Sixteen rows of planes (no header: one group, whose step is 2) with one token's planes (X_BITS, n_words)."""
    tile = words + tl.program_id(0).to(tl.int64) * (8 + 16 * W_BITS * n_words) + 8
    lane = tl.arange(0, 16)
    total = tl.zeros((BLOCK, 16), tl.int32)
    for start in range(0, n_words, BLOCK):
        w = start + tl.arange(0, BLOCK)
        some = w < n_words
        for i in tl.static_range(W_BITS):
            of_weight = tl.load(tile + (w[:, None] * W_BITS + i) * 16 + lane[None, :], mask=some[:, None], other=0)
            for j in tl.static_range(X_BITS):
                of_x = tl.load(x + j * n_words + w, mask=some, other=0)
                differing = of_weight ^ of_x[:, None]
                count = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [differing], tl.int32, True, 1)
                total += count << (i + j)
    whole = 32 * n_words * ((1 << W_BITS) - 1) * ((1 << X_BITS) - 1) - 2 * tl.sum(total, axis=0)
    tl.store(out + tl.program_id(0) * 16 + lane, whole.to(tl.float32))


def floats(format_id: str, x: torch.Tensor, rows: int) -> tuple[Work, int, np.ndarray]:
    """The work, the bytes of the weight, and the float64 product of its first rows."""
    cols, rng = x.shape[1], np.random.default_rng(0)
    raw = cases.random_packed(format_id, ROWS, cols, rng)
    few = PanelWeight.of(PackedWeight(format_id, ROWS, cols, raw.reshape(-1)), x.device)
    weight = PanelWeight(format_id, rows, cols, few.buffer.repeat(rows // ROWS))
    expected = as_float64(x) @ blocks.decode(format_id, raw, cols).astype(np.float64).T
    return (lambda: panel_matmul(x, weight)), weight.buffer.nbytes, expected


def few_bits(weight_bits: int, activation_bits: int, x: torch.Tensor, rows: int) -> tuple[Work, int, np.ndarray]:
    of_rows = random_planes(weight_bits, x.shape[1], GROUP)
    weight = repeated(of_rows, rows, x.device)
    expected = planes.product(x.float().cpu().numpy(), of_rows, activation_bits)
    return (lambda: plane_matmul(x, weight, activation_bits)), weight.buffer.nbytes, expected


def popcount(weight_bits: int, activation_bits: int, x: torch.Tensor, rows: int) -> tuple[Work, int, np.ndarray]:
    """Its activations are given as planes: rounding them is not timed."""
    cols, rng = x.shape[1], np.random.default_rng(1)
    of_rows = random_planes(weight_bits, cols, cols)
    weight = repeated(of_rows, rows, x.device)
    codes = rng.integers(0, 1 << activation_bits, cols, dtype=np.uint8)
    bits = codes[None, :] >> np.arange(activation_bits, dtype=np.uint8)[:, None] & 1
    packed = torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int32)).to(x.device)
    out = torch.empty((1, rows), device=x.device)
    stored, _, _ = planes.unpack(of_rows)
    expected = planes.values(codes[None], activation_bits) @ planes.values(stored, weight_bits).T

    def work() -> torch.Tensor:
        words = weight.buffer.view(torch.int32)
        _popcount[(rows // 16,)](packed, words, out, cols // 32, weight_bits, activation_bits, BLOCK=32)
        return out

    return work, weight.buffer.nbytes, expected.astype(np.float64)


def random_planes(bits: int, cols: int, group: int) -> planes.PlaneWeight:
    rng = np.random.default_rng(0)
    fmt = planes.PlaneFormat.bipolar(bits, group)
    codes = rng.integers(0, fmt.levels + 1, (ROWS, cols), dtype=np.uint8)
    return planes.pack(fmt, codes, np.full((ROWS, fmt.n_groups(cols)), 2, np.float16))


def repeated(weight: planes.PlaneWeight, rows: int, device: torch.device) -> DevicePlanes:
    buffer = torch.from_numpy(weight.buffer).to(device).repeat(rows // ROWS)
    return DevicePlanes(weight.format, rows, weight.cols, buffer)


def dense(x: torch.Tensor, rows: int) -> tuple[Work, int, np.ndarray]:
    few = torch.randn((ROWS, x.shape[1]), device=x.device).half()
    weight = few.repeat(rows // ROWS, 1)
    return (lambda: x @ weight.T), weight.nbytes, as_float64(x) @ as_float64(few).T


def as_float64(x: torch.Tensor) -> np.ndarray:
    return x.double().cpu().numpy()


def check(name: str, work: Work, expected: np.ndarray) -> None:
    """The whole result against the product of the rows that it repeats, within float16's rounding of it."""
    got = as_float64(work()).reshape(len(expected), -1, ROWS)
    worst = np.abs(got - expected[:, None]).max() / np.abs(expected).max()
    if not worst < 2.0**-9:
        raise RuntimeError(f"{name} computes another product: off by {worst:.2g} of the largest output")


def measured(work: Work, n_bytes: int) -> dict[str, Any]:
    median, least, most = do_bench(work, warmup=50, rep=200, quantiles=QUANTILES)
    return {"us": {"median": 1e3 * median, "p10": 1e3 * least, "p90": 1e3 * most}, "GB/s": n_bytes / median / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096,11008x4096", help="rows x columns, several with commas")
    parser.add_argument("--tokens", default="1,16,256,4096")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    device = torch.device("cuda")
    config = {"device": torch.cuda.get_device_name(), "shapes": args.shape, "tokens": args.tokens}
    harness.card("Triton kernels", config)
    results: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for shape in args.shape.split(","):
        rows, cols = map(int, shape.split("x"))
        for n_tokens in map(int, args.tokens.split(",")):
            x = torch.randn((n_tokens, cols), device=device).half()
            works = {"torch": dense(x, rows)}
            works |= {name: floats(name, x, rows) for name in FORMATS}
            works |= {f"W{w}A{a}": few_bits(w, a, x, rows) for w, a in PAIRS}
            if n_tokens == 1:
                works["W2A2 popcount"] = popcount(2, 2, x, rows)
            for name, (work, n_bytes, expected) in works.items():
                key = f"{shape} tokens={n_tokens} {name}"
                check(key, work, expected)
                results[key] = measured(work, n_bytes)
                first = results[f"{shape} tokens={n_tokens} torch"]["us"]["median"]
                ratios[f"torch / {key}"] = round(first / results[key]["us"]["median"], 3)
                print(
                    f"  {key:44} {results[key]['us']['median']:10.1f} us  {results[key]['GB/s']:8.0f} GB/s", flush=True
                )
    first_shape = args.shape.split(",")[0]
    claims = [
        harness.claim(
            f"{name}: one token, times torch float16 (4.25 and 2.25 bits: at most 3.8 and 7.1)", value, at_least=2
        )
        for name in ("int4_g128_sym", "int2_g128_sym")
        if (value := ratios.get(f"torch / {first_shape} tokens=1 {name}")) is not None
    ]
    harness.save(
        "ops/triton_matmul",
        {"config": config, "results": results, "ratios": ratios, "claims": claims},
        "torch",
        "triton",
    )


if __name__ == "__main__":
    main()
