"""``barefoot export``: a model goes out and comes back."""

import json

import pytest


@pytest.mark.parametrize("kind", ["gguf", "compressed-tensors", "barefoot"])
def test_what_is_exported_answers_as_before(barefoot, tiny_gguf, tmp_path, kind):
    target = tmp_path / ("model.gguf" if kind == "gguf" else "folder")
    done = barefoot("export", tiny_gguf.path, "-o", target, "--to", kind, "--json")
    facts = json.loads(done.stdout)
    assert done.stderr == ""
    files = [target] if kind == "gguf" else target.iterdir()
    assert facts["bytes"] == sum(file.stat().st_size for file in files)
    expected = {"gguf": "q4_0", "compressed-tensors": "int4_g32_sym", "barefoot": "q4_0"}[kind]
    assert facts["formats"][expected] == 7 * tiny_gguf.n_layers
    ask = ("he said", "--max-tokens", "6", "--context", "64", "--temperature", "0", "--raw", "--memory", "256MiB")
    before, after = (barefoot("run", model, *ask, "--activations", "float32") for model in (tiny_gguf.path, target))
    assert (after.returncode, after.stdout) == (0, before.stdout), after.stderr
    assert before.stdout.strip()


def test_a_folder_in_the_place_of_a_file(barefoot, tiny_gguf, tmp_path):
    done = barefoot("export", tiny_gguf.path, "-o", tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path} must be a file for --to gguf" in done.stderr


def test_a_table_of_formats(barefoot, tiny_gguf, tmp_path):
    done = barefoot("export", tiny_gguf.path, "-o", tmp_path / "model.gguf")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(str(tmp_path / "model.gguf"))
    assert [line.split() for line in lines[1:]] == [
        ["q8_0", "1", "tensors"],
        ["f32", "5", "tensors"],
        ["q4_0", "14", "tensors"],
    ]
