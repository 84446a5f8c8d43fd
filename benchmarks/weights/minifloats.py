"""Minifloats and integers of the same width on EfficientNet-Lite0 and MiniLM: post-training steps, modelled LUTs.

    python -m benchmarks weights.minifloats --images CHECKPOINT FOLDER --encoder FOLDER --text FILE [FILE ...]

CHECKPOINT is EfficientNet-Lite0's .pth, its FOLDER Fashion-MNIST; the encoder's FOLDER all-MiniLM-L6-v2, FILE WikiText.
Splits of up to 3 exponent bits (4 on MiniLM) are tried, for weights (a scale per output channel) and for activations
(one static scale, 99.999 % of calibration); E1 formats are the integers. First and last layer have 8-bit integers. The
cost of the hardware is simulated: look-up tables of one multiply-accumulate unit by the model of barefoot.sim.fpga.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from barefoot.sim.fpga import Operand, multiply_accumulate
from barefoot.weights import ranges
from barefoot.weights.integers import network
from barefoot.weights.integers.network import Node, Product, Sum
from barefoot.weights.integers.simulated import convolution
from barefoot.weights.minifloat import Minifloat, formats, rounded_rows
from barefoot.weights.ptq.correction import corrected
from barefoot.weights.ptq.equalization import equalized
from barefoot.weights.ptq.rounding import learn_rounding, neighbours
from benchmarks.harness import card, claim, save
from benchmarks.models.efficientnet import classifier, fashion_mnist
from benchmarks.weights.passages import load, passages

SETTINGS = ((4, 8), (6, 6), (8, 8))
N_PRODUCTS = 1024
ENDS = Minifloat.named("E1M6")
Network = tuple[Node, ...]
Seen = Callable[[str, Any], Any]


@torch.no_grad()
def apply(node: Node, *inputs: torch.Tensor) -> torch.Tensor:
    """What a node computes, by torch in float32."""
    if isinstance(node, Product):
        y = convolution(node, inputs[0]) + torch.from_numpy(node.bias)
        return y if node.cap is None else y.clip(min=0).minimum(torch.as_tensor(node.cap, dtype=torch.float32))
    return inputs[0] + inputs[1] if isinstance(node, Sum) else inputs[0].mean((1, 2), keepdim=True)


def run(nodes: Network, images: torch.Tensor, seen: Seen = lambda name, value: value) -> torch.Tensor:
    """``network.run`` by torch."""
    values = {"input": seen("input", images)}
    for node in nodes:
        values[node.name] = seen(node.name, apply(node, *(values[source] for source in node.sources)))
    return values[nodes[-1].name]


@dataclass(frozen=True)
class Values:
    """Rounds every value but the first and the last to one format, without a sign where there is nothing below 0."""

    fmt: Minifloat
    scales: Mapping[str, tuple[Minifloat, float]]

    @classmethod
    def calibrated(cls, fmt: Minifloat, nodes: Network, images: np.ndarray) -> Values:
        without_sign = replace(fmt, unsigned=True, mantissa_bits=fmt.mantissa_bits + 1)
        percent = partial(ranges.percentile, percent=99.999)
        scales: dict[str, tuple[Minifloat, float]] = {}
        for name, (low, high) in network.calibrate(nodes, [images], percent).items():
            own = ENDS if name == "input" else without_sign if low >= 0 else fmt
            scales[name] = own, float(own.scale(np.float32([max(-low, high)]))[0])
        return cls(fmt, scales)

    def __call__(self, name: str, value: Any) -> Any:
        if name == "head":
            return value
        fmt, scale = self.scales[name]
        return fmt.rounded(value / scale) * scale


def weights_in(nodes: Network, fmt: Minifloat) -> Network:
    """Nearest rounding, a scale per output channel."""
    return tuple(
        replace(n, weight=rounded_rows(n.weight.reshape(len(n.weight), -1), own(n, fmt)).reshape(n.weight.shape))
        if isinstance(n, Product)
        else n
        for n in nodes
    )


def own(node: Product, fmt: Minifloat) -> Minifloat:
    return ENDS if node.name in ("stem", "head") else fmt


def with_learned_rounding(nodes: Network, fmt: Minifloat, seen: Seen, images: torch.Tensor, n_steps: int) -> Network:
    """Layer after layer, on inputs of the rounded prefix."""
    real, ours = {"input": images}, {"input": seen("input", images)}
    found: list[Node] = []
    for node in nodes:
        new = node
        if isinstance(node, Product):
            flat, grid = node.weight.reshape(len(node.weight), -1), own(node, fmt)
            scale = grid.scale(np.abs(flat).max(axis=1))[:, None]
            low, high = ((side * scale).reshape(node.weight.shape) for side in neighbours(flat / scale, grid))
            x = ours[node.source]
            with torch.no_grad():
                targets = convolution(node, real[node.source])

            def forward(weight: torch.Tensor, x: torch.Tensor, node: Product = node) -> torch.Tensor:
                return convolution(node, x, weight)

            new = replace(node, weight=learn_rounding(low, high, node.weight, forward, x, targets, n_steps))
        found.append(new)
        real[node.name] = apply(node, *(real[source] for source in node.sources))
        ours[node.name] = seen(node.name, apply(new, *(ours[source] for source in node.sources)))
    return tuple(found)


def accuracy(nodes: Network, images: torch.Tensor, labels: np.ndarray, seen: Seen = lambda name, value: value) -> float:
    logits = torch.cat([run(nodes, batch, seen).reshape(len(batch), -1) for batch in images.split(100)])
    return round(100 * float((logits.argmax(1).numpy() == labels).mean()), 2)


def luts(w: Minifloat, a: Minifloat) -> int:
    """Of one unit; activations mostly have no sign, so their mantissa has a bit more."""
    return multiply_accumulate(
        Operand(w.exponent_bits, w.mantissa_bits),
        Operand(a.exponent_bits, a.mantissa_bits + 1, signed=False),
        N_PRODUCTS,
    ).total


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points (accuracy, cost) that no other one beats in both."""
    return [
        name
        for name, (good, cost) in points.items()
        if not any(g >= good and c <= cost and (g, c) != (good, cost) for g, c in points.values())
    ]


def splits(bits: int, most_exponent_bits: int = 3) -> Sequence[Minifloat]:
    return [f for f in formats(bits) if f.exponent_bits <= most_exponent_bits and f.mantissa_bits > 0]


def pictures(args: argparse.Namespace) -> dict[str, Any]:
    checkpoint, folder = args.images
    train, labels = fashion_mnist(folder, "train", args.train)
    test, answers = fashion_mnist(folder, "t10k", args.test)
    nodes = classifier(checkpoint, train, labels)
    calibration, images = train[:100], torch.from_numpy(test)
    reference = accuracy(nodes, images, answers)
    print(f"  float32 {reference} %", flush=True)
    values = {
        bits: {f: Values.calibrated(f, nodes, calibration) for f in splits(bits)} for bits in {a for _, a in SETTINGS}
    }
    sweep: dict[str, dict[str, Any]] = {}
    for w_bits, a_bits in SETTINGS:
        for w, a in itertools.product(splits(w_bits), splits(a_bits)):
            found = accuracy(weights_in(nodes, w), images, answers, values[a_bits][a])
            sweep[f"W {w}, A {a}"] = {"bits": [w_bits, a_bits], "accuracy": found, "LUTs": luts(w, a)}
            print(f"  W {w}, A {a}: {found} %, {luts(w, a)} LUTs", flush=True)
    best: dict[str, Any] = {}
    for w_bits, a_bits in SETTINGS:
        own_points = {n: p for n, p in sweep.items() if p["bits"] == [w_bits, a_bits]}
        integers = f"W {splits(w_bits)[0]}, A {splits(a_bits)[0]}"
        floats = max((n for n in own_points if n != integers), key=lambda n: own_points[n]["accuracy"])
        best[f"W{w_bits}A{a_bits}"] = {
            "integers": sweep[integers]["accuracy"],
            "best float": [floats, sweep[floats]["accuracy"]],
        }
    points = {n: (p["accuracy"], p["LUTs"]) for n, p in sweep.items()}
    on_front = front(points)
    return {
        "float32": reference,
        "sweep": sweep,
        "best": best,
        "front of accuracy and LUTs": on_front,
        "integers among them": [
            n for n in on_front if all(part.split()[-1].startswith("E1M") for part in n.split(", "))
        ],
        "steps": {
            name: steps(nodes, Minifloat.named(name), calibration, images, answers, args.steps)
            for name in ("E1M2", "E2M1")
        },
    }


def steps(
    nodes: Network, fmt: Minifloat, calibration: np.ndarray, images: torch.Tensor, labels: np.ndarray, n_steps: int
) -> dict[str, float]:
    """The post-training stack, one step more each time, at 4-bit weights and 8-bit integer activations."""
    eight = splits(8)[0]
    even = equalized(nodes)
    plain, scaled = (Values.calibrated(eight, n, calibration) for n in (nodes, even))
    rounded = weights_in(even, fmt)
    learned = with_learned_rounding(even, fmt, scaled, torch.from_numpy(calibration), n_steps)
    stack: dict[str, tuple[Network, Values]] = {
        "nearest": (weights_in(nodes, fmt), plain),
        "+ equalization": (rounded, scaled),
        "+ bias correction": (corrected(even, rounded, calibration, scaled), scaled),
        "+ learned rounding": (corrected(even, learned, calibration, scaled), scaled),
        "bias correction alone": (corrected(nodes, weights_in(nodes, fmt), calibration, plain), plain),
    }
    found = {name: accuracy(n, images, labels, seen) for name, (n, seen) in stack.items()}
    print(f"  {fmt} {found}", flush=True)
    return found


@torch.no_grad()
def text(args: argparse.Namespace) -> dict[str, float]:
    """Cosine of sentence embeddings to the original's, the encoder's weights rounded, activations in float32."""
    model, tokenizer = load(args.encoder, 2, seed=0)
    data = passages("".join(Path(f).read_text("utf-8") for f in args.text), tokenizer, 16, 32)
    ids = data.test[: args.passages]
    linears = [m for m in model.encoder.encoder.modules() if isinstance(m, nn.Linear)]
    originals = [m.weight.clone() for m in linears]
    real = model.encoder(ids)[0].mean(1)
    found = {}
    for fmt in (f for bits in (4, 6, 8) for f in splits(bits, 4)):
        for module, original in zip(linears, originals, strict=True):
            module.weight.copy_(rounded_rows(original, fmt))
        found[str(fmt)] = round(float(torch.cosine_similarity(model.encoder(ids)[0].mean(1), real).mean()), 5)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs=2, required=True, metavar=("CHECKPOINT", "FOLDER"))
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100, help="of learned rounding")
    parser.add_argument("--passages", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = {k: v for k, v in vars(args).items() if isinstance(v, int)}
    config["task"] = "Fashion-MNIST at 56 x 56, linear head; sentence embeddings of WikiText passages"
    card("minifloats and integers (LUTs: simulated)", config)
    sentences = text(args)
    print(f"  MiniLM {sentences}", flush=True)
    found = pictures(args)
    best, stack = found["best"], found["steps"]
    save(
        "weights/minifloats",
        {
            "status": "LUTs are simulated: an analytic model, nothing was synthesised",
            "config": config,
            "EfficientNet-Lite0": found,
            "MiniLM, embedding cosine": sentences,
            "claims": [
                *(
                    claim(
                        f"points of the best float over integers, {n}",
                        b["best float"][1] - b["integers"],
                        at_least=-0.3,
                    )
                    for n, b in best.items()
                ),
                *(
                    claim(
                        f"points of the whole stack over nearest rounding, 4-bit {n}",
                        s["+ learned rounding"] - s["nearest"],
                        at_least=0,
                    )
                    for n, s in stack.items()
                ),
                claim(
                    "embedding distance of E2M1 / of 4-bit integers, MiniLM",
                    (1 - sentences["E2M1"]) / (1 - sentences["E1M2"]),
                    at_most=1,
                ),
                claim(
                    "embedding distance of E4M3 / of 8-bit integers, MiniLM",
                    (1 - sentences["E4M3"]) / (1 - sentences["E1M6"]),
                    at_least=1,
                ),
            ],
        },
        "torch",
        "transformers",
    )


if __name__ == "__main__":
    main()
