"""Another budget for a model that runs already: which part of its stack then is in memory."""

from __future__ import annotations

from dataclasses import replace

from barefoot.core.errors import Incompatible, OverBudget
from barefoot.core.ledger import Footprint
from barefoot.core.model import ModelSpec
from barefoot.core.units import format_bytes
from barefoot.engine.stacks import OWNER, stack_footprint
from barefoot.plan.result import Plan


def with_budget(plan: Plan, spec: ModelSpec, budget_bytes: int) -> Plan:
    """The plan with as much of the model's stack as fits into another budget, and all else as it is.

    Raises
    ------
    Incompatible : the model has no stack.
    OverBudget : not even the model without its stack fits; the smallest budget is named.
    """
    if not spec.stack:
        raise Incompatible(
            f"{plan.model} has no blocks that come and go, so its memory stays as it is",
            cure="begin anew with another --memory, or fit the model as a stack: barefoot fit … --weights bitstack",
        )
    smallest = at_level(plan, spec, 0)
    needed = smallest.needed[plan.place]
    if needed > budget_bytes:
        raise OverBudget(
            f"{plan.model} needs at least {format_bytes(needed)} as it runs, without any of its {len(spec.stack):,} "
            f"further blocks; allowed were {format_bytes(budget_bytes)}",
            needed=needed,
            available=budget_bytes,
            cure=f"allow {format_bytes(needed)}, or begin anew with a shorter --context",
        )
    low, high = 0, len(spec.stack)
    while low < high:
        middle = (low + high + 1) // 2
        fits = at_level(plan, spec, middle).needed[plan.place] <= budget_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return replace(at_level(plan, spec, low), budget={**plan.budget, plan.place: budget_bytes})


def at_level(plan: Plan, spec: ModelSpec, n_stacked: int) -> Plan:
    """The plan with ``n_stacked`` parts of the stack in memory."""
    others = Footprint(tuple(e for e in plan.footprint if e.owner != OWNER))
    config = replace(plan.config, n_stacked=n_stacked)
    return replace(plan, config=config, footprint=others + stack_footprint(spec, n_stacked))
