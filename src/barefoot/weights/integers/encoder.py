"""A BERT encoder layer in integers: 8-bit matrices and their inputs, 16-bit residuals, integer softmax, GELU and norms.

I-BERT: Integer-only BERT Quantization (Kim et al. 2021, arXiv:2101.01321), figure 1. Every value is symmetric: a signed
code times a scale. Inputs of matrices and of the two products of attention have 8 bits, what enters GELU and the norms
16; sums have 32 bits.

    scores   q kᵀ in units of S_q S_k / √d → softmax, in units of 2^-8
    norm     (r - mean) / deviation in units of 2^-10, times γ (16 bits), plus β → 8 bits

*Differs from the paper*: GELU reads 16-bit codes in place of 32-bit sums, so that its squares stay below 2^32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput
from barefoot.weights import ranges
from barefoot.weights.integers.dyadic import I64, Dyadic, Integers, dyadic, rescale
from barefoot.weights.integers.functions import NORM_BITS, PROBABILITY_BITS, Exponential, Gelu, normalized, softmax
from barefoot.weights.integers.network import WEIGHTS

F32 = npt.NDArray[np.float32]

MATRICES = ("query", "key", "value", "attention", "up", "down")
NORMS = ("attention_norm", "output_norm")
VALUES_8 = ("input", "query", "key", "value", "context", "attention_norm", "gelu", "output_norm")
VALUES_16 = ("attention_sum", "up", "output_sum")


@dataclass(frozen=True)
class Matrix:
    """y = rescale(x Wᵀ + b). ``weight`` int8 (out, in), ``bias`` int32 (out,) in units of the products."""

    weight: npt.NDArray[np.int8]
    bias: npt.NDArray[np.int32]
    by: Dyadic

    @property
    def n_bytes(self) -> int:
        return self.weight.nbytes + self.bias.nbytes + self.by.n_bytes

    def __call__(self, x: Integers, bits: int) -> I64:
        sums = x.astype(np.int32) @ self.weight.T.astype(np.int32) + self.bias
        return limited(rescale(sums, self.by), bits)


@dataclass(frozen=True)
class Norm:
    """Layer norm to 8 bits. ``scale`` int16 (d,), ``shift`` int32 (d,) in units of the normalized times the scale's."""

    scale: npt.NDArray[np.int16]
    shift: npt.NDArray[np.int32]
    by: Dyadic

    @property
    def n_bytes(self) -> int:
        return self.scale.nbytes + self.shift.nbytes + self.by.n_bytes

    def __call__(self, r: Integers) -> I64:
        return limited(rescale(normalized(r) * self.scale + self.shift, self.by), 8)


@dataclass(frozen=True)
class EncoderLayer:
    """Codes (batch, tokens, d) in, codes out; ``scales`` says what every value's unit is."""

    n_heads: int
    matrices: Mapping[str, Matrix]
    norms: Mapping[str, Norm]
    scales: Mapping[str, float]
    exponential: Exponential
    gelu: Gelu
    context: Dyadic
    residuals: Mapping[str, Dyadic]
    after_gelu: Dyadic

    @property
    def n_bytes(self) -> int:
        """Of matrices and norms; the dozen constants between them are not counted."""
        return sum(m.n_bytes for m in self.matrices.values()) + sum(n.n_bytes for n in self.norms.values())

    def run(self, x: Integers) -> I64:
        """Sequences of full length: there is no mask. The head's size is d / n_heads."""
        m = self.matrices
        q, k, v = (self._heads(m[name](x, 8)) for name in ("query", "key", "value"))
        probabilities = softmax(q @ k.swapaxes(-1, -2), self.exponential)
        mixed = limited(rescale(probabilities @ v, self.context), 8)
        context = mixed.swapaxes(1, 2).reshape(x.shape)
        r = m["attention"](context, 16) + rescale(x, self.residuals["attention_sum"])
        y = self.norms["attention_norm"](r)
        hidden = limited(rescale(self.gelu(m["up"](y, 16)), self.after_gelu), 8)
        r = m["down"](hidden, 16) + rescale(y, self.residuals["output_sum"])
        return self.norms["output_norm"](r)

    def _heads(self, x: I64) -> I64:
        batch, tokens, d = x.shape
        return x.reshape(batch, tokens, self.n_heads, d // self.n_heads).swapaxes(1, 2)


def limited(x: I64, bits: int) -> I64:
    """Symmetric codes: ±(2^(bits - 1) - 1)."""
    top = (1 << (bits - 1)) - 1
    return np.clip(x, -top, top)


def encode(x: F32, scale: float) -> I64:
    """8-bit codes of a value."""
    return limited(np.rint(x / scale).astype(np.int64), 8)


def convert_layer(
    weights: Mapping[str, tuple[F32, F32]], n_heads: int, magnitudes: Mapping[str, float]
) -> EncoderLayer:
    """An integer layer.

    Parameters
    ----------
    weights : weight and bias of the ``MATRICES``, scale and shift of the ``NORMS``.
    magnitudes : the largest magnitude of each of ``VALUES_8`` and ``VALUES_16`` that is to be represented.

    Raises
    ------
    InvalidInput : a weight or a magnitude is missing.
    """
    missing = [n for n in (*MATRICES, *NORMS) if n not in weights]
    missing += [n for n in (*VALUES_8, *VALUES_16) if n not in magnitudes]
    if missing:
        raise InvalidInput(f"an encoder layer needs {', '.join(missing)} too")
    s = {name: magnitudes[name] / 127 for name in VALUES_8} | {name: magnitudes[name] / 32767 for name in VALUES_16}
    wiring = {
        "query": ("input", "query"),
        "key": ("input", "key"),
        "value": ("input", "value"),
        "attention": ("context", "attention_sum"),
        "up": ("attention_norm", "up"),
        "down": ("gelu", "output_sum"),
    }
    head = len(weights["query"][0]) // n_heads
    gelu = Gelu(s["up"])
    return EncoderLayer(
        n_heads,
        {name: _matrix(*weights[name], s[x], s[y]) for name, (x, y) in wiring.items()},
        {name: _norm(*weights[name], s[name]) for name in NORMS},
        s,
        Exponential(s["query"] * s["key"] / math.sqrt(head)),
        gelu,
        dyadic(s["value"] / 2**PROBABILITY_BITS / s["context"]),
        {
            "attention_sum": dyadic(s["input"] / s["attention_sum"]),
            "output_sum": dyadic(s["attention_norm"] / s["output_sum"]),
        },
        dyadic(gelu.out_scale / s["gelu"]),
    )


def _matrix(weight: F32, bias: F32, x: float, y: float) -> Matrix:
    scale, zero = WEIGHTS.parameters(*ranges.extremes(weight))
    unit = x * scale[:, 0].astype(np.float64)
    codes = (WEIGHTS.quantize(weight, scale, zero) - zero).astype(np.int8)
    return Matrix(codes, np.rint(bias / unit).astype(np.int32), dyadic(unit / y))


def _norm(scale: F32, shift: F32, y: float) -> Norm:
    unit = float(np.abs(scale).max()) / 32767
    products = unit / (1 << NORM_BITS)
    return Norm(
        np.rint(scale / unit).astype(np.int16), np.rint(shift / products).astype(np.int32), dyadic(products / y)
    )
