"""bfp — block floating point: integers that share an exponent.

The number format of Accurate Block Quantization in LLMs with Outliers (Trukhanov and Soloveychik 2024,
arXiv:2403.20137), there called BFP(mantissa + 8):

    w = 2^(e − mantissa + 2) × q        e = exponent of the block's largest magnitude, q of ``mantissa`` bits, signed

Values in the top half step saturate; solvers that look for better scales try the next exponent too.

*K-sort*: one outlier takes the bits of all that share its exponent, so channels are put in the order of their sizes
(``by_size``) and outliers come to share blocks with each other. Where the function does not depend on the order of the
channels, :mod:`barefoot.weights.folds` moves it into the weights, and at run time nothing is left of it.

Bytes a block: 1 (exponent) + block × mantissa / 8. The layout is documented bit by bit in :mod:`barefoot.ops.blocks`;
products are those of integers.

Differs from the paper: there blocks hold keys, here weights, and two's complement has one level more below zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot.weights.formats import GROUPS, WeightFormat, check_knob

MANTISSAS = (3, 4, 6, 8)


@dataclass(frozen=True)
class BlockFloat(WeightFormat, name="bfp", papers=(41,), status="stable"):
    mantissa: int = 4
    block: int = 32

    def __post_init__(self) -> None:
        check_knob("bfp", "mantissa", self.mantissa, MANTISSAS)
        check_knob("bfp", "block", self.block, GROUPS)

    def layout(self, stored: str) -> str:
        return f"bfp{self.mantissa}_g{self.block}"


def by_size(sizes: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """The channels from the largest to the smallest, equal ones as they are; of each row where ``sizes`` has rows.

    sizes : (..., channels), such as the norms of a matrix's columns, or the standard deviations of keys.
    """
    return np.argsort(-sizes, axis=-1, kind="stable")
