"""Q-BERT on MiniLM: groups and Hessian-chosen widths against whole matrices, reversed orders and other sensitivities.

    python -m benchmarks weights.qbert --model FOLDER --text FILE [FILE ...] [--seeds 3] [--steps 100]

FOLDER is all-MiniLM-L6-v2, FILE WikiText. The encoder is first fine-tuned to tell which article a passage comes from;
all accuracies are of held-out passages, all fine-tunings of rounded models are alike. Mixed precision is compared at
the bytes of 3 bits throughout, with widths of 2 and 4 bits, under the same knapsack with different weightings.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from barefoot.weights.curvature import hessian_product, sensitivity, top_eigenvalue
from barefoot.weights.qbert import QBert, choose_widths, rounding, store
from benchmarks.harness import card, claim, save, spread
from benchmarks.weights.passages import Classifier, Passages, accuracy, fine_tune, load, passages

N_ARTICLES = 16
LENGTH = 32
RATE = 1e-4


def encoder_layers(model: Classifier) -> dict[str, list[nn.Linear]]:
    return {
        str(i): [m for m in layer.modules() if isinstance(m, nn.Linear)]
        for i, layer in enumerate(model.encoder.encoder.layer)
    }


def eigenvalues(model: Classifier, data: Passages, n_batches: int) -> dict[str, list[float]]:
    """Top eigenvalues of each layer, one for each batch."""
    found: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(1)
    for ids, labels in data.batches(16, n_batches, seed=1):
        for name, linears in encoder_layers(model).items():
            weights = [m.weight for m in linears]
            loss = nn.functional.cross_entropy(model(ids), labels)
            start = torch.randn(sum(w.numel() for w in weights), generator=generator)
            value = top_eigenvalue(hessian_product(loss, weights), start, tolerance=1e-2, n_iterations=30)
            found.setdefault(name, []).append(value)
    return found


def tuned(
    trained: Classifier, data: Passages, knobs: QBert, widths: dict[str, int], n_steps: int, seed: int
) -> dict[str, float]:
    """Accuracy after fine-tuning the rounded model, with the encoder's weights from their stored bytes."""
    model = copy.deepcopy(trained)
    linears = {m: widths[name] for name, ms in encoder_layers(model).items() for m in ms}
    tables = [m for m in model.encoder.embeddings.modules() if isinstance(m, nn.Embedding)]
    rounded = linears | dict.fromkeys(tables, knobs.embedding_bits)
    with rounding(knobs, rounded):
        before = accuracy(model, data)
        fine_tune(model, data, n_steps, RATE, seed)
        after = accuracy(model, data)
    n_bytes = 0
    for module, bits in rounded.items():
        stored = store(knobs, module.weight.detach().numpy(), bits)
        module.weight.data = torch.from_numpy(stored.weights())
        n_bytes += stored.n_bytes if module in linears else 0
    reloaded = accuracy(model, data)
    return {"accuracy": after, "without fine-tuning": before, "reloaded, float inputs": reloaded, "bytes": n_bytes}


def mse_of_groups(model: Classifier) -> dict[str, Any]:
    """Σ of squared errors for 1, 12 and 128 groups, and the share of matrices in which more groups are better."""
    matrices = [m.weight.detach() for ms in encoder_layers(model).values() for m in ms]
    errors = {
        (bits, n): [float(((w - QBert(n_groups=n).rounded(w, bits)) ** 2).sum()) for w in matrices]
        for bits, n in itertools.product((2, 3, 4), (1, 12, 128, 768))
    }
    better = [
        fewer > more
        for bits, (n, m) in itertools.product((2, 3, 4), ((1, 12), (12, 128)))
        for fewer, more in zip(errors[bits, n], errors[bits, m], strict=True)
    ]
    sums = {f"{bits} bits, {n} groups": sum(e) for (bits, n), e in errors.items()}
    return {"sum": sums, "share of matrices better with more groups": sum(better) / len(better)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--trained-steps", type=int, default=500)
    parser.add_argument("--batches", type=int, default=12, help="for the Hessian, of 16 passages each")
    args = parser.parse_args()
    torch.set_num_threads(1)

    model, tokenizer = load(args.model, N_ARTICLES, seed=0)
    data = passages("".join(Path(f).read_text("utf-8") for f in args.text), tokenizer, N_ARTICLES, LENGTH)
    layers = encoder_layers(model)
    shapes = [tuple(m.weight.shape) for ms in layers.values() for m in ms]
    config = {
        "task": f"which of {N_ARTICLES} WikiText articles a passage of {LENGTH} tokens is from",
        "passages": [len(data.train), len(data.test)],
        "steps": {"float": args.trained_steps, "rounded": args.steps},
        "seeds": args.seeds,
        "bits": "embeddings 8, inputs of matrices 8",
    }
    facts = {
        "encoder matrices": len(shapes),
        "their float32 bytes": sum(4 * r * c for r, c in shapes),
        "bytes at 3 bits, 128 groups": sum(QBert().n_bytes(s, 3) for s in shapes),
        "bytes at 3 bits, 1 group": sum(QBert(n_groups=1).n_bytes(s, 3) for s in shapes),
    }
    card("Q-BERT on MiniLM", config | facts)

    fine_tune(model, data, args.trained_steps, RATE, seed=0)
    reference = accuracy(model, data)
    print(f"  float32 {reference:.2f} %", flush=True)
    start = time.perf_counter()
    values = eigenvalues(model, data, args.batches)
    omega = {name: sensitivity(v) for name, v in values.items()}
    for name, v in values.items():
        print(f"  layer {name} λ {statistics.mean(v):.3f} ± {statistics.pstdev(v):.3f} min {min(v):.3f}", flush=True)
    print(f"  eigenvalues in {time.perf_counter() - start:.0f} s", flush=True)

    weights = {name: [m.weight.detach() for m in ms] for name, ms in layers.items()}
    by_omega = sorted(omega, key=lambda name: omega[name])
    weightings: dict[str, dict[str, float]] = {
        "hessian": omega,
        "reversed": {name: omega[other] for name, other in zip(by_omega, reversed(by_omega), strict=True)},
        "mean only": {name: abs(statistics.mean(v)) for name, v in values.items()},
        "norm of the weights": {name: math.sqrt(sum(float((w**2).sum()) for w in ws)) for name, ws in weights.items()},
    }
    mixed, budget = QBert(widths=(2, 4)), facts["bytes at 3 bits, 128 groups"]
    runs: dict[str, tuple[QBert, dict[str, int], int]] = {
        f"3 bits, {n} groups": (QBert(n_groups=n), dict.fromkeys(layers, 3), 1) for n in (1, 12)
    }
    runs["3 bits, 128 groups"] = (QBert(), dict.fromkeys(layers, 3), args.seeds)
    runs |= {f"2 bits, {n} groups": (QBert(n_groups=n), dict.fromkeys(layers, 2), 1) for n in (1, 128)}
    for name, weighting in weightings.items():
        runs[f"2/4 {name}"] = (mixed, choose_widths(mixed, weights, weighting, budget), args.seeds)
    budget = sum(QBert().n_bytes(s, 2) for s in shapes) * 5 // 4
    runs["2/3 hessian"] = (QBert(), choose_widths(QBert(), weights, omega, budget), 1)

    results, seen = {}, {}
    for name, (knobs, widths, n_seeds) in runs.items():
        key = (knobs.n_groups, *widths.values())
        if key not in seen or len(seen[key]) < n_seeds:
            seen[key] = [tuned(model, data, knobs, widths, args.steps, seed) for seed in range(n_seeds)]
        found = seen[key]
        results[name] = {metric: spread([run[metric] for run in found]) for metric in found[0]}
        results[name]["accuracies"] = [round(run["accuracy"], 2) for run in found]
        results[name]["widths"] = "".join(map(str, widths.values()))
        print(f"  {name:24} {results[name]['widths']} {results[name]['accuracies']}", flush=True)

    def mean(name: str) -> float:
        return statistics.mean(results[name]["accuracies"])

    groups = mse_of_groups(model)
    sums = groups["sum"]
    save(
        "weights/qbert_minilm",
        {
            "config": config,
            "card": facts,
            "results": results | {"float32": {"accuracy": reference}},
            "eigenvalues": {n: [round(x, 4) for x in v] for n, v in values.items()},
            "omega": {n: round(x, 4) for n, x in omega.items()},
            "weight error": groups,
            "ratios": {
                "float32 / stored bytes of the encoder's matrices, 2/3 bits": round(
                    facts["their float32 bytes"] / results["2/3 hessian"]["bytes"]["median"], 2
                )
            },
            "claims": [
                claim(
                    "matrices whose error falls with more groups",
                    groups["share of matrices better with more groups"],
                    at_least=0.95,
                ),
                claim(
                    "error of 128 groups / of one, 3 bits",
                    sums["3 bits, 128 groups"] / sums["3 bits, 1 groups"],
                    at_most=1,
                ),
                claim("points lost at 3 bits, 128 groups", reference - mean("3 bits, 128 groups"), at_most=2.3),
                claim(
                    "points gained by 128 groups over one, 3 bits",
                    mean("3 bits, 128 groups") - mean("3 bits, 1 groups"),
                    at_least=0,
                ),
                claim(
                    "points gained by 128 groups over one, 2 bits",
                    mean("2 bits, 128 groups") - mean("2 bits, 1 groups"),
                    at_least=0,
                ),
                claim(
                    "points of the Hessian's choice over the reversed one",
                    mean("2/4 hessian") - mean("2/4 reversed"),
                    at_least=0,
                ),
                claim(
                    "compression of the encoder at 2/3 bits",
                    facts["their float32 bytes"] / results["2/3 hessian"]["bytes"]["median"],
                    at_least=9,
                ),
            ],
        },
        "torch",
        "transformers",
    )


if __name__ == "__main__":
    main()
