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
    answers : by index. is_batch : they were made together, and their speed is that of all.
    load_seconds : reading the weights into place. before_seconds : from the command's start to that.
    measured : the process's peak resident bytes, when this record is made.
    """

    plan: Plan
    reserved: Reserved
    handed_out: Mapping[Kind, int]
    answers: list[Answer]
    load_seconds: float
    before_seconds: float
    is_batch: bool = False
    measured: int | None = field(default_factory=_peak)

    @property
    def predicted(self) -> int:
        return self.plan.needed["host"]

    @property
    def unaccounted(self) -> int | None:
        return None if self.measured is None else self.measured - self.predicted

    @property
    def _timed(self) -> list[Answer]:
        """The answers whose speed is told: all of a batch, the last one of a chat."""
        return self.answers if self.is_batch else self.answers[-1:]

    @property
    def prefill_tokens_per_second(self) -> float:
        seconds = sum(a.prefill_seconds for a in self._timed)
        return sum(a.n_prefilled for a in self._timed) / seconds if seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Of the tokens that decoding gave; the first of each answer comes out of the prefill."""
        seconds = sum(a.decode_seconds for a in self._timed)
        return sum(a.n_decoded for a in self._timed) / seconds if seconds else 0.0

    def summary(self) -> str:
        """One line: peak, budget, prediction, speed."""
        measured = "peak not measured" if self.measured is None else f"peak {format_bytes(self.measured)}"
        parts = [f"{measured} of {format_bytes(self.plan.budget['host'])}, predicted {format_bytes(self.predicted)}"]
        if self.answers:
            prompts, answers = ("prompts", f"{len(self.answers)} answers") if self.is_batch else ("prompt", "answer")
            n_prefilled, n_tokens = (sum(getattr(a, n) for a in self._timed) for n in ("n_prefilled", "n_tokens"))
            parts.append(f"{prompts} {n_prefilled} tokens at {self.prefill_tokens_per_second:,.1f}/s")
            parts.append(f"{answers} {n_tokens} tokens at {self.decode_tokens_per_second:,.1f}/s")
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

        plan, last = self.plan, self.answers[-1] if self.answers and not self.is_batch else None
        device = this_machine()
        predicted = plan.footprint.by_kind("host")
        return {
            "text": last.text if last else None,
            "finish_reason": last.finish_reason if last else None,
            "prompt_tokens": sum(a.n_prompt for a in self._timed),
            "decode_tokens": sum(a.n_tokens for a in self._timed),
            "answers": [
                {
                    "index": a.index,
                    "text": a.text,
                    "finish_reason": a.finish_reason,
                    "prompt_tokens": a.n_prompt,
                    "decode_tokens": a.n_tokens,
                }
                for a in self.answers
            ],
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
            "prefill_tokens_per_second": self.prefill_tokens_per_second if self.answers else None,
            "decode_tokens_per_second": self.decode_tokens_per_second if self.answers else None,
            "predicted_prefill_tokens_per_second": plan.prefill.tokens_per_second,
            "predicted_decode_tokens_per_second": plan.decode.tokens_per_second,
            "turns": len(self.answers),
            "plan": plan.to_json(),
            "machine": {"processor": device.title, "cores": device.n_cores, "kernels": ops.backend()},
            "versions": {"barefoot": __version__, "python": platform.python_version(), "numpy": np.__version__},
        }
