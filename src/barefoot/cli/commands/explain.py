"""``barefoot explain``: a technique's idea and formula, and its bytes on a model."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from typing import TYPE_CHECKING, Any

from barefoot.cli import arguments, console
from barefoot.core.units import format_bytes, parse_count

if TYPE_CHECKING:
    from barefoot.core.ledger import Term
    from barefoot.core.technique import Technique

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
    "terms": "with a model: [name, count, bytes each] of all that it stores",
    "bytes": "with a model: their sum",
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


def find_technique(text: str) -> Technique:
    """The technique of a spec string, of whichever family has that name."""
    from barefoot.core.errors import InvalidInput, unknown_name
    from barefoot.core.registry import families, techniques
    from barefoot.core.spec import parse_composition

    name = text.split("(")[0].strip()
    owners = [family for family in families() if name in techniques(family)]
    if not owners:
        raise unknown_name("technique", name, {n for family in families() for n in techniques(family)})
    composition = parse_composition(text, techniques(owners[0]), owners[0])
    if len(composition) != 1:
        raise InvalidInput(f"{text!r} is a composition", cure="explain its techniques one by one")
    return composition[0]


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
        "knobs": {f.name: getattr(technique, f.name) for f in dataclasses.fields(technique)},  # type: ignore[arg-type]
        "needs": sorted(technique.needs),
        "provides": sorted(technique.provides),
        "conflicts": dict(technique.conflicts),
        "documentation": documentation(technique),
    }


def execute(args: argparse.Namespace) -> int:
    technique = find_technique(args.technique)
    facts = _facts(technique)
    terms: tuple[Term, ...] = ()
    if args.model:
        from barefoot.cli.models import load_shapes
        from barefoot.cli.report import model_line

        spec = load_shapes(args.model).spec
        context = min(args.context, spec.context_length)
        terms = technique.model_terms(spec, context, min(64, context))
        line = f"{model_line(args.model, spec)}; context {context:,}"
        facts |= {"terms": [[t.name, t.count, t.bytes_each] for t in terms], "bytes": sum(t.bytes for t in terms)}
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
    if terms:
        print(f"\n{line}")
        rows = [(t.name, f"{t.count:,}", f"× {t.bytes_each:,}", t.bytes) for t in terms]
        rows.append(("all", "", "", facts["bytes"]))
        lines = [(*row[:3], f"= {row[3]:,}", format_bytes(row[3])) for row in rows]
        print(console.table(lines, header=("term", "count", "bytes each", "bytes", ""), right=(1, 2, 3, 4)))
    return 0
