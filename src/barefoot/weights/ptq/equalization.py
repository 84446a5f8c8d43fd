"""Cross-layer equalization: channels of like range, by scales that two layers pass to each other.

Data-Free Quantization through Weight Equalization and Bias Correction (Nagel et al. 2019, arXiv:1906.04721), section
4.1, as post-training quantization to minifloats uses it (Aggarwal et al. 2023, arXiv:2311.12359, section III). Between
two layers whose activation function scales with its input, channel i may be divided by s_i in the first and multiplied
by it in the second. With r the largest magnitude of the channel's weights on either side::

    s_i = √(r_1i / r_2i)          both ranges become √(r_1i r_2i)

*Differs from the paper*: a ReLU6 does not scale, so its limit is divided by s_i too and becomes one for each channel.
The function is preserved exactly, and no bias has to be absorbed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from barefoot.weights.integers.network import Node, Product

F32 = npt.NDArray[np.float32]


def equalized(nodes: Sequence[Node], n_rounds: int = 20) -> tuple[Node, ...]:
    """The same function with equalized channels, wherever a product is read by one other product and nothing else."""
    readers = Counter(source for node in nodes for source in node.sources)
    found = {node.name: node for node in nodes}
    pairs = [
        (node.source, node.name)
        for node in nodes
        if isinstance(node, Product) and readers[node.source] == 1 and isinstance(found.get(node.source), Product)
    ]
    for _ in range(n_rounds):
        for first, second in pairs:
            a, b = found[first], found[second]
            assert isinstance(a, Product)
            assert isinstance(b, Product)
            found[first], found[second] = _shared(a, b)
    return tuple(found[node.name] for node in nodes)


def _shared(first: Product, second: Product) -> tuple[Product, Product]:
    ours = np.abs(first.weight).max(axis=(1, 2, 3))
    theirs = np.abs(second.weight).max(axis=(1, 2, 3) if second.depthwise else (0, 1, 2))
    alive = (ours > 0) & (theirs > 0)
    s = np.sqrt(np.where(alive, ours, 1) / np.where(alive, theirs, 1)).astype(np.float32)
    rows = s[:, None, None, None]
    cap = None if first.cap is None else np.float32(first.cap) / s
    return (
        replace(first, weight=first.weight / rows, bias=first.bias / s, cap=cap),
        replace(second, weight=second.weight * (rows if second.depthwise else s)),
    )
