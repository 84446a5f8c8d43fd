"""What all commands share: help, exit codes, errors in one line, JSON, closed pipes."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from barefoot.cli.commands import all_commands
from barefoot.cli.main import EXIT_CODES
from barefoot.core import errors

COMMAND = [sys.executable, "-m", "barefoot"]


def test_every_file_of_the_folder_is_a_command(barefoot):
    done = barefoot("--help")
    assert done.returncode == 0
    listed = re.findall(r"^    ([\w-]+)(?: |$)", done.stdout, re.MULTILINE)
    assert (
        listed
        == sorted(all_commands())
        == [
            "compare",
            "doctor",
            "eval",
            "explain",
            "export",
            "fit",
            "kv-compare",
            "papers",
            "plan",
            "pull",
            "run",
            "tune",
        ]
    )


@pytest.mark.parametrize("name", sorted(all_commands()))
def test_help_shows_the_examples(barefoot, name):
    done = barefoot(name, "--help")
    assert done.returncode == 0
    for example in all_commands()[name].EXAMPLES:
        assert example in done.stdout


def test_help_loads_no_heavy_library():
    code = (
        "import sys; from barefoot.cli.main import main; main(['--help']);"
        "print([m for m in ('numpy', 'rich', 'jinja2', 'tokenizers', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_exit_codes_are_those_of_the_exceptions():
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.BarefootError)
    ]
    assert len(kinds) == 8
    assert {kind.exit_code for kind in kinds} == {1, 2, 3, 4, 5, 6, 7, 8}
    assert {kind.exit_code for kind in kinds} | {0, 130, 141} == set(EXIT_CODES)


@pytest.mark.parametrize(
    ("arguments", "first_line"),
    [
        ([], "error: the following arguments are required: COMMAND"),
        (["plan"], "error: the following arguments are required: MODEL"),
        (["plan", "smollm2", "--memory", "12 apples"], "error: '12 apples' is not a size in bytes"),
        (["papers", "93"], "error: there is no paper 93; they are numbered 1 to 92"),
        (["papers", "14", "--status", "done"], "error: argument --status: invalid choice: 'done'"),
        (["run", "model.gguf", "--prompt", "Hello"], "error: unrecognized arguments: --prompt"),
    ],
)
def test_wrong_input_is_one_line_and_a_cure(barefoot, arguments, first_line):
    done = barefoot(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[0].startswith(first_line)
    assert "Traceback" not in done.stderr


def test_the_cure_follows(barefoot):
    done = barefoot("explain", "imt")
    assert done.returncode == 2
    first, *rest = done.stderr.splitlines()
    assert re.fullmatch(r"error: unknown technique 'imt'; known: (\w+, )*int(, \w+)*", first)
    assert rest == ["  → did you mean int?"]


def test_debug_adds_the_traceback(barefoot):
    plain = barefoot("papers", "93").stderr
    done = barefoot("papers", "93", env={"BAREFOOT_DEBUG": "1"})
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert done.stderr.endswith(plain)


def test_json_of_a_failure(barefoot):
    done = barefoot("papers", "93", "--json")
    assert json.loads(done.stdout)["error"] == {
        "name": "InvalidInput",
        "message": "there is no paper 93; they are numbered 1 to 92",
        "cure": None,
        "exit_code": 2,
    }


def test_json_to_a_file_keeps_the_text(barefoot, tmp_path):
    done = barefoot("papers", "14", "--json", tmp_path / "out.json")
    assert done.stdout.startswith("14  A Survey of Quantization Methods")
    assert [p["number"] for p in json.loads((tmp_path / "out.json").read_text("utf-8"))["papers"]] == [14]


def test_a_file_that_cannot_be_written(barefoot, tmp_path):
    done = barefoot("papers", "--json", tmp_path / "missing" / "out.json")
    assert done.returncode == 1
    assert done.stderr.startswith("error: [Errno 2] No such file or directory")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipe that closes with a signal")
def test_a_closed_pipe_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, "papers"], stdout=write, stderr=subprocess.PIPE, encoding="utf-8")
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_no_escape_codes_without_a_terminal(barefoot):
    assert "\033" not in barefoot("papers").stdout + barefoot("explain", "int").stdout + barefoot("papers", "93").stderr


def test_papers_counts_all(barefoot):
    lines = barefoot("papers").stdout.splitlines()
    assert len([line for line in lines if re.match(r"\d\d  ", line)]) == 92
    assert lines[-1].endswith("; 92 in all")


def test_options_may_stand_before_what_they_belong_to(barefoot, tmp_path):
    done = barefoot("papers", "--json", tmp_path / "out.json", "14")
    assert done.stdout == barefoot("papers", "14").stdout
    assert [p["number"] for p in json.loads((tmp_path / "out.json").read_text("utf-8"))["papers"]] == [14]


def test_papers_by_status(barefoot):
    done = barefoot("papers", "--status", "planned", "--json")
    assert {p["status"] for p in json.loads(done.stdout)["papers"]} == {"planned"}


def test_pull_of_nothing(barefoot):
    done = barefoot("pull", "no-such-model")
    assert done.returncode == 8
    assert done.stderr.startswith("error: no model 'no-such-model'")


def test_doctor_says_what_is_documented(barefoot):
    facts = json.loads(barefoot("doctor", "--json").stdout)
    assert set(facts) == set(all_commands()["doctor"].JSON_KEYS) - {"devices"}
    assert facts["threads"] >= 1
    assert facts["kernels"]["backend"].split(":")[1] in facts["kernels"]["available"]
    assert facts["versions"]["barefoot"] in barefoot("--version").stdout
    assert 0 < facts["memory"]["available_bytes"] <= facts["memory"]["total_bytes"]


def test_doctor_lists_machines_with_their_sources(barefoot):
    devices = json.loads(barefoot("doctor", "--devices", "--json").stdout)["devices"]
    assert {"rtx-4090", "h100"} <= {device["name"] for device in devices}
    assert all(device["sources"] for device in devices)


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is another thing there")
def test_an_interrupted_pull_leaves_nothing_behind(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "pull", "smollm2"],
        env={**os.environ, "BAREFOOT_CACHE": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while process.poll() is None and not list(tmp_path.glob("models/*/.fetch-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.decode().strip() == "interrupted"
    assert [path for path in tmp_path.rglob("*") if path.is_file() or path.name.startswith(".fetch")] == []


def test_pull_lists_aliases(barefoot, tmp_path):
    done = barefoot("pull", "--list", "--json", env={"BAREFOOT_CACHE": str(tmp_path)})
    models = {model["name"]: model["path"] for model in json.loads(done.stdout)["models"]}
    assert models["smollm2"] is None
