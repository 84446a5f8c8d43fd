"""A technique is one file: the example of the how-to is dropped into a folder, and everything finds it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder of techniques that holds the example of docs/add-a-technique.md and nothing else."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/add-a-technique.md").read_text("utf-8"), re.DOTALL).group(1)
    folder = tmp_path_factory.mktemp("techniques")
    family = folder / "weights" / "formats"
    family.mkdir(parents=True)
    (family / "slim.py").write_text(code, "utf-8")
    return folder


def run(toy, *command):
    env = {**os.environ, "BAREFOOT_TECHNIQUES": str(toy), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, encoding="utf-8")


def test_the_example_is_short(toy):
    assert len((toy / "weights/formats/slim.py").read_text("utf-8").splitlines()) <= 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A config.json, and how many weights its matrices have; all are stored as floats."""
    d, d_ff, kv, vocab = 64, 128, 32, 256
    config = {
        "model_type": "llama",
        "hidden_size": d,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": d_ff,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(config), "utf-8")
    return path, vocab * d + 2 * (2 * d * d + 2 * kv * d + 3 * d * d_ff)


def test_explain_finds_it_and_counts_its_bytes(toy, model):
    path, n_weights = model
    done = run(toy, "-m", "barefoot", "explain", "slim(group=64)", str(path), "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["technique"], facts["family"]) == ("slim(group=64)", "weights.formats")
    assert facts["bytes"] == n_weights // 64 * (64 + 2)


def test_plan_takes_it(toy, model):
    path, n_weights = model
    done = run(toy, "-m", "barefoot", "plan", str(path), "--weights", "slim", "--memory", "1GiB", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert "slim" in plan["command"]
    weights = [e for e in plan["recommended"]["terms"] if e["kind"] == "weights"]
    scales = sum(count * size for e in weights for name, count, size in e["terms"] if name.endswith("scales"))
    assert scales == n_weights // 32 * 2


def test_the_generated_tables_list_it(toy, tmp_path):
    done = run(toy, "tools/generate_docs.py", "--to", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "| `slim` |" in (tmp_path / "techniques.md").read_text("utf-8")
    assert "`slim`" not in (ROOT / "docs/techniques.md").read_text("utf-8")


def test_without_the_folder_it_is_unknown(toy):
    done = run("", "-m", "barefoot", "explain", "slim")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown technique 'slim'; known: ")
