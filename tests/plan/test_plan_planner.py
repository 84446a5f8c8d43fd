"""Plans: exact against trying everything, true to what is stated, monotone in memory; machines that are elsewhere."""

import itertools
import math
from dataclasses import replace

import pytest

from barefoot.core.device import Device, parse_device
from barefoot.core.errors import Incompatible, InvalidInput, OverBudget
from barefoot.core.ledger import PHASES, Term, entry
from barefoot.core.units import GIB, MIB
from barefoot.engine.config import EngineConfig
from barefoot.engine.footprint import footprint
from barefoot.engine.specs import spec_from_config
from barefoot.kv.policies.h2o import H2O
from barefoot.kv.ruled import Ruled
from barefoot.kv.stores.f16 import HalfStore
from barefoot.kv.stores.q4 import Int4Store
from barefoot.kv.stores.q8 import Int8Store
from barefoot.plan import quality
from barefoot.plan.choices import CHUNKS, Caches, Frame, Problem, Tables
from barefoot.plan.job import Budget, RunJob, Stated, format_weights, parse_kv, parse_weights
from barefoot.plan.known import known_spec
from barefoot.plan.planner import candidates, plan, smallest_budget
from barefoot.plan.reserved import SLACK_BYTES, Reserved
from barefoot.plan.result import plan_from_json
from barefoot.plan.roofline import phase_times
from barefoot.plan.solve import pace
from barefoot.weights.formats.integer import IntegerGroups
from barefoot.weights.formats.stored import Stored

SMOL = known_spec("smollm2-135m")
NOTHING = Reserved(0, "test")
JOB = RunJob(1024, 64)
KEEPING = Caches(math.inf, False)
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


def as_q4_1(spec):
    """SmolLM2 as its packaged file stores it: a Q8_0 embedding, Q4_1 layers."""
    kinds = {"embed": "q8_0", "attn": "q4_1", "ffn": "q4_1", "norm": "f32"}
    return replace(spec, weights=tuple(replace(w, format=kinds[w.group]) for w in spec.weights))


def tiny(**changes):
    shapes = {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 640,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    return spec_from_config({**shapes, **changes}, "tiny")


def run(spec=SMOL, budget=512 * MIB, job=JOB, stated=None, device=MACHINE, **kwargs):
    return plan(spec, job, Budget({device.place: budget}), device, stated, reserved=NOTHING, **kwargs)


def tier_index(kl):
    return next(i for i, (_, limit) in enumerate(quality.TIERS) if kl <= limit)


def kl_of(spec, config):
    """The sum over groups of what quality says, resident layers in proportion, written independently of the search."""
    total = quality.kv_loss(spec, config.kv, config.context).kl
    for group, fmt in config.weights.items():
        matrices = [w for w in spec.weights if w.group == group and w.rows > 1]
        n = sum(w.n_elements for w in matrices)
        for w in matrices:
            on_disk = w.layer is not None and w.layer >= spec.n_layers - config.n_streamed_layers
            on_disk |= config.stream_head and group == ("embed" if spec.tied else "head")
            if not on_disk:
                total += quality.weight_loss(spec, group, fmt, w.format).kl * w.n_elements / n
    return total


@pytest.mark.parametrize(
    ("tied", "fraction"),
    [(True, 0.25), (True, 0.4), (True, 0.6), (True, 0.8), (True, 1.1), (False, 0.3), (False, 0.5), (False, 0.7)],
)
def test_the_plan_is_the_best_of_all(tied, fraction, monkeypatch):
    job, spec = RunJob(96, 32), tiny(tie_word_embeddings=tied)
    few = {
        spec_: quality._technique(spec_, "weights.formats") for spec_ in ("stored", "int(bits=8)", "int", "int(bits=2)")
    }
    monkeypatch.setattr(quality, "candidate_formats", lambda group: tuple(few.values()))
    stores = (HalfStore(), Int8Store(), Int4Store())
    monkeypatch.setattr(quality, "candidate_stores", lambda: stores)
    groups = ("embed", "attn", "ffn") if tied else ("embed", "attn", "ffn", "head")
    whole = footprint(spec, EngineConfig(96, HalfStore(), {}, chunk=64)).peak()[1]
    budget = int(fraction * whole)
    keys = []
    chunks = sorted({min(c, job.n_prompt) for c in CHUNKS})
    for chunk, n, head, kv in itertools.product(chunks, range(4), (False, True), stores):
        for formats in itertools.product(few.values(), repeat=len(groups)):
            weights = dict(zip(groups, formats, strict=True))
            config = EngineConfig(96, kv, weights, chunk, "int8", n, head, n_threads=2)
            total = footprint(spec, config)
            if SLACK_BYTES + total.peak()[1] > budget + SLACK_BYTES:
                continue
            kl = kl_of(spec, config)
            seconds = sum(t.seconds for t in phase_times(spec, config, job, MACHINE))
            keys.append((tier_index(kl), pace(seconds), kl, config))
    if not keys:
        with pytest.raises(OverBudget):
            run(spec, budget + SLACK_BYTES, job)
        return
    best = min(keys, key=lambda k: k[:3])
    found = run(spec, budget + SLACK_BYTES, job)
    seconds = found.prefill.seconds + found.decode.seconds
    assert tier_index(found.quality.kl) == best[0]
    assert abs(pace(seconds) - best[1]) <= 1  # the same sums in another order may round to the next step
    assert found.quality.kl == pytest.approx(kl_of(spec, found.config), abs=1e-12)
    if pace(seconds) == best[1]:
        assert found.quality.kl == pytest.approx(best[2], abs=1e-9)


@pytest.mark.parametrize("spec", [as_q4_1(SMOL), known_spec("gemma-3-270m"), tiny()], ids=["smol", "gemma", "tiny"])
def test_what_the_search_adds_up_is_the_time_of_the_plan(spec):
    job = RunJob(300, 40)
    problem = Problem(spec, job, MACHINE, Stated())
    tables = Tables(problem)
    for frame in (Frame(64, 0, False), Frame(16, 2, False), Frame(256, spec.n_layers, True), Frame(32, 1, True)):
        for pick, dropping in itertools.product((0, -1), (False, True)):
            chosen = [slot[pick] for slot in tables.slots(frame, Caches(math.inf, dropping))]
            config = problem.config(frame, [o.value for o in chosen])
            seconds = sum(t.seconds for t in phase_times(spec, config, job, MACHINE))
            assert sum(o.seconds for o in chosen) == pytest.approx(seconds, rel=1e-9)
            assert sum(o.kl for o in chosen) == pytest.approx(kl_of(spec, config), abs=1e-12)
            total = footprint(spec, config)
            resident = sum(e.bytes for e in total.select(kind="weights") if e.owner.split(".")[-1] in problem.groups)
            padding = sum(t.bytes for e in total.select(kind="weights") for t in e.terms if t.name == "alignment")
            assert resident - padding == sum(o.bytes[0] for o in chosen[:-1])
            caches = [*total.select(kind="kv"), *(e for e in total if e.owner in ("kv workspace", "prompt", "chooser"))]
            terms = [t for e in caches for t in e.terms]
            assert sum(t.bytes for t in terms if t.name != "alignment") == pytest.approx(chosen[-1].bytes[0], abs=128)


def test_a_plan_obeys_its_budget_and_lists_every_byte():
    tokenizer = entry("tokenizer", "reserved", [Term("vocabulary", 1, 7 * MIB)], phases=PHASES)
    reserved = Reserved(40 * MIB, "test")
    found = plan(SMOL, RunJob(1024, 64), Budget({"host": 400 * MIB}), MACHINE, reserved=reserved, extra=tokenizer)
    assert found.needed["host"] <= 400 * MIB
    engine = footprint(SMOL, found.config)
    for phase in engine.phases:
        assert found.peaks()[phase] == engine.select(phase=phase).bytes + 47 * MIB + SLACK_BYTES
    reserved_terms = {t.name: t.bytes for e in found.footprint.select(kind="reserved") for t in e.terms}
    assert reserved_terms["interpreter and libraries"] == 40 * MIB
    assert reserved_terms["allocator slack"] == SLACK_BYTES


def test_more_memory_is_never_worse():
    spec, previous = as_q4_1(SMOL), None
    for mebibytes in (24, 32, 48, 64, 80, 100, 120, 160, 256):
        found = run(spec, mebibytes * MIB)
        this = (tier_index(found.quality.kl), pace(found.prefill.seconds + found.decode.seconds))
        assert previous is None or this <= previous
        previous = this
    assert previous[0] == 0


def test_four_bit_files_keep_their_blocks_when_there_is_room():
    found = run(as_q4_1(SMOL), 256 * MIB)
    assert set(found.config.weights.values()) == {Stored()}
    assert (found.config.n_streamed_layers, found.config.stream_head) == (0, False)


def test_no_group_gets_more_bits_than_it_is_stored_with():
    for slot in Tables(Problem(as_q4_1(SMOL), RunJob(128, 16), MACHINE, Stated())).slots(Frame(64, 0, False), KEEPING)[
        :3
    ]:
        stored = next(o for o in slot if o.value == Stored())
        assert len(slot) > 1
        assert all(o.bytes[0] < stored.bytes[0] for o in slot if o is not stored)


def test_when_memory_is_short_the_file_is_streamed():
    found = run(as_q4_1(SMOL), 60 * MIB)
    assert found.config.n_streamed_layers > 0
    assert found.quality.kl <= 0.01
    assert found.decode.bound == "disk"
    assert any("read from disk" in note for note in found.notes)


def test_what_is_stated_is_kept():
    stated = Stated(
        weights={"ffn": IntegerGroups(bits=4, group=64)}, kv=HalfStore(), chunk=48, stream_head=True, n_threads=1
    )
    config = run(stated=stated).config
    assert config.weights["ffn"] == IntegerGroups(bits=4, group=64)
    assert (config.kv, config.chunk, config.stream_head, config.n_threads) == (HalfStore(), 48, True, 1)
    # streaming would carry the file's blocks in place of the stated format
    assert config.n_streamed_layers == 0
    streamed = replace(stated, streamed_layers=7, stream_head=False)
    assert run(stated=streamed).config.n_streamed_layers == 7


def test_a_stated_format_that_cannot_hold_the_model_is_refused():
    with pytest.raises(Incompatible, match="128"):
        run(stated=Stated(weights={"attn": IntegerGroups(group=128)}))  # 576 columns


def test_a_context_beyond_the_models_is_refused_by_the_engine():
    with pytest.raises(InvalidInput, match="context"):
        run(job=RunJob(10_000, 10))


@pytest.mark.parametrize("max_kl", [0.01, 0.1, float("inf")])
def test_the_smallest_budget_is_tight(max_kl):
    spec, job = as_q4_1(SMOL), RunJob(512, 32)
    least = smallest_budget(spec, job, MACHINE, max_kl=max_kl, reserved=NOTHING)
    found = run(spec, least, job)
    assert found.quality.kl <= max_kl or max_kl == float("inf")
    below = candidates(spec, job, Budget({"host": least - 1}), MACHINE, reserved=NOTHING)
    assert all(p.quality.kl > max_kl for p in below)


def test_candidates_trade_quality_for_speed():
    found = candidates(SMOL, RunJob(1024, 256), Budget({"host": 300 * MIB}), MACHINE, reserved=NOTHING)
    seconds = [p.prefill.seconds + p.decode.seconds for p in found]
    tiers = [tier_index(p.quality.kl) for p in found]
    assert len(found) >= 2
    assert tiers == sorted(set(tiers))
    assert all(b < 0.9 * a for a, b in itertools.pairwise(seconds))
    assert found[0].config == run(budget=300 * MIB, job=RunJob(1024, 256)).config


def test_a_budget_above_the_machine_is_the_machine():
    small = replace(MACHINE, memory_bytes={"host": 100 * MIB})
    found = run(budget=10 * GIB, device=small)
    assert found.needed["host"] <= 100 * MIB
    assert any("were allowed" in note for note in found.notes)


def test_a_batch_has_keys_and_values_for_each_sequence():
    stated = Stated(weights=dict.fromkeys(("embed", "attn", "ffn"), Stored()), kv=HalfStore(), chunk=64)
    one, eight = (run(budget=4 * GIB, job=RunJob(1024, 64, batch=n), stated=stated) for n in (1, 8))
    kv = [p.footprint.select(kind="kv", phase="decode").bytes for p in (one, eight)]
    assert kv == [1024 * 23_040, 8 * 1024 * 23_040]
    weights = [p.footprint.select(kind="weights", phase="decode").bytes for p in (one, eight)]
    assert weights[0] == weights[1]
    logits = [p.footprint.select(kind="logits", phase="decode").bytes for p in (one, eight)]
    assert logits == [49152 * 4, 8 * 49152 * 4]


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_bytes_of_a_batch_are_those_that_the_engine_takes(batch):
    found = run(budget=4 * GIB, job=RunJob(256, 64, batch=batch))
    assert found.config.n_sequences == batch
    engine = footprint(SMOL, found.config)
    assert [e for e in found.footprint if e in engine.entries] == list(engine)
    assert plan_from_json(found.to_json()).config == found.config


def test_a_batch_is_predicted_to_decode_faster_than_one_by_one():
    """Weights are read once for a step, keys and values for each: at the roofline of a machine bound by memory."""
    stated = Stated(weights=dict.fromkeys(("embed", "attn", "ffn"), Stored()), kv=HalfStore(), chunk=64)
    fast = replace(MACHINE, peaks=dict.fromkeys(MACHINE.peaks, 1e18), op_seconds=0.0)
    one, eight = (run(budget=4 * GIB, job=RunJob(1024, 64, batch=n), stated=stated, device=fast) for n in (1, 8))
    positions = sum(range(961, 1025))  # what 64 steps see
    of_one = positions * 23_040 + 64 * 23_040 + 64 * 576 * 2  # read, written, and rows of the bf16 embedding
    more = eight.decode.seconds - one.decode.seconds
    assert more == pytest.approx(7 * of_one / (fast.read_gb_s["host"] * 1e9), rel=1e-6)
    assert eight.decode.n_tokens == 8 * 64


# Machines that one does not sit at.


def test_llama_70b_on_a_card_of_24_gb():
    llama, card = known_spec("llama-3.1-70b"), parse_device("rtx-4090")
    job, layer = RunJob(8192, 512), 2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192
    budget = 24 * 10**9
    found = plan(llama, job, Budget({"accelerator": budget}), card, reserved=NOTHING)
    assert found.needed["accelerator"] <= budget
    assert found.needed["host"] <= 64 * 10**9
    assert 0 < found.n_host_layers < 80
    # bf16 would need 141 GB of 88; 8 bits with a scale and a minimum for 32 weights are 36 bytes
    assert set(found.config.weights.values()) == {IntegerGroups(bits=8)}
    on_host = found.footprint.select(kind="weights", place="host").bytes
    assert on_host == found.n_host_layers * (layer // 32 * 36 + 2 * 8192 * 4)
    kv = (
        found.footprint.select(kind="kv", place="host").bytes
        + found.footprint.select(kind="kv", place="accelerator").bytes
    )
    assert found.config.kv == Int8Store()
    assert kv == 8192 * 80 * 2 * 8 * (128 + 8)
    assert any("stay in host memory" in note for note in found.notes)


def test_a_million_tokens_on_eight_h100():
    llama, cards = known_spec("llama-3.1-70b"), parse_device("8x h100")
    job = RunJob(1 << 20, 1024)
    stated = Stated(weights=dict.fromkeys(("embed", "attn", "ffn", "head"), Stored()), kv=HalfStore())
    found = plan(llama, job, Budget({}), cards, stated, reserved=NOTHING)
    assert found.footprint.select(kind="kv", place="accelerator").bytes == (1 << 20) * 327_680
    vectors = (2 * 80 + 1) * 8192
    weights = found.footprint.select(kind="weights", place="accelerator").bytes
    assert weights == 2 * (70_553_706_496 - vectors) + 4 * vectors
    assert found.n_host_layers == 0
    assert found.needed["accelerator"] <= 640 * 10**9
    assert found.prefill.bound == "compute"
    with pytest.raises(OverBudget):
        plan(llama, RunJob(1 << 21, 1024), Budget({}), cards, replace(stated, streamed_layers=0), reserved=NOTHING)


# Spellings.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int(bits=3)", dict.fromkeys(("embed", "attn", "ffn", "head"), IntegerGroups(bits=3))),
        ("ffn=int(bits=3, group=64) attn=stored", {"ffn": IntegerGroups(bits=3, group=64), "attn": Stored()}),
        ("embed=int,head=stored", {"embed": IntegerGroups(), "head": Stored()}),
    ],
)
def test_weights_are_read_and_printed(text, expected):
    assert parse_weights(text) == expected
    assert parse_weights(format_weights(expected)) == expected


@pytest.mark.parametrize("text", ["", "wat=int", "ffn=", "int int", "ffn=int ffn=stored", "int(bits=5)", "ffn:int"])
def test_unreadable_weights_are_refused(text):
    with pytest.raises(InvalidInput):
        parse_weights(text)


def test_kv_stores_are_read():
    assert parse_kv("q8") == Int8Store()
    assert parse_kv("h2o(keep=64) > q8") == Ruled(H2O(keep=64), Int8Store())
    with pytest.raises(Incompatible, match="policies come first"):
        parse_kv("q8 > q8")


@pytest.mark.parametrize("numbers", [(0, 1), (10, 0), (10, 10)])
def test_impossible_jobs_are_refused(numbers):
    with pytest.raises(InvalidInput):
        RunJob(*numbers)


def test_impossible_budgets_are_refused():
    with pytest.raises(InvalidInput):
        Budget({"host": 0})
