"""Refusals: numbers that are tight, and commands that, read back, fit."""

import shlex
from dataclasses import replace

import pytest

from barefoot.core.device import Device, parse_device
from barefoot.core.errors import OverBudget
from barefoot.core.units import MIB, parse_bytes
from barefoot.kv.stores.f16 import HalfStore
from barefoot.plan.job import Budget, RunJob, Stated, parse_kv, parse_weights
from barefoot.plan.known import known_spec
from barefoot.plan.planner import plan
from barefoot.plan.reserved import Reserved
from barefoot.weights.formats.integer import IntegerGroups

RESERVED = Reserved(40 * MIB, "test")
JOB = RunJob(1024, 64)
MACHINE = Device(
    name="this",
    title="a machine",
    memory_bytes={"host": 16 << 30},
    read_gb_s={"host": 20.0, "disk": 1.0},
    peaks={"int8": 800e9, "f16": 200e9, "f32": 200e9},
    n_cores=2,
    n_threads=2,
)
KINDS = {"embed": "q8_0", "attn": "q4_1", "ffn": "q4_1", "norm": "f32"}
SMOL = known_spec("smollm2-135m")
SMOL = replace(SMOL, weights=tuple(replace(w, format=KINDS[w.group]) for w in SMOL.weights))


def refused(job=JOB, budget=40 * MIB, stated=None, device=MACHINE, spec=SMOL):
    with pytest.raises(OverBudget) as caught:
        plan(spec, job, Budget({device.place: budget}), device, stated, reserved=RESERVED, model="smollm2")
    return caught.value


def read_command(command):
    """What the command line makes of a command: job, budget and what is stated."""
    words = shlex.split(command)
    assert words[:3] in (["barefoot", "run", "smollm2"], ["barefoot", "plan", "smollm2"])
    flags, rest = {}, words[3:]
    while rest:
        flag = rest.pop(0)
        flags[flag] = True if flag in ("--stream-head", "--no-stream-head") else rest.pop(0)
    stated = Stated(
        weights=parse_weights(flags.pop("--weights")) if "--weights" in flags else {},
        kv=parse_kv(flags.pop("--kv")) if "--kv" in flags else None,
        chunk=int(flags.pop("--chunk")) if "--chunk" in flags else None,
        streamed_layers=int(flags.pop("--stream-layers")) if "--stream-layers" in flags else None,
        stream_head=True
        if flags.pop("--stream-head", False)
        else False
        if flags.pop("--no-stream-head", False)
        else None,
        n_threads=int(flags.pop("--threads")) if "--threads" in flags else None,
        activations=flags.pop("--activations", None),
    )
    job = RunJob(int(flags.pop("--context")), int(flags.pop("--max-tokens")), int(flags.pop("--batch", 1)))
    budget, device = parse_bytes(flags.pop("--memory")), flags.pop("--device", "this")
    assert not flags
    return job, budget, stated, device


def fits(job, budget, stated=None, device=MACHINE, spec=SMOL):
    try:
        return plan(spec, job, Budget({device.place: budget}), device, stated, reserved=RESERVED)
    except OverBudget:
        return None


def test_needed_is_tight():
    error = refused()
    assert error.available == 40 * MIB
    assert fits(RunJob(1024, 64), error.needed) is not None
    assert fits(RunJob(1024, 64), error.needed - 1) is None
    assert error.exit_code == 3


@pytest.mark.parametrize(
    ("budget", "stated"),
    [
        (40 * MIB, None),
        (55 * MIB, Stated(kv=HalfStore())),
        (60 * MIB, Stated(weights={"ffn": IntegerGroups(bits=4, group=64)})),
        (70 * MIB, Stated(streamed_layers=0, stream_head=False)),
    ],
    ids=["nothing stated", "kv", "weights", "no streaming"],
)
def test_every_command_fits(budget, stated):
    refusal = refused(budget=budget, stated=stated).refusal
    assert len(refusal.alternatives) >= 3
    assert len({a.command for a in refusal.alternatives}) == len(refusal.alternatives)
    for alternative in refusal.alternatives:
        job, memory, again, device = read_command(alternative.command)
        assert device == "this"
        found = fits(job, memory, again)
        assert found is not None, alternative.command
        assert found.needed["host"] == alternative.needed_bytes <= memory
        assert found.quality.kl == alternative.kl


def test_commands_come_cheapest_in_quality_first():
    alternatives = refused().refusal.alternatives
    lossless = [a.kl <= 0.01 for a in alternatives]
    assert lossless == sorted(lossless, reverse=True)
    assert lossless[0]


def test_the_largest_context_is_tight():
    least = refused().needed
    refusal = refused(budget=least - 2 * MIB).refusal
    largest = refusal.largest_context
    assert 16 <= largest < 1024
    assert fits(RunJob(largest, 64), least - 2 * MIB) is not None
    assert fits(RunJob(largest + 1, 64), least - 2 * MIB) is None
    assert f"{largest:,}" in refusal.message


def test_a_stated_chunk_bounds_the_context_from_below():
    """A context shorter than what passes the layers at once is none; every command keeps the chunk or says so."""
    stated = Stated(chunk=200)
    tight = refused(stated=stated, budget=refused(stated=stated).needed - MIB).refusal
    assert tight.largest_context >= 200
    assert fits(RunJob(tight.largest_context, 64), tight.available_bytes, stated) is not None
    assert refused(stated=stated, budget=41 * MIB).refusal.largest_context == 0


def test_the_largest_batch_is_tight():
    job, budget = RunJob(1024, 64, batch=256), 120 * MIB
    refusal = refused(job=job, budget=budget).refusal
    assert 1 <= refusal.largest_batch < 256
    assert fits(replace(job, batch=refusal.largest_batch), budget) is not None
    assert fits(replace(job, batch=refusal.largest_batch + 1), budget) is None


def test_below_the_floor_only_more_memory_helps():
    refusal = refused(budget=20 * MIB).refusal  # less than the runtime itself
    assert (refusal.largest_context, refusal.largest_batch) == (0, 0)
    assert len(refusal.alternatives) >= 3
    for alternative in refusal.alternatives:
        assert read_command(alternative.command)[1] > 40 * MIB


def test_message_and_cure_say_the_numbers():
    error = refused()
    text = str(error)
    assert f"{error.needed / MIB:.1f} MiB" in text
    assert "40.0 MiB" in text
    assert error.cure.count("barefoot run smollm2 --memory") == len(error.refusal.alternatives)
    data = error.refusal.to_json()
    assert (data["fits"], data["needed_bytes"], data["available_bytes"]) == (False, error.needed, 40 * MIB)


def test_another_machine_is_planned_not_run():
    llama, card = known_spec("llama-3.1-8b"), parse_device("rtx-4090")
    error = refused(RunJob(4096, 64), 400 * MIB, device=card, spec=llama)
    for alternative in error.refusal.alternatives:
        job, memory, again, device = read_command(alternative.command)
        assert device == "rtx-4090"
        assert fits(job, memory, again, card, llama) is not None
