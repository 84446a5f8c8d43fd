"""``barefoot papers``: the 92 papers and what of each is here."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from barefoot.cli import console
from barefoot.core.technique import STATUSES

HELP = "list the 92 papers that barefoot is made of, with the status of each"
EXAMPLES = ("barefoot papers", "barefoot papers 14", "barefoot papers --status experimental")
JSON_KEYS = {"papers": "those asked for: number, title, home, status, techniques, modules, tests, benchmarks, claim"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("number", nargs="?", type=int, metavar="NUMBER", help="one paper, with all that is known of it")
    parser.add_argument("--status", choices=STATUSES, help="only the papers of this status")


def execute(args: argparse.Namespace) -> int:
    from barefoot.papers import all_papers, paper

    chosen = [paper(args.number)] if args.number is not None else list(all_papers())
    if args.status:
        chosen = [p for p in chosen if p.status == args.status]
    if args.json:
        console.write_json({"papers": [p.to_json() for p in chosen]}, args.json)
    if args.json == console.STDOUT:
        return 0
    if args.number is not None:
        for p in chosen:
            print(console.bold(f"{p.number:02d}  {p.title}", sys.stdout))
            facts = {"status": p.status, "home": f"barefoot/{p.home}/", "claim": p.claim}
            lists = {"techniques": p.techniques, "modules": p.modules, "tests": p.tests, "benchmarks": p.benchmarks}
            facts |= {key: ", ".join(values) for key, values in lists.items()}
            print(console.table([(f"  {key}", value) for key, value in facts.items() if value]))
        return 0
    print(console.table([(f"{p.number:02d}", p.status, p.home, p.title) for p in chosen]))
    counts = Counter(p.status for p in chosen)
    print("\n" + ", ".join(f"{counts[s]} {s}" for s in STATUSES if counts[s]) + f"; {len(chosen)} in all")
    return 0
