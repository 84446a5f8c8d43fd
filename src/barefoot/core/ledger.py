"""The ledger: bytes as terms (name × count × bytes each), by kind, place and phase.

A :class:`Term` is written beside the code that allocates it. An :class:`Entry` groups the terms of one owner and says
in which phases they are alive. A :class:`Footprint` is a tuple of entries; its peak is the maximum over phases of what
is alive in that phase, never a sum of everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal[
    "weights",
    "kv",
    "activations",
    "gradients",
    "optimizer",
    "logits",
    "adapter",
    "index",
    "workspace",
    "reserved",
]
Place = Literal["accelerator", "host", "disk"]
Phase = Literal["load", "convert", "prefill", "decode", "forward", "backward", "step", "save"]

KINDS: tuple[Kind, ...] = get_args(Kind)
PLACES: tuple[Place, ...] = get_args(Place)
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class Term:
    """``count`` things of ``bytes_each`` bytes; whole numbers only, so that nothing is rounded out of sight."""

    name: str
    count: int
    bytes_each: int

    def __post_init__(self) -> None:
        for field, value in (("count", self.count), ("bytes_each", self.bytes_each)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"term {self.name!r}: {field} must be a non-negative int, got {value!r}")

    @property
    def bytes(self) -> int:
        return self.count * self.bytes_each


@dataclass(frozen=True)
class Entry:
    """The terms of one owner, of one kind, in one place, alive in ``phases``."""

    owner: str
    kind: Kind
    place: Place
    phases: tuple[Phase, ...]
    terms: tuple[Term, ...]

    @property
    def bytes(self) -> int:
        return sum(term.bytes for term in self.terms)


@dataclass(frozen=True)
class Footprint:
    """All entries of a job. Footprints add by ``+``; every question is a filter over the entries."""

    entries: tuple[Entry, ...] = ()

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(self.entries + other.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def select(self, *, kind: Kind | None = None, place: Place | None = None, phase: Phase | None = None) -> Footprint:
        """The entries of that kind, in that place, alive in that phase; None means any."""
        return Footprint(
            tuple(
                e
                for e in self.entries
                if (kind is None or e.kind == kind)
                and (place is None or e.place == place)
                and (phase is None or phase in e.phases)
            )
        )

    @property
    def bytes(self) -> int:
        """The plain sum of all entries: what a filter selected, not a peak."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases that occur, in the order in which a job passes through them."""
        present = {phase for entry in self.entries for phase in entry.phases}
        return tuple(phase for phase in PHASES if phase in present)

    def peak(self, place: Place = "host") -> tuple[Phase | None, int]:
        """The phase in which most bytes are alive in ``place``, and those bytes; (None, 0) when nothing is there."""
        totals = [(phase, self.select(place=place, phase=phase).bytes) for phase in self.phases]
        return max(totals, key=lambda item: item[1], default=(None, 0))

    def by_kind(self, place: Place = "host", phase: Phase | None = None) -> dict[Kind, int]:
        """Bytes of each kind alive in ``phase`` (the peak phase of ``place`` when None); no kind with 0 bytes."""
        phase = phase or self.peak(place)[0]
        totals = {kind: self.select(kind=kind, place=place, phase=phase).bytes for kind in KINDS}
        return {kind: total for kind, total in totals.items() if total}

    def to_json(self) -> list[dict[str, Any]]:
        """Entries as plain data: owner, kind, place, phases, bytes, terms [name, count, bytes_each]."""
        return [
            {
                "owner": e.owner,
                "kind": e.kind,
                "place": e.place,
                "phases": list(e.phases),
                "bytes": e.bytes,
                "terms": [[t.name, t.count, t.bytes_each] for t in e.terms],
            }
            for e in self.entries
        ]


def entry(
    owner: str, kind: Kind, terms: Iterable[Term], *, phases: Sequence[Phase], place: Place = "host"
) -> Footprint:
    """A footprint of a single entry."""
    return Footprint((Entry(owner, kind, place, tuple(phases), tuple(terms)),))
