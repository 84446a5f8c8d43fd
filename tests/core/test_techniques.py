"""Techniques, their spec strings and their discovery."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.registry import families, techniques
from barefoot.core.spec import format_composition, parse_composition
from barefoot.core.technique import Technique, check_composition


class Role(Technique):
    pass


@dataclass(frozen=True)
class Keep(Role, name="keep", provides=["positions dropped"]):
    tokens: int = 1024
    window: int | None = None


@dataclass(frozen=True)
class Pack(Role, name="pack", conflicts={"positions dropped": "its groups span positions"}):
    bits: int = 4
    clip: float = 1.0
    signed: bool = False
    mode: str = "row"


@dataclass(frozen=True)
class Probe(Role, name="probe", needs=["attention mass"]):
    n: int


KNOWN = {c.name: c for c in (Keep, Pack, Probe)}


def parse(text):
    return parse_composition(text, KNOWN, "test")


def test_parse():
    assert parse("keep(tokens=64) > pack(bits=2, signed=true,clip=0.5,mode=head)") == (
        Keep(64),
        Pack(2, 0.5, True, "head"),
    )
    assert parse("keep(window=none)") == (Keep(),)


@pytest.mark.parametrize(
    "techniques_", [(Keep(),), (Keep(5), Pack()), (Pack(2, 0.25, True, "x"), Probe(3)), (Keep(window=7),)]
)
def test_printing_and_parsing_are_inverse(techniques_):
    assert parse(format_composition(techniques_)) == techniques_


def test_defaults_are_not_printed():
    assert str(Keep()) == "keep"
    assert str(Keep(tokens=3)) == "keep(tokens=3)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("keeep", "unknown test technique 'keeep'"),
        ("keep(token=3)", "unknown knob of keep 'token'"),
        ("keep(tokens=3,tokens=4)", "given twice"),
        ("keep(tokens=3.5)", "expected int"),
        ("pack(signed=yes)", "expected true or false"),
        ("keep(tokens)", "can't read 'tokens'"),
        ("keep(tokens=1", "can't read"),
        ("keep >", "can't read ''"),
        ("probe", "probe needs n="),
        ("__import__('os')", "unknown test technique"),
        ("pack(mode=lambda:0)) or keep", "can't read"),
    ],
)
def test_bad_specs_say_what_is_wrong(text, message):
    with pytest.raises(InvalidInput, match=re.escape(message)):
        parse(text)


def test_a_near_name_is_suggested():
    with pytest.raises(InvalidInput) as error:
        parse("keeep")
    assert error.value.cure == "did you mean keep?"


def test_conflict_gives_the_declared_reason():
    with pytest.raises(Incompatible, match="pack can't be used with keep: its groups span positions"):
        check_composition([Keep(), Pack()])
    check_composition([Pack()])


def test_needs_must_be_provided():
    with pytest.raises(Incompatible, match="needs attention mass"):
        check_composition([Probe(1)])
    check_composition([Probe(1)], frozenset({"attention mass"}))


def test_a_technique_does_not_provide_for_itself():
    @dataclass(frozen=True)
    class Both(Role, name="both", needs=["x"], provides=["x"]):
        pass

    with pytest.raises(Incompatible):
        check_composition([Both()])


def test_every_family_finds_its_techniques_and_their_specs_round_trip():
    assert {"weights.formats", "kv.stores"} <= set(families())
    for family in families():
        known = techniques(family)
        assert known
        for name, cls in known.items():
            assert cls.name == name
            assert cls.family == family
            assert cls.__doc__ or sys.modules[cls.__module__].__doc__
            default = parse_composition(name, known, family)
            assert parse_composition(format_composition(default), known, family) == default


def test_unknown_family_lists_the_known():
    with pytest.raises(InvalidInput, match=r"kv\.stores"):
        techniques("kv.shops")


TOY = '''
"""toy - one byte a channel."""
from dataclasses import dataclass
from barefoot.kv.stores import KVStore

@dataclass(frozen=True)
class Toy(KVStore, name="{name}"):
    @property
    def row_format(self): return "f16"
    def row_parts(self, head_dim): return (("bytes", head_dim, 1),)
'''


def names_found(folder) -> str:
    code = "from barefoot.core.registry import techniques; print(*techniques('kv.stores'))"
    env = {**os.environ, "BAREFOOT_TECHNIQUES": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    return done.stdout + done.stderr


def test_a_file_in_a_folder_is_a_technique(tmp_path):
    (tmp_path / "kv" / "stores").mkdir(parents=True)
    (tmp_path / "kv" / "stores" / "mine.py").write_text(TOY.format(name="toy"))
    assert "toy" in names_found(tmp_path).split()


def test_two_techniques_of_one_name_are_refused(tmp_path):
    (tmp_path / "kv" / "stores").mkdir(parents=True)
    (tmp_path / "kv" / "stores" / "mine.py").write_text(TOY.format(name="q8"))
    assert "two techniques of kv.stores are named 'q8'" in names_found(tmp_path)


def test_finding_techniques_brings_no_framework():
    """In a fresh process: all families, and all that lies in them; neither PyTorch nor transformers comes along."""
    code = (
        "import sys; from barefoot.core.registry import families, techniques; "
        "print(sum(len(techniques(f)) > 0 for f in families()), *({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(families()))]
