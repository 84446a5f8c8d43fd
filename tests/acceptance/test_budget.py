"""The main promise on real models: a sensible answer inside the stated memory, and refusals whose commands fit.

Where a memory cgroup can be made the kernel enforces the limit, page cache included; elsewhere the process's own
high-water mark is held against it. The models are fetched once into the cache, as ``barefoot pull`` does.
"""

import json
import pydoc_data.topics
import shlex
import subprocess
import sys

import pytest

from barefoot.core.measure import cgroup_reason, resident, run_limited

MIB = 1 << 20
BAREFOOT = [sys.executable, "-m", "barefoot"]

pytestmark = pytest.mark.skipif(resident() is None, reason="this system does not tell what a process has resident")


@pytest.fixture(scope="module")
def smollm2():
    return fetched("smollm2")


@pytest.fixture(scope="module")
def refusal(smollm2):
    """What ``plan`` says of a budget that nothing fits, at the default context."""
    return refused(smollm2)


def fetched(name):
    done = subprocess.run([*BAREFOOT, "pull", name], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return name


def refused(*job):
    command = [*BAREFOOT, "plan", *job, "--memory", "40MiB", "--json"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    return json.loads(done.stdout)


def run(tmp_path, n_bytes, *arguments):
    """The record of ``barefoot run`` in a process that may take ``n_bytes``; it stayed within them."""
    out = tmp_path / "out.json"
    command = [*BAREFOOT, "run", *arguments, "--json", str(out)]
    if cgroup_reason() is None:
        done = run_limited(command, n_bytes, stdin=subprocess.DEVNULL)
        assert not done.killed
    else:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text("utf-8"))
    assert record["budget_bytes"] == n_bytes
    assert record["measured_peak_bytes"] <= n_bytes
    assert abs(record["unaccounted_bytes"]) <= 0.05 * record["predicted_peak_bytes"]
    return record


@pytest.mark.parametrize("memory", [112, 128, 160, 256, 512])
def test_inside_the_budget(tmp_path, smollm2, memory):
    job = ("--memory", f"{memory}MiB", "--context", "1024", "--max-tokens", "16")
    record = run(tmp_path, memory * MIB, smollm2, "The capital of France is", "--raw", *job)
    assert "Paris" in record["text"]


@pytest.mark.parametrize(("batch", "kv", "row"), [(1, "q8", 68), (3, "f16", 128), (16, "q4", 40), (16, "f32", 256)])
def test_a_batch_inside_the_budget(tmp_path, smollm2, batch, kv, row):
    """18 prompts; the keys and values of every sequence are there, ``row`` bytes for a head's 64 numbers."""
    prompts, n_bytes = tmp_path / "prompts.txt", 768 * MIB
    prompts.write_text("\n".join(["The capital of France is", "1, 2, 3, 4,"] * 9), "utf-8")
    job = ("--batch", str(batch), "--kv", kv, "--context", "512", "--max-tokens", "8", "--memory", str(n_bytes))
    record = run(tmp_path, n_bytes, smollm2, "--prompts", str(prompts), "--raw", *job)
    stored = batch * 512 * 30 * 2 * 3 * row
    assert record["by_kind"]["kv"] == {"predicted": stored, "measured": stored}
    assert [("Paris" in a["text"], " 5, 6" in a["text"]) for a in record["answers"]] == [
        (True, False),
        (False, True),
    ] * 9


def test_the_smallest_budget_of_a_large_vocabulary(tmp_path):
    """262,144 tokens: the tables of the tokenizer are a good part of what the process takes."""
    job = (fetched("gemma3-270m"), "--context", "1024", "--max-tokens", "16")
    smallest = min(option["budget_bytes"] for option in refused(*job)["alternatives"])
    assert smallest <= 448 * MIB
    record = run(tmp_path, smallest, *job, "1, 2, 3, 4, 5,", "--raw", "--memory", str(smallest))
    assert record["text"].startswith(" 6, 7, 8, 9")


def test_what_a_long_prompt_leaves_is_in_the_prediction(tmp_path, smollm2):
    """24,000 bytes: the library that encodes them leaves its heap in pieces, which stay resident."""
    prompt = " ".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[:24_000]
    job = ("--memory", "160MiB", "--context", "8192", "--max-tokens", "4", "--kv", "q3")
    record = run(tmp_path, 160 * MIB, smollm2, prompt, "--raw", *job)
    assert record["prompt_tokens"] > 4_000
    assert record["unaccounted_bytes"] <= 0


def test_a_refusal_says_by_how_much(refusal):
    assert refusal["available_bytes"] == 40 * MIB
    assert refusal["needed_bytes"] > 40 * MIB
    budgets = [option["budget_bytes"] for option in refusal["alternatives"]]
    assert len(budgets) >= 3
    assert min(budgets) - MIB < refusal["needed_bytes"] <= min(budgets)


def test_every_command_of_a_refusal_fits(tmp_path, refusal):
    """As printed, but for a shorter answer: the context, and with it the KV store, stays as large."""
    for option in refusal["alternatives"]:
        program, command, *arguments = shlex.split(option["command"])
        assert (program, command) == ("barefoot", "run")
        record = run(tmp_path, option["budget_bytes"], *arguments, "--max-tokens", "8")
        assert 1 <= record["decode_tokens"] <= 8
