"""barefoot run --prompts, in processes of its own, and reading of prompts."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from barefoot.cli.batch import LINE_KEYS, parse
from barefoot.cli.commands.run import JSON_KEYS
from barefoot.core.errors import InvalidInput

MIB = 1 << 20
SMALL = ("--memory", "128MiB", "--context", "128", "--max-tokens", "12")
PROMPTS = ["hello", "a longer prompt than the others", "x", "what?", "no\tmore"]
# Answers that don't depend on how many are made at once: sums of float32 products don't.
EXACT = ("--activations", "float32")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("batch") / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def answered(barefoot, tiny_gguf, file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out.json"
    done = barefoot("run", tiny_gguf.path, "--prompts", file, "--batch", 3, *SMALL, *EXACT, "--report", "--json", out)
    assert done.returncode == 0, done.stderr
    return done, json.loads(out.read_text("utf-8"))


def lines(done):
    return {line["index"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_every_prompt_gets_the_answer_that_it_gets_alone(barefoot, tiny_gguf, answered):
    found = lines(answered[0])
    assert sorted(found) == list(range(5))
    for i, prompt in enumerate(PROMPTS):
        alone = json.loads(barefoot("run", tiny_gguf.path, prompt, *SMALL, *EXACT, "--json").stdout)
        assert found[i] == {"index": i, **{key: alone[key] for key in LINE_KEYS[1:]}}


def test_sampled_answers_do_not_depend_on_the_batch(barefoot, tiny_gguf, file):
    sampled = ("--temperature", "1", "--seed", "5")
    one, two = (
        lines(barefoot("run", tiny_gguf.path, "--prompts", file, "--batch", n, *SMALL, *EXACT, *sampled))
        for n in (1, 4)
    )
    assert one == two
    assert len({line["text"] for line in one.values()}) == 5


def test_the_record_of_a_batch(answered):
    done, record = answered
    assert set(record) == set(JSON_KEYS)
    assert (record["text"], record["finish_reason"], record["turns"]) == (None, None, 5)
    assert record["answers"] == [line for _, line in sorted(lines(done).items())]
    assert record["prompt_tokens"] == sum(a["prompt_tokens"] for a in record["answers"])
    assert record["decode_tokens"] == sum(a["decode_tokens"] for a in record["answers"])
    assert record["plan"]["job"]["batch"] == 3
    assert record["plan"]["config"]["kv"] in done.stderr


@pytest.mark.parametrize(("batch", "kv", "row"), [(1, "q8", 32 + 2), (3, "q4", 16 + 4), (16, "f32", 128)])
def test_the_ledger_of_a_batch_adds_up(barefoot, tiny_gguf, tmp_path, batch, kv, row):
    """Keys and values by hand, a head's 32 numbers in ``row`` bytes."""
    out, n_prompts, context = tmp_path / "out.json", 18, 512
    job = ("--batch", batch, "--kv", kv, "--memory", "256MiB", "--context", context, "--max-tokens", 5)
    text = "\n".join(f"prompt {i}" for i in range(n_prompts))
    done = barefoot("run", tiny_gguf.path, "--prompts", "-", *job, "--json", out, stdin=text)
    assert done.returncode == 0, done.stderr
    assert len(lines(done)) == n_prompts
    record = json.loads(out.read_text("utf-8"))
    (stored,) = [e["bytes"] for e in record["terms"] if e["kind"] == "kv"]
    assert stored == batch * tiny_gguf.n_layers * 2 * context * tiny_gguf.n_kv_heads * row
    assert record["measured_peak_bytes"] <= record["predicted_peak_bytes"] <= record["budget_bytes"]


def test_fewer_prompts_than_the_batch_take_no_more_memory(barefoot, tiny_gguf):
    done = barefoot("run", tiny_gguf.path, "--batch", 64, *SMALL, "--json", stdin="one\ntwo\n")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"]["job"]["batch"] == 2


def test_a_saved_plan_brings_its_batch(barefoot, tiny_gguf, file, tmp_path):
    saved = tmp_path / "plan.toml"
    assert barefoot("plan", tiny_gguf.path, *SMALL, "--batch", 2, "--save", saved).returncode == 0
    done = barefoot("run", tiny_gguf.path, "--prompts", file, "--plan", saved, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"]["job"]["batch"] == 2


def test_json_lines_with_messages(barefoot, tiny_gguf):
    given = [
        {"prompt": "hello", "id": 7},
        {"messages": [{"role": "user", "content": "hello"}]},
        {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}]},
    ]
    text = "\n".join(map(json.dumps, given))
    found = lines(barefoot("run", tiny_gguf.path, "--prompts", "-", *SMALL, *EXACT, "--batch", 2, stdin=text))
    assert {**found[1], "index": 0} == found[0]
    # <|im_start|>system\nbe<|im_end|>\n: 2 control tokens, and the rest in bytes
    assert found[2]["prompt_tokens"] == found[0]["prompt_tokens"] + 2 + len("system\nbe\n")


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["hello", "--batch", "2"], "", "PROMPT is one prompt"),
        (["--batch", "2"], "\n  \n", "standard input holds no prompts"),
        (["--batch", "0"], "hello", "batch must be at least 1, got 0"),
        (["--prompts", "-"], '{"prompt": "a"}\n\n{"prompt": 3}', "standard input, line 3 holds neither a prompt nor"),
        (["--prompts", "-"], '{"prompt": "a"}\nb', "standard input, line 2 is no JSON"),
        (["--prompts", "-"], "a\n" + "x" * 200, "prompt 1: the conversation has"),
    ],
)
def test_prompts_that_are_none(barefoot, tiny_gguf, arguments, stdin, message):
    done = barefoot("run", tiny_gguf.path, *arguments, *SMALL, stdin=stdin)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {message}" in done.stderr


def test_a_file_that_is_not_there(barefoot, tiny_gguf):
    done = barefoot("run", tiny_gguf.path, "--prompts", "/no/such/file", *SMALL)
    assert done.returncode == 1
    assert "/no/such/file" in done.stderr
    assert "Traceback" not in done.stderr


def test_too_large_a_batch_is_refused_with_the_largest(barefoot, tiny_gguf):
    done = barefoot(
        "run", tiny_gguf.path, "--batch", 900, "--memory", "100MiB", "--context", 512, "--kv", "f16", stdin="x\n" * 900
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert "the largest batch is" in done.stderr
    assert "barefoot run" in done.stderr


def test_parse():
    def user(text):
        return [{"role": "user", "content": text}]

    assert parse("a b\n\n c \r\n", "x") == [user("a b"), user("c")]
    assert parse('a\n{"prompt": 1}', "x") == [user("a"), user('{"prompt": 1}')]
    assert parse('{"prompt": "a\\nb"}', "x") == [user("a\nb")]
    assert parse(" \n", "x") == []
    for bad in ('{"messages": []}', '{"messages": [{"role": "user"}]}', '{"messages": "a"}', "{}"):
        with pytest.raises(InvalidInput, match="x, line 1 holds neither"):
            parse(bad, "x")
    with pytest.raises(InvalidInput, match="x, line 2 holds neither"):
        parse('{"prompt": "a"}\n[1]', "x")


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is another thing there")
def test_ctrl_c_keeps_the_answers_that_are_there(tiny_gguf, tmp_path):
    prompts, out, answers = tmp_path / "prompts.txt", tmp_path / "out.json", tmp_path / "answers.jsonl"
    prompts.write_text("hello\n" * 400)
    job = ("--prompts", prompts, "--batch", "2", "--context", "512", "--max-tokens", "200", "--json", out)
    command = [sys.executable, "-m", "barefoot", "run", tiny_gguf.path, "--memory", "1GiB", *job]
    with answers.open("w") as stdout:
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE
        )
        end = time.monotonic() + 60
        while not answers.stat().st_size:
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in error
    written = [json.loads(line)["index"] for line in answers.read_text("utf-8").splitlines()]
    assert [a["index"] for a in json.loads(out.read_text("utf-8"))["answers"]] == sorted(written)
    assert 1 <= len(written) < 400
