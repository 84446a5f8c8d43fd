"""The operator table against numbers worked out by hand from the models' published shapes."""

from dataclasses import replace

import pytest

from barefoot.core.model import LayerSpec, Rope
from barefoot.engine.config import EngineConfig
from barefoot.kv.stores.f16 import HalfStore
from barefoot.kv.stores.q8 import Int8Store
from barefoot.plan.known import known_models, known_spec
from barefoot.plan.operators import Site, Stage, attention_op, n_pairs, table
from barefoot.weights.formats.integer import IntegerGroups
from barefoot.weights.formats.stored import Stored

SMOL = known_spec("smollm2-135m")
# q and o 576 × 576, k and v 192 × 576, three of 1,536 × 576
LAYER_WEIGHTS = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576
EMBED_WEIGHTS = 49_152 * 576
VECTORS = ("norm", "attn_norm", "ffn_norm")


def total(rows, field, names=None):
    return sum(getattr(op, field) * n for _, op, n in rows if names is None or op.name in names)


def config(**kwargs):
    return EngineConfig(**{"context": 1024, "kv": HalfStore(), **kwargs})


# Parameters as the models' cards state them.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini": 3_821_079_552,
    "phi-3-medium": 13_960_238_080,
}


@pytest.mark.parametrize(("name", "n"), PARAMETERS.items())
def test_known_models_have_their_published_number_of_parameters(name, n):
    assert known_spec(name).n_parameters == n


def test_every_known_model_is_read():
    for name in known_models():
        assert known_spec(name).name == name


def test_decode_operations_of_smollm2():
    rows = table(SMOL, config(), Site(), n=1, past=999)
    attention = 30 * 9 * 1000 * (4 * 64 + 5)  # 9 query heads of 64, 1,000 keys, 5 operations a softmax element
    elementwise = 30 * (3 * 12 * 64 + 2 * 1536 + 2 * 576)
    norms = 7 * 576 * 61
    matrices = 2 * (30 * LAYER_WEIGHTS + EMBED_WEIGHTS)  # the tied head counts, the gather does not
    assert matrices == 268_959_744
    assert total(rows, "ops") == matrices + attention + elementwise + norms


def test_prefill_computes_the_logits_of_the_last_position_only():
    rows = table(SMOL, config(), Site(), n=100, past=0)
    matrices = [(op, n) for _, op, n in rows if op.name not in ("attention", "elementwise", *VECTORS)]
    assert sum(op.ops * n for op, n in matrices) == 2 * (100 * 30 * LAYER_WEIGHTS + EMBED_WEIGHTS)


def test_weight_bytes_include_scales():
    formats = dict.fromkeys(("embed", "attn", "ffn"), IntegerGroups(bits=4))
    rows = table(SMOL, config(weights=formats), Site(), n=1, past=0)
    assert total(rows, "load_weight", ("q", "k", "v", "o", "gate", "up", "down")) == 30 * LAYER_WEIGHTS // 32 * 20
    assert total(rows, "load_weight", ("embed",)) == 576 // 32 * 20  # one row
    assert total(rows, "load_weight", ("head",)) == EMBED_WEIGHTS // 32 * 20  # the same matrix, all of it
    assert total(rows, "load_weight", VECTORS) == 61 * 576 * 4


def test_keys_and_values_are_read_once_per_kv_head():
    decode = table(SMOL, config(), Site(), n=1, past=999)
    assert total(decode, "load_kv") == 1000 * 23_040
    assert total(decode, "store_kv") == 23_040
    quantized = table(SMOL, config(kv=Int8Store()), Site(), n=1, past=999)
    assert total(quantized, "load_kv") == 1000 * 30 * 2 * 3 * (64 + 2 * 2)
    batch = table(SMOL, config(), Site(), n=1, past=999, batch=4)
    assert total(batch, "load_kv") == 4 * 1000 * 23_040
    assert total(batch, "load_weight", ("q", "gate", "down")) == total(decode, "load_weight", ("q", "gate", "down"))


@pytest.mark.parametrize("window", [None, 1, 4, 7, 100])
@pytest.mark.parametrize("past", [0, 3, 6, 7, 50])
@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_pairs_are_the_causal_sum(window, past, n):
    limit = window or 10**9
    assert n_pairs(n, past, window) == sum(min(past + i, limit) for i in range(1, n + 1))


def test_gemma_reads_only_the_window_in_its_local_layers():
    gemma = known_spec("gemma-3-270m")
    assert sum(layer.window == 512 for layer in gemma.layers) == 15
    rows = table(gemma, config(context=4096), Site(), n=1, past=2999)
    assert total(rows, "load_kv") == (15 * 512 + 3 * 3000) * 2 * 256 * 2
    attention = 4 * (4 * 256 + 5) * (15 * 512 + 3 * 3000)
    assert total(rows, "ops", ("attention",)) == attention


def test_head_dim_is_the_models_own():
    layer = LayerSpec(Rope(1e4, 256))
    spec = replace(known_spec("gemma-3-270m"), layers=(layer,))
    op = attention_op(spec, HalfStore(), Site(), Stage("layer", (), True), n=1, past=9)
    assert op.ops == 4 * 10 * (4 * 256 + 5)  # 640 / 4 heads would be 160


def test_integer_arithmetic_only_where_weights_and_activations_are_integers():
    formats = {"attn": IntegerGroups(bits=8), "ffn": Stored()}
    kinds = {op.name: op.compute for _, op, _ in table(SMOL, config(weights=formats), Site(), n=1, past=0)}
    assert (kinds["q"], kinds["gate"], kinds["attention"]) == ("int8", "f32", "f32")
    floats = table(SMOL, config(weights=formats, activations="float32"), Site(), n=1, past=0)
    assert {op.compute for _, op, _ in floats} == {"f32"}
    there = table(SMOL, config(weights=formats), Site("accelerator", 2), n=1, past=0)
    assert {op.compute for _, op, _ in there} == {"f16"}


def test_streamed_layers_are_read_as_stored():
    formats = {"attn": IntegerGroups(bits=8), "ffn": IntegerGroups(bits=8)}
    rows = table(SMOL, config(weights=formats, n_streamed_layers=10), Site(), n=1, past=0)
    from_disk = sum(op.load_weight * n for _, op, n in rows if op.at == "disk")
    assert from_disk == 10 * LAYER_WEIGHTS * 2
    here = sum(op.load_weight * n for _, op, n in rows if op.at == "host" and op.name in ("q", "k", "v", "o"))
    assert here == 20 * (2 * 576 * 576 + 2 * 192 * 576) // 32 * 36


def test_a_streamed_tied_head_leaves_the_embedding_on_disk():
    rows = table(SMOL, config(stream_head=True), Site(), n=7, past=0)
    assert sum(op.load_weight for _, op, _ in rows if op.at == "disk") == EMBED_WEIGHTS * 2 + 7 * 576 * 2
