"""Cycles and energy of an accelerator that multiplies one power of two of each weight at a time. Simulated.

BitMoD: Bit-serial Mixture-of-Datatype LLM Acceleration (Chen et al. 2024, arXiv:2411.11745), section IV: an element
sums four products of f16 activations a step, a step being one signed power of two of each of four weights. A format
takes as many steps as its worst level has such terms: 5 = 4 + 1 takes two, as does every level of BitMoD; integers of
6 bits take three, of 8 bits four. An array of elements of ``rows`` x ``columns`` holds as many outputs of as many
tokens. A product of weights [n, k] with t tokens takes::

    compute   ⌈k / lanes⌉ ⌈n / rows⌉ ⌈t / columns⌉ steps                  cycles
    memory    (weights + inputs + outputs in bits) / 256                  cycles, at 1 GHz

whichever is more: both run at once. Scales of groups are applied while the next group is summed (8 cycles a group, 64
and more of sums). Where neither weights nor inputs fit their buffer of 512 KiB, one of them is read again for each
buffer's worth of the other, whichever costs less. The energy is that of the elements; memory's is not modelled.

*Differs from the paper*, whose figures come from synthesis: areas and energies of elements are its own (a 28 nm
process), everything else is counted here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

BUFFER_BYTES = 512 << 10
MEMORY_BITS = 256  # a cycle
ACTIVATION_BITS = 16
PLACE_AND_ROUTE = 1.5  # times the energy of the synthesised elements


def signed_terms(value: int) -> int:
    """The least number of signed powers of two whose sum is ``value``.

    >>> signed_terms(7), signed_terms(-5), signed_terms(0)
    (2, 2, 0)
    """
    # Of an odd number, the term that leaves a multiple of four behind (non-adjacent form).
    n, terms = abs(value), 0
    while n:
        if n & 1:
            n -= 2 - (n & 3)
            terms += 1
        n >>= 1
    return terms


def steps(levels: Iterable[int]) -> int:
    """Of a format with these levels."""
    return max(map(signed_terms, levels))


@dataclass(frozen=True)
class Array:
    """Elements side by side. ``lanes`` products are taken up together; ``um2`` and ``pj`` are of an element, ``pj`` a
    cycle."""

    rows: int
    columns: int
    lanes: int
    um2: float
    pj: float

    @property
    def area(self) -> float:
        return self.rows * self.columns * self.um2


#: Of about the same area: f16 multiply-accumulate units, and BitMoD's elements as arranged for prompts and one token.
FLOAT = Array(32, 24, 1, 1968.7, 0.77)
PREFILL = Array(32, 32, 4, 1507.7, 0.56)
DECODE = Array(64, 16, 4, 1507.7, 0.56)


@dataclass(frozen=True)
class Cycles:
    """``compute`` and ``memory`` run at once. ``joules`` : of the elements."""

    compute: int
    memory: int
    joules: float

    @property
    def total(self) -> int:
        return max(self.compute, self.memory)


def product(array: Array, n: int, k: int, tokens: int, weight_bits: float, n_steps: int = 1) -> Cycles:
    """Weights [n, k] of ``weight_bits`` each, scales included, times ``tokens`` inputs."""
    compute = math.ceil(k / array.lanes) * math.ceil(n / array.rows) * math.ceil(tokens / array.columns) * n_steps
    weights, inputs, outputs = n * k * weight_bits, tokens * k * ACTIVATION_BITS, tokens * n * ACTIVATION_BITS
    moved = math.ceil((_read(weights, inputs) + outputs) / MEMORY_BITS)
    joules = compute * array.rows * array.columns * array.pj * PLACE_AND_ROUTE * 1e-12
    return Cycles(compute, moved, joules)


def _read(weights: float, inputs: float) -> float:
    """Bits of both that come from memory."""
    buffer = 8 * BUFFER_BYTES
    if weights <= buffer or inputs <= buffer:
        return weights + inputs
    return min(weights * math.ceil(inputs / buffer) + inputs, weights + inputs * math.ceil(weights / buffer))
