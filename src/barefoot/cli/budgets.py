"""The budgets that a run has had: the one it began with, and those that the user allowed it between answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from barefoot.core.units import format_bytes, parse_bytes
from barefoot.plan.levels import with_budget

if TYPE_CHECKING:
    from barefoot.core.ledger import Kind
    from barefoot.core.model import ModelSpec
    from barefoot.engine.runner import Engine
    from barefoot.plan.result import Plan


class Budgets:
    """An engine, the plan that it obeys now, and the largest one that it has obeyed."""

    def __init__(self, engine: Engine, spec: ModelSpec, plan: Plan) -> None:
        self._engine, self._spec, self.plan = engine, spec, plan
        self._largest = plan, engine.arena.used()

    def allow(self, size: str) -> str:
        """Another budget from now on, such as ``"120MiB"``; what it comes to, in a line.

        Raises
        ------
        InvalidInput : no size.
        OverBudget, Incompatible, CorruptFile : it can't be done, and all stays as it was.
        """
        before = self._engine.config.n_stacked or 0
        plan = with_budget(self.plan, self._spec, parse_bytes(size))
        held = plan.config.n_stacked or 0
        self._engine.resize(held)
        self.plan = plan
        if plan.needed[plan.place] > self._largest[0].needed[plan.place]:
            self._largest = plan, self._engine.arena.used()
        return (
            f"{held:,} of {len(self._spec.stack):,} blocks in memory, {held - before:+,}; "
            f"{format_bytes(plan.needed[plan.place])} of {format_bytes(plan.budget[plan.place])}"
        )

    @property
    def largest(self) -> tuple[Plan, dict[Kind, int]]:
        """The plan of the largest peak, and the bytes by kind that the engine handed out under it."""
        return self._largest
