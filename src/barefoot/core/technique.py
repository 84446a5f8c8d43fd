"""What every technique is: a frozen dataclass of knobs with a name, papers, a status and traits.

A technique is declared by its class statement and found by lying in its family's folder; no list names it::

    @dataclass(frozen=True)
    class IntGroups(WeightFormat, name="int", papers=(14,), status="stable"):
        bits: int = 4

The fields of the dataclass are the knobs, with the paper's defaults; ``str(technique)`` is its spec string.
Traits are short phrases. ``needs`` must be provided by something else in the composition, ``conflicts`` maps a trait
that must not be there to the reason, and both are read by the planner and by the tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

from barefoot.core.errors import Incompatible

Status = Literal["planned", "experimental", "stable", "simulated"]
STATUSES: tuple[Status, ...] = get_args(Status)


class Technique:
    """Base of all techniques. Roles (weight format, KV store, …) are abstract subclasses; methods are final ones."""

    name: ClassVar[str]
    family: ClassVar[str]
    papers: ClassVar[tuple[int, ...]] = ()
    status: ClassVar[Status] = "experimental"
    needs: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    conflicts: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(
        cls,
        *,
        name: str | None = None,
        papers: Sequence[int] = (),
        status: Status = "experimental",
        needs: Sequence[str] = (),
        provides: Sequence[str] = (),
        conflicts: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(**kwargs)
        if name is None:  # an abstract role
            return
        if not name.isidentifier() or name != name.lower():
            raise TypeError(f"technique name {name!r} must be a lower-case identifier")
        if status not in STATUSES:
            raise TypeError(f"technique {name!r}: status {status!r} is not one of {', '.join(STATUSES)}")
        cls.name = name
        cls.papers, cls.status = tuple(papers), status
        cls.needs, cls.provides, cls.conflicts = frozenset(needs), frozenset(provides), dict(conflicts or {})

    @classmethod
    def knobs(cls) -> dict[str, Any]:
        """Name and default of every knob, in order (``dataclasses.MISSING`` where there is no default)."""
        return {f.name: f.default for f in dataclasses.fields(cls)}  # type: ignore[arg-type]

    def __str__(self) -> str:
        from barefoot.core.spec import format_technique

        return format_technique(self)


def check_composition(techniques: Sequence[Technique], provided: frozenset[str] = frozenset()) -> None:
    """Refuse a set of techniques whose traits do not go together.

    Parameters
    ----------
    techniques : everything that is to run together, outermost first.
    provided : traits of the model and the machine.

    Raises
    ------
    Incompatible : a trait that one technique conflicts with is provided by another or by the model, or a need is unmet;
        the message gives the reason that the technique itself declares.
    """
    for technique in techniques:
        around = provided.union(*(t.provides for t in techniques if t is not technique))
        for trait, reason in sorted(technique.conflicts.items()):
            if trait in around:
                sources = [str(t) for t in techniques if t is not technique and trait in t.provides]
                raise Incompatible(f"{technique} can't be used with {', '.join(sources) or trait}: {reason}")
        missing = technique.needs - around
        if missing:
            raise Incompatible(
                f"{technique} needs {' and '.join(sorted(missing))}, which nothing in the composition provides"
            )
