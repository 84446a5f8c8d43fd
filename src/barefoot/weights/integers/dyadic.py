"""Dyadic numbers: a real factor as c / 2^n, so that rescaling is a product, a sum and a shift of integers.

A Survey of Quantization Methods for Efficient Neural Network Inference (Gholami et al. 2021, arXiv:2103.13630), section
IV.A; HAWQ-V3 (Yao et al. 2020, arXiv:2011.10680), section 3. A layer's sum of products a, in units of S_w S_x, becomes
the code y of the next layer, in units of S_y::

    M = S_w S_x / S_y ≈ c / 2^n           y = clip(Z_y + ((a c + 2^(n-1)) >> n))

which rounds half upwards. c has at most 24 bits, so that M is met within 2^-24 of itself and |a| < 2^28 keeps the
product exact even in double precision, where the same can be simulated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput

FACTOR_BITS = 24
MAX_SHIFT = 62

I64 = npt.NDArray[np.int64]
Integers = npt.NDArray[np.signedinteger]


@dataclass(frozen=True)
class Dyadic:
    """``factor`` over 2^``shift``, int64 each, one or one for each channel. As stored: 4 bytes and 1."""

    factor: I64
    shift: I64

    @property
    def n_bytes(self) -> int:
        return 5 * self.factor.size

    @property
    def values(self) -> npt.NDArray[np.float64]:
        return self.factor / np.exp2(self.shift)


def dyadic(reals: npt.ArrayLike, common: bool = False) -> Dyadic:
    """Positive factors as dyadic numbers; with ``common`` all have the shift of the largest.

    Raises
    ------
    InvalidInput : a factor is not positive, not finite, or above 2^24.
    """
    values = np.asarray(reals, np.float64)
    if not (np.isfinite(values).all() and values.min() > 0 and values.max() < 1 << FACTOR_BITS):
        raise InvalidInput(
            f"factors lie above 0 and below 2^{FACTOR_BITS}, got {values.min():.3g} to {values.max():.3g}"
        )
    exponent = np.frexp(values)[1]  # each factor is below 2^exponent
    if common:
        exponent = np.full_like(exponent, exponent.max())
    shift = np.minimum(FACTOR_BITS - exponent, MAX_SHIFT).astype(np.int64)
    factor = np.rint(values * np.exp2(shift)).astype(np.int64)
    return Dyadic(np.minimum(factor, (1 << FACTOR_BITS) - 1), shift)


def rescale(sums: Integers, by: Dyadic) -> I64:
    """``sums`` times ``by``, rounded half upwards; the channels of ``by`` are the last axis of ``sums``."""
    return shifted(sums.astype(np.int64) * by.factor, by.shift)


def shifted(products: I64, shift: I64) -> I64:
    """``products`` / 2^``shift``, rounded half upwards."""
    return (products + (np.int64(1) << shift >> 1)) >> shift
