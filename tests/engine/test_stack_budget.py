"""A stack inside a budget that changes while it runs: fresh processes, where possible inside a memory cgroup."""

import json
import subprocess
import sys

import numpy as np
import pytest
from random_files import LLAMA, write_random

from barefoot.core.measure import COUNTER_SLACK, cgroup_reason, resident, run_limited
from barefoot.core.units import MIB
from barefoot.engine.fitting import Fit, fit
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.weights.solvers.range import Range
from barefoot.weights.structures.bitstack import BitStack

LARGER = LLAMA | {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
}
SHRUNK = 6 * MIB

CODE = """
import json, sys
from barefoot.core.measure import release_free_memory, resident, peak_resident
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.plan.job import Budget, RunJob, Stated, parse_kv
from barefoot.plan.levels import with_budget
from barefoot.plan.planner import plan
from barefoot.plan.reserved import reserved_now
from barefoot.plan.warm import warm_up

folder, allowed, shrunk = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
warm_up()
with Checkpoint(folder) as checkpoint:
    spec = model_spec(checkpoint)
    stated = Stated(kv=parse_kv("f16"), chunk=64, n_threads=2)
    reserved = reserved_now()
    job = RunJob(256, 64)
    first = plan(spec, job, Budget({"host": allowed}), stated=stated, reserved=reserved)
    release_free_memory()
    steps = []
    with Engine(checkpoint, spec, first.config) as engine:
        for budget in (allowed, allowed - shrunk, allowed):
            now = with_budget(first, spec, budget)
            engine.resize(now.config.n_stacked)
            engine.reset()
            engine.prefill(list(range(1, 100)))
            engine.decode(7)
            stack = engine.arena.used_by_owner()["stack"]
            steps.append([now.config.n_stacked, stack, now.needed["host"], resident().anonymous, resident().total])
print(json.dumps({"steps": steps, "peak": peak_resident(), "all": len(spec.stack)}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 million weights of layers in six blocks each: 1.7 MiB a level."""
    path = tmp_path_factory.mktemp("budget")
    write_random(path / "source", LARGER)
    how = BitStack(blocks=6, scale=False)
    with Checkpoint(path / "source") as checkpoint:
        spec = model_spec(checkpoint)
        formats = {w.name: how for w in spec.weights if w.group in ("attn", "ffn")}
        fit(checkpoint, spec, Fit(formats, Range(), np.empty((0, 0), np.int32)), path / "out").finish({})
    return path / "out"


@pytest.fixture(scope="module")
def everything(folder):
    """What the whole stack takes in such a process."""
    done = subprocess.run(command(folder, 1 << 40, 0), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["steps"][0][2]


def command(folder, allowed, shrunk):
    return [sys.executable, "-c", CODE, str(folder), str(allowed), str(shrunk)]


@pytest.mark.skipif(resident() is None, reason="this system does not tell what a process has resident")
def test_the_stack_follows_the_budget_and_memory_follows_the_stack(folder, everything):
    allowed = everything - MIB
    arguments = command(folder, allowed, SHRUNK)
    if cgroup_reason() is None:
        done = run_limited(arguments, allowed)
        assert not done.killed
    else:
        done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (n0, stack0, needs0, own0, _), (n1, stack1, needs1, own1, all1), (n2, stack2, _, own2, _) = found["steps"]
    assert found["all"] > n0 == n2 > n1 > 0
    assert (needs0, needs1) <= (allowed, allowed - SHRUNK)
    assert all1 <= allowed - SHRUNK
    assert SHRUNK - MIB < stack0 - stack1 < SHRUNK + MIB
    assert stack2 == stack0
    assert abs((own0 - own1) - (stack0 - stack1)) <= COUNTER_SLACK + MIB // 2
    assert abs((own2 - own1) - (stack2 - stack1)) <= COUNTER_SLACK + MIB // 2
    assert allowed - SHRUNK < found["peak"] <= allowed
