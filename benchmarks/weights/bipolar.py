"""Codes without a zero against codes with one: what bipolar weights and activations cost in quality at equal bytes.

Efficient Arbitrary Precision Acceleration for Large Language Models on GPU Tensor Cores (Ma et al. 2024,
arXiv:2409.17870) stores odd multiples of a step, -(2^n - 1) .. 2^n - 1. Here the matrices of the layers are rounded
to such a grid, to integers around a zero, and to integers above a minimum, in groups such that all three take the same
bytes, each with the same search for the parameters of least squared error; embedding and head stay. Then, with weights
as they are, the inputs of all matrices are rounded to few bits, without and with a zero. KL to the model as it is.
The claims say that no width is better off without a zero or a minimum, so that fits have no bipolar format; products
read integers of either kind as planes without loss (``barefoot.ops.planes``).

    python -m benchmarks weights.bipolar NAME=MODEL --text FILE [--windows 4] [--window 256] [--every 1]

``--every 3`` rounds in every third layer only, which takes a third of the time. All passes are numpy's in float32
(``barefoot.engine.layer_pass``); nothing is packed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from barefoot import ops
from barefoot.core.model import ModelSpec
from barefoot.engine.layer_pass import STAGES, LayerPass
from barefoot.engine.source import Source
from barefoot.engine.specs import model_spec
from barefoot.evals.divergence import Divergence
from barefoot.evals.scoring import text_windows
from barefoot.evals.texts import read_text
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.ops.grids import F32, Grid, Table, Uniform
from barefoot.ops.planes import quantize_activations, values
from barefoot.weights.solvers import solve_groups
from barefoot.weights.solvers.mse import least_error
from benchmarks import harness

Rounding = Callable[[F32], F32]
WEIGHT_BITS, ACTIVATION_BITS = (4, 3, 2, 1), (8, 6, 4, 3, 2)
ONE_NUMBER, TWO_NUMBERS = 32, 64  # columns of groups with one f16 number and with two: half a bit a weight
ACTIVATION_GROUP = 64


def bipolar(bits: int) -> Grid:
    return Table(tuple(float(v) for v in range(1 - 2**bits, 2**bits, 2)), ONE_NUMBER)


def grids(bits: int) -> dict[str, Grid]:
    """Of equal bytes. One bit around a zero would be 0 and -1."""
    found = {
        "bipolar": bipolar(bits),
        "zero": Uniform(bits, ONE_NUMBER, symmetric=True),
        "minimum": Uniform(bits, TWO_NUMBERS),
    }
    return {name: grid for name, grid in found.items() if bits > 1 or name != "zero"}


def to_grid(grid: Grid) -> Rounding:
    def rounded(weight: F32) -> F32:
        return solve_groups(weight, grid, least_error(weight, grid)).weights(grid)

    return rounded


def without_zero(bits: int) -> Rounding:
    """As ``barefoot.ops.planes`` rounds activations."""

    def rounded(x: F32) -> F32:
        codes, scales, _ = quantize_activations(x, bits, ACTIVATION_GROUP)
        return (values(codes, bits) * np.repeat(scales, ACTIVATION_GROUP, axis=1)[:, : x.shape[1]]).astype(np.float32)

    return rounded


def with_zero(bits: int) -> Rounding:
    """2^bits - 1 multiples of a step around 0, one step per token and group."""

    def rounded(x: F32) -> F32:
        groups = x.reshape(len(x), -1, ACTIVATION_GROUP)
        step = np.abs(groups).max(axis=2, keepdims=True) / np.float32(2 ** (bits - 1) - 1)
        codes = np.rint(np.divide(groups, step, out=np.zeros_like(groups), where=step > 0))
        return (codes * step).reshape(x.shape)

    return rounded


def same(x: F32) -> F32:
    return x


def logits(
    source: Source, spec: ModelSpec, texts: Sequence[Sequence[int]], weights: Rounding, inputs: Rounding, every: int = 1
) -> Iterator[F32]:
    """Of the second half of each window, with the matrices of every so many layers and their inputs rounded."""
    names = {w.name for w in spec.weights}
    embed = source.floats("embed")
    hidden = [embed[list(ids)] * np.float32(spec.embed_scale) for ids in texts]
    shift = np.float32(spec.norm_plus_one)
    for layer in range(spec.n_layers):
        prefix = f"layers.{layer}."
        roles = [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
        matrices = {role for stage in STAGES.values() for role in stage}
        vectors = {role: source.floats(prefix + role)[0] for role in roles if role not in matrices}
        factors = {role: v + shift if role.endswith("norm") else v for role, v in vectors.items()}
        there = LayerPass(spec, layer, factors)
        of_weights, of_inputs = (weights, inputs) if layer % every == 0 else (same, same)
        dense = {role: of_weights(source.floats(prefix + role)) for role in matrices}

        def products(
            xs: list[F32], stage: str, dense: dict[str, F32] = dense, rounded: Rounding = of_inputs
        ) -> list[list[F32]]:
            return [[rounded(x) @ dense[role].T for role in STAGES[stage]] for x in xs]

        x = [there.attend(*qkv) for qkv in products([there.attn_in(h) for h in hidden], "attn_in")]
        hidden = [there.after_attention(h, o) for h, (o,) in zip(hidden, products(x, "attn_out"), strict=True)]
        x = [there.activate(*both) for both in products([there.ffn_in(h) for h in hidden], "ffn_in")]
        hidden = [there.after_ffn(h, down) for h, (down,) in zip(hidden, products(x, "ffn_out"), strict=True)]
    head = source.floats("head") if "head" in names else embed
    norm = source.floats("norm")[0] + shift
    for h in hidden:
        last = np.empty_like(h)
        ops.rmsnorm(h, norm, spec.norm_eps, last)
        yield last[len(h) // 2 : -1] @ head.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="NAME=MODEL")
    parser.add_argument("--text", required=True)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--every", type=int, default=1)
    args = parser.parse_args()
    name, path = args.model.split("=", 1)
    runs = {
        f"weights {kind} {bits}": (to_grid(grid), same) for bits in WEIGHT_BITS for kind, grid in grids(bits).items()
    }
    for bits in ACTIVATION_BITS:
        runs[f"activations bipolar {bits}"] = (same, without_zero(bits))
        runs[f"activations zero {bits}"] = (same, with_zero(bits))
    config = {
        "model": name,
        "text": Path(args.text).name,
        "window": args.window,
        "windows": args.windows,
        "every": args.every,
    }
    harness.card("bipolar codes", config | {"runs": len(runs)})
    results: dict[str, dict[str, float]] = {}
    with Checkpoint(path) as checkpoint:
        spec = model_spec(checkpoint)
        source = Source(checkpoint, spec)
        texts = text_windows(read_text(args.text), load_tokenizer(checkpoint), args.window, args.windows * args.window)
        reference = list(logits(source, spec, texts, same, same))
        for label, (weights, inputs) in runs.items():
            divergence = Divergence()
            for ids, there, here in zip(
                texts, reference, logits(source, spec, texts, weights, inputs, args.every), strict=True
            ):
                for row in range(0, len(there), 8):
                    some = slice(row, row + 8)
                    targets = np.asarray(ids[len(ids) // 2 + 1 :], np.int64)
                    divergence.add(there[some], here[some], targets[some])
            results[label] = divergence.summary
            print(
                f"  {label:24} KL {results[label]['kl_mean']:.4g}  perplexity {results[label]['perplexity']:.4g}",
                flush=True,
            )
    kl = {label: result["kl_mean"] for label, result in results.items()}
    ratios = {
        f"weights: bipolar / minimum, {b} bits": kl[f"weights bipolar {b}"] / kl[f"weights minimum {b}"]
        for b in WEIGHT_BITS
    }
    ratios |= {
        f"weights: bipolar / zero, {b} bits": kl[f"weights bipolar {b}"] / kl[f"weights zero {b}"]
        for b in WEIGHT_BITS
        if b > 1
    }
    ratios |= {
        f"activations: bipolar / zero, {b} bits": kl[f"activations bipolar {b}"] / kl[f"activations zero {b}"]
        for b in ACTIVATION_BITS
    }
    claims = [
        harness.claim(
            f"weights of {b} bits: KL of bipolar / of a {kind}",
            ratios[f"weights: bipolar / {kind}, {b} bits"],
            at_least=1,
        )
        for kind in ("minimum", "zero")
        for b in WEIGHT_BITS
        if f"weights: bipolar / {kind}, {b} bits" in ratios
    ]
    rounded = {label: round(value, 4) for label, value in ratios.items()}
    harness.save(f"weights/bipolar_{name}", {"config": config, "results": results, "ratios": rounded, "claims": claims})


if __name__ == "__main__":
    main()
