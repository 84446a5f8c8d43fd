"""barefoot run, in processes of its own, on a tiny model with random weights."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from barefoot.cli.commands.run import JSON_KEYS

MIB = 1 << 20
COMMAND = [sys.executable, "-m", "barefoot", "run"]
# Python itself ends by the signal, which shells report as 130 too, when it comes as the interpreter shuts down.
INTERRUPTED = (130, -signal.SIGINT)
SMALL = ("--memory", "128MiB", "--context", "256", "--max-tokens", "16")


@pytest.fixture(scope="module")
def answered(barefoot, tiny_gguf, tmp_path_factory):
    """One finished run and its record."""
    out = tmp_path_factory.mktemp("run") / "out.json"
    done = barefoot("run", tiny_gguf.path, "hello", *SMALL, "--report", "--json", out)
    assert done.returncode == 0, done.stderr
    return done, json.loads(out.read_text("utf-8"))


def test_the_record_has_the_documented_keys(answered):
    assert set(answered[1]) == set(JSON_KEYS)


def test_the_answer_is_what_was_streamed(answered):
    done, record = answered
    assert done.stdout == record["text"] + "\n"
    # <|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n in single bytes, but for 4 control tokens and "he"
    assert record["prompt_tokens"] == len("user\n") + len("llo") + 1 + len("\n") + len("assistant\n") + 3
    assert record["decode_tokens"] == 16
    assert record["finish_reason"] == "length"


def test_the_ledger_adds_up(answered, tiny_gguf):
    record = answered[1]
    assert record["budget_bytes"] == 128 * MIB
    assert record["predicted_peak_bytes"] <= record["budget_bytes"]
    assert record["predicted_peak_bytes"] == max(record["phases"].values())
    assert sum(kind["predicted"] for kind in record["by_kind"].values()) == record["predicted_peak_bytes"]
    assert record["unaccounted_bytes"] == record["measured_peak_bytes"] - record["predicted_peak_bytes"]
    codes = sum(
        count * size
        for entry in record["terms"]
        if entry["owner"] in ("weights.attn", "weights.ffn")
        for name, count, size in entry["terms"]
        if name != "alignment"
    )
    n_weights = tiny_gguf.n_matrix_weights - tiny_gguf.vocab_size * tiny_gguf.d_model
    if record["plan"]["config"]["weights"].count("stored") == 3:
        assert codes == n_weights // 32 * 18  # Q4_0: 16 bytes of codes and a scale for 32 weights


def test_the_report_shows_the_same_numbers(answered):
    done, record = answered
    lines = {line.split("  ")[0]: line for line in done.stderr.splitlines()}
    assert f"{record['measured_peak_bytes'] / MIB:,.1f} MiB" in lines["peak"]
    assert f"{record['predicted_peak_bytes'] / MIB:,.1f} MiB" in lines["peak"]
    assert "unaccounted" in lines
    assert set(record["by_kind"]) <= set(lines)


def test_what_is_stated_is_kept(barefoot, tiny_gguf):
    stated = ("--weights", "int(bits=8,group=64)", "--kv", "q4", "--chunk", "16", "--threads", "1")
    done = barefoot("run", tiny_gguf.path, "hi", *SMALL, *stated, "--activations", "float32", "--json")
    assert done.returncode == 0, done.stderr
    config = json.loads(done.stdout)["plan"]["config"]
    assert (config["kv"], config["chunk"], config["n_threads"], config["activations"]) == ("q4", 16, 1, "float32")
    assert config["weights"].count("int(bits=8,group=64)") in (1, 3)


def test_a_prompt_after_the_options(barefoot, tiny_gguf, answered):
    done = barefoot("run", tiny_gguf.path, *SMALL, "hello")
    assert done.returncode == 0, done.stderr
    assert done.stdout == answered[0].stdout


def test_json_to_stdout_is_all_there_is(barefoot, tiny_gguf):
    done = barefoot("run", tiny_gguf.path, "hello", *SMALL, "--json")
    assert json.loads(done.stdout)["decode_tokens"] == 16


def test_the_same_seed_gives_the_same_text(barefoot, tiny_gguf):
    texts = [
        barefoot("run", tiny_gguf.path, "hello", *SMALL, "--temperature", "1", "--seed", seed, "--threads", 1).stdout
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_pipe_is_the_prompt(barefoot, tiny_gguf, answered):
    done = barefoot("run", tiny_gguf.path, *SMALL, stdin="hello\n")
    assert done.stdout == answered[0].stdout


def test_bytes_that_are_no_text_are_replaced(tiny_gguf):
    """In a pipe and in an argument: U+FFFD is three tokens of this vocabulary."""
    for prompt, piped in (([], b"x\xe9"), ([b"x\xe9"], b"")):
        command = [*COMMAND, str(tiny_gguf.path), *prompt, "--raw", *SMALL, "--json"]
        done = subprocess.run(command, input=piped, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["prompt_tokens"] == 1 + len("\ufffd".encode())


def test_a_pipe_follows_the_prompt(barefoot, tiny_gguf):
    n = [
        json.loads(barefoot("run", tiny_gguf.path, *arguments, *SMALL, "--json", stdin=stdin).stdout)["prompt_tokens"]
        for arguments, stdin in ((["ab", "--raw"], "cde\n"), (["ab\n\ncde", "--raw"], ""))
    ]
    assert n == [7, 7]


def test_without_any_prompt_there_is_a_default_one(barefoot, tiny_gguf):
    done = barefoot("run", tiny_gguf.path, *SMALL, "--json", "--raw")
    from barefoot.cli.commands.run import DEFAULT_PROMPT

    assert json.loads(done.stdout)["prompt_tokens"] == len(DEFAULT_PROMPT) - DEFAULT_PROMPT.count("he")


def test_stop_strings_end_the_answer_and_are_not_in_it(barefoot, tiny_gguf, answered):
    text = answered[1]["text"]
    stop = text[5:8]
    done = barefoot("run", tiny_gguf.path, "hello", *SMALL, "--stop", stop, "--json")
    record = json.loads(done.stdout)
    assert record["text"] == text[: text.index(stop)]
    assert record["finish_reason"] == "stop"


def test_without_a_budget_it_is_what_the_machine_has(barefoot, tiny_gguf):
    done = barefoot("run", tiny_gguf.path, "hi", "--context", 64, "--max-tokens", 2)
    assert done.returncode == 0
    assert "available on this machine" in done.stderr


def test_too_small_a_budget_is_refused_with_commands(barefoot, tiny_gguf, tmp_path):
    out = tmp_path / "out.json"
    done = barefoot("run", tiny_gguf.path, "hello", "--memory", "8MiB", "--json", out)
    assert (done.returncode, done.stdout) == (3, "")
    assert "barefoot run" in done.stderr
    record = json.loads(out.read_text("utf-8"))
    assert record["fits"] is False
    assert record["available_bytes"] == 8 * MIB < record["needed_bytes"]
    assert record["error"]["name"] == "OverBudget"


def test_too_long_a_prompt_is_refused(barefoot, tiny_gguf):
    done = barefoot("run", tiny_gguf.path, "x" * 300, *SMALL)
    assert (done.returncode, done.stdout) == (2, "")
    assert "the context holds 256" in done.stderr


def test_a_saved_plan_runs(barefoot, tiny_gguf, tmp_path):
    saved = tmp_path / "plan.toml"
    planned = barefoot("plan", tiny_gguf.path, *SMALL, "--kv", "q4", "--save", saved)
    assert planned.returncode == 0, planned.stderr
    done = barefoot("run", tiny_gguf.path, "hello", "--plan", saved, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["budget_bytes"], record["plan"]["config"]["kv"]) == (128 * MIB, "q4")
    assert record["plan"]["job"]["context"] == 256


@pytest.mark.parametrize(
    ("content", "code", "name"),
    [(b"", 6, "CorruptFile"), (b"GGUF" + b"\xff" * 60, 5, None), (b"nonsense" * 10, None, None)],
)
def test_files_that_are_no_models(barefoot, tmp_path, content, code, name):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    done = barefoot("run", path, "hello", *SMALL)
    assert done.returncode in ((code,) if code else (5, 6))
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_missing_model(barefoot):
    assert barefoot("run", "/no/such/model.gguf", "hello").returncode == 8


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is another thing there")
def test_ctrl_c_leaves_with_130(tiny_gguf):
    process = subprocess.Popen(
        [*COMMAND, str(tiny_gguf.path), "hello", "--memory", "1GiB", "--context", "512", "--max-tokens", "400"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert process.stdout.read(1)  # it answers
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode in INTERRUPTED
    assert b"Traceback" not in error


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipe that closes with a signal")
def test_a_reader_that_leaves(tiny_gguf):
    process = subprocess.Popen(
        [*COMMAND, str(tiny_gguf.path), "hello", "--memory", "1GiB", "--context", "512", "--max-tokens", "400"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def wait_for(read, text, seconds=30):
    """What was read until ``text`` came."""
    seen, end = "", time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < end, f"waited for {text!r}, got {seen!r}"
        seen += read()
    return seen


@contextlib.contextmanager
def chat_at_a_terminal(*arguments):
    """Begin a chat; (the process, what reads its screen, what types a line)."""
    import pty
    import select

    terminal, other_end = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "TERM": "xterm", "NO_COLOR": "1"},
    )
    os.close(other_end)

    def read():
        ready, _, _ = select.select([terminal], [], [], 0.2)
        return os.read(terminal, 4096).decode("utf-8", "replace") if ready else ""

    def say(text):
        os.write(terminal, text.encode() + b"\n")

    try:
        yield process, read, say
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pty")
def test_a_chat_at_a_terminal(tiny_gguf):
    job = ("--memory", "128MiB", "--context", "96", "--max-tokens", "4")
    with chat_at_a_terminal(tiny_gguf.path, *job) as (process, read, say):
        assert "/reset begins anew" in wait_for(read, "> ")
        say("hi")
        wait_for(read, "\n> ")
        say("ho")  # 2 × (27 tokens of format and text) + 4 answered
        wait_for(read, "\n> ")
        say("ha")
        wait_for(read, "\n> ")
        say("too long by now")
        assert "the context holds 96" in wait_for(read, "\n> ")
        say("/what")
        assert "unknown command /what" in wait_for(read, "\n> ")
        say("/memory 100MiB")
        assert "unknown command /memory" in wait_for(read, "\n> ")
        say("/reset")
        wait_for(read, "begun anew")
        say("once more")
        wait_for(read, "\n> ")
        say("/exit")
        assert "peak " in wait_for(read, "answer 4 tokens")
        assert process.wait(timeout=30) == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pty")
def test_a_stack_in_a_chat_that_allows_less_and_more(barefoot, tiny_gguf, tmp_path):
    """14 matrices of 3 blocks: the first ones stay, 28 come and go."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{i * i}" for i in range(600)))
    command = ["fit", tiny_gguf.path, "--weights", "bitstack(blocks=3)", "-o", tmp_path / "stack", "--text", text]
    done = barefoot(*command, "--window", 64, "--tokens", 256, "--json", tmp_path / "fit.json")
    assert done.returncode == 0, done.stderr
    fitted = json.loads((tmp_path / "fit.json").read_text())
    record = json.loads((tmp_path / "stack" / "barefoot.json").read_text())
    assert [name[-2:] for name in record["stack"]] == ["02"] * 14 + ["03"] * 14
    assert fitted["formats"]["signs"] < fitted["weight_bytes"]
    assert 0 <= fitted["run_bytes"] - fitted["least_run_bytes"] <= fitted["formats"]["signs"]
    job = ("--memory", "128MiB", "--context", "96", "--max-tokens", "4")
    with chat_at_a_terminal(tmp_path / "stack", *job) as (process, read, say):
        assert "/memory SIZE allows more or less" in wait_for(read, "> ")
        say("hi")
        wait_for(read, "\n> ")
        say("/memory 1MiB")
        assert "without any of its 28 further blocks" in wait_for(read, "\n> ")
        say("/memory lots")
        assert "lots" in wait_for(read, "\n> ")
        say("/memory 127MiB")
        assert "28 of 28 blocks in memory, +0" in wait_for(read, "\n> ")
        say("ho")
        wait_for(read, "\n> ")
        say("/exit")
        wait_for(read, "answer 4 tokens")
        assert process.wait(timeout=30) == 0
