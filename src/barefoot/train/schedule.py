"""The learning rate over the steps: a rise at the beginning, then constant, or falling to a floor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from barefoot.core.errors import InvalidInput, unknown_name

Shape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """The share of the highest learning rate that each step takes.

    With w steps of warm-up, n in all and the floor f, step s (from 0) takes (s + 1) / (w + 1) while s < w. Behind that,
    with t = (s - w) / (n - w), it takes 1 (constant), f + (1 - f) (1 - t) (linear), or
    f + (1 - f) (1 + cos πt) / 2 (cosine). So the floor is what a further step would take, and no step takes 0.

    Parameters
    ----------
    warmup : steps, or below 1 a share of all steps, rounded.
    floor : share of the highest rate, 0 to 1.

    Raises
    ------
    InvalidInput : a knob lies outside its range.
    """

    shape: Shape = "cosine"
    warmup: float = 0.03
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise unknown_name("schedule", self.shape, get_args(Shape))
        if not (0 <= self.warmup < 1 or (self.warmup >= 1 and float(self.warmup).is_integer())):
            raise InvalidInput(f"warm-up must be a number of steps, or a share below 1; got {self.warmup}")
        if not 0 <= self.floor <= 1:
            raise InvalidInput(f"the floor of the learning rate must be 0 to 1, got {self.floor}")

    def n_warmup(self, n_steps: int) -> int:
        """Steps of warm-up among ``n_steps``, at most all of them."""
        return min(n_steps, round(self.warmup * n_steps if self.warmup < 1 else self.warmup))

    def share(self, step: int, n_steps: int) -> float:
        """What step number ``step`` of ``n_steps`` takes, from 0; the floor behind the last one."""
        warmup = self.n_warmup(n_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        t = min(1.0, (step - warmup) / max(1, n_steps - warmup))
        if self.shape == "constant":
            return 1.0
        falling = 1 - t if self.shape == "linear" else (1 + math.cos(math.pi * t)) / 2
        return self.floor + (1 - self.floor) * falling
