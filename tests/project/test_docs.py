"""The docs: generated pages are fresh, commands in them parse, links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from barefoot.cli.commands import all_commands
from barefoot.cli.main import build_parser

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def commands():
    """Every barefoot command in the docs and in the help: (where, words)."""
    for page in PAGES:
        for line in re.findall(
            r"^(?:[^\n|`]*\| )?(barefoot [^\n]*)$|`(barefoot [^`\n]*)`", page.read_text("utf-8"), re.M
        ):
            yield page.name, line[0] or line[1]
    for name, command in all_commands().items():
        for example in command.EXAMPLES:
            yield name, example[example.index("barefoot ") :]


@pytest.mark.parametrize(("where", "line"), sorted(set(commands())))
def test_commands_parse(where, line):
    if re.search(r"\b[A-Z]{3,}\b", line.split('"')[0]) or "…" in line:
        line = re.sub(r"\[|\]", "", line).replace("SIZE", "1GiB").replace("TECHNIQUE", "int")
    words = shlex.split(line, comments=True)[1:]
    assert build_parser().parse_args(words).command in all_commands()


def test_generated_pages_are_fresh():
    done = subprocess.run([sys.executable, ROOT / "tools/generate_docs.py", "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target
