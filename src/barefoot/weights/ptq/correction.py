"""Bias correction: what rounding adds to the mean of a layer's output is taken from its bias.

Data-Free Quantization through Weight Equalization and Bias Correction (Nagel et al. 2019, arXiv:1906.04721), section
4.2, in the empirical form: layer by layer, on calibration inputs, the layers before already rounded and corrected::

    b ← b + E[W x] - E[Ŵ x̂]          per output channel, before the activation function
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from barefoot.weights.integers.network import Node, Product, convolve

F32 = npt.NDArray[np.float32]


def corrected(
    original: Sequence[Node],
    rounded: Sequence[Node],
    images: F32,
    seen: Callable[[str, F32], F32] = lambda name, value: value,
) -> tuple[Node, ...]:
    """``rounded`` with corrected biases. ``seen`` rounds values, as for ``network.run``."""
    real, ours = {"input": images}, {"input": seen("input", images)}
    found: list[Node] = []
    for exact, node in zip(original, rounded, strict=True):
        real[exact.name] = exact(*(real[source] for source in exact.sources))
        if isinstance(node, Product) and isinstance(exact, Product):
            means = [
                convolve(values[n.source], n.weight, n.stride, n.depthwise).mean(axis=(0, 1, 2), dtype=np.float64)
                for n, values in ((exact, real), (node, ours))
            ]
            node = replace(node, bias=(exact.bias + means[0] - means[1]).astype(np.float32))
        found.append(node)
        ours[node.name] = seen(node.name, node(*(ours[source] for source in node.sources)))
    return tuple(found)
