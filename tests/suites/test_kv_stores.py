"""Every KV store of the registry: exact bytes, fewer than the reference, error within its step, honest refusals."""

import numpy as np
import pytest

from barefoot.core.registry import techniques
from barefoot.engine.specs import spec_from_config
from barefoot.kv.stores.f16 import HalfStore
from barefoot.ops import kvrows

# Those of rows, one for each position; tests/kv has the others.
KNOWN = {n: s for n, s in techniques("kv.stores").items() if s.rows}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 192,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
}
GEMMA = LLAMA | {
    "model_type": "gemma3_text",
    "num_key_value_heads": 1,
    "head_dim": 96,
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


@pytest.fixture(params=KNOWN)
def store(request):
    return KNOWN[request.param]()


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 256])
def test_row_bytes_are_those_of_the_encoded_row(store, head_dim):
    rows = np.random.default_rng(head_dim).standard_normal((5, head_dim), np.float32)
    assert store.row_bytes(head_dim) == kvrows.encode(store.row_format, rows).shape[-1]


@pytest.mark.parametrize(
    ("config", "slots"),
    [(LLAMA, 3 * 100), (GEMMA, 100 + 2 * (20 - 1 + 16))],  # window layers keep the window and one chunk
)
def test_terms_count_every_slot_of_every_layer(store, config, slots):
    spec = spec_from_config(config, "x")
    expected = 2 * slots * spec.n_kv_heads * store.row_bytes(spec.head_dim)
    assert sum(term.bytes for term in store.terms(spec, context=100, chunk=16)) == expected


def test_a_store_takes_no_more_than_floats_and_loses_no_more_than_its_step(store):
    rows = np.random.default_rng(1).standard_normal((64, 128), np.float32) * 3
    back = kvrows.decode(store.row_format, kvrows.encode(store.row_format, rows), 128)
    groups = rows.reshape(64, 4, 32)
    step = {
        "f32": np.zeros((64, 4)),
        "f16": np.abs(groups).max(-1) * 2.0**-10,
        "q8": np.abs(groups).max(-1) / 127,
        "q4": np.ptp(groups, axis=-1) / 15,
        "q3": np.ptp(groups, axis=-1) / 7,
        "q2": np.ptp(groups, axis=-1) / 3,
        "bfp4": 2 * 2 ** (np.floor(np.log2(np.abs(groups).max(-1))) - 2),  # the largest may be a step too small
    }.get(store.row_format)
    assert step is not None, "a new row format states its step here"
    error = np.abs(back - rows).reshape(64, 4, 32).max(-1)
    assert (error <= step / 2 + np.abs(groups).max(-1) * 2.0**-9 * (step > 0)).all()
    if store.row_format not in ("f32", "f16"):
        assert store.row_bytes(128) < HalfStore().row_bytes(128)
