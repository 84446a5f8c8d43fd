"""Sorted keys: the same function, whatever the order; the order itself; what it does for blocks of one exponent."""

from __future__ import annotations

import numpy as np
import pytest
from random_files import GEMMA, LLAMA, write_random
from test_batch import open_engine

from barefoot import ops
from barefoot.core.errors import Incompatible
from barefoot.engine import key_order
from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.kv.stores.bfp4 import BlockFloatStore
from barefoot.ops import kvrows
from barefoot.plan.job import parse_kv

IDS = [(7 * i + 3) % 250 for i in range(40)]
WIDE = {"head_dim": 64, "num_attention_heads": 4}  # two blocks a head
QWEN = {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
MODELS = {
    "llama": LLAMA | WIDE | {"num_key_value_heads": 2},
    "gemma": GEMMA | WIDE | {"num_key_value_heads": 1},
    "qwen": LLAMA | QWEN | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("order") / request.param
    write_random(path, MODELS[request.param])
    return path


class Sorted(BlockFloatStore):
    """Rows of float32, with channels in the order of their sizes."""

    row_format = "f32"
    sorts_keys = True

    def row_parts(self, head_dim):
        return (("values", head_dim, 4),)


def logits(engine):
    return np.array([engine.prefill(IDS[:30]).copy(), *(engine.decode(token).copy() for token in IDS[30:])])


@pytest.mark.parametrize("n_streamed", [0, 2])
def test_an_order_changes_nothing_but_rounding(folder, n_streamed):
    """In exact rows; positions count, and heads of queries meet those of their keys."""
    found = []
    for store in (parse_kv("f32"), Sorted()):
        with Checkpoint(folder) as checkpoint:
            config = EngineConfig(96, store, {}, 16, "float32", n_streamed_layers=n_streamed)
            with Engine(checkpoint, model_spec(checkpoint), config) as engine:
                orders = engine._key_orders
                found.append(logits(engine))
    assert orders is not None
    assert not any((own == np.arange(64)).all() for own in orders.reshape(-1, 64))
    assert np.abs(found[1] - found[0]).max() < 1e-5 * np.abs(found[0]).max()


def test_orders_are_those_of_keys_of_white_inputs(folder):
    """s² against the mean squares of keys that random inputs make, before RoPE."""
    with Checkpoint(folder) as checkpoint, open_engine(folder, kv=parse_kv("f32")) as engine:
        spec = model_spec(checkpoint)
        for layer in (0, spec.n_layers - 1):
            got = key_order.sizes_by_weights(checkpoint, spec, layer)
            x = np.random.default_rng(layer).standard_normal((20_000, spec.d_model)).astype(np.float32)
            vectors = {n.split(".")[-1]: v for n, v in engine._vectors.items() if n.startswith(f"layers.{layer}.")}
            keys = np.empty((len(x), spec.n_kv_heads * spec.head_dim), np.float32)
            weight = next(w for w in spec.weights if w.name == f"layers.{layer}.k")
            matrix = np.empty((weight.rows, weight.cols), np.float32)
            checkpoint.read_into(weight.source, matrix.view(np.uint8), weight.row_start, weight.rows)
            keys = (x * vectors["attn_norm"]) @ matrix.T + vectors.get("k_bias", 0)
            keys = keys.reshape(len(x), spec.n_kv_heads, 64) * vectors.get("k_norm", 1)
            assert np.allclose(got, np.square(keys).mean(axis=0), rtol=0.06)
            order = key_order.by_size(got)
            assert (np.diff(np.take_along_axis(got, order.astype(int), 1), axis=1) <= 0).all()
            assert (np.sort(order) == np.arange(64)).all()


@pytest.mark.parametrize(("head_dim", "least"), [(128, 1.25), (256, 1.5), (32, 1.0)])
def test_sorting_lowers_the_error_of_keys_with_large_channels(head_dim, least):
    """Log-normal channels, σ 0.3, one in 16 eight times as large; a head of one block gains nothing."""
    rng = np.random.default_rng(head_dim)
    sizes = np.exp(0.3 * rng.standard_normal(head_dim)) * np.where(np.arange(head_dim) % 16 == 5, 8, 1)
    keys = (rng.standard_normal((2000, head_dim)) * sizes).astype(np.float32)

    def error(x):
        return np.square(kvrows.decode("bfp4", kvrows.encode("bfp4", x), head_dim) - x).mean()

    order = key_order.by_size(sizes[None])[0]
    ratio = error(keys) / error(np.ascontiguousarray(keys[:, order]))
    assert ratio >= least
    if head_dim == 32:
        assert ratio == 1
    else:  # the cheap imitation: any other order
        drawn = rng.permutation(head_dim)
        assert error(np.ascontiguousarray(keys[:, drawn])) > 0.9 * error(keys)


def test_bytes_and_when_there_is_nothing_to_sort(tmp_path):
    for head_dim, expected in ((64, 2 * LLAMA["num_hidden_layers"] * 2 * 64), (32, 0)):
        folder = tmp_path / str(head_dim)
        write_random(folder, MODELS["llama"] | {"head_dim": head_dim})
        with open_engine(folder, kv=parse_kv("bfp4(sort=true)")) as engine:
            stated = sum(entry.bytes for entry in engine.footprint.select(phase="decode") if entry.owner == "key order")
            assert stated == engine.arena.used_by_owner().get("key order", 0) == expected


@pytest.mark.parametrize(
    "kv", ["bfp4(sort=true)", "h2o(keep=20) > bfp4(sort=true)", "think(recent=8) > bfp4(sort=true)"]
)
def test_what_is_sorted_goes_on_from_a_file(folder, kv, tmp_path):
    with open_engine(folder, kv=parse_kv(kv)) as engine, open_engine(folder, kv=parse_kv(kv)) as other:
        engine.prefill(IDS[:30])
        engine.save(tmp_path / "at.kv")
        other.load(tmp_path / "at.kv")
        assert np.array_equal(engine.decode(IDS[30]), other.decode(IDS[30]))


def test_what_does_not_go_with_it_is_refused():
    with pytest.raises(Incompatible, match="turns queries in pairs of channels"):
        parse_kv("sinks(rope=slot) > bfp4(sort=true)")
    with pytest.raises(Incompatible, match="channels would have another order in either layer"):
        parse_kv("minicache > bfp4(sort=true)")


def test_reorder(rng):
    x = rng.standard_normal((5, 4 * 48)).astype(np.float32)
    orders = np.array([rng.permutation(48) for _ in range(2)], np.uint16)
    expected = np.concatenate([x.reshape(5, 4, 48)[:, h][:, orders[h // 2]] for h in range(4)], axis=1)
    got = x.copy()
    ops.reorder(got, orders)
    assert np.array_equal(got, expected)
    with pytest.raises(ValueError, match="below"):
        ops.reorder(got, np.full((2, 48), 48, np.uint16))
    with pytest.raises(ValueError, match="multiple of"):
        ops.reorder(got, orders[:, :40].copy())
