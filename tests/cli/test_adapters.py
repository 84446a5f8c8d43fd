"""Adapters on the command line: planned, run, measured and merged."""

from __future__ import annotations

import json

import pytest
from adapter_folders import random_pairs, spec_of, write_random_adapter

from barefoot.engine.adapter_files import save_adapter

ASK = ("he said", "--max-tokens", "8", "--context", "64", "--raw", "--memory", "256MiB", "--activations", "float32")


@pytest.fixture(scope="module")
def adapter(tiny_gguf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "tuned"
    write_random_adapter(tiny_gguf.path, folder)
    return folder


def adapter_bytes(model) -> int:
    """Of rank 4 in float32, by hand from the shapes: a header, and rows of whole sixteens."""
    shapes = [shape for name, shape in model.matrices.items() if name.startswith("blk")]
    return sum(64 + 4 * 4 * sum(-(-n // 16) * 16 for n in shape) for shape in shapes)


def test_an_adapter_is_planned_run_and_in_the_ledger(barefoot, tiny_gguf, adapter, tmp_path):
    plain = barefoot("run", tiny_gguf.path, *ASK)
    tuned = barefoot("run", tiny_gguf.path, *ASK, "--adapter", adapter, "--json", tmp_path / "run.json")
    assert tuned.returncode == 0, tuned.stderr
    assert tuned.stdout
    assert tuned.stdout != plain.stdout
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["by_kind"]["adapter"] == dict.fromkeys(("predicted", "measured"), adapter_bytes(tiny_gguf))
    planned = barefoot("plan", tiny_gguf.path, *ASK[1:5], *ASK[6:], "--adapter", adapter, "--json")
    plan = json.loads(planned.stdout)
    entries = [e for e in plan["recommended"]["terms"] if e["kind"] == "adapter"]
    assert [e["bytes"] for e in entries] == [adapter_bytes(tiny_gguf)]
    assert f"--adapter {adapter}" in plan["command"]
    assert any("beside 14 matrices" in note for note in plan["recommended"]["notes"])


def test_a_saved_plan_keeps_its_adapter(barefoot, tiny_gguf, adapter, tmp_path):
    words = (*ASK[1:5], *ASK[6:], "--adapter", adapter)
    barefoot("plan", tiny_gguf.path, *words, "--save", tmp_path / "plan.toml")
    by_plan = barefoot("run", tiny_gguf.path, "he said", "--raw", "--plan", tmp_path / "plan.toml")
    by_words = barefoot("run", tiny_gguf.path, *ASK, "--adapter", adapter)
    assert (by_plan.returncode, by_plan.stdout) == (0, by_words.stdout), by_plan.stderr


def test_what_is_exported_answers_as_with_the_adapter(barefoot, tiny_gguf, adapter, tmp_path):
    done = barefoot(
        "export", tiny_gguf.path, "-o", tmp_path / "folder", "--to", "barefoot", "--adapter", adapter, "--json"
    )
    facts = json.loads(done.stdout)
    assert facts["merged"] == {"into": 0, "beside": 7 * tiny_gguf.n_layers, "lost": 0.0}
    expected = barefoot("run", tiny_gguf.path, *ASK, "--adapter", adapter)
    merged = barefoot("run", tmp_path / "folder", *ASK)
    assert (merged.returncode, merged.stdout) == (0, expected.stdout), merged.stderr
    refused = barefoot("export", tiny_gguf.path, "-o", tmp_path / "m.gguf", "--adapter", adapter)
    assert refused.returncode == 2
    assert "is merged into a folder of barefoot's, not --to gguf" in refused.stderr


def test_a_text_is_measured_with_it(barefoot, tiny_gguf, adapter):
    words = ("eval", tiny_gguf.path, "--tokens", "256", "--window", "64", "--json")
    plain, tuned = (json.loads(barefoot(*words, *more).stdout) for more in ((), ("--adapter", adapter)))
    assert tuned["perplexity"] != plain["perplexity"]
    refused = barefoot(*words, "--driver", "torch", "--adapter", adapter)
    assert refused.returncode == 2
    assert "--adapter says how the engine computes" in refused.stderr


def test_what_is_no_adapter_of_the_model_is_refused_before_loading(barefoot, tiny_gguf, tmp_path):
    missing = barefoot("run", tiny_gguf.path, *ASK, "--adapter", tmp_path)
    assert missing.returncode == 8
    assert "is no adapter: it lacks adapter_config.json" in missing.stderr
    spec = spec_of(tiny_gguf.path)
    save_adapter(tmp_path / "a", spec, random_pairs(spec, rank=2))
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    other = barefoot("plan", tiny_gguf.path, "--adapter", tmp_path / "a")
    assert other.returncode == 5
    assert "sets use_dora" in other.stderr
