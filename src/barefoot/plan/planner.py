"""From a model's shapes, a job and a budget to a plan. Signatures first; the search follows."""

from __future__ import annotations

from barefoot.core.device import Device
from barefoot.core.ledger import Footprint
from barefoot.core.model import ModelSpec
from barefoot.plan.job import Budget, RunJob, Stated
from barefoot.plan.reserved import Reserved
from barefoot.plan.result import Plan


def plan(
    spec: ModelSpec,
    job: RunJob,
    budget: Budget,
    device: Device | None = None,
    stated: Stated | None = None,
    *,
    reserved: Reserved | None = None,
    extra: Footprint | None = None,
    model: str | None = None,
) -> Plan:
    """The best plan that fits; OverBudget (carrying a Refusal) when there is none. ``model``: the name in commands."""
    raise NotImplementedError


def candidates(
    spec: ModelSpec,
    job: RunJob,
    budget: Budget,
    device: Device | None = None,
    stated: Stated | None = None,
    *,
    reserved: Reserved | None = None,
    extra: Footprint | None = None,
    model: str | None = None,
) -> tuple[Plan, ...]:
    """The best plan of each quality tier, best quality first: the first one is the one that ``plan`` recommends."""
    raise NotImplementedError


def smallest_budget(
    spec: ModelSpec,
    job: RunJob,
    device: Device | None = None,
    stated: Stated | None = None,
    *,
    max_kl: float = float("inf"),
    reserved: Reserved | None = None,
    extra: Footprint | None = None,
) -> int:
    """The least bytes (in the place that computes) with which ``plan`` succeeds at a predicted KL of at most max_kl."""
    raise NotImplementedError
