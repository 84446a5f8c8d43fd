"""Adapters in plans: their bytes are there whatever is chosen, on any machine, and in what is saved."""

import pytest

from barefoot.core.device import parse_device
from barefoot.core.model import PartSpec
from barefoot.core.units import GIB, MIB
from barefoot.engine.config import AdapterParts
from barefoot.ops import lowrank
from barefoot.plan.explain import explain, find
from barefoot.plan.job import Budget, RunJob, Stated
from barefoot.plan.known import known_spec
from barefoot.plan.planner import plan, smallest_budget
from barefoot.plan.reserved import Reserved
from barefoot.plan.result import plan_from_toml

SMOL = known_spec("smollm2-135m")
NOTHING = Reserved(0, "test")
RANK = 64


def adapter(spec, type_id="f16") -> AdapterParts:
    """Of rank 64 beside all matrices of the layers."""
    parts = [
        (w.name, PartSpec("adapter", lowrank.kind(type_id), lowrank.n_bytes(type_id, w.rows, w.cols, RANK), w.source))
        for w in spec.weights
        if w.layer is not None and w.rows > 1
    ]
    return AdapterParts("tuned", tuple(parts))


# 2 bytes × 64 × (inputs + outputs) of q, k, v, o, gate, up, down, and a cache line each; all are whole sixteens.
BYTES = 30 * (2 * 64 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)) + 7 * 64)


def test_the_smallest_budget_grows_by_the_adapter():
    """The peak is where tokens are decoded, where nothing of reading it is left, and no kernel needs more scratch."""
    stated = Stated(chunk=16, n_threads=2)
    with_it, without = (
        smallest_budget(SMOL, RunJob(1024, 64, adapter=each), stated=stated, reserved=NOTHING)
        for each in (adapter(SMOL), None)
    )
    assert with_it - without == BYTES


@pytest.mark.parametrize("budget", [160 * MIB, 512 * MIB])
def test_a_plan_with_an_adapter_fits_and_is_saved_whole(budget):
    found = plan(SMOL, RunJob(1024, 64, adapter=adapter(SMOL)), Budget({"host": budget}), reserved=NOTHING)
    assert found.footprint.peak()[1] <= budget
    assert found.footprint.by_kind("host", "decode")["adapter"] == BYTES
    assert found.config.adapter == adapter(SMOL)
    assert "--adapter tuned" in found.command
    again = plan_from_toml(found.to_toml())
    assert (again.job, again.config, again.footprint) == (found.job, found.config, found.footprint)
    plain = plan(SMOL, RunJob(1024, 64), Budget({"host": budget}), reserved=NOTHING)
    assert "adapter" not in plain.command
    assert plan_from_toml(plain.to_toml()).job == plain.job


def test_on_an_accelerator_factors_are_where_their_layers_are():
    spec = known_spec("llama-3.1-70b")
    device = parse_device("rtx-4090")
    found = plan(spec, RunJob(4096, 512, adapter=adapter(spec)), Budget({"accelerator": 20 * GIB}), device)
    by_place = {e.place: e.bytes for e in found.footprint if e.kind == "adapter"}
    of_layer = 2 * 64 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)) + 7 * 64
    n_host = found.n_host_layers
    assert 0 < n_host < 80
    assert by_place == {"accelerator": (80 - n_host) * of_layer, "host": n_host * of_layer}


def test_lora_is_explained_with_the_models_numbers():
    explained = explain(find("lora(rank=8)"), SMOL, RunJob(1024, 64))
    sizes = {line.part: {term.name: term.bytes for term in line.terms} for line in explained.lines}
    assert sizes == {
        "attn": {"A": 30 * 8 * 4 * 576 * 4, "B": 30 * 8 * (2 * 576 + 2 * 192) * 4},
        "ffn": {"A": 30 * 8 * (2 * 576 + 1536) * 4, "B": 30 * 8 * (2 * 1536 + 576) * 4},
    }
    assert [line.part for line in explain(find("lora(targets=qv)"), SMOL, RunJob(1024, 64)).lines] == ["attn"]


def test_optimizers_are_explained_over_the_default_adapter():
    """16 × (inputs + outputs) of seven matrices in 30 layers learn; the largest array is 16 × 1,536."""
    learned = 30 * 16 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    (line,) = explain(find("adamw"), SMOL, RunJob(64, 1)).lines
    assert (line.bytes, line.stored_bytes) == (8 * learned + 8 * 16 * 1536, 8 * learned)
    (line,) = explain(find("paged(resident=2)"), SMOL, RunJob(64, 1)).lines
    assert (line.bytes, line.stored_bytes) == (2 * MIB + (256 << 10) + 8 * 16 * 1536, 8 * learned)
