"""Exponential, softmax, GELU, square root and layer norm of integers.

I-BERT: Integer-only BERT Quantization (Kim et al. 2021, arXiv:2101.01321), sections 3.3 to 3.6. An integer q stands for
q S. A polynomial a (x + b)² + c of x = q S is the integer (q + ⌊b / S⌋)² + ⌊c / (a S²)⌋ in units of a S²::

    exp   x ≤ 0 is -z ln 2 + p with p in (-ln 2, 0]; exp(p) ≈ 0.3585 (p + 1.353)² + 0.344, shifted right by z
    erf   sign(x) (-0.2888 (min(|x|, 1.769) - 1.769)² + 1)
    GELU  x (1 + erf(x / √2)) / 2
    √n    Newton's iteration, exactly ⌊√n⌋

The functions of this module come in pairs: constants are derived from S once, when a network is converted; what runs
afterwards is made of integers only. Integers have 64 bits; products of two 32-bit ones occur.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from barefoot.core.errors import InvalidInput
from barefoot.weights.integers.dyadic import I64, Integers

LN2 = math.log(2)
PROBABILITY_BITS = 8
NORM_BITS = 10  # a normalized element 1.0 is 2^10
MEAN_BITS = 4  # of a mean behind the point: squares then stay below 2^44, sums of 2^16 of them below 2^60


@dataclass(frozen=True)
class Exponential:
    """exp of integers ≤ 0 in units of ``scale`` (at most 0.1, or ln 2 is too coarse a number)."""

    scale: float

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 0.1:
            raise InvalidInput(f"exponents need units between 0 and 0.1, got {self.scale:.3g}")

    @property
    def constants(self) -> tuple[int, int, int]:
        return math.floor(LN2 / self.scale), math.floor(1.353 / self.scale), math.floor(0.344 / 0.3585 / self.scale**2)

    @property
    def out_scale(self) -> float:
        return 0.3585 * self.scale**2

    def __call__(self, q: Integers) -> I64:
        """q ≤ 0 → the exponential, in units of ``out_scale``."""
        ln2, b, c = self.constants
        halvings = (-q.astype(np.int64)) // ln2
        rest = q + halvings * ln2
        powers: I64 = ((rest + b) ** 2 + c) >> np.minimum(halvings, 62)
        return powers


def softmax(q: Integers, exponential: Exponential) -> I64:
    """Along the last axis, in units of 2^-8: 0 to 256."""
    powers = exponential(q - q.max(axis=-1, keepdims=True))
    shares: I64 = (powers << PROBABILITY_BITS) // powers.sum(axis=-1, keepdims=True)
    return shares


@dataclass(frozen=True)
class Gelu:
    """GELU of integers in units of ``scale``."""

    scale: float

    @property
    def constants(self) -> tuple[int, int, int]:
        """⌊b / S⌋, 1 in units of the polynomial, and how far 1 + erf is shifted to have 16 bits."""
        inner = self.scale / math.sqrt(2)
        one = math.floor(1 / 0.2888 / inner**2)
        return math.floor(1.769 / inner), one, max(0, one.bit_length() + 1 - 16)

    @property
    def out_scale(self) -> float:
        return self.scale * 0.2888 * (self.scale / math.sqrt(2)) ** 2 * 2.0 ** (self.constants[2] - 1)

    def __call__(self, q: Integers) -> I64:
        """The result, in units of ``out_scale``: 32 bits for codes of 16."""
        b, one, shift = self.constants
        q = q.astype(np.int64)
        erf = np.sign(q) * (one - (np.minimum(np.abs(q), b) - b) ** 2)
        product: I64 = q * ((one + erf) >> shift)
        return product


def square_root(n: Integers) -> I64:
    """⌊√n⌋ of integers from 0 to 2^62."""
    n = n.astype(np.int64)
    root = np.full_like(n, 1 << 31)
    while True:
        # From above, Newton's iteration falls until it has arrived.
        following = (root + n // np.maximum(root, 1)) >> 1
        if np.all(following >= root):
            return root
        root = np.minimum(root, following)


def normalized(q: Integers) -> I64:
    """(q - mean) / standard deviation along the last axis, in units of 2^-10. Up to 2^16 elements below 2^17."""
    n = q.shape[-1]
    finer = q.astype(np.int64) << MEAN_BITS
    centred = finer - (finer.sum(axis=-1, keepdims=True) + n // 2) // n
    spread = np.maximum(square_root((centred**2).sum(axis=-1, keepdims=True) // n), 1)
    quotients: I64 = ((centred << (NORM_BITS + 1)) + spread) // (2 * spread)
    return quotients
