"""The same network by PyTorch in double precision: what software does that only simulates quantization.

Values are numbers that happen to be whole, products are torch's convolutions, dyadic factors real numbers. All of it is
exact in double precision, so both must agree bit for bit (:mod:`barefoot.weights.integers.network`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from barefoot.weights.integers.network import I32, Code, IntegerNetwork, IntegerProduct, IntegerSum, Product

if TYPE_CHECKING:
    import torch


def convolution(node: Product | IntegerProduct, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """(n, h, w, c) → the same, "same" padding and all, without the bias, in the type of ``x``; with ``weight`` in place
    of the node's own, if given."""
    import torch

    own = torch.from_numpy(node.weight) if weight is None else weight
    kernel = own.to(x.dtype).permute(0, 3, 1, 2)
    stride, k = node.stride, kernel.shape[2]
    below, behind = (max((-(-size // stride) - 1) * stride + k - size, 0) for size in x.shape[1:3])
    sides = (behind // 2, behind - behind // 2, below // 2, below - below // 2)
    padded = torch.nn.functional.pad(x.permute(0, 3, 1, 2), sides)
    groups = len(kernel) if node.depthwise else 1
    return torch.nn.functional.conv2d(padded, kernel, stride=stride, groups=groups).permute(0, 2, 3, 1)


def simulate(network: IntegerNetwork, codes: I32) -> I32:
    """What ``network.run(codes)`` returns."""
    import torch

    values = {"input": torch.from_numpy(codes).double()}
    for node in network.nodes:
        factor = torch.from_numpy(node.by.values)
        limit = None
        if isinstance(node, IntegerProduct):
            sums = convolution(node, values[node.sources[0]] - node.x.zero) + torch.from_numpy(node.bias)
            real = sums * factor
            limit = None if node.limit is None else torch.from_numpy(np.asarray(node.limit))
        elif isinstance(node, IntegerSum):
            a, b = (values[s] - code.zero for s, code in zip(node.sources, node.codes, strict=True))
            real = a * factor[0] + b * factor[1]
        else:
            real = (values[node.sources[0]] - node.x.zero).mean((1, 2), keepdim=True) * factor
        values[node.name] = _limited(torch.floor(real + 0.5), node.y, limit)
    found: I32 = values[network.nodes[-1].name].to(torch.int32).numpy()
    return found


def _limited(units: torch.Tensor, y: Code, limit: torch.Tensor | None) -> torch.Tensor:
    codes = units + y.zero
    return codes.clip(0, 255) if limit is None else codes.clip(min=y.zero).minimum(limit.double())
