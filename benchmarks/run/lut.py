"""Look-up tables end to end (T-MAC, LUT Tensor Core): decode and memory by bits and layout, quality, table counts.

    python -m benchmarks.run.lut MODEL NAME [--bits 4 2] [--rounds 5] [--windows 2] [--window 256] [--text FILE]

All matrices of MODEL are converted to integer groups. Speed and peak memory: fresh processes in alternating rounds, the
same weights in panels and in the look-up layout. Quality: every product of a text looked up (chunks of 8 tokens, the
most that are), against the same weights with float32 activations; beside it 8-bit activations in panels. Counts: what
the engine records for a token. Rounding: relative error of a product with random 2-bit weights, 1,024 inputs, plain and
with 1 % of the inputs 20 times as large, against rounding activations to 8 bits with one scale a token. The claims on
it are the paper's, with a scale for each table (by its formula, in numpy); what the kernels reach with a scale for
eight tables is among the ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.evals.divergence import Divergence, windows
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.kv.stores.f32 import FloatStore
from barefoot.ops import blocks, lut
from barefoot.ops.dispatch import parse_layouts
from barefoot.plan.job import parse_weights
from benchmarks.harness import card, child, claim, read_bandwidth, rounds, save
from benchmarks.quality.formats import scored, text_of

WORKER = Path(__file__).with_name("barefoot_worker.py")
LAYOUTS = ("panels", "lut")
F64 = npt.NDArray[np.float64]


def weights_of(bits: int) -> str:
    return f"int(bits={bits},group=64)"


def layouts_of(bits: int, layout: str) -> str:
    return " ".join(f"{bits}/{size}={layout}" for size in ("small", "large"))


def settings_of(bits: int, layout: str) -> dict[str, Any]:
    return {"weights": parse_weights(weights_of(bits)), "layouts": parse_layouts(layouts_of(bits, layout))}


def quality(model: str, texts: list[list[int]], bits: int, n_threads: int) -> dict[str, dict[str, float]]:
    """Each layout against float32 activations on the same weights: cosine of the logits, perplexities, KL."""
    base = {"context": len(texts[0]), "kv": FloatStore(), "n_threads": n_threads}
    whole = {"chunk": len(texts[0]), "n_logits": len(texts[0]) // 2}
    exact = EngineConfig(**base, **whole, weights=parse_weights(weights_of(bits)), activations="float32")
    reference = list(scored(model, exact, texts))
    found = {}
    for layout in LAYOUTS:
        config = EngineConfig(**base, **settings_of(bits, layout), chunk=lut.FEW_TOKENS, n_logits=lut.FEW_TOKENS)
        divergence, cosines = Divergence(), []
        for tokens, there, here in zip(texts, reference, scored(model, config, texts), strict=True):
            divergence.add(there, here, np.asarray(tokens[len(tokens) // 2 + 1 :]))
            dots = np.einsum("tv,tv->t", there, here, dtype=np.float64)
            cosines.append(dots / (np.linalg.norm(there, axis=1) * np.linalg.norm(here, axis=1)))
        every = np.concatenate(cosines)
        found[layout] = {**divergence.summary, "cosine_mean": float(every.mean()), "cosine_min": float(every.min())}
    return found


@contextmanager
def counting() -> Iterator[list[int]]:
    """The number of weights of each product that programs record meanwhile; one product builds its tables once."""
    counts: list[int] = []
    original = ops.Program

    class Counting:
        def __init__(self) -> None:
            self._program = original()

        def matmul(self, x: Any, weights: Any, outs: Any, **more: Any) -> None:
            counts.append(len(weights))
            self._program.matmul(x, weights, outs, **more)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._program, name)

    ops.Program = Counting  # type: ignore[assignment, misc]
    try:
        yield counts
    finally:
        ops.Program = original  # type: ignore[misc]


def table_counts(model: str, bits: int, n_threads: int) -> dict[str, float]:
    """Per layer and token: tables built, matrices that they serve, and the most bytes of tables at once."""
    config = EngineConfig(context=16, kv=FloatStore(), chunk=1, n_threads=n_threads, **settings_of(bits, "lut"))
    with Checkpoint(model) as checkpoint, counting() as counts:
        spec = model_spec(checkpoint)
        with Engine(checkpoint, spec, config):
            pass
    widest = max(w.cols for w in spec.weights if w.rows > 1)
    tables, plain = (ops.matmul_scratch_bytes(1, widest, looks_up=each) for each in (True, False))
    return {
        "tables built, per layer": len(counts) / spec.n_layers,
        "matrices served, per layer": sum(counts) / spec.n_layers,
        "table bytes": tables - plain,
        "bytes of the widest input in f16": 2 * widest,
    }


def rounding(outliers: bool) -> dict[str, float]:
    """Relative error of a product by what is rounded to 8 bits; the kernels' and, by its formula, a scale per run."""
    rng = np.random.default_rng(0)
    name, n_rows, n_cols = "int2_g64_sym", 512, 1024
    x = rng.standard_normal((lut.FEW_TOKENS, n_cols)).astype(np.float32)
    if outliers:
        x[:, rng.choice(n_cols, n_cols // 100, replace=False)] *= 20
    raw = blocks.encode(name, rng.uniform(-1, 1, (n_rows, n_cols)).astype(np.float32))
    weights = blocks.decode(name, raw, n_cols).astype(np.float64)
    exact = x @ weights.T
    packed = {"panels": np.empty(raw.size, np.uint8), "lut": np.empty(raw.size, np.uint8)}
    ops.pack_panels(name, raw, n_rows, n_cols, packed["panels"])
    ops.pack_lut(name, raw, n_rows, n_cols, packed["lut"])
    scratch = np.empty(ops.matmul_scratch_bytes(len(x), n_cols, looks_up=True), np.uint8)

    def error(product: F64 | npt.NDArray[np.float32]) -> float:
        return float(np.linalg.norm(product - exact) / np.linalg.norm(exact))

    def kernel(layout: str) -> float:
        out = np.empty((len(x), n_rows), np.float32)
        weight = ops.PackedWeight(name, n_rows, n_cols, packed[layout], layout)
        ops.matmul(x, [weight], [out], scratch=scratch)
        return error(out)

    a_token = np.abs(x).max(axis=1, keepdims=True).astype(np.float64) / 127
    # A table of its own scale for each run of four, whose entries are then rounded: entry j is what codes make of it.
    runs = x.astype(np.float64).reshape(len(x), -1, lut.RUN)
    step = np.abs(runs).sum(axis=2)[..., None] / 127
    entries = np.rint(lut.exact_tables(x).astype(np.float64) / step) * step
    codes = np.rint(weights / _scales(raw, name, n_rows, n_cols)).astype(int) + 2
    product = np.zeros_like(exact)
    for plane in range(2):
        bits = (codes >> plane & 1).reshape(n_rows, -1, lut.RUN)
        indices = (bits << np.arange(lut.RUN)).sum(axis=2)
        signed = entries[:, np.arange(indices.shape[1]), indices]  # [token, row, run]
        product += 0.5 * 2**plane * (signed * _scales(raw, name, n_rows, n_cols)[:, :: lut.RUN]).sum(axis=2)
    product -= 0.5 * x.astype(np.float64) @ _scales(raw, name, n_rows, n_cols).T
    return {
        "activations, a scale a token": error(np.rint(x / a_token) * a_token @ weights.T),
        "activations, a scale for 32 (panels)": kernel("panels"),
        "tables, a scale for 32 inputs (lut)": kernel("lut"),
        "tables, a scale for 4 inputs": error(product),
    }


def _scales(raw: npt.NDArray[np.uint8], name: str, n_rows: int, n_cols: int) -> F64:
    """The scale of each weight, (rows, cols)."""
    scales = raw.reshape(n_rows, -1, blocks.block_bytes(name))[..., :2].copy().view(np.float16)
    return np.repeat(scales[..., 0].astype(np.float64), blocks.block_elements(name), axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("name")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=128)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--text")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window", type=int, default=256)
    args = parser.parse_args()

    base = {"model": args.model, "context": args.prefill + args.decode, "n_threads": args.threads}
    base |= {"prefill": args.prefill, "decode": args.decode, "chunk": args.prefill}
    with Checkpoint(args.model) as checkpoint:
        tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer.encode(text_of(args.text)[: 12 * args.windows * args.window], add_bos=False)
    texts = list(windows(ids, args.window, tokenizer.bos_id if tokenizer.add_bos else None))[: args.windows]
    facts = {k: v for k, v in base.items() if k != "model"} | {
        "kernels": ops.backend(),
        "file": Path(args.model).name,
        "read GB/s": read_bandwidth(args.threads),
        **table_counts(args.model, args.bits[0], args.threads),
    }
    card(f"run: look-up tables, {args.name}", facts)

    def process(bits: int, layout: str) -> dict[str, Any]:
        return child(WORKER, base | {"weights": weights_of(bits), "layouts": layouts_of(bits, layout)})

    contenders = {f"{bits} bits, {layout}": (bits, layout) for bits in args.bits for layout in LAYOUTS}
    results: dict[str, Any] = rounds(
        {name: lambda each=each: process(*each) for name, each in contenders.items()},  # type: ignore[misc]
        args.rounds,
    )
    claims = [
        claim("tables built per layer and token: one for q, k, v, one for gate, up", facts["tables built, per layer"],
              at_least=4, at_most=4)
    ]  # fmt: skip
    for bits in args.bits:
        found = quality(args.model, texts, bits, args.threads)
        for layout, summary in found.items():
            results[f"{bits} bits, {layout}"]["quality"] = summary
            print(f"  {bits} bits, {layout}: " + "  ".join(f"{k} {v:.6g}" for k, v in summary.items()), flush=True)
        looked_up = found["lut"]
        off = abs(looked_up["perplexity"] / looked_up["reference_perplexity"] - 1)
        claims += [
            claim(f"{bits} bits: cosine to float32 activations", looked_up["cosine_mean"], at_least=0.999),
            claim(f"{bits} bits: perplexity off by", off, at_most=0.005),
        ]
    errors = {"plain": rounding(False), "1 % outliers": rounding(True)}
    ratios = {}
    for (case, each), bound in zip(errors.items(), (0.6, 0.2), strict=True):
        token = each["activations, a scale a token"]
        ratios |= {f"{case}: error of {what} / of activations, a scale a token": e / token for what, e in each.items()}
        measured = each["tables, a scale for 4 inputs"] / token
        claims.append(claim(f"{case}: error of tables / of activations, a scale a token", measured, at_most=bound))

    def decode(bits: int, layout: str) -> float:
        return float(results[f"{bits} bits, {layout}"]["decode_tokens_per_s"]["median"])

    ratios |= {f"{bits} bits, decode: lut / panels": decode(bits, "lut") / decode(bits, "panels") for bits in args.bits}
    save(
        f"run/lut_{args.name}",
        {
            "config": base | {"model": Path(args.model).name, "bits": args.bits, "rounds": args.rounds},
            "card": facts,
            "results": results | {"rounding": errors},
            "ratios": {name: round(value, 3) for name, value in ratios.items()},
            "claims": claims,
        },
    )


if __name__ == "__main__":
    main()
