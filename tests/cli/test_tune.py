"""tune as people run it, on a tiny model: learn, be killed, go on, run with what was learned."""

import json
import signal
import subprocess
import sys
import time

import pytest
from random_files import LLAMA, write_random

from barefoot.adapters.files import TENSORS
from barefoot.cli.commands import all_commands
from barefoot.core.units import MIB
from barefoot.io.safetensors import read_safetensors

pytest.importorskip("torch", reason="training is PyTorch's")

ANSWER = "hehehehehehehehe"


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """One answer to whatever is asked, which a model of random weights can learn."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    records = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": ANSWER}]}
        for i in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def command(tiny_gguf, chats, out, *more):
    numbers = ["--length", 96, "--batch", 2, "--steps", 30, "--rate", "0.03", "--threads", 1]
    return ["tune", tiny_gguf.path, chats, "-o", out, *numbers, *more]


@pytest.fixture(scope="module")
def tuned(barefoot, tiny_gguf, chats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    done = barefoot(*command(tiny_gguf, chats, folder / "out", "--memory", "2GiB", "--json", folder / "out.json"))
    assert done.returncode == 0, done.stderr
    return folder / "out", json.loads((folder / "out.json").read_text())


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_inside_what_was_predicted(tuned):
    folder, record = tuned
    assert set(record) == set(all_commands()["tune"].JSON_KEYS)
    curve = lines(folder)
    assert [line["step"] for line in curve] == list(range(1, 31))
    assert curve[0]["loss"] > 4.5  # of 259 tokens, by lot: 5.6
    assert record["best"] < 1.0
    assert record["best"] == min(line["held_out_loss"] for line in curve if "held_out_loss" in line)
    assert record["measured_peak_bytes"] <= record["predicted_peak_bytes"]
    assert record["plan"]["needed_bytes"] == record["predicted_peak_bytes"] < record["budget_bytes"]


def test_what_was_learned_runs(tuned, barefoot, tiny_gguf):
    folder, _ = tuned
    plain, learned = (
        barefoot("run", tiny_gguf.path, "say 3", "--max-tokens", 8, "--temperature", 0, *more)
        for more in ((), ("--adapter", folder))
    )
    assert learned.returncode == 0, learned.stderr
    assert learned.stdout.strip().startswith("hehe")
    assert not plain.stdout.strip().startswith("hehe")


def killed_and_again(arguments, out, barefoot):
    """Run it, kill it behind eight steps, and run it again."""
    process = subprocess.Popen(
        [sys.executable, "-m", "barefoot", *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    metrics = out / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or len(metrics.read_bytes().splitlines()) < 8):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed_behind = len(metrics.read_bytes().splitlines())
    assert 8 <= killed_behind < 30
    done = barefoot(*arguments, "--optimizer", "paged(resident=1,page=4)")  # a state is any optimizer's
    assert done.returncode == 0, done.stderr
    assert "paged(resident=1,page=4)" in done.stderr
    assert "going on behind step" in done.stderr


def assert_same(out, whole):
    compared = ("step", "loss", "norm", "rate", "held_out_loss")
    assert [[line.get(k) for k in compared] for line in lines(out)] == [
        [line.get(k) for k in compared] for line in lines(whole)
    ]
    adapter = "adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (whole / adapter).read_bytes()


def test_killed_it_goes_on_as_if_nothing_had_happened(tuned, tiny_gguf, chats, tmp_path, barefoot):
    out = tmp_path / "out"
    killed_and_again(command(tiny_gguf, chats, out, "--memory", "2GiB", "--save-every", 3), out, barefoot)
    assert_same(out, tuned[0])


def test_other_settings_dont_go_on(tuned, tiny_gguf, chats, barefoot):
    done = barefoot(*command(tiny_gguf, chats, tuned[0], "--memory", "2GiB", "--seed", 1))
    assert done.returncode == 2
    assert "another" in done.stderr


def test_too_little_memory_is_refused_before_anything(tiny_gguf, chats, tmp_path, barefoot):
    done = barefoot(*command(tiny_gguf, chats, tmp_path / "out", "--memory", "64MiB"))
    assert done.returncode == 3
    assert "at least" in done.stderr
    assert not (tmp_path / "out").exists()


def test_bad_data_is_named_with_its_line(tiny_gguf, tmp_path, barefoot):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    done = barefoot(*command(tiny_gguf, data, tmp_path / "out", "--memory", "2GiB"))
    assert done.returncode == 2
    assert "bad.jsonl, line 2" in done.stderr


def test_a_plan_alone_lists_what_there_is(tuned, tiny_gguf, chats, tmp_path, barefoot):
    where = tmp_path / "plan.json"
    done = barefoot(*command(tiny_gguf, chats, tmp_path / "out", "--memory", "2GiB", "--plan", "--json", where))
    assert done.returncode == 0, done.stderr
    record = json.loads(where.read_text())
    assert record["steps"] is None
    every = [record["plan"], *record["alternatives"]]
    assert {each["loss"] for each in every} == {"plain", "cce"}
    assert {each["activations"] for each in every} == {"keep", "recompute"}
    assert {each["base"] for each in every} >= {"stored"}
    fitting = [each for each in every if each["needed_bytes"] <= record["budget_bytes"]]
    same_base = [each for each in fitting if each["base"] == "stored"]
    assert record["plan"]["seconds_per_step"] == min(each["seconds_per_step"] for each in same_base)
    # The process's own bytes are measured for a plan as for a training, which has read its data besides.
    assert abs(record["plan"]["needed_bytes"] - tuned[1]["plan"]["needed_bytes"]) < 16 * MIB
    assert not (tmp_path / "out").exists()


def test_a_spectral_adapter_learns_and_runs(barefoot, tiny_gguf, chats, tmp_path):
    """What it writes is a pair of thin factors beside the model as it was."""
    adapter = ("--adapter", "lamda(rank=8,init=zero_core)")
    done = barefoot(*command(tiny_gguf, chats, tmp_path / "out", "--memory", "2GiB", *adapter))
    assert done.returncode == 0, done.stderr
    learned = barefoot(
        "run", tiny_gguf.path, "say 3", "--max-tokens", 8, "--temperature", 0, "--adapter", tmp_path / "out"
    )
    assert learned.returncode == 0, learned.stderr
    assert learned.stdout.strip().startswith("hehe")


def test_a_side_network_learns_and_is_not_run(barefoot, tiny_gguf, chats, tmp_path):
    """Inside what was predicted; ``run`` says why it doesn't take it."""
    out = tmp_path / "out"
    side = command(tiny_gguf, chats, out, "--adapter", "qst(r=4)", "--memory", "2GiB", "--json", tmp_path / "out.json")
    done = barefoot(*side)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["measured_peak_bytes"] <= record["predicted_peak_bytes"]
    assert {plan["activations"] for plan in (record["plan"], *record["alternatives"])} == {"keep"}
    curve = lines(out)
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert "barefoot run" not in done.stdout
    ran = barefoot("run", tiny_gguf.path, "say 3", "--adapter", out)
    assert ran.returncode != 0
    assert "the engine doesn't run it" in ran.stderr
    again = barefoot(*side, "--activations", "recompute", "--plan")
    assert "there is none to pass again" in again.stderr


PRUNE = ("--memory", "2GiB", "--prune", "taylor(ratio=0.5,first=1,last=0)")


@pytest.fixture(scope="module")
def pruned(barefoot, tiny_gguf, chats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    done = barefoot(*command(tiny_gguf, chats, folder / "out", *PRUNE, "--json", folder / "out.json"))
    assert done.returncode == 0, done.stderr
    return folder / "out", json.loads((folder / "out.json").read_text())


def test_beside_a_pruned_copy_it_learns_and_the_whole_model_runs_it(pruned, tuned, barefoot, tiny_gguf):
    """One of two layers loses half of its channels; what is written has the whole model's shapes."""
    folder, record = pruned
    assert record["measured_peak_bytes"] <= record["predicted_peak_bytes"]
    assert record["best"] < 1.0
    cut = 3 * tiny_gguf.d_model * tiny_gguf.d_ff // 2  # the only group of heads stays
    assert tuned[1]["plan"]["parameters"] - record["plan"]["parameters"] == cut
    shapes = [{t.name: t.shape for t in read_safetensors(each / TENSORS).tensors} for each in (folder, tuned[0])]
    assert shapes[0] == shapes[1]
    learned = barefoot("run", tiny_gguf.path, "say 3", "--max-tokens", 8, "--temperature", 0, "--adapter", folder)
    assert learned.returncode == 0, learned.stderr
    assert learned.stdout.strip().startswith("hehe")


def test_beside_a_pruned_copy_it_goes_on_with_the_same_units(pruned, tiny_gguf, chats, tmp_path, barefoot):
    out = tmp_path / "out"
    killed_and_again(command(tiny_gguf, chats, out, *PRUNE, "--save-every", 3), out, barefoot)
    assert_same(out, pruned[0])
    assert (out / "pruned.safetensors").read_bytes() == (pruned[0] / "pruned.safetensors").read_bytes()
    other = command(tiny_gguf, chats, out, "--memory", "2GiB", "--prune", "drawn(ratio=0.5,first=1,last=0)")
    done = barefoot(*other)
    assert done.returncode == 2
    assert "beside another copy" in done.stderr
    (out / "documents.safetensors").write_bytes(b"no table")
    done = barefoot(*other)
    assert done.returncode == 6, "the table of the data is read where there is one"


def test_units_of_a_folder_are_planned_with(pruned, tiny_gguf, chats, tmp_path, barefoot):
    where = tmp_path / "plan.json"
    given = command(tiny_gguf, chats, tmp_path / "out", "--memory", "2GiB", "--prune", pruned[0])
    done = barefoot(*given, "--plan", "--json", where)
    assert done.returncode == 0, done.stderr
    plan, made = json.loads(where.read_text())["plan"], pruned[1]["plan"]
    assert (plan["pruning"], plan["parameters"]) == (made["pruning"], made["parameters"])
    assert "convert" in made["by_phase"]
    assert "convert" not in plan["by_phase"], "nothing is scored again"
    refused = barefoot(*given, "--adapter", "qst(r=4)", "--plan")
    assert refused.returncode == 4
    assert "can't be put back from a pruned copy" in refused.stderr
    nothing = barefoot(*command(tiny_gguf, chats, tmp_path / "out", "--prune", "drawn", "--plan"))
    assert nothing.returncode == 2
    assert "cuts nothing" in nothing.stderr


def test_what_is_measured_goes_to_tensorboard_too(tiny_gguf, chats, tmp_path, barefoot):
    """Read back by TensorBoard itself; what it takes is in the prediction."""
    pytest.importorskip("tensorboard", reason="TensorBoard's own reader is compared with")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, where = tmp_path / "out", tmp_path / "out.json"
    arguments = command(tiny_gguf, chats, out, "--memory", "2GiB", "--tensorboard", "--json", where)
    done = barefoot(*arguments)
    assert done.returncode == 0, done.stderr
    record = json.loads(where.read_text())
    assert record["measured_peak_bytes"] <= record["predicted_peak_bytes"]
    events = EventAccumulator(str(out))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in lines(out)]


def test_a_base_of_two_bits_learns_what_its_parent_says(barefoot, tiny_gguf, chats, tmp_path):
    """Inside what was predicted; without labels' share the loss is the divergence itself."""
    out, record = tmp_path / "out", tmp_path / "out.json"
    taught = command(tiny_gguf, chats, out, "--weights", "attn=int(bits=2,group=32) ffn=int(bits=2,group=32)",
                     "--teacher", tiny_gguf.path, "--loss", "lrec(ce=0)", "--memory", "2GiB")  # fmt: skip
    done = barefoot(*taught, "--json", record)
    assert done.returncode == 0, done.stderr
    found, curve = json.loads(record.read_text()), lines(out)
    assert 0 < found["best"] < 0.5 * curve[0]["loss"]
    assert found["skipped"] == 0
    assert found["measured_peak_bytes"] <= found["predicted_peak_bytes"]
    assert {p["loss"] for p in (found["plan"], *found["alternatives"])} == {"lrec(ce=0.0)"}
    learned = barefoot("run", tiny_gguf.path, "say 3", "--max-tokens", 2, "--adapter", out)
    assert learned.returncode == 0, learned.stderr
    other = barefoot(*taught[:-2], "--memory", "2GiB", "--loss", "lrec")  # the state is of another loss
    assert other.returncode == 2
    assert "another" in other.stderr


def test_a_teacher_of_other_words_is_refused(barefoot, tiny_gguf, chats, tmp_path):
    write_random(tmp_path / "more", LLAMA | {"vocab_size": 300})
    done = barefoot(*command(tiny_gguf, chats, tmp_path / "out", "--teacher", tmp_path / "more", "--plan"))
    assert done.returncode != 0
    assert "300 words" in done.stderr
    alone = barefoot(*command(tiny_gguf, chats, tmp_path / "out", "--loss", "lrec", "--plan"))
    assert alone.returncode != 0
    assert "--teacher MODEL" in alone.stderr
