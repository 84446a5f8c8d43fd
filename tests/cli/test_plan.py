"""barefoot plan and explain on headers."""

import json
import shlex

import pytest

from barefoot.cli.commands.explain import JSON_KEYS as EXPLAIN_KEYS
from barefoot.cli.commands.plan import JSON_KEYS as PLAN_KEYS

MIB = 1 << 20


def planned(barefoot, *arguments):
    done = barefoot("plan", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_record_has_the_documented_keys(barefoot, tiny_gguf):
    record = planned(barefoot, tiny_gguf.path, "--memory", "256MiB")
    assert set(record) == set(PLAN_KEYS) - {"alternatives"}
    assert record["fits"] is True
    assert record["needed_bytes"] <= record["available_bytes"] == 256 * MIB
    assert record["recommended"] == record["candidates"][0]
    assert record["model"]["n_layers"] == tiny_gguf.n_layers


def test_the_command_gives_the_same_plan(barefoot, tiny_gguf):
    import shlex

    first = planned(barefoot, tiny_gguf.path, "--memory", "256MiB", "--context", "128")
    words = shlex.split(first["command"])
    assert words[:2] == ["barefoot", "run"]
    second = planned(barefoot, *words[2:])
    assert second["recommended"]["config"] == first["recommended"]["config"]
    assert second["needed_bytes"] == first["needed_bytes"]


def test_the_text_names_what_the_record_holds(barefoot, tiny_gguf):
    record = planned(barefoot, tiny_gguf.path, "--memory", "256MiB", "--context", "128")
    text = barefoot("plan", tiny_gguf.path, "--memory", "256MiB", "--context", "128").stdout
    assert record["command"] in text
    assert f"peak {record['needed_bytes'] / MIB:,.1f} MiB of 256.0 MiB" in text
    assert f"KL {record['recommended']['quality']['kl']:.4f}" in text


def test_what_the_cache_can_be_is_listed_with_its_price(barefoot, tiny_gguf):
    command = (tiny_gguf.path, "--memory", "256MiB", "--context", "128", "--kv", "h2o(keep=64) > q4")
    record = planned(barefoot, *command)
    own, *others = record["kv"]
    assert own["kv"] == record["recommended"]["config"]["kv"] == "h2o(keep=64) > q4"
    assert own["n_kept"] == 65
    assert [c["kl"] for c in others] == sorted(c["kl"] for c in others)
    assert {"f16", "q8"} <= {c["kv"] for c in others}
    terms = [t for e in record["recommended"]["terms"] if e["kind"] == "kv" for t in e["terms"]]
    assert own["bytes"] == sum(count * size for name, count, size in terms if name != "alignment")
    text = barefoot("plan", *command, "--all").stdout
    assert all(c["kv"] in text and f"{c['kl']:.4f}" in text for c in record["kv"])


def test_a_refusal(barefoot, tiny_gguf):
    done = barefoot("plan", tiny_gguf.path, "--memory", "4MiB", "--json")
    assert done.returncode == 3
    record = json.loads(done.stdout)
    assert (record["fits"], record["recommended"], record["command"]) == (False, None, None)
    assert record["available_bytes"] == 4 * MIB < record["needed_bytes"]
    for alternative in record["alternatives"]:
        assert alternative["command"] in done.stderr
        assert alternative["needed_bytes"] <= alternative["budget_bytes"]


def test_a_machine_that_is_not_here(barefoot):
    record = planned(barefoot, "llama-3.1-8b", "--device", "rtx-4090")
    assert set(record["recommended"]["needed_bytes"]) >= {"accelerator"}
    assert record["command"].startswith("barefoot plan llama-3.1-8b --device rtx-4090")


def test_a_config_without_weights(barefoot, tmp_path):
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 128,
        "vocab_size": 256,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    record = planned(barefoot, folder / "config.json", "--memory", "256MiB")
    d, ff, kv = 64, 128, 32
    assert record["model"]["n_parameters"] == 256 * d + 2 * (2 * d * d + 2 * kv * d + 3 * d * ff + 2 * d) + d


@pytest.mark.parametrize(
    "arguments",
    [
        ["--weights", "int(bits=5)"],
        ["--kv", "q9"],
        ["--device", "abacus"],
        ["--chunk", "0"],
        ["--stream-layers", "-1"],
        ["--stream-layers", "3"],
        ["--threads", "0"],
    ],
)
def test_choices_that_are_none(barefoot, tiny_gguf, arguments):
    done = barefoot("plan", tiny_gguf.path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")


def test_the_command_of_a_batch_answers_the_lines_of_standard_input(barefoot, tiny_gguf):
    record = planned(barefoot, tiny_gguf.path, "--memory", "256MiB", "--batch", "2", "--context", "64")
    assert shlex.split(record["command"])[:2] == ["barefoot", "run"]
    done = barefoot(*shlex.split(record["command"])[1:], "--max-tokens", "4", stdin="one\n\ntwo\nthree\n")
    assert done.returncode == 0, done.stderr
    assert sorted(json.loads(line)["index"] for line in done.stdout.splitlines()) == [0, 1, 2]


def test_a_plan_shows_its_batch(barefoot, tiny_gguf):
    done = barefoot("plan", tiny_gguf.path, "--memory", "256MiB", "--batch", "3", "--context", "64")
    assert "3 sequences decoded together" in done.stdout
    assert "3 at once" in done.stdout


def test_too_large_a_batch_names_the_largest(barefoot, tiny_gguf):
    """Each sequence of 512 positions takes 2 layers × 2 × 512 rows of f32 to q4: 20 bytes a row at least."""
    done = barefoot("plan", tiny_gguf.path, "--memory", "120MiB", "--batch", "4000", "--context", "512", "--json")
    assert done.returncode == 3, done.stderr
    record = json.loads(done.stdout)
    largest = record["largest_batch"]
    assert 100 < largest < 120 * 2**20 // (2 * 2 * 512 * 20)
    assert f"the largest batch is {largest}" in record["message"]
    assert "for each of 4000 sequences" in record["message"]
    commands = [shlex.split(a["command"]) for a in record["alternatives"]]
    (fitting,) = [c for c in commands if c[c.index("--batch") + 1] == str(largest)]
    again = barefoot("plan", *fitting[2:], "--json")
    assert again.returncode == 0, again.stderr


def test_explain_counts_keys_and_values(barefoot, tiny_gguf):
    done = barefoot("explain", "q8", tiny_gguf.path, "--context", "128", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert set(facts) == set(EXPLAIN_KEYS)
    assert facts["papers"][0]["number"] == 14
    n_rows = 2 * tiny_gguf.n_layers * tiny_gguf.n_kv_heads * 128
    assert facts["bytes"] == n_rows * (tiny_gguf.head_dim + 2 * tiny_gguf.head_dim // 32)


def test_explain_counts_weights(barefoot, tiny_gguf):
    facts = json.loads(barefoot("explain", "int(bits=3,group=64)", tiny_gguf.path, "--json").stdout)
    assert facts["bytes"] == tiny_gguf.n_matrix_weights // 64 * (64 * 3 // 8 + 2 + 2)


def test_explain_prints_the_terms(barefoot, tiny_gguf):
    text = barefoot("explain", "int(bits=3,group=64)", tiny_gguf.path).stdout
    assert text.startswith("int(bits=3,group=64)  (weights.formats, ")
    n_groups = tiny_gguf.vocab_size * tiny_gguf.d_model // 64
    assert f"{n_groups} × {64 * 3 // 8} = {n_groups * 24:,}" in " ".join(text.split())
