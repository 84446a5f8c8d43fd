"""Convolutional networks in integers: 8-bit weights and activations, 32-bit sums and biases, dyadic rescaling.

A Survey of Quantization Methods for Efficient Neural Network Inference (Gholami et al. 2021, arXiv:2103.13630), section
IV.A. A network is a row of nodes; each reads the values of earlier ones. Images are (n, height, width, channels), and
padding is "same": ceil(size / stride) positions, the larger half of the zeros behind. ``convert`` turns real nodes into
integer ones, given the range of every value::

    product   y = clip(Z_y + rescale(Σ (x - Z_x) w + b, S_x S_w / S_y))      b in units of S_x S_w, 32 bits
    sum       y = clip(Z_y + shifted((x_1 - Z_1) c_1 + (x_2 - Z_2) c_2, n))  c_i / 2^n ≈ S_i / S_y
    mean      y = clip(Z_y + (Σ (x - Z_x) c + half) // (h w 2^n))            c / 2^n ≈ S_x / S_y

Weights are symmetric, per output channel or per tensor; values are asymmetric, one static range each. Activation
functions that clip (ReLU, ReLU6) are limits of the codes.

**Stored**: weights 1 byte; for each channel a bias of 4 bytes and a dyadic number of 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput
from barefoot.weights import ranges
from barefoot.weights.affine import Affine
from barefoot.weights.granularity import Block, to_groups
from barefoot.weights.integers.dyadic import Dyadic, dyadic, rescale, shifted

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
WEIGHTS = Affine(8, "restricted")
VALUES = Affine(8, "asymmetric")
SAMPLE = 1 << 18  # elements of a value that calibration keeps of each batch


@dataclass(frozen=True)
class Product:
    """A convolution or, on images of one pixel, a matrix. ``weight`` float32 (out, k, k, in), or where ``depthwise``
    (channels, k, k, 1); ``bias`` (out,); ``cap``: None, inf for ReLU, 6 for ReLU6, or one for each channel (out,)."""

    name: str
    source: str
    weight: F32
    bias: F32
    stride: int = 1
    depthwise: bool = False
    cap: float | F32 | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def __call__(self, x: F32) -> F32:
        y: F32 = convolve(x, self.weight, self.stride, self.depthwise) + self.bias
        return y if self.cap is None else np.clip(y, 0, np.float32(self.cap))


@dataclass(frozen=True)
class Sum:
    name: str
    sources: tuple[str, str]

    def __call__(self, a: F32, b: F32) -> F32:
        return a + b


@dataclass(frozen=True)
class Mean:
    """Over an image, which keeps one pixel."""

    name: str
    source: str

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def __call__(self, x: F32) -> F32:
        mean: F32 = x.mean(axis=(1, 2), keepdims=True)
        return mean


Node = Product | Sum | Mean


def convolve(x: Any, weight: Any, stride: int, depthwise: bool) -> Any:
    """(n, h, w, in) → (n, ⌈h / stride⌉, ⌈w / stride⌉, out), in the arrays' own type, tap by tap of the kernel."""
    n, height, width, channels = x.shape
    k = weight.shape[1]
    rows, cols = -(-height // stride), -(-width // stride)
    below, behind = (max((out - 1) * stride + k - size, 0) for out, size in ((rows, height), (cols, width)))
    padded = np.zeros_like(x, shape=(n, height + below, width + behind, channels))
    padded[:, below // 2 : below // 2 + height, behind // 2 : behind // 2 + width] = x
    y = np.zeros((n, rows, cols, weight.shape[0]), np.result_type(x, weight))
    for i in range(k):
        for j in range(k):
            tap = padded[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (cols - 1) * stride + 1 : stride]
            y += tap * weight[:, i, j, 0] if depthwise else tap @ weight[:, i, j].T
    return y


def with_norm(weight: F32, scale: F32, shift: F32, mean: F32, variance: F32, epsilon: float) -> tuple[F32, F32]:
    """Weight and bias of a convolution that a batch norm follows, its statistics fixed."""
    factor = scale / np.sqrt(variance + np.float32(epsilon))
    return weight * factor[:, None, None, None], shift - mean * factor


def run(nodes: Sequence[Node], image: F32, seen: Callable[[str, F32], F32] = lambda name, value: value) -> F32:
    """The last node's value, in real numbers. ``seen`` is shown every value, the input's name being "input", and may
    replace it: that is how quantization is simulated."""
    values = {"input": seen("input", image)}
    for node in nodes:
        values[node.name] = seen(node.name, node(*(values[source] for source in node.sources)))
    return values[nodes[-1].name]


Calibration = Callable[[F32], tuple[F32, F32]]


def calibrate(
    nodes: Sequence[Node], images: Iterable[F32], calibration: Calibration = ranges.extremes
) -> dict[str, tuple[float, float]]:
    """The static range of every value, by ``calibration`` on up to 262,144 elements of it from each batch."""
    samples: dict[str, list[F32]] = {}

    def keep(name: str, value: F32) -> F32:
        samples.setdefault(name, []).append(value.reshape(-1)[:: -(-value.size // SAMPLE)].copy())
        return value

    for batch in images:
        run(nodes, batch, keep)
    found = {name: calibration(np.concatenate(parts)[None]) for name, parts in samples.items()}
    return {name: (float(low[0]), float(high[0])) for name, (low, high) in found.items()}


@dataclass(frozen=True)
class Code:
    """What the codes of a value mean: x = scale × (code - zero)."""

    scale: float
    zero: int

    @classmethod
    def of(cls, low: float, high: float) -> Code:
        scale, zero = VALUES.parameters(np.array([low], np.float32), np.array([high], np.float32))
        return cls(float(scale[0, 0]), int(zero[0, 0]))

    def encode(self, x: F32) -> I32:
        codes: I32 = VALUES.quantize(x, np.float32(self.scale), np.float32(self.zero)).astype(np.int32)
        return codes

    def decode(self, codes: npt.NDArray[np.signedinteger]) -> F32:
        return (codes - self.zero).astype(np.float32) * np.float32(self.scale)

    def limited(self, sums: npt.NDArray[np.int64], limit: npt.NDArray[np.int64] | None = None) -> I32:
        """Sums in units of the scale as codes, between the one of 0 and ``limit`` where there is one."""
        if limit is None:
            return np.clip(sums + self.zero, 0, VALUES.levels).astype(np.int32)
        return np.clip(sums + self.zero, self.zero, limit).astype(np.int32)

    def limit(self, cap: float | F32 | None) -> npt.NDArray[np.int64] | None:
        """The code of an activation function's upper limit, if it has any."""
        if cap is None:
            return None
        highest = np.rint(np.minimum(np.float64(cap) / self.scale, VALUES.levels)) + self.zero
        limits: npt.NDArray[np.int64] = np.minimum(highest, VALUES.levels).astype(np.int64)
        return limits


@dataclass(frozen=True)
class IntegerProduct:
    """``weight`` int8, ``bias`` int32 (out,), ``factor`` of the rescaling, and the limits of the codes."""

    name: str
    sources: tuple[str, ...]
    weight: npt.NDArray[np.int8]
    bias: I32
    stride: int
    depthwise: bool
    x: Code
    y: Code
    by: Dyadic
    limit: npt.NDArray[np.int64] | None

    @property
    def n_bytes(self) -> int:
        return self.weight.nbytes + self.bias.nbytes + self.by.n_bytes

    def __call__(self, x: I32) -> I32:
        sums = convolve(x - np.int32(self.x.zero), self.weight.astype(np.int32), self.stride, self.depthwise)
        return self.y.limited(rescale(sums + self.bias, self.by), self.limit)


@dataclass(frozen=True)
class IntegerSum:
    name: str
    sources: tuple[str, str]
    codes: tuple[Code, Code]
    y: Code
    by: Dyadic

    @property
    def n_bytes(self) -> int:
        return self.by.n_bytes

    def __call__(self, a: I32, b: I32) -> I32:
        terms = (
            (x - np.int32(code.zero)).astype(np.int64) * factor
            for x, code, factor in zip((a, b), self.codes, self.by.factor, strict=True)
        )
        return self.y.limited(shifted(sum(terms), self.by.shift[0]))


@dataclass(frozen=True)
class IntegerMean:
    """``by`` is for an image of one pixel; its factor is divided by the number of pixels when they are known."""

    name: str
    sources: tuple[str, ...]
    x: Code
    y: Code
    by: Dyadic

    @property
    def n_bytes(self) -> int:
        return self.by.n_bytes

    def __call__(self, x: I32) -> I32:
        sums = (x - np.int32(self.x.zero)).sum(axis=(1, 2), keepdims=True, dtype=np.int64)
        divisor = x.shape[1] * x.shape[2] << self.by.shift
        return self.y.limited((sums * self.by.factor + (divisor >> 1)) // divisor)


@dataclass(frozen=True)
class IntegerNetwork:
    """Codes in, codes out. ``input`` and ``output`` say what they mean in real numbers."""

    nodes: tuple[IntegerProduct | IntegerSum | IntegerMean, ...]
    input: Code
    output: Code

    @property
    def n_bytes(self) -> int:
        return sum(node.n_bytes for node in self.nodes)

    def run(self, codes: I32) -> I32:
        """Codes of images (n, h, w, channels) to those of the last node: nothing but integers in between."""
        values = {"input": codes}
        for node in self.nodes:
            values[node.name] = node(*(values[source] for source in node.sources))
        return values[self.nodes[-1].name]


def convert(nodes: Sequence[Node], seen: Mapping[str, tuple[float, float]], per_channel: bool = True) -> IntegerNetwork:
    """The integer network of ``nodes``, for values in the ranges ``seen`` (of every node and of "input").

    Raises
    ------
    InvalidInput : a value has no range.
    """
    missing = [name for name in ("input", *(node.name for node in nodes)) if name not in seen]
    if missing:
        raise InvalidInput(f"no range of {', '.join(missing)}", cure="calibrate the whole network")
    code = {name: Code.of(*limits) for name, limits in seen.items()}
    found: list[IntegerProduct | IntegerSum | IntegerMean] = []
    for node in nodes:
        y = code[node.name]
        if isinstance(node, Product):
            found.append(_product(node, code[node.source], y, per_channel))
        elif isinstance(node, Sum):
            a, b = (code[source] for source in node.sources)
            found.append(
                IntegerSum(
                    node.name, node.sources, (a, b), y, dyadic([a.scale / y.scale, b.scale / y.scale], common=True)
                )
            )
        else:
            x = code[node.source]
            found.append(IntegerMean(node.name, node.sources, x, y, dyadic([x.scale / y.scale])))
    return IntegerNetwork(tuple(found), code["input"], code[nodes[-1].name])


def _product(node: Product, x: Code, y: Code, per_channel: bool) -> IntegerProduct:
    flat = node.weight.reshape(len(node.weight), -1)
    block: Block = (1, None) if per_channel else (None, None)
    scale, zero = WEIGHTS.parameters(*ranges.extremes(to_groups(flat, block)))
    # A channel whose bias dwarfs its weights gets coarser weights, so that its sums stay below 2^28.
    scale = np.maximum(scale, np.abs(node.bias)[:, None] / np.float32(x.scale * 2.0**27))
    codes = WEIGHTS.quantize(flat, scale, zero) - zero
    unit = x.scale * scale[:, 0].astype(np.float64)
    bias = np.rint(node.bias / unit)
    return IntegerProduct(
        node.name,
        node.sources,
        codes.reshape(node.weight.shape).astype(np.int8),
        bias.astype(np.int32),
        node.stride,
        node.depthwise,
        x,
        y,
        dyadic(unit / y.scale),
        y.limit(node.cap),
    )
