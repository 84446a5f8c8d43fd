"""papers.toml against the code, both ways."""

import importlib
from pathlib import Path

import pytest

from barefoot.core.errors import InvalidInput
from barefoot.core.registry import families, techniques
from barefoot.core.technique import STATUSES
from barefoot.papers import all_papers, paper

ROOT = Path(__file__).parents[2]
REGISTRY = {f"{family}/{name}": cls for family in families() for name, cls in techniques(family).items()}


def test_all_92_once_and_in_order():
    assert [p.number for p in all_papers()] == list(range(1, 93))
    assert len({p.title for p in all_papers()}) == 92


def test_every_technique_is_listed_by_its_papers():
    declared = {(number, name) for name, cls in REGISTRY.items() for number in cls.papers}
    listed = {(p.number, name) for p in all_papers() for name in p.techniques}
    assert listed == declared


@pytest.mark.parametrize("p", [p for p in all_papers() if p.status != "planned"], ids=lambda p: f"{p.number:02d}")
def test_what_is_here_has_code_tests_and_a_claim(p):
    assert p.status in STATUSES
    assert p.techniques or p.modules
    assert p.claim
    assert p.tests
    for path in (*p.tests, *p.benchmarks):
        assert (ROOT / path).is_file(), path
    for name in p.modules:
        importlib.import_module(name)


@pytest.mark.parametrize("p", [p for p in all_papers() if p.status == "planned"], ids=lambda p: f"{p.number:02d}")
def test_what_is_planned_claims_nothing(p):
    assert (p.techniques, p.modules, p.tests, p.benchmarks, p.claim) == ((), (), (), (), "")


@pytest.mark.parametrize("number", [0, 93, -1])
def test_no_other_paper(number):
    with pytest.raises(InvalidInput, match="numbered 1 to 92"):
        paper(number)
