"""The answer when a job does not fit: by how much, what would fit instead, and commands that do.

Every alternative has been planned, and fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from barefoot.core.errors import OverBudget
from barefoot.core.ledger import Place
from barefoot.core.units import format_bytes
from barefoot.plan.job import RunJob


@dataclass(frozen=True)
class Alternative:
    """Something that fits: what changes, its predicted bytes and quality, and the command to paste."""

    change: str
    command: str
    needed_bytes: int
    budget_bytes: int
    kl: float
    tier: str
    decode_tokens_per_second: float

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__}


@dataclass(frozen=True)
class Refusal:
    """Why a job does not fit, and what would.

    ``needed_bytes`` is the smallest peak of any plan within what is stated, ``available_bytes`` the budget;
    ``largest_context`` and ``largest_batch`` (0: none) fit with all else as it was. ``n_stack`` parts of the model can
    be left out, and are in those smallest plans. Alternatives are sorted by the quality they cost, then by how much
    they change.
    """

    model: str
    job: RunJob
    place: Place
    needed_bytes: int
    available_bytes: int
    largest_context: int
    largest_batch: int
    alternatives: tuple[Alternative, ...]
    n_stack: int = 0

    @property
    def message(self) -> str:
        """What happened, in one line, and what would fit; the alternatives' commands are separate."""
        short = self.needed_bytes - self.available_bytes
        of_batch = f" for each of {self.job.batch} sequences" if self.job.batch > 1 else ""
        text = (
            f"{self.model} with a context of {self.job.context:,} tokens{of_batch} needs at least "
            f"{format_bytes(self.needed_bytes)} in {self.place} memory; available are "
            f"{format_bytes(self.available_bytes)}, {format_bytes(short)} too few"
        )
        if self.n_stack:
            text += f" even without the {self.n_stack:,} blocks that it can do without"
        if self.largest_context:
            text += f"; the largest context that fits is {self.largest_context:,}"
        if self.job.batch > 1 and self.largest_batch:
            text += f"; the largest batch is {self.largest_batch}"
        return text

    @property
    def cure(self) -> str | None:
        """The commands that fit, one a line."""
        lines = [f"{a.command}    # {a.change}" for a in self.alternatives]
        return "use one of\n" + "\n".join(f"  {line}" for line in lines) if lines else None

    def error(self) -> OverBudget:
        """The exception that carries this refusal."""
        return OverBudget(
            self.message, needed=self.needed_bytes, available=self.available_bytes, refusal=self, cure=self.cure
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "fits": False,
            "needed_bytes": self.needed_bytes,
            "available_bytes": self.available_bytes,
            "place": self.place,
            "largest_context": self.largest_context,
            "largest_batch": self.largest_batch,
            "message": self.message,
            "alternatives": [a.to_json() for a in self.alternatives],
        }
