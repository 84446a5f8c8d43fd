"""Bilevel groups: what two ways of sharing scales cost at equal bytes, along a row and across sixteen rows.

    python -m benchmarks weights.bilevel MODEL NAME [--layers 0 7 14 21 29]

The squared error of matrices rounded without feedback, relative to their squares, of ``ops.bilevel`` (along the row,
units of a few bits), of the tiles of SpQR (arXiv:2306.03078, section 4.1: in 16 x 16 weights 3-bit scales and zero
points, four f16 numbers), of tiles in the manner of K-quants (4-bit scales and minimums, two f16 numbers), all
b + 0.625 bits a weight, and of groups with f16 scales and minimums. Every one is fitted by the same search, the tiles
of SpQR besides by range, as the paper does. MODEL is a dithered reference (benchmarks/quality/dithered.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np

from barefoot.engine.source import Source
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.ops import blocks
from barefoot.ops.bilevel import BITS, GROUP, Bilevel
from barefoot.ops.grids import to_f16
from barefoot.weights.solvers.mse import least_error
from benchmarks.harness import card, claim, save

F32 = np.ndarray
ROWS = 16  # of a tile
EVERY = np.ones((GROUP, 1), np.float32)
SOUGHT = 2  # codes to either side


def in_blocks(weight: F32, format_id: str) -> F32:
    """Decoded, of a format's own encoding or with ranges of least error."""
    fmt = blocks.lookup(format_id)
    if fmt.grid is None:
        packed = blocks.encode(format_id, weight)
    else:
        x = weight.reshape(-1, fmt.grid.group)
        params = least_error(fmt.grid, x)
        packed = blocks.pack(format_id, fmt.grid.round(x, params).reshape(weight.shape), params)
    return blocks.decode(format_id, packed, weight.shape[1])


def tiles(weight: F32) -> F32:
    """(16, tiles × 16): groups as columns, those of a tile beside one another."""
    rows, cols = weight.shape
    return weight.reshape(rows // ROWS, ROWS, cols // GROUP, GROUP).transpose(3, 0, 2, 1).reshape(GROUP, -1)


def levels(values: F32, bits: int) -> tuple[F32, F32]:
    """Step and least level, f16, of ``values`` (tiles, 16) each tile's range."""
    low = to_f16(values.min(axis=1, keepdims=True))
    return to_f16((values.max(axis=1, keepdims=True) - low) / ((1 << bits) - 1)), low


def nearest(values: F32, step: F32, low: F32, most: int) -> F32:
    return np.clip(np.rint(np.divide(values - low, step, out=np.zeros_like(values), where=step != 0)), 0, most)


def best_of(form: Bilevel, x: F32, candidates: Iterator[tuple[F32, F32]]) -> float:
    """The squared error of the best pair of scale and zero point for each group."""
    least = np.full(x.shape[1], np.inf, np.float32)
    for scale, zero in candidates:
        least = np.minimum(least, form.errors(x, EVERY, np.maximum(scale, 0).reshape(-1), zero.reshape(-1)))
    return float(least.sum())


def papers_tiles(x: F32, form: Bilevel, sought: int, by_range: bool) -> float:
    """Scales and zero points of 3 bits, with steps and least levels."""
    if by_range:
        step = np.maximum(np.ptp(x, axis=0) / form.levels, np.float32(1e-12))
        zero = -x.min(axis=0) / step
    else:
        step, zero, _ = form.span(x, EVERY)
    scales, zeros = step.reshape(-1, ROWS), zero.reshape(-1, ROWS)
    of_scales, of_zeros = levels(scales, 3), levels(zeros, 3)
    s, z = nearest(scales, *of_scales, 7), nearest(zeros, *of_zeros, 7)

    def candidates() -> Iterator[tuple[F32, F32]]:
        for ds in range(-sought, sought + 1):
            for dz in range(-sought, sought + 1):
                scale = of_scales[1] + of_scales[0] * np.clip(s + ds, 0, 7)
                yield scale, of_zeros[1] + of_zeros[0] * np.clip(z + dz, 0, 7)

    return best_of(form, x, candidates())


def k_tiles(x: F32, form: Bilevel) -> float:
    """Scales and minimums of 4 bits, as multiples of a unit each."""
    step, zero, _ = form.span(x, EVERY)
    scales, minimums = step.reshape(-1, ROWS), np.maximum(step * zero, 0).reshape(-1, ROWS)
    unit, below = (to_f16(v.max(axis=1, keepdims=True) / 15) for v in (scales, minimums))
    none = np.float32(0)
    s, m = nearest(scales, unit, none, 15), nearest(minimums, below, none, 15)

    def candidates() -> Iterator[tuple[F32, F32]]:
        for ds in range(-SOUGHT, SOUGHT + 1):
            for dm in range(-SOUGHT, SOUGHT + 1):
                scale = unit * np.clip(s + ds, 1, 15)
                yield scale, below * np.clip(m + dm, 0, 15) / np.maximum(scale, np.float32(1e-12))

    return best_of(form, x, candidates())


def ways(bits: int) -> dict[str, tuple[float, Callable[[F32], float]]]:
    """Bits a weight and the squared error of a matrix."""
    form = Bilevel(bits)

    def of(format_id: str) -> tuple[float, Callable[[F32], float]]:
        return blocks.bits_per_weight(format_id), lambda w: float(np.square(in_blocks(w, format_id) - w).sum())

    return {
        "along the row": of(form.name),
        "tiles of SpQR, by range": (bits + 0.625, lambda w: papers_tiles(tiles(w), form, 0, True)),
        "tiles of SpQR, searched": (bits + 0.625, lambda w: papers_tiles(tiles(w), form, SOUGHT, False)),
        "tiles as K-quants": (bits + 0.625, lambda w: k_tiles(tiles(w), form)),
        "groups of 32, f16": of(f"int{bits}_g32_asym"),
        "groups of 64, f16": of(f"int{bits}_g64_asym"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name")
    parser.add_argument("--layers", type=int, nargs="*", default=[0, 7, 14, 21, 29])
    args = parser.parse_args()

    card(f"bilevel groups on {args.name}", {"layers": args.layers})
    results: dict[str, dict[str, float]] = {}
    with Checkpoint(args.model) as checkpoint:
        spec = model_spec(checkpoint)
        source = Source(checkpoint, spec)
        names = [w.name for w in spec.weights if w.layer in args.layers and w.group != "norm"]
        for bits in BITS:
            for way, (stored, error) in ways(bits).items():
                relative = [error(w) / float(np.square(w).sum()) for w in map(source.floats, names)]
                mean = float(np.exp(np.mean(np.log(relative))))
                results[f"{bits} bits, {way}"] = {"bits": stored, "relative squared error": mean}
                print(f"  {bits} bits, {way:26} {stored:.4f} bits, relative squared error {mean:.5g}", flush=True)

    def ratio(ours: str, other: str) -> float:
        return results[ours]["relative squared error"] / results[other]["relative squared error"]

    claims = [
        claim(
            f"{bits} bits: error along the row / {other}",
            ratio(f"{bits} bits, along the row", f"{bits} bits, {other}"),
            at_most=most,
        )
        for bits in BITS
        for other, most in (("tiles of SpQR, by range", 1), ("tiles of SpQR, searched", 1), ("groups of 32, f16", 0.8))
    ]
    save(f"weights/bilevel_{args.name}", {"config": {"layers": args.layers}, "results": results, "claims": claims})


if __name__ == "__main__":
    main()
