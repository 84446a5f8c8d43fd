"""What a sequence has been through: its tokens, what went when, and the rules of its layers by now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from barefoot.core import untrusted
from barefoot.core.errors import CorruptFile
from barefoot.kv import budgets
from barefoot.kv.layout import Layout
from barefoot.kv.policies import Policy, by_layer
from barefoot.kv.storage import F32


@dataclass
class Course:
    """
    Attributes
    ----------
    prompt_ends : tokens that there were behind each prompt.
    evicted_at : tokens that there were when an entry went last.
    parts, part : tokens that there were when each part of the strikes began, and the present one.
    weights : of the layers that have passed a first prompt, by which they share their budget.
    carried : of each layer, what its policy is given next time, float32 (n_layers, n_carried).
    rules : of each layer; none without a policy.
    """

    carried: F32
    rules: list[Policy]
    parts: list[int]
    part: int = 0
    n_tokens: int = 0
    evicted_at: int = 0
    prompt_ends: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, layout: Layout) -> Course:
        policy, n = layout.policy, layout.n_layers
        rules = [] if policy is None else [policy] * n
        if policy is not None and policy.layers == "pyramid":
            rules = by_layer(policy, budgets.pyramid(n), n, layout.context)
        return cls(np.zeros((n, 0 if policy is None else policy.n_carried), np.float32), rules, [0] * layout.n_parts)

    def copy(self) -> Course:
        return replace(
            self,
            carried=self.carried.copy(),
            rules=list(self.rules),
            parts=list(self.parts),
            prompt_ends=list(self.prompt_ends),
            weights=list(self.weights),
        )

    def slots(self, layout: Layout) -> list[int] | None:
        """The most entries of each layer, where layers have unequal room."""
        if layout.policy is None or layout.policy.layers == "uniform":
            return None
        return [rule.slots(layout.context) for rule in self.rules]

    def header(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "tokens": self.n_tokens,
            "evicted_at": self.evicted_at,
            "parts": self.parts,
            "part": self.part,
            "prompts": self.prompt_ends,
            "keeps": [rule.keep for rule in self.rules],
            "carried": self.carried.tolist(),
        }

    @classmethod
    def restored(cls, header: Mapping[str, Any], layout: Layout) -> Course:
        """What a file's header says.

        Raises
        ------
        CorruptFile : it can't be so.
        """
        course = cls.start(layout)
        n_tokens = course.n_tokens = untrusted.count(header, "tokens", layout.context)
        course.evicted_at = untrusted.count(header, "evicted_at", n_tokens)
        course.parts = untrusted.counts(header, "parts", len(course.parts), n_tokens)
        course.part = untrusted.count(header, "part", max(0, len(course.parts) - 1))
        ends = header.get("prompts")
        course.prompt_ends = untrusted.counts(header, "prompts", len(ends) if isinstance(ends, list) else 0, n_tokens)
        course.carried[...] = untrusted.numbers(header, "carried", course.carried.shape)
        most = layout.n_layers * layout.n_slots
        keeps = untrusted.counts(header, "keeps", len(course.rules), most)
        if layout.policy is not None and layout.policy.layers != "uniform":
            if min(keeps) < layout.policy.least_keep:
                raise CorruptFile(f"a layer that keeps {min(keeps)} entries, must be {layout.policy.least_keep}")
            course.rules = [layout.policy.with_keep(keep) for keep in keeps]
            slots = course.slots(layout)
            if slots is not None and sum(slots) > most:
                raise CorruptFile(f"layers that keep {sum(slots)} entries in all, of {most}")
        return course
