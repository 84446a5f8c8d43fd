"""Engines whose entries a policy rules: as the plain engine where all stay, and the same wherever weights lie."""

from __future__ import annotations

import numpy as np
import pytest
from random_files import GEMMA, LLAMA, write_random
from test_batch import PLACES, open_engine

from barefoot.core.errors import CorruptFile, Incompatible, InvalidInput
from barefoot.kv.policies.h2o import H2O
from barefoot.kv.policies.scissorhands import Scissorhands
from barefoot.kv.policies.sinks import Sinks
from barefoot.kv.policies.snapkv import SnapKV
from barefoot.kv.ruled import Ruled
from barefoot.kv.stores.comet import Comet
from barefoot.kv.stores.f16 import HalfStore
from barefoot.kv.stores.kivi import Kivi
from barefoot.kv.stores.mikv import MiKV
from barefoot.kv.stores.minicache import MiniCache
from barefoot.kv.stores.q8 import Int8Store
from barefoot.kv.stores.think import Think

IDS = [(7 * i + 3) % 250 for i in range(70)]
ALL = (  # of 96 positions
    *(Ruled(policy, HalfStore()) for policy in (Sinks(keep=90), H2O(keep=90), SnapKV(keep=80, room=16))),
    MiniCache(start=0, retain=0.9),
    Ruled(H2O(keep=90), MiniCache(start=0, retain=0.9)),
)
FEW = (Sinks(keep=20), H2O(keep=20), Scissorhands(keep=20, window=9, recent=4), SnapKV(keep=20, window=6, room=40))
STORES = [
    *(Ruled(policy, HalfStore()) for policy in FEW),
    *(Ruled(FEW[3], store) for store in (Kivi(residual=32), MiniCache(inner=Int8Store()))),
    Ruled(FEW[1], MiniCache(start=0, recent=2)),
    Kivi(residual=32),
    Comet(group=32),
    MiniCache(start=0, recent=3),
    Ruled(FEW[1], Think(recent=8)),
    Think(Kivi(residual=32)),
    Think(Comet(group=32)),
    Ruled(FEW[2], MiKV(Int8Store(), bits=4)),
]


@pytest.fixture(scope="module", params=["llama", "gemma"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("ruled") / request.param
    write_random(path, {"llama": LLAMA, "gemma": GEMMA}[request.param])
    return path


def answers(engine, prompt, following, **options):
    """Logits behind the prompt, and behind each of the following tokens."""
    return np.array([engine.prefill(prompt, **options).copy(), *(engine.decode(t).copy() for t in following)])


@pytest.mark.parametrize("kv", ALL, ids=str)
def test_all_that_stays_gives_what_the_plain_engine_gives(folder, kv):
    """A prompt, tokens, a second prompt, tokens."""
    with open_engine(folder) as plain, open_engine(folder, kv=kv) as engine:
        for prompt, following in ((IDS[:33], IDS[33:40]), (IDS[40:60], IDS[60:66])):
            expected, got = (answers(e, prompt, following) for e in (plain, engine))
            assert np.abs(got - expected).max() < 2e-5 * np.abs(expected).max()
        assert engine.position == plain.position == 66


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kv", STORES, ids=str)
def test_where_weights_lie_changes_nothing(folder, kv, place):
    with open_engine(folder, kv=kv) as resident, open_engine(folder, kv=kv, **PLACES[place]) as engine:
        expected, got = (answers(e, IDS[:50], IDS[50:60]) for e in (resident, engine))
    assert np.array_equal(got, expected)
    assert len({row.tobytes() for row in expected}) == 11


def test_chunks_change_nothing(folder):
    kv = Ruled(H2O(keep=24), HalfStore())
    with open_engine(folder, kv=kv) as engine, open_engine(folder, kv=kv, chunk=32) as other:
        expected, got = (answers(e, IDS, ()) for e in (engine, other))
    assert np.abs(got - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kv", [Ruled(H2O(keep=20), Int8Store()), *STORES[2:]], ids=str)
def test_sequences_do_not_mix(folder, kv):
    prompts = [IDS[:50], IDS[5:20], IDS[20:]]
    alone = []
    for prompt in prompts:
        with open_engine(folder, kv=kv) as engine:
            alone.append(answers(engine, prompt, IDS[:6]))
    with open_engine(folder, kv=kv, n_sequences=3) as engine:
        for sequence, prompt in enumerate(prompts):
            assert np.array_equal(engine.prefill(prompt, sequence=sequence), alone[sequence][0])
        for step, token in enumerate(IDS[:6]):
            logits = engine.decode_batch({2: token, 0: token, 1: token}).copy()
            for row, sequence in enumerate((2, 0, 1)):
                assert np.allclose(logits[row], alone[sequence][1 + step], atol=1e-5 * np.abs(logits).max())


@pytest.mark.parametrize("place", PLACES)
def test_every_tokens_logits(folder, place):
    """The same in the pass over the prompt as behind shorter prompts, where nothing has gone yet."""
    rows = {}
    kv = Ruled(SnapKV(keep=40, window=6, room=40), HalfStore())
    with open_engine(folder, kv=kv, n_logits=3, **PLACES[place]) as engine:
        engine.prefill(IDS[:38], all_logits=lambda first, some: rows.update(enumerate(some.copy(), first)))
        assert sorted(rows) == list(range(38))
        for n in (1, 9, 38):
            engine.reset()
            assert np.allclose(engine.prefill(IDS[:n]), rows[n - 1], atol=2e-5)


@pytest.mark.parametrize("kv", STORES, ids=str)
def test_beginning_anew_forgets_everything(folder, kv):
    with open_engine(folder, kv=kv) as engine:
        first = answers(engine, IDS[:40], IDS[40:50])
        engine.reset()
        assert engine.position == 0
        assert np.array_equal(answers(engine, IDS[:40], IDS[40:50]), first)


def test_going_back(tmp_path):
    folder = tmp_path / "llama"  # the other one's rings have moved on
    write_random(folder, LLAMA)
    with open_engine(folder, kv=Ruled(Sinks(keep=60), HalfStore())) as engine:
        engine.prefill(IDS[:40])
        expected = engine.decode(9).copy()
        for token in (5, 6, 7):
            engine.decode(token)
        engine.truncate(40)
        assert engine.position == 40
        assert np.allclose(engine.decode(9), expected, atol=1e-6 * np.abs(expected).max())
    with open_engine(folder, kv=Ruled(Sinks(keep=30), HalfStore())) as engine:
        engine.prefill(IDS[:40])
        engine.decode(9)
        with pytest.raises(InvalidInput, match="can't go back from 41 tokens to 40"):
            engine.truncate(40)
        assert engine.position == 41


def test_no_room_is_said_before_anything_happens(folder):
    with open_engine(folder, kv=Ruled(SnapKV(keep=20, window=6, room=2), HalfStore())) as engine:
        engine.prefill(IDS[:40])
        first = [engine.decode(token).copy() for token in (1, 2)]
        with pytest.raises(InvalidInput, match="all 22 slots are taken"):
            engine.decode(3)
        assert engine.position == 42
        engine.reset()
        engine.prefill(IDS[:40])
        assert np.array_equal(engine.decode(1), first[0])


def test_a_prompt_that_fails_leaves_an_empty_sequence(tmp_path):
    write_random(tmp_path / "m", LLAMA)
    with open_engine(tmp_path / "m", kv=Ruled(Sinks(keep=20), HalfStore()), n_streamed_layers=4) as engine:
        good = engine.prefill(IDS[:30]).copy()
        engine.reset()
        engine._files.read = _fails
        with pytest.raises(CorruptFile):
            engine.prefill(IDS[:30])
        del engine._files.read
        assert engine.position == 0
        assert np.array_equal(engine.prefill(IDS[:30]), good)


def test_an_interruption_leaves_an_empty_sequence(folder):
    with open_engine(folder, kv=Ruled(H2O(keep=20), HalfStore()), n_sequences=2) as engine:
        first = answers(engine, IDS[:40], IDS[40:42])
        engine.reset()
        engine.prefill(IDS[:40])
        engine.prefill(IDS[:20], sequence=1)
        engine._by_layer.stepped = _fails
        with pytest.raises(CorruptFile):
            engine.decode(9)
        del engine._by_layer.stepped
        assert engine.positions == (0, 20)
        assert np.array_equal(answers(engine, IDS[:40], IDS[40:42]), first)


def test_a_model_of_windows_has_nothing_to_rule(tmp_path):
    windows = GEMMA | {"layer_types": ["sliding_attention"] * 4}
    write_random(tmp_path / "m", windows)
    for kv in (Ruled(H2O(keep=20), HalfStore()), Kivi()):
        with pytest.raises(Incompatible, match="has nothing to rule"):
            open_engine(tmp_path / "m", kv=kv)


def _fails(*_args):
    raise CorruptFile("the disk is gone")


@pytest.mark.parametrize(
    "kv", [HalfStore(), *(Ruled(H2O(keep=20), s) for s in (HalfStore(), MiniCache())), Kivi(residual=32)], ids=str
)
def test_a_fork_goes_on_by_itself(folder, kv):
    with open_engine(folder, kv=kv, n_sequences=3) as engine:
        engine.prefill(IDS[:45])
        engine.fork(0, 2)
        assert engine.positions == (45, 0, 45)
        other = [engine.decode(token, 2).copy() for token in (8, 9)]
        own = [engine.decode(token, 0).copy() for token in (1, 2)]
        engine.fork(2, 1)
        further = engine.decode(3, 1).copy()
    for tokens, expected in (((8, 9), other), ((1, 2), own), ((8, 9, 3), [*other, further])):
        with open_engine(folder, kv=kv) as engine:
            got = answers(engine, IDS[:45], tokens)[1:]
        assert np.array_equal(got, expected)
    with open_engine(folder, kv=kv, n_sequences=2) as engine, pytest.raises(InvalidInput, match="into itself"):
        engine.fork(1, 1)


def test_rounded_inputs_are_those_of_the_plain_engine(folder):
    """With int8 a prompt meets the kernels of the plain engine, of bfloat16 tiles where there are some."""
    settings = {"activations": "int8", "chunk": 48}
    with (
        open_engine(folder, **settings) as plain,
        open_engine(folder, kv=ALL[0], **settings) as engine,
    ):
        assert np.array_equal(engine.prefill(IDS[:60]), plain.prefill(IDS[:60]))
