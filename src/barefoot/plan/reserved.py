"""The runtime's own bytes: interpreter, numpy, barefoot, tokenizers, jinja2; and the slack of the allocator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from barefoot.core.device import cached_probe
from barefoot.core.ledger import PHASES, Footprint, Term, entry
from barefoot.core.units import MIB

# What `python -c "import barefoot.engine, tokenizers, jinja2"` keeps resident where nobody has measured it yet.
DEFAULT_BYTES = 56 * MIB
# Page tables, stacks, and what malloc keeps back: measured runs must stay below predicted + this.
SLACK_BYTES = 3 * MIB


@dataclass(frozen=True)
class Reserved:
    """Bytes of the process before the job allocates anything, and where the number comes from."""

    bytes: int
    source: str

    def footprint(self) -> Footprint:
        """An entry of kind ``reserved``, alive in every phase: the runtime, and the stated slack."""
        terms = (Term("interpreter and libraries", 1, self.bytes), Term("allocator slack", 1, SLACK_BYTES))
        return entry("process", "reserved", terms, phases=PHASES)


def _status(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def reserved_now() -> Reserved | None:
    """What this process has resident now: call it when all libraries of the run are imported. None off Linux."""
    resident = _status("VmRSS")
    return None if resident is None else Reserved(resident, "measured in this process")


def reserved_expected() -> Reserved:
    """What a run's process will have resident: from the last probe of this machine, else the stated default."""
    measured = (cached_probe() or {}).get("reserved_bytes")
    if measured:
        return Reserved(int(measured), "measured by the last probe")
    return Reserved(DEFAULT_BYTES, "default, not measured: run barefoot doctor")
