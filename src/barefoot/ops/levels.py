"""Number formats that are not uniform, as tables: the level that each code stands for, before a group's scale.

A scale is free, so a table may be multiplied by any constant. Where all levels of 64 codes or fewer become integers of
at most 127, they are these integers, and products are taken in integers. Otherwise the largest magnitude lies between 1
and 2, and products are taken in float32.

Minifloat E{e}M{m} (arXiv:2311.12359, section II): a sign, e bits of exponent E and m of mantissa M, in this order from
the highest bit; bias = 2^(e-1) - 1; no code is an infinity or NaN:

    E = 0    ± 2^(1 - bias) × M / 2^m
    E > 0    ± 2^(E - bias) × (1 + M / 2^m)

NF4 (arXiv:2305.14314, section 3): levels at quantiles of the normal distribution, seven below zero, zero, and eight
above, ascending. Here they are multiples of 1/127, at most 1/254 away from the paper's.

BitMoD (arXiv:2411.11745, section III): the minifloats E2M0 and E2M1, whose code of negative zero stands for a special
value instead, one of several that a group chooses from.
"""

from __future__ import annotations

import math

MOST = 127  # the largest integer level
#: Exponent and mantissa bits of the minifloats of 3 to 8 bits. Those of one exponent bit are uniform: integers.
SPLITS = tuple((e, b - 1 - e) for b in range(3, 9) for e in range(2, b) if b - 1 > e or e <= 3)
BITMOD = {3: (2, 0), 4: (2, 1)}  # bits: of exponent and mantissa
BITMOD_SPECIALS = {3: (3.0, 6.0), 4: (10.0, 16.0)}  # inside the range, and beyond it


def minifloat(exponent: int, mantissa: int) -> tuple[float, ...]:
    """The values of all 2^(1 + e + m) codes, as the paper has them; the second half are negative.

    >>> minifloat(2, 1)[:8]
    (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    """
    bias, ones = 2 ** (exponent - 1) - 1, 2**mantissa
    fields = [divmod(code, ones) for code in range(2**exponent * ones)]
    magnitudes = [2.0 ** (e - bias) * (1 + m / ones) if e else 2.0 ** (1 - bias) * m / ones for e, m in fields]
    return (*magnitudes, *(-each for each in magnitudes))


def minifloat_table(exponent: int, mantissa: int) -> tuple[float, ...]:
    """``minifloat`` times a power of two: integers where they fit, or a top between 1 and 2."""
    values = minifloat(exponent, mantissa)
    top, smallest = max(values), min(value for value in values if value > 0)
    in_integers = len(values) <= 64 and top <= MOST * smallest
    unit = smallest if in_integers else 2.0 ** (math.frexp(top)[1] - 1)
    return tuple(value / unit for value in values)


def are_integers(table: tuple[float, ...]) -> bool:
    """Whether products with these levels are taken in integers."""
    return all(level.is_integer() for level in table)


#: NF4 in multiples of 1/127: tabulated, since the library that computes quantiles is larger than this module.
NF4 = (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127)


def nf4_table() -> tuple[float, ...]:
    """The sixteen levels of NF4."""
    return tuple(map(float, NF4))
