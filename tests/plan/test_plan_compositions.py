"""Compositions of the KV cache: what they are priced at, which ones there are, and which one a plan takes."""

import functools
import itertools
import math
from dataclasses import replace
from fractions import Fraction

import pytest

from barefoot.core.device import Device, parse_device
from barefoot.core.units import MIB
from barefoot.engine.config import EngineConfig
from barefoot.engine.footprint import footprint
from barefoot.engine.specs import spec_from_config
from barefoot.kv.policies.h2o import H2O
from barefoot.kv.policies.sinks import Sinks
from barefoot.kv.policies.snapkv import SnapKV
from barefoot.kv.ruled import Ruled
from barefoot.kv.stores.f16 import HalfStore
from barefoot.kv.stores.kivi import Kivi
from barefoot.kv.stores.q2 import Int2Store
from barefoot.kv.stores.q4 import Int4Store
from barefoot.kv.stores.q8 import Int8Store
from barefoot.plan import compositions, quality
from barefoot.plan.explain import explain
from barefoot.plan.job import Budget, RunJob, Stated, parse_kv
from barefoot.plan.known import known_spec
from barefoot.plan.planner import candidates, plan
from barefoot.plan.reserved import SLACK_BYTES, Reserved
from barefoot.weights.formats.stored import Stored

STORES = {"f16": 0.0, "q8": 0.001, "q4": 0.06, "q2": 2.0, "kivi(bits=4)": 0.008, "kivi": 0.2}
POLICIES = {
    "h2o(keep=KEEP)": [(1000, 500, 0.02), (1000, 250, 0.08), (2000, 500, 0.04)],
    "snapkv(keep=KEEP)": [(1000, 500, 0.05), (1000, 125, 0.4)],
}
SMOL = known_spec("smollm2-135m")
JOB = RunJob(2000, 40)
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
LAYERS = 24


def row(model="made up", spec=SMOL, policies=POLICIES, windows=False, stores=STORES):
    return quality.Measurement(
        model, spec.n_parameters, "any", {"kv": stores}, f"file of {model}", policies=policies, windows=windows
    )


@pytest.fixture
def table(monkeypatch):
    """A table of caches that a test makes up, beside the shipped one of weights."""
    shipped = tuple(m for m in quality.measurements() if "kv" not in m.kl)

    def use(*rows):
        monkeypatch.setattr(quality, "measurements", lambda: (*shipped, *rows))
        monkeypatch.setattr(quality, "candidate_stores", functools.cache(quality.candidate_stores.__wrapped__))

    use(row())
    return use


def narrow(**changes):
    """Many layers and few channels, so that a cache is larger than what prompts need while they pass."""
    shapes = {
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 256,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    return spec_from_config({**shapes, **changes}, "narrow")


def tier_index(kl):
    return next(i for i, (_, limit) in enumerate(quality.TIERS) if kl <= limit)


def loss(text, context=2000, spec=SMOL):
    return quality.kv_loss(spec, parse_kv(text), context)


# What they are priced at.


@pytest.mark.parametrize(
    ("keep", "kl"),
    [
        (1000, 0.02),  # the share was measured
        (500, 0.08),  # at two lengths; the worse one counts
        (1500, 0.02),  # above the largest share, what that costs
        (1999, 0.02),
        (2000, 0.0),  # nothing goes
        (5000, 0.0),
    ],
)
def test_a_policy_is_priced_by_the_share_that_it_keeps(table, keep, kl):
    found = loss(f"h2o(keep={keep})")
    assert found.kl == pytest.approx(kl)
    assert not found.partial


@pytest.mark.parametrize("keep", [251, 400, 707, 999])
def test_between_measured_shares_log_kl_is_linear_in_the_log_of_the_share(table, keep):
    low, high = (0.125, 0.4), (0.5, 0.05)
    part = math.log(keep / 2000 / low[0]) / math.log(high[0] / low[0])
    found = loss(f"snapkv(keep={keep})")
    assert math.log(found.kl) == pytest.approx((1 - part) * math.log(low[1]) + part * math.log(high[1]))
    assert found.estimated


def test_below_the_smallest_share_nothing_is_known(table):
    assert not loss("h2o(keep=500)").partial
    found = loss("h2o(keep=499) > q8")
    assert found.partial
    assert (found.kl, found.estimated) == (STORES["q8"], True)
    assert "not measured" in found.source


@pytest.mark.parametrize("text", ["sinks(keep=1000)", "snapkv(keep=1000,window=64)", "h2o(keep=1000,recent=10)"])
def test_other_policies_and_other_knobs_are_not_measured(table, text):
    assert loss(text).partial
    assert loss(text).kl == 0


@pytest.mark.parametrize("text", ["minicache > q8", "h2o(keep=1000) > minicache > q8", "think > q8"])
def test_what_wraps_a_store_is_not_priced_by_its_bits(table, text):
    found = loss(text)
    assert found.partial
    assert found.kl == pytest.approx(STORES["q8"] + (0.02 if "h2o" in text else 0))
    assert "is not measured, and not in the sum" in found.source


def test_room_for_the_answer_costs_no_quality(table):
    assert loss("snapkv(keep=1000,room=7)") == loss("snapkv(keep=1000)")


def test_policy_and_store_add_up(table):
    found = loss("snapkv(keep=1000) > kivi(bits=4)")
    assert found.kl == pytest.approx(0.05 + 0.008)
    assert "file of made up" in found.source


def test_what_was_measured_on_this_model_at_this_share_and_length_is_no_estimate(table):
    assert not loss("h2o(keep=1000)").estimated
    assert loss("h2o(keep=1500)").estimated
    assert loss("h2o(keep=2000)", context=4000).estimated  # the share, but not the length
    assert loss("h2o(keep=1000)", spec=narrow()).estimated


def test_models_with_windows_are_priced_by_their_like(table):
    """A policy rules few layers of a model with windows, so that its price says nothing of the others."""
    dear = {"h2o(keep=KEEP)": [(1000, 500, 0.5)]}
    cheap = {"h2o(keep=KEEP)": [(1000, 500, 0.001)]}
    table(row("all", replace(SMOL, name="all"), dear), row("some", SMOL, cheap, windows=True))
    layers = tuple(replace(layer, window=64 if i % 6 else None) for i, layer in enumerate(SMOL.layers))
    assert loss("h2o(keep=1000)").kl == 0.5
    assert loss("h2o(keep=1000)", spec=replace(SMOL, layers=layers)).kl == 0.001


def test_a_store_without_a_measurement_is_priced_by_those_of_its_name(table):
    found = loss("kivi(bits=3)")  # 4.5 bits a number and 3.5: halfway between 4 and 2 bits in the logarithm
    assert found.kl == pytest.approx(math.sqrt(STORES["kivi(bits=4)"] * STORES["kivi"]))
    assert found.estimated


# Which ones there are.


def test_policies_are_offered_at_the_measured_shares_in_whole_entries(table):
    found = quality.candidate_policies(1001, 40)
    assert set(found) == {
        H2O(keep=501), H2O(keep=251), SnapKV(keep=501, room=40), SnapKV(keep=126, room=40),
    }  # fmt: skip
    assert all(Fraction(p.keep, 1001) >= Fraction(1, 8) for p in found)
    assert H2O(keep=8) in quality.candidate_policies(16, 4)
    assert not any(isinstance(p, SnapKV) for p in quality.candidate_policies(16, 4))  # its window is 32


def test_what_conflicts_or_does_not_hold_the_model_is_left_out(table):
    found = compositions.possible(SMOL, JOB, by_layer=True)
    assert len(found) == len(set(found))
    assert set(quality.candidate_stores()) <= set(found)
    of_h2o = {kv.store for kv in found if isinstance(kv, Ruled) and isinstance(kv.policy, H2O)}
    of_snapkv = {kv.store for kv in found if isinstance(kv, Ruled) and isinstance(kv.policy, SnapKV)}
    assert of_snapkv - of_h2o == {Kivi(bits=4), Kivi()}
    assert of_snapkv == set(quality.candidate_stores())
    windows = replace(SMOL, layers=tuple(replace(layer, window=64) for layer in SMOL.layers))
    rows = {HalfStore(), Int8Store(), Int4Store(), Int2Store()}
    assert set(compositions.possible(windows, JOB, by_layer=True)) == rows
    assert set(compositions.possible(SMOL, JOB, by_layer=False)) == rows
    odd = replace(SMOL, head_dim=66)
    assert Int2Store() not in compositions.possible(odd, JOB, by_layer=True)


def test_nothing_is_offered_that_was_not_measured(table):
    table(row(policies={}))
    assert not any(map(compositions.drops, compositions.possible(SMOL, JOB, by_layer=True)))


def test_what_is_worse_in_everything_is_not_considered(table):
    found = compositions.worthwhile(SMOL, JOB, compositions.possible(SMOL, JOB, by_layer=True))
    assert found[0] == HalfStore()
    losses = [quality.kv_loss(SMOL, kv, JOB.context).kl for kv in found]
    assert losses == sorted(losses)
    # dearer than H2O's at the same share, and larger, since all heads vote; a policy puts no store out of the question
    assert Ruled(SnapKV(keep=1000, room=40), Int8Store()) not in found
    assert Ruled(H2O(keep=1000), Int8Store()) in found
    assert Int2Store() in found


# Which one a plan takes.


FIXED = Stated(
    weights=dict.fromkeys(("embed", "attn", "ffn"), Stored()), chunk=64, streamed_layers=0, stream_head=False
)


def total_bytes(spec, kv, job=JOB):
    config = EngineConfig(job.context, kv, FIXED.weights, 64, n_threads=2, n_sequences=job.batch)
    return footprint(spec, config).peak()[1] + SLACK_BYTES


def planned(spec, n_bytes, job=JOB, stated=FIXED):
    return plan(spec, job, Budget({"host": n_bytes}), MACHINE, stated, reserved=Reserved(0, "test"))


def test_a_plan_takes_the_first_tier_that_fits_and_sends_nothing_away_without_need(table):
    spec = narrow()
    every = compositions.possible(spec, JOB, by_layer=True)
    sizes = {kv: total_bytes(spec, kv) for kv in every}
    taken = set()
    for size in sorted(set(sizes.values())):
        found = planned(spec, size).config.kv
        fitting = {kv: quality.kv_loss(spec, kv, JOB.context).kl for kv in every if sizes[kv] <= size}
        first = min((tier_index(kl), compositions.drops(kv)) for kv, kl in fitting.items())
        assert (tier_index(fitting[found]), compositions.drops(found)) == first
        taken.add(found)
    assert {compositions.drops(kv) for kv in taken} == {False, True}
    assert len(taken) >= 5


def test_with_ample_memory_and_with_what_is_stated_no_policy_is_taken(table):
    spec = narrow()
    assert not compositions.drops(planned(spec, 256 * MIB).config.kv)
    for text in ("f16", "h2o(keep=300) > q4", "sinks(keep=77)", "snapkv(keep=64,room=40) > kivi(bits=3)"):
        assert planned(spec, 256 * MIB, stated=replace(FIXED, kv=parse_kv(text))).config.kv == parse_kv(text)
    unknown = planned(spec, 256 * MIB, stated=replace(FIXED, kv=Ruled(Sinks(keep=77), HalfStore())))
    assert unknown.quality.tier == "not measured"


def test_a_policy_that_is_taken_is_priced_and_said(table):
    spec = narrow()
    kv = Ruled(H2O(keep=500), Int4Store())
    found = planned(spec, total_bytes(spec, kv))
    assert found.config.kv == kv
    assert found.needed["host"] == total_bytes(spec, kv)
    assert found.quality.kl == pytest.approx(0.08 + 0.06)
    assert found.quality.tier == quality.tier(0.14)
    assert found.quality.estimated
    assert "KL 0.1400" in found.quality.sources["kv"]
    (note,) = [n for n in found.notes if "can't be recalled" in n]
    assert "501 of 2,000" in note
    assert "--kv 'h2o(keep=500) > q4'" in found.command


def test_each_sequence_of_a_batch_has_its_own_entries(table):
    spec, job = narrow(), replace(JOB, batch=3)
    kv = Ruled(H2O(keep=500), Int8Store())
    found = planned(spec, total_bytes(spec, kv, job), job)
    assert compositions.drops(found.config.kv)
    assert found.config.n_sequences == 3
    assert found.needed["host"] <= total_bytes(spec, kv, job)


def test_room_for_the_longest_answer_is_part_of_what_is_taken(table):
    table(row(policies={"snapkv(keep=KEEP)": POLICIES["snapkv(keep=KEEP)"]}))
    spec, job = narrow(), RunJob(2000, 700)
    stores = [s for s in quality.candidate_stores() if quality.kv_loss(spec, s, 2000).kl <= 0.3]
    least = min(total_bytes(spec, s, job) for s in stores)
    found = planned(spec, least - 1, job).config.kv
    assert isinstance(found, Ruled)
    assert found.policy.room == 700


def test_candidates_send_entries_away_only_for_speed(table):
    spec = narrow()
    found = candidates(spec, RunJob(2000, 1500), Budget({"host": 256 * MIB}), MACHINE, FIXED, reserved=Reserved(0, "t"))
    seconds = [p.prefill.seconds + p.decode.seconds for p in found]
    assert not compositions.drops(found[0].config.kv)
    assert all(b < 0.9 * a for a, b in itertools.pairwise(seconds))


def test_the_alternatives_of_a_plan_are_priced(table):
    spec = narrow()
    found = planned(spec, total_bytes(spec, Ruled(H2O(keep=500), Int4Store())))
    priced = compositions.priced(spec, JOB, found.config, by_layer=True)
    assert priced[0].kv == str(found.config.kv)
    assert priced[0].n_kept == 501
    # keys and values of 4 heads: 16 bytes of codes, a scale and a minimum for 32 channels; positions and masses
    assert priced[0].bytes == LAYERS * 4 * 501 * (2 * (16 + 4) + 4 + 4)
    assert [p.kl for p in priced[1:]] == sorted(p.kl for p in priced[1:])
    by_name = {p.kv: p for p in priced}
    assert by_name["f16"].bytes == LAYERS * 2000 * 2 * 4 * 32 * 2
    assert (by_name["f16"].passing_bytes, by_name["f16"].kl, by_name["f16"].tier) == (0, 0, "lossless in practice")
    for p in priced:
        kv = parse_kv(p.kv)
        own = footprint(spec, replace(found.config, kv=kv))
        beside = sum(e.bytes for e in own if e.owner in ("kv workspace", "prompt", "chooser"))
        assert p.passing_bytes == beside
        assert own.select(kind="kv", phase="decode").bytes == pytest.approx(p.bytes, abs=64 * 8)
    assert priced[0].to_json()["kl"] == pytest.approx(0.14)


def test_on_accelerators_caches_are_rows(table):
    card = parse_device("rtx-4090")
    found = plan(SMOL, RunJob(8000, 100), Budget({"accelerator": 900 * MIB}), card, reserved=Reserved(0, "t"))
    assert found.config.kv in (HalfStore(), Int8Store(), Int4Store(), Int2Store())


def test_a_policy_is_explained_with_its_price(table):
    found = explain(H2O(keep=1000), SMOL, JOB)
    assert found.lines[0].kl == 0.02
    assert "file of made up" in found.lines[0].source


def test_a_prompt_passes_whole_before_entries_go(table):
    """Attention of a prompt is to all of it, that of a decoded token to what stayed."""
    spec, stated = narrow(), replace(FIXED, kv=HalfStore())
    full, few = (
        planned(spec, 256 * MIB, stated=replace(stated, kv=kv))
        for kv in (HalfStore(), Ruled(H2O(keep=100), HalfStore()))
    )
    assert few.prefill.seconds == pytest.approx(full.prefill.seconds)
    assert few.decode.seconds < full.decode.seconds
