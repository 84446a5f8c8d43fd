"""Optimizers: what a step makes of gradients, and where what it remembers until the next one lies."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from barefoot.core.ledger import Term
from barefoot.core.technique import Technique


class Optimizer(Technique):
    """The role. ``sizes`` are the numbers of each array that learns; all are float32."""

    @abstractmethod
    def state_terms(self, sizes: Sequence[int]) -> tuple[Term, ...]:
        """Bytes in memory from step to step."""

    @abstractmethod
    def step_terms(self, sizes: Sequence[int]) -> tuple[Term, ...]:
        """Bytes that a step allocates at most at a time, beside those and the gradients."""

    def moved_bytes(self, sizes: Sequence[int]) -> int:
        """Bytes that a step reads from disk and writes to it."""
        return 0

    @abstractmethod
    def over(self, parameters: Sequence[Any], folder: Path, **rule: Any) -> Any:
        """A PyTorch optimizer with the methods of ``optim.driver.adamw.AdamW``.

        ``folder`` is for files that it needs while it lives; ``rule`` are ``betas``, ``eps`` and ``weight_decay``.
        """


ROLE = Optimizer
