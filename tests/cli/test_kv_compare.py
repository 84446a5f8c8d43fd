"""kv-compare as people run it, on a tiny model."""

import importlib.util
import json

import pytest

from barefoot.cli.commands import all_commands

CONTEXT, TOKENS = 100, 12


@pytest.fixture(scope="module")
def record(barefoot, tiny_gguf, tmp_path_factory):
    out = tmp_path_factory.mktemp("caches")
    specs = ["f16", "q8", "q2", "sinks(keep=KEEP)", "h2o(keep=KEEP) > q8", "h2o(keep=KEEP) > kivi"]
    command = ["kv-compare", tiny_gguf.path, "--context", CONTEXT, "--tokens", TOKENS, "--passages", 3]
    done = barefoot(*command, "--shares", 0.3, 0.9, "--kv", *specs, "--json", out / "all.json")
    assert done.returncode == 0, done.stderr
    return json.loads((out / "all.json").read_text()), done.stdout


def test_bytes_are_those_of_the_caches(record, tiny_gguf):
    result, _ = record
    assert set(result) == set(all_commands()["kv-compare"].JSON_KEYS)
    bytes_of = {p["name"]: p["n_bytes"] for p in result["points"]}
    slots, layers = CONTEXT + TOKENS + 1, tiny_gguf.n_layers
    rows = {"f16": 64, "q8": 34, "q2": 12}
    for name, row in rows.items():
        each = -(-slots * row // 64) * 64  # keys, or values, of a layer
        assert bytes_of[name] == 2 * layers * each
    for keep in (30, 90):
        entries = layers * (keep + 1)
        for name, row, more in ((f"sinks(keep={keep})", 64, 0), (f"h2o(keep={keep}) > q8", 34, 1)):
            sizes = [entries * row, entries * row, *(1 + more) * [4 * entries]]
            assert bytes_of[name] == sum(-(-size // 64) * 64 for size in sizes)


def test_what_is_lost_is_measured(record):
    result, _ = record
    kl = {p["name"]: p["kl"] for p in result["points"]}
    assert kl["f16"] < 1e-5 < kl["q8"] < kl["q2"]
    assert kl["sinks(keep=90)"] < kl["sinks(keep=30)"]
    assert result["tokens"] == 3 * TOKENS
    assert set(result["frontier"]) <= set(kl)
    assert "f16" in result["frontier"]


def test_what_does_not_go_together_is_said(record):
    result, shown = record
    assert set(result["refused"]) == {"h2o(keep=30) > kivi", "h2o(keep=90) > kivi"}
    for name, reason in result["refused"].items():
        assert f"{name}: {reason}" in shown
        assert "quantized many positions at a time" in reason


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--shares", 1.5), "shares lie between 0 and 1"),
        (("--kv", "q9"), "q9"),
        (("--context", "9k"), "context must be 1 to 512"),
    ],
)
def test_bad_questions_are_answered(barefoot, tiny_gguf, more, says):
    done = barefoot("kv-compare", tiny_gguf.path, *more)
    assert done.returncode in (2, 4)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_picture_is_drawn_or_what_it_needs_is_said(barefoot, tiny_gguf, tmp_path):
    picture = tmp_path / "all.png"
    command = ["kv-compare", tiny_gguf.path, "--context", 40, "--tokens", 3, "--passages", 1, "--kv", "q8", "q4"]
    done = barefoot(*command, "--png", picture)
    if importlib.util.find_spec("matplotlib") is None:
        assert done.returncode != 0
        assert "pip install barefoot[plot]" in done.stderr
        assert not picture.exists()
    else:
        assert done.returncode == 0, done.stderr
        assert picture.read_bytes()[:4] == b"\x89PNG"
