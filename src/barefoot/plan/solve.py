"""solve — an exact multiple-choice knapsack: one option from each slot, within capacities.

Options carry bytes in each place, seconds and KL divergence, all of which add up over the slots. Among the combinations
that fit, whose KL is at most a limit, the best has the least key: for speed

    (pace, KL, bytes)          pace = log(seconds) in steps of 1 %

so that a gain of speed below 1 % never costs quality or memory; for size, bytes. Depth-first search with bounds: what
remains can't be cheaper than the sum of each slot's cheapest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

PACE_STEP = 0.01
ROUNDING = 1e-12  # sums of a few floats in another order differ by less
Key = tuple[float, float, float]


class Option(NamedTuple):
    """A choice for one slot and what it costs: bytes in each place, seconds, nats."""

    value: Any
    bytes: tuple[int, ...]
    seconds: float
    kl: float


class Choice(NamedTuple):
    """One value for each slot, and the sums."""

    values: tuple[Any, ...]
    bytes: tuple[int, ...]
    seconds: float
    kl: float


def pace(seconds: float) -> int:
    """Seconds on a logarithmic scale, in steps of 1 %; non-decreasing."""
    return math.floor(math.log(max(seconds, 1e-12)) / math.log1p(PACE_STEP))


def by_speed(n_bytes: int, seconds: float, kl: float) -> Key:
    """Faster first, then closer to the original, then smaller."""
    return (pace(seconds), kl, n_bytes)


def by_bytes(n_bytes: int, seconds: float, kl: float) -> Key:
    """Smaller first, then faster, then closer to the original."""
    return (n_bytes, pace(seconds), kl)


def _least(slots: Sequence[Sequence[Option]], n_places: int) -> list[tuple[tuple[int, ...], float, float]]:
    """For each depth, the least bytes, seconds and KL that the slots from there on add."""
    bounds = [((0,) * n_places, 0.0, 0.0)]
    for options in reversed(slots):
        size, seconds, kl = bounds[-1]
        least = tuple(b + min(o.bytes[i] for o in options) for i, b in enumerate(size))
        bounds.append((least, seconds + min(o.seconds for o in options), kl + min(o.kl for o in options)))
    return bounds[::-1]


def best(
    slots: Sequence[Sequence[Option]],
    capacities: Sequence[int],
    *,
    max_kl: float = math.inf,
    key: Callable[[int, float, float], Key] = by_speed,
    below: Key | None = None,
    accept: Callable[[Choice], bool] = lambda choice: True,
) -> Choice | None:
    """The choice with the least key that fits, or None.

    Parameters
    ----------
    slots : the options of each slot; none may be empty.
    capacities : bytes of each place.
    max_kl : limit of the summed KL.
    key : of the bytes in the first place, seconds and KL; must not decrease when one of them grows.
    below : only choices with a smaller key count.
    accept : a last test of whole choices, asked only of those that would be the best so far.
    """
    bounds = _least(slots, len(capacities))
    # Fast options first, so that a good choice is found early and bounds the rest.
    ordered = [sorted(options, key=lambda o: (o.seconds, o.kl, o.bytes)) for options in slots]
    found: Choice | None = None
    limit = below

    def search(depth: int, values: tuple[Any, ...], size: tuple[int, ...], seconds: float, kl: float) -> None:
        nonlocal found, limit
        more_bytes, more_seconds, more_kl = bounds[depth]
        if any(s + m > c for s, m, c in zip(size, more_bytes, capacities, strict=True)):
            return
        if depth == len(ordered):
            choice = Choice(values, size, seconds, kl)
            this = key(size[0], seconds, kl)
            if kl <= max_kl and (limit is None or this < limit) and accept(choice):
                found, limit = choice, this
            return
        least_seconds, least_kl = (seconds + more_seconds) * (1 - ROUNDING), kl + more_kl - ROUNDING
        if least_kl > max_kl:
            return
        if limit is not None and key(size[0] + more_bytes[0], least_seconds, least_kl) >= limit:
            return
        for option in ordered[depth]:
            total = tuple(a + b for a, b in zip(size, option.bytes, strict=True))
            search(depth + 1, (*values, option.value), total, seconds + option.seconds, kl + option.kl)

    search(0, (), (0,) * len(capacities), 0.0, 0.0)
    return found
