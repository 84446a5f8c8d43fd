"""JLCM on the hidden layers of MiniLM at 3 bits: order, joint learning and the proximal gradient, each against without.

    python -m benchmarks weights.jlcm --model FOLDER --text FILE [FILE ...] [--steps 100]

FOLDER is all-MiniLM-L6-v2, FILE WikiText. Both matrices of every feed-forward block are compressed, block after block,
inputs taken from the compressed prefix; attention stays in float32. Measured on held-out passages: the mean squared
error of each block's output, of the whole prefix, and the cosine of the sentence embedding to the original's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from barefoot.weights.codebooks import jlcm
from barefoot.weights.codebooks.jlcm import Jlcm, Mapped
from barefoot.weights.codebooks.ordering import order_by_distribution
from barefoot.weights.taxonomy import Quantizer
from benchmarks.harness import card, claim, save
from benchmarks.weights.passages import load, passages

BITS = 3
Matrices = dict[str, np.ndarray]


@dataclass(frozen=True)
class Block:
    """One feed-forward block: hidden states behind attention to the layer's output."""

    layer: nn.Module

    @property
    def matrices(self) -> Matrices:
        return {
            "up": self.layer.intermediate.dense.weight.detach().numpy(),
            "down": self.layer.output.dense.weight.detach().numpy(),
        }

    def __call__(self, weights: Mapping[str, torch.Tensor], x: torch.Tensor, order: np.ndarray | None = None) -> Any:
        """``order`` of the hidden neurons, in which ``weights`` are."""
        up, down = self.layer.intermediate.dense, self.layer.output.dense
        bias = up.bias if order is None else up.bias[torch.from_numpy(order)]
        hidden = nn.functional.gelu(nn.functional.linear(x, weights["up"], bias))
        return self.layer.output.LayerNorm(nn.functional.linear(hidden, weights["down"], down.bias) + x)


@dataclass(frozen=True)
class Compressed:
    weights: Matrices
    order: np.ndarray | None
    n_bytes: int


Method = Callable[[Block, torch.Tensor, torch.Tensor], Compressed]


def by_rows(block: Block, *_: torch.Tensor, quantizer: Quantizer) -> Compressed:
    """One of the survey's quantizers."""
    encoded = {name: quantizer.encode(w) for name, w in block.matrices.items()}
    return Compressed({n: e.decode() for n, e in encoded.items()}, None, sum(e.n_bytes for e in encoded.values()))


def groups_for(shape: tuple[int, int], budget_bytes: int, absorbed: bool) -> int:
    """The most codebooks within a budget."""
    n = 1
    while Jlcm(BITS, n + 1).n_bytes(shape, absorbed) <= budget_bytes and n < shape[0]:
        n += 1
    return n


def grouped(
    block: Block,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    budgets: Mapping[str, int],
    ordered: bool,
    n_steps: int = 0,
    **options: Any,
) -> Compressed:
    """Codebooks for groups of rows. The order of hidden neurons is absorbed by down's columns; down's own rows, the
    residual stream, keep their places, and a map says which group each belongs to."""
    mapping_travel = options.pop("mapping_travel", Jlcm.mapping_travel)
    original = block.matrices
    shuffle = np.random.default_rng(0).permutation
    choose = order_by_distribution if ordered else lambda w, n: shuffle(len(w))
    knobs = {n: Jlcm(BITS, groups_for(w.shape, budgets[n], n == "up"), n_steps=n_steps) for n, w in original.items()}
    knobs = {name: replace(k, mapping_travel=mapping_travel) for name, k in knobs.items()}
    hidden = choose(original["up"], knobs["up"].n_groups)
    moved = {"up": original["up"][hidden], "down": original["down"][:, hidden]}
    rows = choose(moved["down"], knobs["down"].n_groups)
    moved["down"] = moved["down"][rows]
    back = np.argsort(rows)
    start = {name: jlcm.initial(knobs[name], w) for name, w in moved.items()}

    def forward(weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return block({"up": weights["up"], "down": weights["down"][torch.from_numpy(back)]}, x, hidden)

    found: Mapping[str, Mapped] = {name: jlcm.stored(m) for name, m in start.items()}
    if n_steps:
        found = jlcm.learn(knobs["up"], moved, start, forward, inputs, targets, **options)
    n_bytes = sum(sum(s.nbytes for s in jlcm.pack(knobs[n], m)) for n, m in found.items())
    n_bytes += len(rows) * (knobs["down"].n_groups - 1).bit_length() // 8
    return Compressed({"up": found["up"].weights(), "down": found["down"].weights()[back]}, hidden, n_bytes)


@torch.no_grad()
def attended(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = layer.attention(x)
    return y[0] if isinstance(y, tuple) else y


def measured(encoder: nn.Module, method: Method, calibration: torch.Tensor, held_out: torch.Tensor) -> dict[str, Any]:
    """Compress block after block with ``method``."""
    with torch.no_grad():
        real, ours = encoder.embeddings(calibration), encoder.embeddings(calibration)
        real_test, ours_test = encoder.embeddings(held_out), encoder.embeddings(held_out)
    block_errors, prefix_errors, weight_error, n_bytes = [], [], 0.0, 0
    for layer in encoder.encoder.layer:
        block = Block(layer)
        originals = {name: torch.from_numpy(w) for name, w in block.matrices.items()}
        real, ours, real_test, ours_test = (attended(layer, x) for x in (real, ours, real_test, ours_test))
        with torch.no_grad():
            target = block(originals, real)
        done = method(block, ours.reshape(-1, ours.shape[-1]), target.reshape(-1, target.shape[-1]))
        weights = {name: torch.from_numpy(w) for name, w in done.weights.items()}
        with torch.no_grad():
            goal = block(originals, real_test)
            block_errors.append(float(((block(weights, real_test, done.order) - goal) ** 2).mean()))
            ours, ours_test = block(weights, ours, done.order), block(weights, ours_test, done.order)
            prefix_errors.append(float(((ours_test - goal) ** 2).mean()))
        expected = block.matrices
        if done.order is not None:
            expected = {"up": expected["up"][done.order], "down": expected["down"][:, done.order]}
        weight_error += sum(float(((done.weights[n] - w) ** 2).sum()) for n, w in expected.items())
        n_bytes += done.n_bytes
        real, real_test = target, goal
    cosine = torch.cosine_similarity(ours_test.mean(1), real_test.mean(1)).mean()
    return {
        "bytes": n_bytes,
        "squared error of the weights": round(weight_error, 2),
        "block errors": [round(e, 6) for e in block_errors],
        "prefix errors": [round(e, 6) for e in prefix_errors],
        "embedding cosine": round(float(cosine), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--passages", type=int, default=128, help="to learn on, and held out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load(args.model, 2, seed=0)
    model.requires_grad_(False)
    data = passages("".join(Path(f).read_text("utf-8") for f in args.text), tokenizer, 16, 32)
    encoder, n = model.encoder, args.passages
    shapes = {name: w.shape for name, w in Block(encoder.encoder.layer[0]).matrices.items()}
    row_scales = Quantizer(BITS, "clusters", "full", (1, None))
    budgets = {name: row_scales.n_bytes(shape) for name, shape in shapes.items()}
    common: dict[str, Any] = {"budgets": budgets, "ordered": True}
    methods: dict[str, Method] = {
        "uniform, a range per row": lambda *a: by_rows(*a, quantizer=Quantizer(BITS)),
        "one codebook": lambda *a: by_rows(*a, quantizer=Quantizer(BITS, "clusters", "full", (None, None))),
        "one codebook, a scale per row": lambda *a: by_rows(*a, quantizer=row_scales),
        "codebooks, random groups": lambda *a: grouped(*a, **(common | {"ordered": False})),
        "codebooks, ordered": lambda *a: grouped(*a, **common),
        "codewords learned, mapping frozen": lambda *a: grouped(*a, **common, n_steps=args.steps, mapping_travel=0),
        "both learned, plain gradient": lambda *a: grouped(
            *a, **common, n_steps=args.steps, weighting=jlcm.straight_through
        ),
        "JLCM": lambda *a: grouped(*a, **common, n_steps=args.steps),
    }
    config = {
        "bits": BITS,
        "steps": args.steps,
        "passages of 32 tokens": [n, n],
        "codebooks": {name: groups_for(s, budgets[name], name == "up") for name, s in shapes.items()},
        "held-out text": "paragraphs that calibration has not seen",
    }
    card("JLCM on MiniLM's feed-forward blocks", config | {"budget bytes per matrix": budgets})
    results = {}
    for name, method in methods.items():
        results[name] = measured(encoder, method, data.train[:n], data.test[:n])
        print(f"  {name:36} {results[name]}", flush=True)
    ours, start = results["JLCM"], results["codebooks, ordered"]
    gains = [1 - a / b for a, b in zip(ours["block errors"], start["block errors"], strict=True)]
    key = "squared error of the weights"
    save(
        "weights/jlcm_minilm",
        {
            "config": config,
            "results": results,
            "ratios": {
                "least gain of a block by joint learning": round(min(gains), 4),
                "error of the last prefix / with frozen mappings": round(
                    ours["prefix errors"][-1] / results["codewords learned, mapping frozen"]["prefix errors"][-1], 4
                ),
                "error of the last prefix / with the plain gradient": round(
                    ours["prefix errors"][-1] / results["both learned, plain gradient"]["prefix errors"][-1], 4
                ),
            },
            "claims": [
                claim(
                    "weight error of ordered codebooks / of one", start[key] / results["one codebook"][key], at_most=1
                ),
                claim(
                    "weight error of ordered / random groups",
                    start[key] / results["codebooks, random groups"][key],
                    at_most=1,
                ),
                claim(
                    "blocks whose error joint learning cuts by 15 %",
                    sum(g >= 0.15 for g in gains) / len(gains),
                    at_least=0.9,
                ),
                claim(
                    "embedding distance / uniform's",
                    (1 - ours["embedding cosine"]) / (1 - results["uniform, a range per row"]["embedding cosine"]),
                    at_most=1,
                ),
                claim(
                    "embedding distance / that of a scale per row",
                    (1 - ours["embedding cosine"]) / (1 - results["one codebook, a scale per row"]["embedding cosine"]),
                    at_most=1,
                ),
            ],
        },
        "torch",
        "transformers",
    )


if __name__ == "__main__":
    main()
