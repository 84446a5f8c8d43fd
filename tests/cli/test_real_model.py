"""The main promise on the default model: a real answer inside a real budget, which the kernel enforces where it can.

The model is fetched once into the cache, as ``barefoot pull smollm2`` does.
"""

import json
import subprocess
import sys

import pytest

from barefoot.core.measure import cgroup_reason, run_limited

MIB = 1 << 20
RUN = [sys.executable, "-m", "barefoot", "run", "smollm2"]


@pytest.fixture(scope="module", autouse=True)
def smollm2(barefoot):
    done = barefoot("pull", "smollm2")
    assert done.returncode == 0, done.stderr


def run(tmp_path, memory, *arguments):
    """The record of a run within ``memory`` MiB."""
    out = tmp_path / "out.json"
    command = [*RUN, *arguments, "--memory", f"{memory}MiB", "--context", "1024", "--json", str(out)]
    if cgroup_reason() is None:
        done = run_limited(command, memory * MIB, stdin=subprocess.DEVNULL)
        assert not done.killed
    else:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text("utf-8"))


@pytest.mark.parametrize("memory", [112, 128, 160, 256])
def test_inside_the_budget(tmp_path, memory):
    record = run(tmp_path, memory, "The capital of France is", "--raw", "--max-tokens", "24")
    assert record["measured_peak_bytes"] <= record["budget_bytes"] == memory * MIB
    assert abs(record["unaccounted_bytes"]) <= 0.05 * record["predicted_peak_bytes"]
    assert "Paris" in record["text"]


def test_a_second_turn_keeps_the_first_in_the_kv_store():
    """It computes only what is new, and says what computing everything again says."""
    code = """
import json
from barefoot.cli.conversation import Conversation
from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.sampling import SamplingParams
from barefoot.engine.specs import model_spec
from barefoot.io.chat import find_chat_template
from barefoot.io.inventory import Checkpoint
from barefoot.io.sources import resolve
from barefoot.io.tokenizer import load_tokenizer
from barefoot.plan.job import parse_kv
with Checkpoint(resolve("smollm2")) as c:
    config = EngineConfig(context=512, kv=parse_kv("f32"), activations="float32")
    with Engine(c, model_spec(c), config) as engine:
        talk = Conversation(engine, load_tokenizer(c), find_chat_template(c), SamplingParams(), max_tokens=24)
        ask = lambda prompt: talk.ask(prompt, lambda text: None, lambda *a: None)
        turns = [ask("My name is Ada."), ask("What is my name?")]
        talk._messages = talk._messages[:2]
        engine.reset()
        talk._held = []
        turns.append(ask("What is my name?"))
        talk.reset()
        turns.append(ask("What is my name?"))
print(json.dumps([[t.text, t.n_prompt, t.n_prefilled, t.n_tokens] for t in turns]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, again, alone = json.loads(done.stdout)
    assert first[1] == first[2]
    assert second[2] <= second[1] - first[1] - first[3] + 1
    assert again[2] == again[1] == second[1]
    assert again[0] == second[0]
    assert alone[1] == alone[2] < second[1]
    assert alone[0] != second[0]
