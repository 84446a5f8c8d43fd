"""The engine takes exactly what the footprint says, kind by kind, and nothing per token."""

import gc
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from random_files import GEMMA, LLAMA, write_random

from barefoot import ops
from barefoot.core.errors import Incompatible, InvalidInput, OverBudget
from barefoot.core.ledger import Footprint, Term, entry
from barefoot.core.measure import release_free_memory, resident
from barefoot.core.registry import techniques
from barefoot.engine.arena import Arena
from barefoot.engine.config import EngineConfig
from barefoot.engine.footprint import CONVERT_ELEMENTS, ENCODE_BYTES_PER_WEIGHT, PASSING, footprint
from barefoot.engine.runner import Engine
from barefoot.engine.sampling import SamplingParams, sample
from barefoot.engine.specs import model_spec, spec_from_config
from barefoot.io.inventory import Checkpoint
from barefoot.kv.stores.f16 import HalfStore
from barefoot.kv.stores.q4 import Int4Store
from barefoot.kv.stores.q8 import Int8Store
from barefoot.ops import blocks
from barefoot.ops.rounding import ENCODED_AT_A_TIME
from barefoot.weights.formats.dense import Dense
from barefoot.weights.formats.integer import IntegerGroups

STORES = {n: s for n, s in techniques("kv.stores").items() if s.rows}
INT4, INT8 = IntegerGroups(4, 32), IntegerGroups(8, 32, True)
INT2 = IntegerGroups(2, 32)
WIDE = LLAMA | {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 1024}
LOOKED_UP = {"weights": {"attn": INT2, "ffn": IntegerGroups(3, 32)}, "layouts": {"2/small": "lut", "3/small": "lut"}}
CASES = {
    "plain": (LLAMA, {}),
    "q8": (LLAMA, {"kv": Int8Store(), "context": 77, "chunk": 5}),
    "int4": (LLAMA, {"weights": {"attn": INT4, "ffn": INT4, "embed": INT8, "head": INT8}, "kv": Int4Store()}),
    "mixed": (LLAMA | {"tie_word_embeddings": True}, {"weights": {"attn": Dense("f16")}, "chunk": 1, "n_threads": 2}),
    "streamed": (LLAMA, {"n_streamed_layers": 2, "weights": {"ffn": INT4}}),
    "all streamed": (LLAMA, {"n_streamed_layers": 4, "stream_head": True, "n_logits": 3}),
    "tied streamed": (LLAMA | {"tie_word_embeddings": True, "vocab_size": 4001}, {"stream_head": True}),
    "looked up": (WIDE, LOOKED_UP),
    "looked up, small chunk": (WIDE, LOOKED_UP | {"chunk": 3, "n_threads": 2}),
    "looked up, rows beside": (LLAMA, LOOKED_UP | {"layouts": {"2/small": "lut", "3/small": "rows"}}),
    "windows": (GEMMA, {"kv": Int8Store(), "context": 300, "chunk": 24, "activations": "float32"}),
    "windows streamed": (GEMMA, {"n_streamed_layers": 3, "stream_head": True, "weights": {"attn": INT8}}),
    "batch": (LLAMA, {"n_sequences": 3, "n_threads": 2}),
    "batch beyond a chunk": (LLAMA, {"n_sequences": 16, "chunk": 5, "kv": Int8Store(), "n_streamed_layers": 1}),
    "batch of windows": (GEMMA, {"n_sequences": 5, "n_logits": 2, "kv": Int4Store(), "stream_head": True}),
}


def config_of(settings) -> EngineConfig:
    return EngineConfig(**{"context": 128, "kv": HalfStore(), "chunk": 16} | settings)


def open_engine(folder, settings) -> Engine:
    with Checkpoint(folder) as checkpoint:
        return Engine(checkpoint, model_spec(checkpoint), config_of(settings))


@pytest.mark.parametrize("case", CASES)
def test_arena_hands_out_what_the_footprint_says(case, tmp_path):
    config, settings = CASES[case]
    write_random(tmp_path / "model", config)
    planned = footprint(spec_from_config(config, "planned from the config alone"), config_of(settings))
    with open_engine(tmp_path / "model", settings) as run:
        used = run.arena.used()
        run.prefill(list(range(40)))
        run.decode(3)
        assert run.arena.used() == used
    expected = Counter()
    for e in planned.select(phase="decode"):
        if e.owner not in PASSING:
            expected[e.kind] += e.bytes
    assert used == expected


@pytest.mark.parametrize("case", CASES)
def test_terms_equal_the_arrays_that_exist(case, tmp_path):
    """The terms of weights and KV against the bytes of the arrays that the engine computes with."""
    config, settings = CASES[case]
    write_random(tmp_path / "model", config)
    with open_engine(tmp_path / "model", settings) as run:
        resident_weights = storage_sizes(
            each.buffer for w in run._matrices.values() for each in (w.blocks, *w.parts)
        ) + storage_sizes(run._vectors.values())
        kv = storage_sizes(a for layer in run._layers for a in (layer.keys, layer.values))
        terms = {(e.owner, t.name): t.bytes for e in run.footprint for t in e.terms if t.name != "alignment"}
    assert resident_weights == sum(n for (owner, _), n in terms.items() if owner.startswith("weights."))
    assert kv == sum(n for (owner, _), n in terms.items() if owner == "kv")


def storage_sizes(arrays) -> int:
    return sum(array.nbytes for array in arrays)


def test_known_bytes_of_smollm_shape():
    """Counted by hand: SmolLM2-135M, int8 groups of 32 (34 bytes) for embeddings, 4-bit groups (20 bytes) elsewhere."""
    config = LLAMA | {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    weights = {"embed": INT8, "attn": INT4, "ffn": INT4}
    plan = footprint(
        spec_from_config(config, "smol"), config_of({"weights": weights, "kv": Int8Store(), "context": 1024})
    )
    by_owner = {e.owner: e.bytes for e in plan}
    assert by_owner["weights.embed"] == 49152 * 576 // 32 * 34
    assert by_owner["weights.attn"] == 30 * (2 * 576 * 576 + 2 * 192 * 576) // 32 * 20
    assert by_owner["weights.ffn"] == 30 * 3 * 576 * 1536 // 32 * 20
    assert by_owner["weights.norm"] == 61 * 576 * 4
    assert by_owner["kv"] == 30 * 2 * 1024 * 3 * (64 + 2 * 2)
    assert by_owner["logits"] == 49152 * 4


def test_look_ups_plan_their_tables_and_nothing_else():
    """For the widest input, 1,024: 16 entries for 4 of them, a scale and a sum for 32, for each token."""
    spec = spec_from_config(WIDE, "wide")
    for chunk, n_tokens in ((1, 1), (5, 5)):
        plans = [footprint(spec, config_of(LOOKED_UP | {"chunk": chunk, "layouts": each})) for each in
                 ({}, LOOKED_UP["layouts"])]  # fmt: skip
        multiplied, looked_up = ({e.owner: e.bytes for e in plan} for plan in plans)
        tables = n_tokens * (16 * 1024 // 4 + 2 * 4 * 1024 // 32)
        assert looked_up["scratch"] - multiplied["scratch"] == tables
        assert {k: v for k, v in looked_up.items() if k not in ("scratch", "staging")} == {
            k: v for k, v in multiplied.items() if k not in ("scratch", "staging")
        }


def test_window_layers_keep_a_ring():
    spec = spec_from_config(GEMMA, "windows")
    plan = footprint(spec, config_of({"context": 300, "chunk": 24}))
    # three layers keep 16 - 1 + 24 positions, one keeps 300; one head of 64 channels at 2 bytes, keys and values
    assert next(e.bytes for e in plan if e.owner == "kv") == (3 * 39 + 300) * 2 * 64 * 2


@pytest.mark.parametrize("n_sequences", [1, 3, 16])
@pytest.mark.parametrize("store", STORES)
def test_a_batch_takes_its_sequences_keys_and_values(store, n_sequences, tmp_path):
    """By hand, from the arrays, and by the system: private memory of this process grows by what is planned."""
    config = LLAMA | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    write_random(tmp_path / "model", config)
    rows = {"f32": 256, "f16": 128, "q8": 64 + 2 * 2, "q4": 32 + 2 * 4, "q3": 24 + 8, "q2": 16 + 8, "bfp4": 32 + 2}
    row = rows[store]  # bytes of a head's 64 numbers
    kv = n_sequences * 4 * 2 * 512 * 4 * row  # layers, keys and values, positions, heads
    settings = {"kv": STORES[store](), "context": 512, "n_sequences": n_sequences}
    gc.collect()
    release_free_memory()
    before = resident()
    with open_engine(tmp_path / "model", settings) as run:
        for s in range(n_sequences):
            run.prefill([s] * 5, sequence=s)
        run.decode_batch(dict.fromkeys(range(n_sequences), 1))
        gc.collect()
        release_free_memory()
        after = resident()
        planned = {e.owner: e.bytes for e in run.footprint.select(phase="decode") if e.owner not in PASSING}
        assert planned["kv"] == kv
        assert planned["logits"] == -(-n_sequences * 259 * 4 // 64) * 64
        assert storage_sizes(a for layer in run._layers for a in (layer.keys, layer.values)) == kv
        if before is not None and after is not None:
            grown = after.anonymous - before.anonymous
            assert abs(grown - sum(planned.values())) < 256 << 10  # less than the smallest sequence's store


def test_large_model_is_planned_from_its_config_alone():
    config = LLAMA | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "vocab_size": 128256,
        "dtype": "bfloat16",
    }
    spec = spec_from_config(config, "70B")
    assert spec.n_parameters == 70_553_706_496
    plan = footprint(spec, config_of({}))
    assert sum(e.bytes for e in plan if e.owner in ("weights.attn", "weights.ffn")) == 2 * (
        80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672)
    )


def test_nothing_stays_allocated_per_token(tmp_path):
    """Decoding on leaves no memory behind, and passing objects stay small, streamed or not."""
    write_random(tmp_path / "model", LLAMA)
    for settings in ({}, {"n_streamed_layers": 3, "stream_head": True}):
        with open_engine(tmp_path / "model", settings | {"context": 512}) as run:
            run.prefill([1, 2, 3])
            tracemalloc.start()
            for token in range(250):  # until the interpreter's own free lists, of each thread, are full
                run.decode(token)
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            for token in range(200):
                run.decode(token)
            _, peak = tracemalloc.get_traced_memory()
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert after - before < 200 * 40  # less than one object a token
        if ops.backend().startswith("native"):  # the numpy reference makes arrays of its own
            assert peak - before < 32 * 1024


def test_a_batch_leaves_nothing_allocated_per_token(tmp_path):
    write_random(tmp_path / "model", LLAMA)
    with open_engine(tmp_path / "model", {"context": 512, "n_sequences": 4}) as run:
        tokens = dict.fromkeys(range(4), 7)
        run.decode_batch(tokens)
        tracemalloc.start()
        for _ in range(250):
            run.decode_batch(tokens)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(200):
            run.decode_batch(tokens)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert after - before < 200 * 40  # less than one object a step


def test_encoding_takes_what_is_planned(rng):
    tile = rng.standard_normal((CONVERT_ELEMENTS // 1024, 1024), dtype=np.float32)
    peaks = {}
    for name in blocks.names():
        if blocks.lookup(name).grid is not None or blocks.lookup(name).encode_blocks is not None:
            out = np.empty((len(tile), blocks.row_bytes(name, tile.shape[1])), np.uint8)
            ops.encode(name, tile, out)
            tracemalloc.start()
            ops.encode(name, tile, out)
            peaks[name] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    planned = ENCODE_BYTES_PER_WEIGHT * ENCODED_AT_A_TIME
    assert 0.8 * planned <= max(peaks.values()) <= planned + 16384
    if ops.backend().startswith("native"):
        assert max(peaks[name] for name in ("int4_g32_asym", "ternary_g64", "q8_0", "nf4_g64")) < 16384


def test_sampling_takes_at_most_what_is_planned(rng):
    vocab = 200_000
    logits = rng.standard_normal(vocab, dtype=np.float32)
    planned = SamplingParams(0.7).footprint(vocab).bytes
    assert SamplingParams().footprint(vocab).bytes == 0
    peaks = []
    for params in (
        SamplingParams(0.7, top_p=0.5, repetition_penalty=1.1),
        SamplingParams(0.7, repetition_penalty=1.1),
        SamplingParams(0.7, top_k=vocab - 1, repetition_penalty=1.1),
        SamplingParams(0.7, min_p=0.5),
        SamplingParams(),
    ):
        generator = params.rng()
        sample(logits, [1, 2, 3], params, generator)  # numpy loads parts of itself at first use
        tracemalloc.start()
        sample(logits, [1, 2, 3], params, generator)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert 0.8 * planned <= max(peaks) <= planned + 16384


def test_loading_peak_is_planned_and_given_back(tmp_path):
    """Private memory of this process: what loading adds stays within the plan, and staging is returned."""
    config = LLAMA | {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 4096, "num_attention_heads": 8}
    write_random(tmp_path / "model", config)
    settings = {"weights": dict.fromkeys(("embed", "head", "attn", "ffn"), INT8)}
    gc.collect()
    release_free_memory()  # loading does so too: what other tests freed must not be counted as its doing
    before = resident()
    with open_engine(tmp_path / "model", settings) as run:
        gc.collect()
        after = resident()
        planned = sum(e.bytes for e in run.footprint.select(phase="decode") if e.owner not in PASSING)
        assert "staging" not in run.arena.used_by_owner()
        assert planned > 32 << 20
        if before is not None and after is not None:
            assert 0.9 * planned < after.anonymous - before.anonymous < 1.1 * planned


def test_large_pages_take_no_byte_more():
    """Regions of odd sizes beside each other: each takes its bytes, rounded to whole small pages."""
    sizes = {"a": (37 << 20) + 1, "b": (21 << 20) + 4097, "c": 999}
    before = resident()
    if before is None:
        pytest.fail("resident memory can't be read on this system")
    plan = Footprint()
    for owner, n_bytes in sizes.items():
        plan += entry(owner, "weights", [Term("x", n_bytes, 1)], phases=("decode",))
    arena = Arena(plan)
    arrays = [arena.take(owner, 64) for owner in sizes]
    taken = resident().anonymous - before.anonymous
    assert 0 <= taken - sum(sizes.values()) < 3 * 4096 + 64 * 1024  # and what Python itself allocates on the way
    assert all(array.nbytes == 64 for array in arrays)


def test_arena_never_grows():
    arena = Arena(entry("a", "workspace", [Term("x", 1, 256)], phases=("decode",)))
    first = arena.take("a", 100)
    assert first.nbytes == 100
    assert arena.take("a", 128).ctypes.data - first.ctypes.data == 128
    assert arena.used() == {"workspace": 256}
    with pytest.raises(OverBudget, match="a asks for 64 B, and 0 B of its planned 256 B are left"):
        arena.take("a", 1)
    with pytest.raises(OverBudget, match="no memory was planned for 'b'"):
        arena.take("b", 1)


def test_released_memory_goes_back_to_the_system():
    n_bytes = 64 << 20
    before = resident()
    if before is None:
        pytest.fail("resident memory can't be read on this system")
    arena = Arena(entry("a", "weights", [Term("x", n_bytes, 1)], phases=("load",)))
    arena.take("a", n_bytes)
    assert 0.95 * n_bytes < resident().anonymous - before.anonymous < 1.05 * n_bytes
    arena.release("a")
    assert resident().anonymous - before.anonymous < 0.05 * n_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 513}, "context must be 1 to 512"),
        ({"chunk": 129}, "chunk must be 1 to 128"),
        ({"n_streamed_layers": 5}, "n_streamed_layers must be 0 to 4"),
        ({"n_logits": 17}, "n_logits must be 1 to 16"),
        ({"n_sequences": 0}, "n_sequences must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(InvalidInput, match=message):
        footprint(spec_from_config(LLAMA, "x"), config_of(settings))


def test_a_format_that_does_not_divide_the_model_is_refused():
    spec = spec_from_config(LLAMA, "x")
    with pytest.raises(Incompatible, match="blocks of 64 columns, and 96"):
        footprint(spec, config_of({"weights": {"attn": IntegerGroups(4, 64)}}))
