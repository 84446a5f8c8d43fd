"""The low-bit study's protocol: what it runs, what it counts as foreseen, what it claims."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from barefoot.core.registry import techniques

FOLDER = Path(__file__).parents[2] / "benchmarks/weights"
if not FOLDER.is_dir():
    pytest.skip("the benchmarks are not part of the installed package", allow_module_level=True)

from benchmarks.weights import low_bit_study as study  # noqa: E402

WORKER = runpy.run_path(str(FOLDER / "low_bit_worker.py"))


def test_every_solver_at_every_width_and_every_format_and_structure_of_a_paper():
    found = list(study.methods())
    assert len({(m.name, m.how) for m in found}) == len(found)
    for solver in techniques("weights.solvers"):
        assert [m.bits for m in found if m.solver == m.name == solver] == [8, 4, 3, 2, 1]
    names = {m.name for m in found}
    assert "ternary" in names
    assert not {"dense", "stored", "blocks", "int"} & names
    assert {n for n, cls in techniques("weights.structures").items() if cls.papers} <= names


def test_a_new_technique_is_a_row(tmp_path, monkeypatch):
    class Toy(techniques("weights.formats")["int"], name="toy", papers=(57,)):
        pass

    there = techniques
    both = {**there("weights.formats"), "toy": Toy}
    monkeypatch.setattr(study, "techniques", lambda role: both if role == "weights.formats" else there(role))
    assert [m.bits for m in study.methods() if m.name == "toy"] == [8, 4, 3, 2, 1]


def test_words_are_foreseen_whole():
    pieces = [b" the", b" un", b"like", b"ly", b" ,", b" 3", b" end", b" of", b"x"]
    tokenizer = SimpleNamespace(decode_bytes=lambda i: pieces[i])
    words = WORKER["words_of"](range(len(pieces)), tokenizer, 0)
    assert words == [range(1), range(1, 4), range(6, 7)]  # " of" goes on past the end
    assert WORKER["words_of"](range(len(pieces)), tokenizer, 2) == [range(6, 7)]


def rows(perplexities, divergences):
    plain = {bits: str(how) for bits, how in study.widths(techniques("weights.formats")["int"])}
    for method, by_bits in perplexities.items():
        for bits, perplexity in by_bits.items():
            kl = divergences.get((method, bits), 0.1)
            yield {
                "method": method,
                "how": plain[bits],
                "perplexity": perplexity,
                "reference_perplexity": 20.0,
                "kl_mean": kl,
            }


def test_claims_are_about_the_rows():
    there = list(
        rows({"range": {4: 25.0, 3: 30.0, 2: 900.0}, "gptq": {4: 21.0, 3: 24.0, 2: 90.0}}, {("gptq", 3): 0.05})
    )
    met = {c["claim"].partition(",")[0]: c for c in study.claims(there)}
    assert met["3 bits: KL of gptq / of plain rounding"]["measured"] == 0.5
    assert met["2 bits: perplexity of gptq / of plain rounding"]["measured"] == 0.1
    assert all(c["met"] for c in met.values())
    there[0]["perplexity"] = 40.0  # 4 bits worse than 3
    failed = [c["claim"] for c in study.claims(there) if not c["met"]]
    assert failed == ["range: perplexity rises as bits fall, smallest step, times"]
    there[3]["failed"] = "RuntimeError: out of memory"  # gptq's 4 bits
    assert not any("near lossless" in c["claim"] for c in study.claims(there))
