"""explain — a technique's formula with a model's numbers in it, as data.

The text is the head of the technique's own docstring, the bytes are its own terms: nothing is written twice.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from barefoot.adapters import Adapter
from barefoot.adapters.lora import LoRA
from barefoot.adapters.pruning import Pruning, pruned_spec
from barefoot.core.errors import Incompatible, InvalidInput, unknown_name
from barefoot.core.ledger import Term
from barefoot.core.model import ModelSpec
from barefoot.core.registry import families, techniques
from barefoot.core.spec import format_technique, parse_composition
from barefoot.core.technique import Technique
from barefoot.kv.policies import Policy
from barefoot.kv.ruled import Ruled
from barefoot.kv.stores import KVStore
from barefoot.kv.stores.f16 import HalfStore
from barefoot.optim import Optimizer
from barefoot.optim.adamw import Adam
from barefoot.plan import quality
from barefoot.plan.job import RunJob
from barefoot.weights.formats import WeightFormat


@dataclass(frozen=True)
class Line:
    """The terms of one part (a group of matrices, all layers' keys and values, an optimizer), and its loss."""

    part: str
    terms: tuple[Term, ...]
    kl: float
    source: str
    stored_bytes: int

    @property
    def bytes(self) -> int:
        return sum(term.bytes for term in self.terms)


@dataclass(frozen=True)
class Explanation:
    """What a technique is and what it takes for a model. ``text`` is its docstring: idea, equations, layout, bytes."""

    technique: str
    family: str
    papers: tuple[int, ...]
    status: str
    title: str
    text: str
    lines: tuple[Line, ...]
    refused: str | None = None

    @property
    def bytes(self) -> int:
        return sum(line.bytes for line in self.lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "technique": self.technique,
            "family": self.family,
            "papers": list(self.papers),
            "status": self.status,
            "title": self.title,
            "text": self.text,
            "bytes": self.bytes,
            "refused": self.refused,
            "parts": [
                {
                    "part": line.part,
                    "bytes": line.bytes,
                    "stored_bytes": line.stored_bytes,
                    "kl": line.kl,
                    "source": line.source,
                    "terms": [[t.name, t.count, t.bytes_each] for t in line.terms],
                }
                for line in self.lines
            ],
        }


def find(text: str) -> Technique:
    """The technique of a spec string, whatever its family.

    Raises
    ------
    InvalidInput : unreadable, unknown, a wrong knob, or several techniques.
    """
    name = text.split("(")[0].strip()
    owner = next((family for family in families() if name in techniques(family)), None)
    if owner is None:
        raise unknown_name("technique", name, sorted({n for family in families() for n in techniques(family)}))
    if ">" in text:
        raise InvalidInput(f"{text!r} is a composition", cure="explain its techniques one by one")
    return parse_composition(text, techniques(owner), owner)[0]


def explain(technique: Technique, spec: ModelSpec, job: RunJob, chunk: int = 64) -> Explanation:
    """The technique's text, and its terms for every part of the model that it could hold.

    Parameters
    ----------
    technique : a weight format, a KV store, a policy (over half precision), an adapter, a pruning or an optimizer
        (:func:`find`).
    spec : the model.
    job : gives the KV store's context.
    chunk : tokens of prefill at once, which window layers keep beyond their window.
    """
    text = sys.modules[type(technique).__module__].__doc__ or ""
    title, _, rest = text.strip().partition("\n")
    refused = None
    try:
        if isinstance(technique, WeightFormat):
            lines = _weights(technique, spec)
        elif isinstance(technique, KVStore | Policy):
            kv = technique if isinstance(technique, KVStore) else Ruled(technique, HalfStore())
            loss = quality.kv_loss(spec, kv, job.context)
            reference = 2 * 2 * spec.n_kv_heads * spec.head_dim
            slots = sum(spec.kv_positions(i, job.context, chunk) for i in range(spec.n_layers))
            terms = kv.terms(spec, job.context, chunk)
            lines = (Line("kv", terms, loss.kl, loss.source, slots * reference),)
        elif isinstance(technique, Adapter):
            lines = _factors(technique, spec)
        elif isinstance(technique, Pruning):
            lines = _copied(technique, spec)
        elif isinstance(technique, Optimizer):
            lines = _remembered(technique, spec)
        else:
            raise InvalidInput(
                f"{technique.name} is no weight format, adapter, pruning or optimizer, nor of the KV cache"
            )
    except Incompatible as error:
        lines, refused = (), str(error)
    return Explanation(
        technique=format_technique(technique),
        family=technique.family,
        papers=technique.papers,
        status=technique.status,
        title=title,
        text=rest.strip(),
        lines=lines,
        refused=refused,
    )


def _factors(technique: Adapter, spec: ModelSpec) -> tuple[Line, ...]:
    """An adapter's arrays in float32, by the group of the matrices that they belong to."""
    from barefoot.ops import blocks

    lines = []
    for group in ("attn", "ffn"):
        matrices = {w.name: w for w in spec.weights if w.group == group and w.rows > 1}
        counts: dict[str, int] = {}
        for factor in technique.factors(spec):
            name, _, letter = factor.name.rpartition(".")
            if name in matrices:
                counts[letter] = counts.get(letter, 0) + factor.n_elements
        stored = sum(w.rows * blocks.row_bytes(w.format, w.cols) for w in matrices.values())
        if counts:
            terms = tuple(Term(letter, n, 4) for letter, n in counts.items())
            lines.append(Line(group, terms, 0.0, "beside the stored values, before it is trained", stored))
    return tuple(lines)


def _remembered(technique: Optimizer, spec: ModelSpec) -> tuple[Line, ...]:
    """What an optimizer has in memory of the default adapter, beside Adam's moments."""
    sizes = [factor.n_elements for factor in LoRA().factors(spec)]
    terms = (*technique.state_terms(sizes), *technique.step_terms(sizes))
    stored = sum(term.bytes for term in Adam().state_terms(sizes))
    return (Line("optimizer", terms, 0.0, f"of {LoRA()}'s arrays; beside adamw's moments", stored),)


def _copied(technique: Pruning, spec: ModelSpec) -> tuple[Line, ...]:
    """The matrices of a pruned copy as they are stored, by group."""
    from barefoot.ops import blocks

    lines, copy = [], pruned_spec(spec, technique.sizes(spec))
    for group in ("attn", "ffn"):
        whole, left = (
            sum(w.rows * blocks.row_bytes(w.format, w.cols) for w in each.weights if w.group == group and w.rows > 1)
            for each in (spec, copy)
        )
        lines.append(Line(group, (Term("left", left, 1),), 0.0, "trained beside only: the whole model runs", whole))
    return tuple(lines)


def _weights(technique: WeightFormat, spec: ModelSpec) -> tuple[Line, ...]:
    from barefoot.ops import blocks

    lines = []
    for group in dict.fromkeys(w.group for w in spec.weights if w.rows > 1):
        matrices = [w for w in spec.weights if w.group == group and w.rows > 1]
        totals: dict[tuple[str, int], int] = {}
        for w in matrices:
            for term in technique.terms(technique.layout(w.format), w.rows, w.cols, w.format):
                totals[term.name, term.bytes_each] = totals.get((term.name, term.bytes_each), 0) + term.count
        losses = [quality.weight_loss(spec, group, technique, s) for s in sorted({w.format for w in matrices})]
        worst = max(losses, key=lambda loss: loss.kl)
        stored = sum(w.rows * blocks.row_bytes(w.format, w.cols) for w in matrices)
        terms = tuple(Term(name, count, size) for (name, size), count in totals.items())
        lines.append(Line(group, terms, worst.kl, worst.source, stored))
    return tuple(lines)
