"""Learned steps on a small CNN and Fashion-MNIST: training while rounded against rounding what was trained.

    python -m benchmarks weights.lsq FOLDER [--train 12000] [--epochs 6] [--tune 3] [--seeds 3]

FOLDER holds the four .gz files of Debian's package dataset-fashion-mnist. Weights have 2 bits and activations 4, in
all layers. Baseline: float32, trained on for as long as the rounded ones are. Imitations: the same
training with the steps left where they began, and steps that learn while the weights stay.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from barefoot.weights.training.lsq import Bits, rounding, stored
from benchmarks.harness import card, claim, save
from benchmarks.models.efficientnet import fashion_mnist

BATCH, RATE, TUNING_RATE = 64, 2e-3, 1e-3
Data = tuple[Tensor, Tensor]


def data(folder: str, part: str, n: int) -> Data:
    """Images (n, 1, 28, 28) and labels."""
    pixels, labels = fashion_mnist(folder, part, n)
    return torch.from_numpy(pixels[:, ::2, ::2, :1].transpose(0, 3, 1, 2).copy()), torch.tensor(labels).long()


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 25, 10),
    )  # fmt: skip


def layers(net: nn.Sequential) -> list[nn.Module]:
    return [module for module in net if isinstance(module, nn.Conv2d | nn.Linear)]


def train(net: nn.Module, examples: Data, epochs: int, rate: float, seed: int, frozen: Callable[[str], bool]) -> None:
    optimizer = torch.optim.Adam([p for name, p in net.named_parameters() if not frozen(name)], rate)
    n_steps = epochs * (len(examples[0]) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for picked in batches(len(examples[0]), epochs, seed):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(examples[0][picked]), examples[1][picked]).backward()
        optimizer.step()
        schedule.step()


def batches(n: int, epochs: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(n, generator=generator)[: n - n % BATCH].split(BATCH)


@torch.no_grad()
def accuracy(net: nn.Module, test: Data) -> float:
    """In per cent."""
    right = sum(int((net(x).argmax(1) == y).sum()) for x, y in zip(test[0].split(500), test[1].split(500), strict=True))
    return 100 * right / len(test[0])


def measured(examples: Data, test: Data, args: argparse.Namespace, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    start = network()
    train(start, examples, args.epochs, RATE, seed, lambda _: False)
    found = {"float32": accuracy(start, test)}

    def rounded(name: str, narrow: Bits, frozen: Callable[[str], bool] | None) -> None:
        net = copy.deepcopy(start)
        modules = dict.fromkeys(layers(net), narrow)
        with rounding(modules, lambda: net(examples[0][:500])):
            if frozen is not None:
                train(net, examples, args.tune, TUNING_RATE, seed, frozen)
            found[name] = accuracy(net, test)
            found[f"{name}, weight bytes"] = sum(stored(module).n_bytes for module in modules)
        print(f"  seed {seed} {name}: {found[name]:.2f} %", flush=True)

    tuned = copy.deepcopy(start)
    train(tuned, examples, args.tune, TUNING_RATE, seed, lambda _: False)
    found["float32, trained on"] = accuracy(tuned, test)
    found["float32, weight bytes"] = sum(4 * module.weight.numel() for module in layers(start))  # type: ignore[operator, union-attr]
    print(
        f"  seed {seed} float32: {found['float32']:.2f} %, trained on {found['float32, trained on']:.2f} %", flush=True
    )
    is_step = lambda name: name.endswith("growth")  # noqa: E731
    rounded("W8A8, rounded", Bits(8), None)
    rounded("W2A4, rounded", Bits(2, 4), None)
    rounded("W2A4, learned steps", Bits(2, 4), lambda _: False)
    rounded("W2A4, imitation: steps frozen", Bits(2, 4), is_step)
    rounded("W2A4, imitation: steps alone", Bits(2, 4), lambda name: not is_step(name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--train", type=int, default=12000)
    parser.add_argument("--test", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--tune", type=int, default=3, help="epochs of training while rounded")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = {k: v for k, v in vars(args).items() if isinstance(v, int)}
    card("training while rounded, learned steps", config)
    examples, test = data(args.folder, "train", args.train), data(args.folder, "t10k", args.test)
    runs = [measured(examples, test, args, seed) for seed in range(args.seeds)]
    mean = {name: statistics.fmean(run[name] for run in runs) for name in runs[0]}
    results: dict[str, Any] = {
        name: {"mean": round(mean[name], 3), "runs": [round(run[name], 2) for run in runs]} for name in mean
    }
    learned, after = mean["W2A4, learned steps"], mean["W2A4, rounded"]
    save(
        "weights/lsq",
        {
            "config": config,
            "results": results,
            "claims": [
                claim("W8A8: points lost by rounding what was trained", mean["float32"] - mean["W8A8, rounded"],
                      at_most=1),
                claim("W2A4: points of learned steps over rounding what was trained", learned - after, at_least=5),
                claim("W2A4: points over the same training with frozen steps",
                      learned - mean["W2A4, imitation: steps frozen"], at_least=0),
                claim("W2A4: points over steps that learn alone", learned - mean["W2A4, imitation: steps alone"],
                      at_least=0),
            ],
        },
        "torch",
    )  # fmt: skip


if __name__ == "__main__":
    main()
