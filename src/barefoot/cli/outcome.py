"""What a run came to: the ledger and the speeds, predicted beside measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from barefoot.cli import report
from barefoot.core.units import format_bytes

if TYPE_CHECKING:
    from barefoot.cli.conversation import Answer
    from barefoot.core.ledger import Kind
    from barefoot.plan.reserved import Reserved
    from barefoot.plan.result import Plan


def _peak() -> int | None:
    from barefoot.core.measure import peak_resident

    return peak_resident()


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes
    ----------
    handed_out : bytes by kind that the run really took: from the arena, for the tokenizer, and reserved.
    load_seconds : reading the weights into place. before_seconds : from the command's start to that.
    measured : the process's peak resident bytes, when this record is made.
    """

    plan: Plan
    reserved: Reserved
    handed_out: Mapping[Kind, int]
    answers: list[Answer]
    load_seconds: float
    before_seconds: float
    measured: int | None = field(default_factory=_peak)

    @property
    def predicted(self) -> int:
        return self.plan.needed["host"]

    @property
    def unaccounted(self) -> int | None:
        return None if self.measured is None else self.measured - self.predicted

    def summary(self) -> str:
        """One line: peak, budget, prediction, speed."""
        measured = "peak not measured" if self.measured is None else f"peak {format_bytes(self.measured)}"
        parts = [f"{measured} of {format_bytes(self.plan.budget['host'])}, predicted {format_bytes(self.predicted)}"]
        if self.answers:
            last = self.answers[-1]
            parts.append(f"prompt {last.n_prefilled} tokens at {last.prefill_tokens_per_second:,.1f}/s")
            parts.append(f"answer {last.n_tokens} tokens at {last.decode_tokens_per_second:,.1f}/s")
        return "; ".join(parts)

    def report(self) -> str:
        """The ledger by kind, then what was chosen."""
        predicted = self.plan.footprint.by_kind("host")
        ledger = report.ledger_table(predicted, self.handed_out, self.predicted, self.measured)
        return f"{ledger}\n\n{report.choices_table(self.plan)}"

    def to_json(self) -> dict[str, Any]:
        """The record that ``run --json`` writes; :data:`barefoot.cli.commands.run.JSON_KEYS` says what is in it."""
        import platform

        import numpy as np

        from barefoot import __version__, ops
        from barefoot.core.device import this_machine

        plan, last = self.plan, self.answers[-1] if self.answers else None
        device = this_machine()
        predicted = plan.footprint.by_kind("host")
        return {
            "text": last.text if last else None,
            "finish_reason": last.finish_reason if last else None,
            "prompt_tokens": last.n_prompt if last else 0,
            "decode_tokens": last.n_tokens if last else 0,
            "budget_bytes": plan.budget["host"],
            "predicted_peak_bytes": self.predicted,
            "measured_peak_bytes": self.measured,
            "reserved_bytes": self.reserved.bytes,
            "unaccounted_bytes": self.unaccounted,
            "by_kind": {k: {"predicted": n, "measured": self.handed_out.get(k)} for k, n in predicted.items()},
            "phases": plan.peaks(),
            "terms": plan.footprint.to_json(),
            "load_seconds": self.load_seconds,
            "first_token_seconds": (
                self.before_seconds + self.load_seconds + self.answers[0].prefill_seconds if self.answers else None
            ),
            "prefill_tokens_per_second": last.prefill_tokens_per_second if last else None,
            "decode_tokens_per_second": last.decode_tokens_per_second if last else None,
            "predicted_prefill_tokens_per_second": plan.prefill.tokens_per_second,
            "predicted_decode_tokens_per_second": plan.decode.tokens_per_second,
            "turns": len(self.answers),
            "plan": plan.to_json(),
            "machine": {"processor": device.title, "cores": device.n_cores, "kernels": ops.backend()},
            "versions": {"barefoot": __version__, "python": platform.python_version(), "numpy": np.__version__},
        }
