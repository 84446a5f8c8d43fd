"""``barefoot explain``: a technique's idea and formula, and its bytes on a model."""

from __future__ import annotations

import argparse
import inspect
import sys
from typing import TYPE_CHECKING, Any

from barefoot.cli import arguments, console
from barefoot.core.units import format_bytes, parse_count

if TYPE_CHECKING:
    from barefoot.core.technique import Technique
    from barefoot.plan.explain import Explanation

HELP = "explain a technique: idea, formula, knobs, and its bytes on a model"
EXAMPLES = (
    "barefoot explain int",
    'barefoot explain "int(bits=3)" smollm2',
    "barefoot explain q8 smollm2 --context 8192",
)
JSON_KEYS = {
    "technique": "the spec string",
    "family": "where it belongs",
    "status": "planned, experimental, stable or simulated",
    "papers": "numbers and titles of the papers that it comes from",
    "knobs": "name → value",
    "needs": "traits that something else must provide",
    "provides": "traits that it provides",
    "conflicts": "trait → why the two don't go together",
    "documentation": "idea, equations, layout and bytes",
    "parts": "with a model: its parts, each with terms [name, count, bytes each], bytes, stored_bytes, kl and source",
    "bytes": "with a model: all that it stores",
    "refused": "with a model: why the technique can't hold it, or null",
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("technique", metavar="TECHNIQUE", help='a name or a spec string, as in "int(bits=3)"')
    parser.add_argument("model", nargs="?", metavar="MODEL", help="put this model's numbers into the formula")
    parser.add_argument(
        "--context",
        metavar="N",
        type=parse_count,
        default=arguments.DEFAULT_CONTEXT,
        help=f"positions kept, for what depends on them; default {arguments.DEFAULT_CONTEXT}",
    )


def documentation(technique: Technique | type[Technique]) -> str:
    """The docstring of the technique's file."""
    module = inspect.getmodule(technique if isinstance(technique, type) else type(technique))
    return inspect.cleandoc(module.__doc__ or "") if module else ""


def _facts(technique: Technique) -> dict[str, Any]:
    from barefoot.papers import paper

    return {
        "technique": str(technique),
        "family": technique.family,
        "status": technique.status,
        "papers": [{"number": n, "title": paper(n).title} for n in technique.papers],
        "knobs": {name: getattr(technique, name) for name in technique.knobs()},
        "needs": sorted(technique.needs),
        "provides": sorted(technique.provides),
        "conflicts": dict(technique.conflicts),
        "documentation": documentation(technique),
    }


def execute(args: argparse.Namespace) -> int:
    from barefoot.plan.explain import explain, find

    technique = find(args.technique)
    facts = _facts(technique)
    title, explanation = "", None
    if args.model:
        from barefoot.cli.models import load_shapes
        from barefoot.cli.report import model_line
        from barefoot.plan.job import RunJob

        spec = load_shapes(args.model).spec
        context = min(args.context, spec.context_length)
        explanation = explain(technique, spec, RunJob(context=context, max_tokens=1))
        title = f"{model_line(args.model, spec)}; context {context:,}"
        facts |= {key: explanation.to_json()[key] for key in ("parts", "bytes", "refused")}
    if args.json:
        console.write_json(facts, args.json)
    if args.json == console.STDOUT:
        return 0
    print(console.bold(f"{technique}  ({technique.family}, {technique.status})", sys.stdout))
    print(f"\n{facts['documentation']}\n")
    rows = [("knob", f"{name} = {value}") for name, value in facts["knobs"].items()]
    rows += [("paper", f"{p['number']:02d} {p['title']}") for p in facts["papers"]]
    rows += [("needs", ", ".join(facts["needs"])), ("provides", ", ".join(facts["provides"]))]
    rows += [("conflicts", f"{trait}: {reason}") for trait, reason in facts["conflicts"].items()]
    print(console.table([row for row in rows if row[1]]))
    if explanation is not None:
        print(f"\n{title}\n{_table(explanation)}")
    return 0


def _table(explanation: Explanation) -> str:
    """The terms, each part's sum beside what the file stores, and its loss; or why the model refuses the technique."""
    if explanation.refused is not None:
        return f"not on this model: {explanation.refused}"
    lines = []
    for part in explanation.lines:
        for i, term in enumerate(part.terms):
            product = (f"{term.count:,}", f"× {term.bytes_each:,}", f"= {term.bytes:,}", format_bytes(term.bytes))
            lines.append(("" if i else part.part, term.name, *product))
        compared = f"{part.bytes / part.stored_bytes:.0%} of {format_bytes(part.stored_bytes)}"
        lines.append(("", "sum", "", compared, f"= {part.bytes:,}", format_bytes(part.bytes)))
    lines.append(("all", "", "", "", f"= {explanation.bytes:,}", format_bytes(explanation.bytes)))
    text = console.table(lines, header=("part", "term", "count", "bytes each", "bytes", ""), right=(2, 3, 4, 5))
    losses = [(part.part, f"KL {part.kl:.4f} nats a token", part.source) for part in explanation.lines]
    return f"{text}\n\n{console.table(losses)}"
