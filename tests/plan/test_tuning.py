"""Plans of tuning: what fits first, what is refused and what would fit; bytes themselves are held in tests/train."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from random_files import LLAMA

from barefoot.adapters.lora import LoRA
from barefoot.adapters.pruning import Kept
from barefoot.adapters.pruning.drawn import Drawn
from barefoot.adapters.pruning.files import Given
from barefoot.adapters.pruning.taylor import Taylor
from barefoot.adapters.qst import QST
from barefoot.core.device import this_machine
from barefoot.core.errors import Incompatible, InvalidInput, OverBudget
from barefoot.core.units import MIB
from barefoot.engine.specs import spec_from_config
from barefoot.optim.adamw import Adam
from barefoot.optim.paged import PagedAdam
from barefoot.plan.job import parse_weights
from barefoot.plan.tuning import LEAST_TOKENS, Question, TuneJob, TuneStated
from barefoot.train.lesson import Lesson
from barefoot.train.losses.lrec import LREC
from barefoot.train.losses.plain import Plain

NAMES = ("adamw", "paged")

SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
SMOL = LLAMA | SIZES | {"num_hidden_layers": 30, "vocab_size": 49152, "max_position_embeddings": 2048}


@pytest.fixture(scope="module")
def question() -> Question:
    spec = spec_from_config(SMOL | {"dtype": "bfloat16", "tie_word_embeddings": True}, "smol")
    return Question(spec, TuneJob(512, 4096), LoRA(), TuneStated(), this_machine(), 250 * MIB)


def test_room_enough_takes_the_fastest_over_the_stored_base(question):
    plan, others = question.choose(1 << 50)
    assert plan.base == "stored"
    assert plan.seconds == min(p.seconds for p in (plan, *others) if p.base == "stored")
    assert plan.tuning.activations == "keep"


def test_less_memory_gives_up_speed_before_the_base(question):
    """Going down, what is chosen always fits, and the base is only rounded where no stored one fits."""
    budget, seen = 1 << 50, []
    while True:
        try:
            plan, others = question.choose(budget)
        except OverBudget as error:
            refused = error
            break
        assert plan.needed <= budget
        if plan.base != "stored":
            assert min(p.needed for p in others if p.base == "stored") > budget
        seen.append(plan)
        budget = plan.needed - 1
    assert {p.tuning.activations for p in seen} == {"keep", "recompute"}
    assert len({p.base for p in seen}) > 1
    assert seen[-1].needed == refused.needed == min(p.needed for p in question.plans())
    assert refused.available == budget


def test_moments_are_paged_before_the_base_is_rounded(question):
    """Of a stored base the least takes pages, which cost time; the bytes that are saved are those not in memory."""
    stored = [p for p in question.plans() if p.base == "stored"]
    least = {
        name: min((p for p in stored if p.tuning.optimizer.name == name), key=lambda p: p.needed) for name in NAMES
    }
    plan, _ = question.choose(least["adamw"].needed - 1)
    assert (plan.base, plan.tuning.optimizer.name) == ("stored", "paged")
    n = question.adapter.n_trained(question.spec)
    kept = {name: plan.footprint.select(kind="optimizer").bytes for name, plan in least.items()}
    assert kept == {"adamw": 8 * n, "paged": (4 << 20) + (256 << 10)}
    paged, plain = (dataclasses.replace(question, stated=TuneStated(optimizer=o)) for o in (PagedAdam(), Adam()))
    for a, b in zip(paged.plans(), plain.plans(), strict=True):
        assert a.seconds > b.seconds
        assert a.needed <= b.needed


def test_the_longest_documents_that_fit_are_named(question):
    stated = TuneStated(formats={}, loss=Plain())
    tight = dataclasses.replace(question, stated=stated)
    budget = min(p.needed for p in tight.plans()) - 1
    longest = tight.largest_length(budget)
    assert LEAST_TOKENS <= longest < 512

    def least(length: int) -> int:
        return min(p.needed for p in dataclasses.replace(tight, job=TuneJob(length, 4096)).plans())

    assert least(longest) <= budget < least(longest + 1)
    with pytest.raises(OverBudget) as error:
        tight.choose(budget)
    assert f"--length {longest}," in str(error.value.cure)
    assert tight.largest_length(1) == 0


def test_what_is_stated_stays(question):
    stated = TuneStated(parse_weights("nf4"), "keep", Plain(), 512, optimizer=PagedAdam(resident=2))
    (plan,) = dataclasses.replace(question, stated=stated).plans()
    tuning = plan.tuning
    assert (tuning.activations, tuning.n_tokens, str(tuning.loss), plan.base) == ("keep", 512, "plain", "nf4")
    assert str(tuning.optimizer) == "paged(resident=2)"
    assert tuning.accumulates


def test_bytes_grow_with_each_number(question):
    def least(**numbers) -> int:
        job = dataclasses.replace(question.job, **{k: v for k, v in numbers.items() if k != "rank"})
        own = dataclasses.replace(question, job=job, adapter=LoRA(rank=numbers.get("rank", 16)))
        return min(p.needed for p in own.plans())

    assert least(length=128) < least(length=256) < least(length=512)
    assert least(rank=4) < least(rank=16) < least(rank=64)


@pytest.mark.parametrize(("length", "tokens"), [(1, 10), (64, 63)])
def test_impossible_jobs(length, tokens):
    with pytest.raises(InvalidInput):
        TuneJob(length, tokens)


def test_a_side_network_keeps_the_base_out_of_the_plan(question):
    """One policy of activations, and fewer bytes than any adapter through which gradients pass and all is kept."""
    aside = dataclasses.replace(question, adapter=QST())
    plan, others = aside.choose(1 << 50)
    assert {p.tuning.activations for p in (plan, *others)} == {"keep"}
    beside = dataclasses.replace(question, stated=TuneStated(activations="keep"))
    assert plan.seconds < beside.choose(1 << 50)[0].seconds
    assert all(
        a.footprint.select(kind="activations").bytes < 0.35 * b.footprint.select(kind="activations").bytes
        for a, b in zip(aside.plans(), beside.plans(), strict=True)
        if a.tuning.n_tokens == b.tuning.n_tokens
    )
    with pytest.raises(Incompatible, match="none to pass again"):
        dataclasses.replace(aside, stated=TuneStated(activations="recompute")).plans()


def test_a_refusal_names_the_least_pruning_that_fits(question):
    tight = dataclasses.replace(question, stated=TuneStated(formats=parse_weights("nf4"), loss=Plain()))
    least = min(plan.needed for plan in tight.plans())
    needed = {}
    for ratio in (0.25, 0.5, 0.75):
        copies = dataclasses.replace(tight.stated, pruning=Taylor(ratio))
        needed[ratio] = min(plan.needed for plan in dataclasses.replace(tight, stated=copies).plans())
    assert needed[0.75] < needed[0.5] < needed[0.25] < least
    for budget, named in ((least - 1, 0.25), (needed[0.25] - 1, 0.5), (needed[0.75], 0.75)):
        with pytest.raises(OverBudget) as error:
            tight.choose(budget)
        assert f'--prune "taylor(ratio={named})"' in str(error.value.cure)
    with pytest.raises(OverBudget) as error:
        tight.choose(needed[0.75] - 1)
    assert "--prune" not in str(error.value.cure)


def test_a_pruned_copy_is_planned_as_it_is(question):
    """The base by what is left of it; and faster, since less is decoded and multiplied."""
    stated = TuneStated({}, "keep", Plain(), 512, optimizer=Adam())
    (whole,) = dataclasses.replace(question, stated=stated).plans()
    (copy,) = dataclasses.replace(question, stated=dataclasses.replace(stated, pruning=Drawn(0.5))).plans()
    layers, d, f, head = 30 - 4 - 2, 576, 1536, 64
    cut = layers * (3 * d * (f // 2) + 2 * d * head * (3 + 1))  # one of three groups: three heads of queries
    assert whole.n_parameters - copy.n_parameters == cut
    weights = [plan.footprint.select(kind="weights").bytes for plan in (whole, copy)]
    assert weights[0] - weights[1] == 2 * cut
    assert copy.seconds < whole.seconds
    assert copy.to_json()["pruning"] == "drawn(ratio=0.5)"
    assert whole.to_json()["pruning"] is None
    aside = dataclasses.replace(stated, activations=None, pruning=Drawn(0.5))
    with pytest.raises(Incompatible, match="can't be put back"):
        dataclasses.replace(question, adapter=QST(), stated=aside).plans()


def test_formats_whose_blocks_dont_fill_the_rows_are_only_refused_when_asked_for(question):
    """Rows of 96 fill no group of 64, and neither do the 40 channels that another training left; groups that span rows
    can be had."""
    spec = spec_from_config(LLAMA | {"intermediate_size": 160}, "random")
    units = {layer: Kept(np.arange(3, dtype=np.int32), np.arange(40, dtype=np.int32)) for layer in (1, 2)}
    given = Given(0.4, 1, 1, pruning=Drawn(0.4, 1, 1), units=units)
    asked = dataclasses.replace(question, spec=spec, stated=TuneStated(pruning=given))
    assert {plan.base for plan in asked.plans()} == {"stored", "attn=nf4(double=true) ffn=nf4(double=true)"}
    with pytest.raises(Incompatible, match="columns are not a multiple"):
        dataclasses.replace(asked, stated=TuneStated(parse_weights("nf4"), pruning=given)).plans()


def test_a_teacher_has_the_losses_that_imitate(question):
    """And only it; its hidden states are in every phase of training, 4 bytes a number, and time for its pass."""
    lesson = Lesson(question.spec, 4096, 1000)
    taught = dataclasses.replace(question, stated=TuneStated(loss=None, n_tokens=512, lesson=lesson)).plans()
    alone = dataclasses.replace(question, stated=TuneStated(n_tokens=512)).plans()
    assert {str(p.tuning.loss) for p in taught} == {str(LREC())}
    assert not any(p.tuning.loss.imitates for p in alone)
    states = (4096 + 1000) * 576 * 4
    assert taught[0].footprint.select(phase="step").bytes - alone[0].footprint.select(phase="step").bytes == states
    assert taught[0].seconds > max(p.seconds for p in alone if p.tuning.activations == taught[0].tuning.activations)
    for stated, match in (
        (TuneStated(loss=LREC()), "imitates a teacher, and there is none"),
        (TuneStated(loss=Plain(), lesson=lesson), "plain takes no teacher"),
    ):
        with pytest.raises(Incompatible, match=match):
            dataclasses.replace(question, stated=stated).plans()
