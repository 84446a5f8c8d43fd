"""An engine whose keys and values take memory as sequences grow: the same logits, in the pool's bytes."""

import numpy as np
import pytest
from random_files import GEMMA, LLAMA, write_random

from barefoot.core.errors import Incompatible, OverBudget
from barefoot.core.measure import resident, resident_at
from barefoot.core.registry import techniques
from barefoot.engine.config import EngineConfig
from barefoot.engine.footprint import footprint
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec, spec_from_config
from barefoot.io.inventory import Checkpoint
from barefoot.kv.placement.slots import PoolExhausted
from barefoot.kv.placement.vattention import VAttention
from barefoot.kv.stores.f16 import HalfStore
from barefoot.plan.job import parse_kv

STORES = {n: s for n, s in techniques("kv.stores").items() if s.rows}
PAGE = 4096
LENGTHS = (70, 3, 33)
# LLAMA: 4 layers with a head of 32 channels: 64 bytes in half precision, 64 tokens a page, 8 pages a group
GROUP = 4 * 2 * PAGE


def open_engine(folder, **settings) -> Engine:
    with Checkpoint(folder) as checkpoint:
        values = {"context": 192, "kv": HalfStore(), "chunk": 17, "activations": "float32", "n_sequences": 3} | settings
        return Engine(checkpoint, model_spec(checkpoint), EngineConfig(**values))


@pytest.fixture(scope="module", params=["llama", "gemma"])
def folder(request, tmp_path_factory):
    """The window layers of gemma keep 16 - 1 + 17 positions, which fill pages."""
    path = tmp_path_factory.mktemp("placement") / request.param
    write_random(path, {"llama": LLAMA, "gemma": GEMMA}[request.param])
    return path


@pytest.fixture
def llama(tmp_path):
    write_random(tmp_path / "llama", LLAMA)
    return tmp_path / "llama"


def prompt(sequence, n=None) -> list[int]:
    return [(11 * sequence + 7 * i) % 250 for i in range(n or LENGTHS[sequence])]


def served(run: Engine) -> list[np.ndarray]:
    """Prompts, steps of all, of one and of two, a sequence that goes back and one that begins anew."""
    rows = [run.prefill(prompt(s), sequence=s).copy() for s in range(3)]
    for step in range(40):
        rows.append(run.decode_batch({s: (31 * s + 5 * step) % 250 for s in range(3)}).copy())
    run.truncate(run.positions[1] - 4, 1)
    rows += [run.decode(9, 1).copy(), run.decode_batch({2: 4, 0: 8}).copy()]
    run.reset(0)
    rows.append(run.prefill(prompt(0, 90), sequence=0).copy())
    run.truncate(0, 2)
    rows.append(run.prefill(prompt(2, 20), sequence=2).copy())
    rows += [run.decode_batch({2: step, 0: 8, 1: 3}).copy() for step in range(30)]
    return rows


@pytest.mark.parametrize("placement", [VAttention(), VAttention(reclaim="eager", background=False)], ids=str)
@pytest.mark.parametrize("store", STORES)
def test_logits_are_those_of_resident_rows_bit_for_bit(folder, store, placement):
    kv = STORES[store]()
    with open_engine(folder, kv=kv) as run:
        expected = served(run)
    with open_engine(folder, kv=kv, kv_placement=placement) as run:
        found = served(run)
    for a, b in zip(expected, found, strict=True):
        assert np.array_equal(a, b)


def test_the_plan_is_the_pool_and_memory_never_more(llama):
    placement = VAttention(pool_bytes=6 * GROUP + 3 * PAGE)
    config = EngineConfig(192, HalfStore(), n_sequences=3, kv_placement=placement)
    planned = {e.owner: e.bytes for e in footprint(spec_from_config(LLAMA, "planned"), config)}
    assert planned["kv"] == 6 * GROUP
    with open_engine(llama, kv_placement=placement) as run:
        assert run.arena.used_by_owner()["kv"] == 6 * GROUP
        pages = run.kv.arrays[0][0]
        address, n_bytes = pages.ctypes.data, run.kv.cache.geometry.n_bytes
        assert n_bytes == 3 * 3 * GROUP  # 192 positions are three pages
        for lengths in ((64, 0, 0), (64, 65, 0), (64, 65, 128)):
            s = next(s for s in range(3) if run.positions[s] != lengths[s])
            run.prefill(prompt(s, lengths[s]), sequence=s)
            needed = GROUP * sum(-(-n // 64) for n in lengths)
            committed = run.kv.cache.committed_bytes
            assert needed <= committed <= 6 * GROUP
            if resident() is not None:
                assert resident_at(address, n_bytes) == committed
        positions = run.positions
        with pytest.raises(PoolExhausted) as raised:  # 1 + 2 + 2 groups, and two more of six
            run.decode_batch({0: 1, 2: 1})
        assert run.positions == positions
        assert (raised.value.needed, raised.value.available) == (7 * GROUP, 6 * GROUP)
        assert isinstance(raised.value, OverBudget)
        run.decode_batch({0: 1, 1: 1})
        run.reset(1)
        run.decode_batch({0: 1, 2: 1})
        with pytest.raises(PoolExhausted):
            run.prefill(prompt(1, 65), sequence=1)
        assert run.positions == (66, 0, 129)
    if resident() is not None:
        assert resident_at(address, n_bytes) == 0


def test_a_prompt_is_refused_before_any_of_it_is_appended(llama):
    with open_engine(llama, kv_placement=VAttention(pool_bytes=2 * GROUP)) as run:
        rows = run.prefill(prompt(0, 30)).copy()
        with pytest.raises(PoolExhausted):
            run.prefill(prompt(0, 100))
        assert run.position == 30
        run.reset()
        assert np.array_equal(run.prefill(prompt(0, 30)), rows)


def test_entries_that_are_no_rows_are_refused(llama):
    for text in ("kivi", "h2o(keep=20) > q8"):
        with pytest.raises(Incompatible, match="commits rows by position"):
            open_engine(llama, kv=parse_kv(text), kv_placement=VAttention())
