"""Plans as TOML and JSON, the runtime's own bytes, explanations, and quality numbers."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from barefoot.core.device import Device
from barefoot.core.errors import InvalidInput
from barefoot.core.units import MIB
from barefoot.kv.stores.f16 import HalfStore
from barefoot.kv.stores.q4 import Int4Store
from barefoot.kv.stores.q8 import Int8Store
from barefoot.plan import explain, quality
from barefoot.plan.job import Budget, RunJob, Stated
from barefoot.plan.known import known_spec
from barefoot.plan.planner import plan
from barefoot.plan.reserved import SLACK_BYTES, Reserved, reserved_expected, reserved_now
from barefoot.plan.result import plan_from_json, plan_from_toml
from barefoot.weights.formats.dense import Dense
from barefoot.weights.formats.integer import IntegerGroups
from barefoot.weights.formats.stored import Stored

SMOL = known_spec("smollm2-135m")
MACHINE = Device("this", "a machine", {"host": 16 << 30}, {"host": 20.0, "disk": 1.0},
                 {"int8": 8e11, "f16": 2e11, "f32": 2e11}, 2, 2)  # fmt: skip


@pytest.fixture(scope="module")
def saved():
    return plan(SMOL, RunJob(1024, 64), Budget({"host": 150 * MIB}), MACHINE, reserved=Reserved(40 * MIB, "test"))


def test_a_plan_survives_toml_and_json(saved):
    assert plan_from_toml(saved.to_toml()) == saved
    assert plan_from_json(json.loads(json.dumps(saved.to_json()))) == saved


def test_layouts_of_the_device_are_part_of_the_plan():
    layouts = {"2/large": "lut", "3/small": "rows"}
    device = replace(MACHINE, layouts=layouts)
    arguments = SMOL, RunJob(1024, 64), Budget({"host": 150 * MIB}), device
    found = plan(*arguments, reserved=Reserved(40 * MIB, "test"))
    assert found.config.layouts == layouts
    assert plan_from_toml(found.to_toml()) == found
    assert "--layouts '2/large=lut 3/small=rows'" in found.command
    stated = plan(*arguments, Stated(layouts={}), reserved=Reserved(40 * MIB, "test"))
    assert stated.config.layouts == {}
    assert "--layouts panels" in stated.command
    one_thread = plan(*arguments, Stated(n_threads=1), reserved=Reserved(40 * MIB, "test"))
    assert one_thread.config.layouts == {}  # they were measured with two


def test_a_saved_plan_states_its_numbers(saved):
    data = saved.to_json()
    assert data["needed_bytes"] == {"host": saved.footprint.peak("host")[1]}
    assert sum(t["bytes"] for t in data["terms"] if "decode" in t["phases"]) == data["peak_bytes"]["decode"]
    assert "--memory 150MiB " in data["command"]
    assert data["decode"]["tokens_per_second"] == pytest.approx(64 / data["decode"]["seconds"])


@pytest.mark.parametrize("text", ["", "model = 3", "][", 'model = "x"\n[config]\ncontext = 1'])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(InvalidInput, match="not a saved plan"):
        plan_from_toml(text)


# Reserved.


def test_reserved_bytes_are_there_in_every_phase_of_a_run():
    footprint = Reserved(40 * MIB, "test").footprint()
    assert footprint.phases == ("load", "convert", "prefill", "decode")
    assert all(footprint.select(phase=phase).bytes == 40 * MIB + SLACK_BYTES for phase in footprint.phases)


def test_reserved_now_is_what_the_process_has_resident():
    code = (
        "from barefoot.plan.reserved import reserved_now\n"
        "before = reserved_now().bytes\n"
        "block = bytearray(64 << 20)\n"
        "print(reserved_now().bytes - before)\n"
    )
    source = str(Path(__file__).parents[2] / "src")
    grown = int(
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": source}, capture_output=True, check=True).stdout
    )
    assert 64 * MIB <= grown <= 66 * MIB
    assert reserved_now().source == "measured in this process"


def test_without_a_probe_the_default_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("BAREFOOT_CACHE", str(tmp_path))
    expected = reserved_expected()
    assert "not measured" in expected.source
    assert expected.bytes % MIB == 0


# Explanations.


def test_a_format_is_explained_with_the_models_numbers():
    found = explain.explain(explain.find("int(bits=3,group=64)"), SMOL, RunJob(1024, 64))
    assert found.bytes == 134_479_872 // 64 * (2 + 2 + 24)
    assert [line.part for line in found.lines] == ["embed", "attn", "ffn"]
    ffn = found.lines[2]
    assert {t.count for t in ffn.terms} == {30 * 3 * 1536 * 576 // 64}
    assert ffn.stored_bytes == 30 * 3 * 1536 * 576 * 2
    assert ffn.kl > 0
    assert found.title.startswith("int — ")
    assert "scale" in found.text
    assert found.papers == (14,)
    assert found.to_json()["bytes"] == found.bytes


def test_a_store_is_explained_with_the_models_numbers():
    found = explain.explain(explain.find("q4"), SMOL, RunJob(1024, 64))
    assert found.bytes == 1024 * 30 * 2 * 3 * (32 + 2 * 2 + 2 * 2)
    assert found.lines[0].stored_bytes == 1024 * 23_040


def test_what_cannot_hold_the_model_is_explained_as_refused():
    found = explain.explain(IntegerGroups(group=128), SMOL, RunJob(1024, 64))
    assert found.lines == ()
    assert "576" in found.refused


def test_an_unknown_technique_is_refused():
    with pytest.raises(InvalidInput, match="known: "):
        explain.find("nonsense")


# Quality.


def test_tiers_are_ordered_and_end_nowhere():
    limits = [limit for _, limit in quality.TIERS]
    assert limits == sorted(limits)
    assert limits[0] == 0.01
    assert limits[-1] == math.inf
    assert quality.tier(0.01) == quality.TIERS[0][0]
    assert quality.tier(0.0101) == quality.TIERS[1][0]


def test_what_keeps_every_bit_loses_nothing():
    for fmt, stored in ((Stored(), "q4_1"), (Stored(), "bf16"), (Dense("f32"), "bf16"), (Dense("bf16"), "bf16")):
        assert quality.weight_loss(SMOL, "ffn", fmt, stored).kl == 0
    assert quality.weight_loss(SMOL, "ffn", Dense("f16"), "bf16").kl > 0
    assert quality.kv_loss(SMOL, HalfStore(), 1024).kl == 0


def test_fewer_bits_lose_more():
    for group in ("embed", "attn", "ffn", "head"):
        losses = [quality.weight_loss(SMOL, group, IntegerGroups(bits=b), "bf16").kl for b in (8, 4, 3, 2)]
        assert losses == sorted(losses)
        assert losses[0] > 0
    assert 0 < quality.kv_loss(SMOL, Int8Store(), 1024).kl < quality.kv_loss(SMOL, Int4Store(), 1024).kl


def test_a_format_without_a_measurement_is_estimated_between_its_neighbours():
    between = quality.weight_loss(SMOL, "ffn", IntegerGroups(bits=3, symmetric=True), "bf16")  # 3.5 bits
    below = quality.weight_loss(SMOL, "ffn", IntegerGroups(bits=3, group=64), "bf16")  # 3.5 bits
    assert between.kl == pytest.approx(below.kl)
    assert between.estimated
    assert "estimated" in between.source
    finer = quality.weight_loss(SMOL, "ffn", IntegerGroups(bits=4, group=128), "bf16")  # 4.25 bits
    assert below.kl > finer.kl > quality.weight_loss(SMOL, "ffn", IntegerGroups(), "bf16").kl


def test_interpolation_is_linear_in_the_logarithm():
    points = {2.0: 1.0, 4.0: 0.01}
    assert quality.interpolate(points, 3.0) == pytest.approx(0.1)
    assert quality.interpolate(points, 5.0) == pytest.approx(0.001)
    assert quality.interpolate(points, 1.0) == pytest.approx(10.0)
    assert quality.interpolate({4.0: 0.02}, 5.0) == pytest.approx(0.005)


def test_measurements_of_the_same_stored_type_and_size_are_preferred(monkeypatch):
    def row(model, parameters, stored, kl, provisional=False):
        return quality.Measurement(model, parameters, stored, {"ffn": {"int": kl}}, f"file of {model}", provisional)

    rows = (
        row("small", 1_000_000, "float", 0.9),
        row("same", SMOL.n_parameters, "float", 0.03),
        row("same", SMOL.n_parameters, "q6_k", 0.05),
        row("large", 10**12, "float", 0.001),
    )
    monkeypatch.setattr(quality, "measurements", lambda: rows)
    assert quality.weight_loss(SMOL, "ffn", IntegerGroups(), "bf16") == quality.Loss(
        0.03, "file of same (same, stored float)", False
    )
    assert quality.weight_loss(SMOL, "ffn", IntegerGroups(), "q6_k").kl == 0.05
    other = quality.weight_loss(SMOL, "ffn", IntegerGroups(), "q8_0")
    assert (other.kl, other.estimated) == (0.03, True)
    assert quality.weight_loss(known_spec("llama-3.1-405b"), "ffn", IntegerGroups(), "bf16").kl == 0.001
