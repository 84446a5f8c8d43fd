"""Levels that are not equally spaced: powers of two, sums of powers of two, clusters.

A Survey of Quantization Methods for Efficient Neural Network Inference (Gholami et al. 2021, arXiv:2103.13630), section
III.F. A table holds ascending levels in [-1, 1], among them 0; the elements of a group are divided by its largest
magnitude, and the nearest level's index is the code.

    powers   0 and ±2^-i for i = 0..2^(b-1) - 2: a product with a level is a shift
    sums     0 and ± sums of a few powers, denser at the ends than powers (APoT, Li et al. 2019, arXiv:1909.13144)

Levels fitted to the weights themselves come from :mod:`barefoot.weights.codebooks.clusters`.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput
from barefoot.weights.arrays import Array, namespace

F32 = npt.NDArray[np.float32]


def powers(bits: int) -> F32:
    """The 2^bits - 1 levels of sign and exponent, float32."""
    if not 2 <= bits <= 6:
        raise InvalidInput(f"powers of two are told apart by 2 to 6 bits, got {bits}")
    return _mirrored(np.exp2(-np.arange((1 << (bits - 1)) - 1, dtype=np.float32)))


def sums(bits: int, bits_each: int = 2) -> F32:
    """The 2^bits - 1 levels of sign and n = (bits - 1) / bits_each exponents, float32.

    Term i is 0 or 2^-(i + j n) for j = 0..2^bits_each - 2; the largest sum is scaled to 1 (equation 4 of APoT).

    Raises
    ------
    InvalidInput : ``bits_each`` does not divide ``bits`` - 1.
    """
    if bits_each < 1 or bits < 2 or (bits - 1) % bits_each:
        raise InvalidInput(f"{bits} bits are a sign and exponents of {bits_each} bits, if they divide {bits - 1}")
    n = (bits - 1) // bits_each
    terms = [(0.0, *(2.0 ** -(i + j * n) for j in range((1 << bits_each) - 1))) for i in range(n)]
    magnitudes = np.array(sorted({sum(term) for term in itertools.product(*terms)} - {0.0}), np.float32)
    return _mirrored(magnitudes / magnitudes.max())


def _mirrored(magnitudes: F32) -> F32:
    return np.sort(np.concatenate([-magnitudes, np.zeros(1, np.float32), magnitudes])).astype(np.float32)


def nearest(x: Array, table: Array) -> Array:
    """The index of the level nearest to each element, int64, the lower of two."""
    return namespace(x).searchsorted((table[1:] + table[:-1]) / 2, x)
