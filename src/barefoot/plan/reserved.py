"""The runtime's own bytes: interpreter, numpy, barefoot, tokenizers, jinja2; and the slack of the allocator."""

from __future__ import annotations

from dataclasses import dataclass

from barefoot.core.device import cached_probe
from barefoot.core.ledger import Footprint, Phase, Term, entry
from barefoot.core.measure import resident
from barefoot.core.units import MIB

# What a run's process has resident where nobody has measured it yet: above all that was seen with CPython 3.10 to 3.13.
DEFAULT_BYTES = 56 * MIB
# What a run adds to the probe's bare process before it is measured itself: the file's header, the prompt, the terminal.
RUN_EXTRA_BYTES = 3 * MIB
# Stacks, what malloc keeps back, and pages of libraries that only a run touches: 5.7 MiB were seen inside a cgroup.
SLACK_BYTES = 7 * MIB
_PHASES: tuple[Phase, ...] = ("load", "convert", "prefill", "decode")


@dataclass(frozen=True)
class Reserved:
    """Bytes of the process before the job allocates anything, and where the number comes from."""

    bytes: int
    source: str

    def footprint(self) -> Footprint:
        """An entry of kind ``reserved``, alive in every phase of a run: the runtime, and the stated slack."""
        terms = (Term("interpreter and libraries", 1, self.bytes), Term("allocator slack", 1, SLACK_BYTES))
        return entry("process", "reserved", terms, phases=_PHASES)


def reserved_now() -> Reserved | None:
    """What this process has resident now: call it when all libraries of the run are imported. None off Linux."""
    now = resident()
    return None if now is None else Reserved(now.total, "measured in this process")


def reserved_expected() -> Reserved:
    """What a run's process will have resident: from the last probe of this machine, else the stated default."""
    measured = (cached_probe() or {}).get("reserved_bytes")
    if measured:
        return Reserved(int(measured) + RUN_EXTRA_BYTES, "measured by the last probe, and a stated 3 MiB")
    return Reserved(DEFAULT_BYTES, "default, not measured: run barefoot doctor")
