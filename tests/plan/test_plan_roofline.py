"""Times: closed forms against sums over every pass, bounds against hand-made machines."""

from dataclasses import replace

import pytest

from barefoot.core.device import Device, parse_device
from barefoot.engine.config import EngineConfig
from barefoot.kv.stores.f16 import HalfStore
from barefoot.kv.stores.q4 import Int4Store
from barefoot.plan.job import RunJob
from barefoot.plan.known import known_spec
from barefoot.plan.operators import Op, Site, Stage, attention_op, table
from barefoot.plan.roofline import op_time, phase_times, rates, stage_times, sweep_times
from barefoot.weights.formats.integer import IntegerGroups

SMOL, GEMMA = known_spec("smollm2-135m"), known_spec("gemma-3-270m")


def device(*, memory=20.0, disk=1.0, int8=800e9, f32=200e9, overhead=0.0):
    return Device(
        name="test",
        title="a machine",
        memory_bytes={"host": 8 << 30},
        read_gb_s={"host": memory, "disk": disk},
        peaks={"int8": int8, "f16": f32, "f32": f32},
        n_cores=2,
        n_threads=2,
        op_seconds=overhead,
    )


def config(**kwargs):
    return EngineConfig(**{"context": 2048, "kv": HalfStore(), "n_threads": 2, **kwargs})


def test_the_bound_flips_where_intensity_meets_the_turning_point():
    machine = rates(device(memory=10.0, f32=100e9))  # 10 operations a byte
    low, high = Op("x", "f32", 99_999, load_weight=10_000), Op("x", "f32", 100_001, load_weight=10_000)
    assert op_time(low, machine) == (pytest.approx(10_000 / 10e9), "memory")
    assert op_time(high, machine) == (pytest.approx(100_001 / 100e9), "compute")


def test_fixed_time_of_an_operator_is_added_and_named():
    machine = rates(device(memory=10.0, overhead=1e-3))
    assert op_time(Op("x", "f32", 0, load_weight=10_000), machine) == (pytest.approx(1e-3 + 1e-6), "overhead")


@pytest.mark.parametrize("spec", [SMOL, GEMMA], ids=["full", "windows"])
@pytest.mark.parametrize("overhead", [0.0, 3e-6])
@pytest.mark.parametrize("slow_bytes", [0, 60_000])
@pytest.mark.parametrize(("n", "start", "count"), [(1, 0, 1), (1, 400, 1300), (64, 0, 31), (1, 500, 2), (16, 7, 100)])
def test_closed_sums_equal_the_sum_over_all_passes(spec, overhead, slow_bytes, n, start, count):
    # peaks chosen so that attention changes its bound on the way
    machine = rates(device(memory=8.0, f32=8e9 if n == 1 else 64e9, overhead=overhead))
    for layer in {layer.window: layer for layer in spec.layers}.values():
        stage = Stage("layer", (Op("w", "f32", 1000, load_weight=50_000),), True, layer.window, "host", slow_bytes)

        def attention_at(i, stage=stage):
            return attention_op(spec, HalfStore(), machine.site, stage, n=n, past=start + i * n)

        plain = {}
        for i in range(count):
            for bound, seconds in stage_times(stage, machine, attention_at(i)).items():
                plain[bound] = plain.get(bound, 0.0) + seconds
        closed = sweep_times(stage, attention_at, count, machine)
        assert sum(closed.values()) == pytest.approx(sum(plain.values()), rel=1e-9)


def test_a_long_answer_costs_few_evaluations():
    machine, calls = rates(device()), []
    stage = Stage("layer", (), True)

    def attention_at(i):
        calls.append(i)
        return attention_op(SMOL, HalfStore(), machine.site, stage, n=1, past=i)

    sweep_times(stage, attention_at, 1_000_000, machine)
    assert len(calls) < 500


def test_phase_times_equal_the_table_pass_by_pass():
    job, settings = RunJob(300, 40), config(context=300, chunk=64, weights={"ffn": IntegerGroups(bits=4)})
    machine = rates(device())
    prefill, decode = phase_times(SMOL, settings, job, device())

    def seconds(rows, skip=()):
        return sum(op_time(op, machine)[0] * n for stage, op, n in rows if stage not in skip)

    chunks = [(64, 0), (64, 64), (64, 128), (64, 192), (4, 256)]
    expected = sum(seconds(table(SMOL, settings, Site(), n=n, past=past), ("head",)) for n, past in chunks)
    expected += seconds([row for row in table(SMOL, settings, Site(), n=1, past=0) if row[0] == "head"])
    assert prefill.seconds == pytest.approx(expected, rel=1e-9)
    assert prefill.n_tokens == 260
    expected = sum(seconds(table(SMOL, settings, Site(), n=1, past=260 + i)) for i in range(40))
    assert decode.seconds == pytest.approx(expected, rel=1e-9)
    assert decode.tokens_per_second == pytest.approx(40 / expected)


def test_decode_reads_every_weight_once_a_token_and_prefill_is_bound_by_arithmetic():
    weights = 2 * 134_515_008 + 2 * 61 * 576  # bf16 matrices, f32 vectors
    kv = sum(23_040 * (past + 2) for past in range(100, 110))  # read past + 1 positions, write one
    prefill, decode = phase_times(SMOL, config(), RunJob(110, 10), device(memory=20.0, f32=1e15))
    assert decode.seconds == pytest.approx((10 * (weights + 1152) + kv) / 20e9, rel=1e-6)
    assert decode.bound == "memory"
    prefill, _ = phase_times(SMOL, config(chunk=100), RunJob(110, 10), device(memory=1e6, f32=1e9))
    matrices = 2 * (100 * 106_168_320 + 49_152 * 576)
    assert prefill.bound == "compute"
    assert matrices / 1e9 < prefill.seconds < 1.05 * matrices / 1e9


def test_streaming_is_bound_by_the_disk_and_never_free():
    layer_bytes = 3_538_944 * 2
    streamed = config(n_streamed_layers=30)
    _, slow = phase_times(SMOL, streamed, RunJob(110, 10), device(disk=0.1))
    rest = phase_times(SMOL, config(), RunJob(110, 10), device())[1].seconds
    assert slow.bound == "disk"
    assert 10 * 30 * layer_bytes / 0.1e9 < slow.seconds < 10 * 30 * layer_bytes / 0.1e9 + rest
    _, hidden = phase_times(SMOL, streamed, RunJob(110, 10), device(disk=1e6))
    put_into_memory = 10 * 30 * layer_bytes / 20e9  # what was read is written before it is used: never free
    assert hidden.seconds == pytest.approx(rest + put_into_memory, rel=1e-9)


def test_quantized_weights_speed_decode_and_not_floating_prefill():
    job, machine = RunJob(600, 10), device(f32=200e9)
    formats = dict.fromkeys(("embed", "attn", "ffn"), IntegerGroups(bits=4))
    settings = {"chunk": 512, "activations": "float32"}
    dense, quantized = (phase_times(SMOL, config(weights=w, **settings), job, machine) for w in ({}, formats))
    assert dense[1].seconds / quantized[1].seconds == pytest.approx(16 / 5, rel=0.2)
    assert dense[0].seconds == pytest.approx(quantized[0].seconds, rel=5e-3)  # only the logits' matrix is memory-bound


def test_time_falls_with_every_rate_and_rises_with_context():
    job = RunJob(600, 100)
    base = sum(t.seconds for t in phase_times(SMOL, config(), job, device()))
    for better in ({"memory": 40.0}, {"int8": 1e13, "f32": 1e13}):
        assert sum(t.seconds for t in phase_times(SMOL, config(), job, device(**better))) < base
    longer = phase_times(SMOL, config(), RunJob(1200, 100), device())[1]
    shorter = phase_times(SMOL, config(), job, device())[1]
    assert longer.seconds > shorter.seconds
    smaller = phase_times(SMOL, config(kv=Int4Store()), RunJob(1200, 100), device())[1]
    assert smaller.seconds < longer.seconds


def test_accelerators_share_matrices_and_pay_for_exchanging_sums():
    llama, settings = known_spec("llama-3.1-70b"), EngineConfig(4096, HalfStore())
    machines = (replace(parse_device(name), op_seconds=0.0) for name in ("h200", "8x h200"))
    one, eight = (phase_times(llama, settings, RunJob(4096, 100), m)[1] for m in machines)
    weights = 2 * (70_553_706_496 - 128_256 * 8192)
    assert one.seconds == pytest.approx(100 * weights / 4.8e12, rel=0.05)
    exchanged = 100 * 80 * 2 * (2 * 7 / 8 * 8192 * 2) / 450e9
    assert eight.seconds == pytest.approx(one.seconds / 8 + exchanged, rel=1e-6)


def test_layers_on_the_host_are_read_there_or_over_the_link():
    llama, settings = known_spec("llama-3.1-8b"), EngineConfig(1024, HalfStore())
    card = replace(parse_device("rtx-4090"), op_seconds=0.0)
    here = phase_times(llama, settings, RunJob(1024, 10), card)[1]
    there = phase_times(llama, settings, RunJob(1024, 10), card, n_host_layers=32)[1]
    layers = 2 * (8_030_261_248 - 2 * 128_256 * 4096)
    assert here.bound == "memory"
    assert there.bound == "host memory"
    # the host reads 60 GB/s, the link carries 32: decoding stays on the host
    assert there.seconds == pytest.approx(10 * layers / 60e9, rel=0.15)
