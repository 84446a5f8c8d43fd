"""Models with a stack: the planner fills the budget with blocks, and another budget changes nothing but them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from barefoot.core.device import Device
from barefoot.core.errors import Incompatible, OverBudget
from barefoot.core.model import PartSpec
from barefoot.core.units import MIB
from barefoot.engine.config import EngineConfig
from barefoot.engine.footprint import footprint
from barefoot.engine.stacks import level_by_level
from barefoot.kv.stores.f16 import HalfStore
from barefoot.ops import signs
from barefoot.plan.job import Budget, RunJob, Stated
from barefoot.plan.known import known_spec
from barefoot.plan.levels import with_budget
from barefoot.plan.planner import plan, smallest_budget
from barefoot.plan.reserved import Reserved
from barefoot.plan.result import plan_from_json

NOTHING = Reserved(0, "test")
JOB = RunJob(1024, 64)
BLOCKS = 8
MACHINE = Device(
    name="test",
    title="a machine",
    memory_bytes={"host": 16 << 30},
    read_gb_s={"host": 20.0, "disk": 1.0},
    peaks={"int8": 800e9, "f16": 200e9, "f32": 200e9},
    n_cores=2,
    n_threads=2,
    op_seconds=1e-6,
)


def stacked_smollm2():
    """SmolLM2-135M with an 8-bit embedding, each matrix of its layers a stack of 8 blocks."""

    def stack(w):
        if w.group not in ("attn", "ffn"):
            return replace(w, format={"embed": "q8_0", "norm": "f32"}[w.group])
        n_bytes = signs.block_bytes(w.rows, w.cols, 4)
        parts = (PartSpec(f"{i:02}", "signs", n_bytes, f"{w.name}+{i:02}") for i in range(1, BLOCKS + 1))
        return replace(w, format="zero", parts=tuple(parts))

    spec = known_spec("smollm2-135m")
    weights = tuple(map(stack, spec.weights))
    return replace(spec, weights=weights, stack=level_by_level(weights))


SPEC = stacked_smollm2()
LARGEST = max(part.n_bytes for part in SPEC.stack)
TOTAL = sum(part.n_bytes for part in SPEC.stack)


def planned(n_bytes, **stated):
    return plan(
        SPEC, JOB, Budget({"host": n_bytes}), MACHINE, Stated(kv=HalfStore(), chunk=64, **stated), reserved=NOTHING
    )


def weight_bytes(found):
    return found.select(kind="weights", phase="decode").bytes


@pytest.fixture(scope="module")
def everything():
    return planned(1 << 30)


def test_a_large_budget_holds_the_whole_stack(everything):
    assert everything.config.n_stacked == len(SPEC.stack) == 210 * (BLOCKS - 1)
    assert not everything.config.stream_head


def test_twenty_budgets_are_filled_to_the_last_block(everything):
    """What is left would not hold the next block, which may take a page of its own."""
    least, most = planned(1 << 30, n_stacked=0).needed["host"], everything.needed["host"]
    assert TOTAL <= most - least <= TOTAL + 64 * len(SPEC.stack) + 4096
    seen = []
    for i in range(20):
        n_bytes = least + (most - least) * i // 19
        found = planned(n_bytes)
        assert n_bytes - LARGEST - 64 - 4096 < found.needed["host"] <= n_bytes
        assert weight_bytes(found.footprint) == weight_bytes(footprint(SPEC, found.config))
        seen.append(found.config.n_stacked)
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, len(SPEC.stack))


def test_the_stack_shrinks_before_anything_else_gives_way():
    free = Stated()
    least = plan(SPEC, JOB, Budget({"host": 1 << 30}), MACHINE, replace(free, n_stacked=0), reserved=NOTHING)
    tight = plan(SPEC, JOB, Budget({"host": least.needed["host"]}), MACHINE, free, reserved=NOTHING)
    assert tight.quality.kl <= least.quality.kl
    assert not tight.config.stream_head
    assert not tight.config.n_streamed_layers


def test_refusals_name_the_smallest_level():
    needed = smallest_budget(SPEC, JOB, MACHINE, reserved=NOTHING)
    assert plan(SPEC, JOB, Budget({"host": needed}), MACHINE, reserved=NOTHING).config.n_stacked == 0
    with pytest.raises(OverBudget, match="even without the 1,470 blocks that it can do without") as caught:
        plan(SPEC, JOB, Budget({"host": needed - 1}), MACHINE, reserved=NOTHING)
    assert caught.value.needed == needed


def test_another_budget_changes_the_stack_alone(everything):
    needed = everything.needed["host"]
    for n_bytes in (needed - 1, needed - 20 * MIB, needed - TOTAL, needed):
        found = with_budget(everything, SPEC, n_bytes)
        assert replace(found.config, n_stacked=None) == replace(everything.config, n_stacked=None)
        assert n_bytes - LARGEST - 64 - 4096 < found.needed["host"] <= n_bytes
        assert found.budget == {"host": n_bytes}
        assert weight_bytes(found.footprint) == weight_bytes(footprint(SPEC, found.config))
    assert with_budget(found, SPEC, 1 << 30).config == everything.config


def test_budgets_that_nothing_fits(everything):
    smallest = planned(1 << 30, n_stacked=0).needed["host"]
    assert with_budget(everything, SPEC, smallest).config.n_stacked == 0
    with pytest.raises(OverBudget, match="without any of its 1,470 further blocks") as caught:
        with_budget(everything, SPEC, smallest - 1)
    assert caught.value.needed == smallest


def test_models_without_a_stack_stay_as_they_are():
    spec = known_spec("smollm2-135m")
    found = plan(spec, JOB, Budget({"host": 1 << 30}), MACHINE, reserved=NOTHING)
    assert found.config.n_stacked is None
    with pytest.raises(Incompatible, match="no blocks that come and go"):
        with_budget(found, spec, 1 << 29)


def test_plans_carry_the_level():
    found = planned(130 * MIB)
    assert 0 < found.config.n_stacked < len(SPEC.stack)
    assert plan_from_json(found.to_json()).config == found.config
    assert f"--stacked {found.config.n_stacked}" in found.command
    again = planned(130 * MIB, n_stacked=found.config.n_stacked)
    assert again.config == found.config
    assert any(f"{found.config.n_stacked:,} of the 1,470 blocks" in note for note in found.notes)


def test_fewer_blocks_are_read_faster():
    few, many = planned(1 << 30, n_stacked=0), planned(1 << 30)
    assert few.decode.seconds < 0.5 * many.decode.seconds
    config = EngineConfig(1024, HalfStore(), n_stacked=0)
    assert footprint(SPEC, config).select(phase="decode").bytes < footprint(SPEC, replace(config, n_stacked=9)).bytes
