"""The losses of benchmarks.train.cce by name, and one of them in a fresh process: bytes and seconds.

    python benchmarks/train/contenders.py '{"loss": "cce", "folder": …, "head": "frozen", "threads": 1}'

The folder holds hidden.npy (n, d_model), labels.npy (n,), head.npy (vocabulary, d_model) and packed.npy, its stored
rows, whose format is in format.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from barefoot.core.measure import PhaseMeter
from barefoot.train.driver.cross_entropy import cross_entropy
from barefoot.train.losses import Loss
from barefoot.train.losses.cce import CutCrossEntropy
from barefoot.train.losses.plain import Plain
from barefoot.weights.module import PackedEmbedding

PAPERS = {"filter": 2**-12, "tile_tokens": 128, "tile_vocab": 256}  # and its tiles
LOSSES: dict[str, Loss] = {
    "plain": Plain(),
    "cce": CutCrossEntropy(),
    "cce filtered": CutCrossEntropy(filter=2**-12),
    "cce filtered, small tiles": CutCrossEntropy(**PAPERS, whole_head=False),
    "cce filtered, small tiles, unsorted": CutCrossEntropy(**PAPERS, whole_head=False, sort=False),
    "cce filtered, small tiles, whole head": CutCrossEntropy(**PAPERS),
}


def by_rows(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """The imitation: plain cross-entropy of a few tokens after the other, gradients with the loss.

    As Liger-Kernel: as many tokens at a time as there are channels for each word, rounded up to a power of two.
    """
    n, vocab = len(hidden), len(head)
    step = 1 << (-(-n // -(-vocab // hidden.shape[1])) - 1).bit_length()
    total = hidden.new_zeros(())
    hidden.grad = torch.empty_like(hidden)
    if head.requires_grad:
        head.grad = torch.zeros_like(head)
    for start in range(0, n, step):
        some = slice(start, start + step)
        x = hidden.detach()[some].requires_grad_()
        loss = torch.nn.functional.cross_entropy(x @ head.T, labels[some], reduction="sum") / n
        loss.backward()
        hidden.grad[some] = x.grad
        total += loss.detach()
    return total


def computed(name: str, hidden: Tensor, head: Any, labels: Tensor) -> float:
    """The mean loss; gradients are left in ``hidden.grad`` and ``head.grad``."""
    if name == "by rows":
        return float(by_rows(hidden, head, labels))
    loss = cross_entropy(LOSSES[name], hidden, head, labels)
    loss.backward()
    return float(loss.detach())


def loaded(folder: Path, kind: str) -> tuple[Tensor, Any, Tensor]:
    """Hidden states with a gradient to come, a head that is trained, frozen or packed, labels."""
    hidden, labels = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("hidden", "labels"))
    if kind == "packed":
        rows = torch.from_numpy(np.load(folder / "packed.npy"))
        head = PackedEmbedding(json.loads((folder / "format.json").read_text()), len(rows), hidden.shape[1])
        head.weight = rows
    else:
        head = torch.from_numpy(np.load(folder / "head.npy")).requires_grad_(kind == "trained")
    return hidden.requires_grad_(), head, labels


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    hidden, head, labels = loaded(Path(settings["folder"]), settings["head"])
    few = hidden.detach()[:8].clone().requires_grad_()
    computed(settings["loss"], few, head, labels[:8])  # libraries take what they keep
    if isinstance(head, Tensor):
        head.grad = None
    with PhaseMeter() as phase:
        start = time.perf_counter(), time.process_time()
        computed(settings["loss"], hidden, head, labels)
        seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    assert phase.result is not None, "the system does not tell peaks"
    result = {"seconds": seconds[0], "processor_seconds": seconds[1], "extra_mib": phase.result.added / 2**20}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
