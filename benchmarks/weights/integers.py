"""Networks in integers on EfficientNet-Lite0 and MiniLM: granularity, calibration, bit equality, distance to float32.

    python -m benchmarks weights.integers --images CHECKPOINT FOLDER --encoder FOLDER --text FILE [FILE ...]

CHECKPOINT is EfficientNet-Lite0's .pth, its FOLDER Fashion-MNIST; the encoder's FOLDER all-MiniLM-L6-v2, FILE WikiText.
The classifier is a linear head on the frozen features. Baseline: float32. Imitations: one scale for each tensor, and
values rounded to 8 bits but computed in float32 ("simulated"), which tells nothing of a machine without floating point.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from barefoot.weights import ranges
from barefoot.weights.affine import Affine
from barefoot.weights.integers import encoder, network
from barefoot.weights.integers.simulated import simulate
from benchmarks.harness import card, claim, save
from benchmarks.models.efficientnet import classifier, fashion_mnist
from benchmarks.weights.passages import Passages, load, passages

CALIBRATIONS: dict[str, network.Calibration] = {
    "extremes": ranges.extremes,
    "percentile": partial(ranges.percentile, percent=99.9),
    "least error": partial(ranges.least_error, grid=Affine(8)),
    "entropy": ranges.entropy,
}
MODULES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
}
READ_BEFORE = {"query": "input", "attention": "context", "attention_norm": "attention_sum", "down": "gelu"}
READ_BEFORE["output_norm"] = "output_sum"


def in_batches(run: Callable[[np.ndarray], np.ndarray], x: np.ndarray, size: int = 50) -> np.ndarray:
    return np.concatenate([run(x[i : i + size]).reshape(len(x[i : i + size]), -1) for i in range(0, len(x), size)])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The mean over rows."""
    return float(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean())


def images(args: argparse.Namespace) -> dict[str, Any]:
    checkpoint, folder = args.images
    x, labels = fashion_mnist(folder, "train", args.train)
    test, answers = fashion_mnist(folder, "t10k", args.exact)
    nodes = classifier(checkpoint, x, labels)
    few, right = test[: args.test], answers[: args.test]
    real = in_batches(lambda b: network.run(nodes, b), few)

    def scored(logits: np.ndarray) -> dict[str, float]:
        hits = float((logits.argmax(1) == right[: len(logits)]).mean())
        return {"accuracy": round(100 * hits, 2), "cosine": round(cosine(logits, real[: len(logits)]), 5)}

    def rounded(seen: dict[str, tuple[float, float]] | None, name: str, value: np.ndarray) -> np.ndarray:
        """8 bits: dynamic without ranges, static with them."""
        flat = value.reshape(1, -1)
        low, high = ranges.extremes(flat) if seen is None else (np.float32([limit]) for limit in seen[name])
        return Affine(8).rounded(flat, low, high).reshape(value.shape)

    results = {"float32": scored(real)}
    print(f"  float32 {results['float32']}", flush=True)
    integer: dict[str, network.IntegerNetwork] = {}
    for calibration, function in CALIBRATIONS.items():
        seen = network.calibrate(nodes, [x[i : i + 50] for i in range(0, 200, 50)], function)
        for per_channel in (True, False):
            name = f"{calibration}, weights per {'channel' if per_channel else 'tensor'}"
            net = integer[name] = network.convert(nodes, seen, per_channel)
            results[name] = scored(in_batches(lambda b, net=net: net.output.decode(net.run(net.input.encode(b))), few))
            print(f"  {name} {results[name]}", flush=True)
        if calibration == "extremes":
            static = partial(network.run, nodes, seen=partial(rounded, seen))
            results["float32 weights, static values"] = scored(in_batches(static, few))
    results["float32 weights, dynamic values"] = scored(
        in_batches(lambda b: np.concatenate([network.run(nodes, i[None], partial(rounded, None)) for i in b]), few)
    )
    best = max((n for n in integer if n.endswith("channel")), key=lambda n: results[n]["cosine"])
    net = integer[best]
    codes = net.input.encode(test)
    ours, theirs = in_batches(net.run, codes), in_batches(lambda b: simulate(net, b), codes)
    float_bytes = sum(4 * (n.weight.size + n.bias.size) for n in nodes if isinstance(n, network.Product))
    return {
        "results": results,
        "best": best,
        "codes that differ from the simulation": int((ours != theirs).sum()),
        "images compared": len(test),
        "bytes": {"float32": float_bytes, "integers": net.n_bytes},
    }


@torch.no_grad()
def seen_in(layer: torch.nn.Module, x: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """The largest magnitude of every value of an encoder layer, and its output."""
    found: dict[str, float] = {}
    hooks = []
    for name, path in MODULES.items():

        def keep(_: Any, inputs: Any, output: torch.Tensor, name: str = name) -> None:
            found[READ_BEFORE.get(name, name)] = float(inputs[0].abs().max())
            if name not in ("attention", "down"):
                found[name] = float(output.abs().max())

        hooks.append(layer.get_submodule(path).register_forward_hook(keep))
    y = layer(x)
    for hook in hooks:
        hook.remove()
    return found, y[0] if isinstance(y, tuple) else y


@torch.no_grad()
def text(args: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load(args.encoder, 2, seed=0)
    data: Passages = passages("".join(Path(f).read_text("utf-8") for f in args.text), tokenizer, 16, 32)
    bert = model.encoder
    calibration, real = bert.embeddings(data.train[:64]), bert.embeddings(data.test[: args.passages])
    codes, results = None, {}
    n_bytes = float_bytes = 0
    for number, module in enumerate(bert.encoder.layer):
        magnitudes, calibration = seen_in(module, calibration)
        parts = {name: module.get_submodule(path) for name, path in MODULES.items()}
        weights = {name: (m.weight.numpy(), m.bias.numpy()) for name, m in parts.items()}
        layer = encoder.convert_layer(weights, bert.config.num_attention_heads, magnitudes)
        if codes is None:
            codes = encoder.encode(real.numpy(), layer.scales["input"])
        else:
            # The unit of one layer's output is that of the next one's input: the same values were seen.
            assert np.isclose(layer.scales["input"], unit)  # noqa: F821
        codes, unit = layer.run(codes), layer.scales["output_norm"]
        _, real = seen_in(module, real)
        n_bytes += layer.n_bytes
        float_bytes += sum(4 * (w.size + b.size) for w, b in weights.values())
        results[f"after layer {number}"] = round(cosine(codes * unit, real.numpy()), 5)
    results["mean of the last states"] = round(cosine(codes.mean(axis=1) * unit, real.numpy().mean(axis=1)), 5)
    return {"cosine": results, "passages": len(real), "bytes": {"float32": float_bytes, "integers": n_bytes}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs=2, required=True, metavar=("CHECKPOINT", "FOLDER"))
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--test", type=int, default=300)
    parser.add_argument("--exact", type=int, default=1000, help="images on which bits are compared")
    parser.add_argument("--passages", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = {k: v for k, v in vars(args).items() if isinstance(v, int)}
    card("networks in integers", config)
    sentences = text(args)
    print(f"  MiniLM {sentences['cosine']}", flush=True)
    pictures = images(args)
    results = pictures["results"]
    by_tensor = max(results[n]["cosine"] for n in results if n.endswith("tensor"))
    save(
        "weights/integers",
        {
            "config": config | {"task": "Fashion-MNIST at 56 x 56, linear head; WikiText passages of 32 tokens"},
            "EfficientNet-Lite0": pictures,
            "MiniLM": sentences,
            "ratios": {
                name: round(part["bytes"]["float32"] / part["bytes"]["integers"], 2)
                for name, part in (("EfficientNet-Lite0 float32 / integers", pictures), ("MiniLM's layers", sentences))
            },
            "claims": [
                claim(
                    "codes that differ from the simulation in double precision, on 1,000 images",
                    pictures["codes that differ from the simulation"],
                    at_most=0,
                ),
                claim("cosine of logits, EfficientNet-Lite0", results[pictures["best"]]["cosine"], at_least=0.97),
                claim(
                    "the same, less the best with a scale per tensor",
                    results[pictures["best"]]["cosine"] - by_tensor,
                    at_least=0,
                ),
                claim("cosine after one encoder layer, MiniLM", sentences["cosine"]["after layer 0"], at_least=0.97),
            ],
        },
        "torch",
        "transformers",
    )


if __name__ == "__main__":
    main()
