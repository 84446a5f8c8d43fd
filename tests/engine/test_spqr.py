"""SpQR in the engine: a fitted model computes with exactly what it stores, resident or streamed, with any cache."""

from __future__ import annotations

import numpy as np
import pytest
from random_files import LLAMA, write_random

from barefoot.core.registry import techniques
from barefoot.engine.config import EngineConfig
from barefoot.engine.fitting import Fit, fit
from barefoot.engine.placement import stored_bytes
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.evals.divergence import Divergence
from barefoot.io.inventory import Checkpoint
from barefoot.kv.stores.f32 import FloatStore
from barefoot.weights.solvers.range import Range
from barefoot.weights.structures.spqr import Spqr

MODEL = LLAMA | {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXTS = np.random.default_rng(3).integers(0, 259, (4, 48)).astype(np.int32)
SPQR = Spqr(bits=3, outliers=0.02)


def fitted(source, target, formats):
    with Checkpoint(source) as checkpoint:
        spec = model_spec(checkpoint)
        how = {w.name: formats(w) for w in spec.weights if w.group != "norm"}
        fit(checkpoint, spec, Fit({n: h for n, h in how.items() if h}, Range(), TEXTS), target).finish({})
    return target


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random model, fitted with all matrices of its layers in SpQR, and the same weights decoded to floats."""
    root = tmp_path_factory.mktemp("spqr")
    write_random(root / "source", MODEL)
    packed = fitted(root / "source", root / "packed", lambda w: SPQR if w.layer is not None else None)
    return root / "source", packed, decoded(packed, root / "decoded")


def decoded(source, target):
    """A plain folder of what ``source`` stores, by the reference decoders alone."""
    import json

    from barefoot.io.safetensors import array_entry, write_safetensors
    from barefoot.ops import blocks, parts

    entries = []
    with Checkpoint(source) as checkpoint:
        for weight in model_spec(checkpoint).weights:
            rows = np.empty((weight.rows, blocks.row_bytes(weight.format, weight.cols)), np.uint8)
            checkpoint.read_into(weight.source, rows)
            dense = blocks.decode(weight.format, rows, weight.cols)
            for part in weight.parts:
                tensor = checkpoint.tensor(part.source)
                path = checkpoint.paths[tensor.shard]
                data = np.fromfile(path, np.uint8, count=part.n_bytes, offset=tensor.offset)
                dense = dense + parts.lookup(part.kind).decode(weight.rows, weight.cols, data)
            entries.append(array_entry(weight.source, dense[0] if weight.group == "norm" else dense))
    target.mkdir()
    (target / "config.json").write_text(json.dumps(MODEL))
    write_safetensors(target / "model.safetensors", entries)
    return target


def logits(folder, **settings):
    """Of three texts that the fit did not see, float32 (n, vocabulary)."""
    with Checkpoint(folder) as checkpoint:
        config = EngineConfig(**{"context": 64, "kv": FloatStore(), "chunk": 32, "n_logits": 32} | settings)
        with Engine(checkpoint, model_spec(checkpoint), config) as run:
            found = []
            for ids in np.random.default_rng(4).integers(0, 259, (3, 40)).tolist():
                run.reset()
                run.prefill(ids, all_logits=lambda _, rows: found.append(rows.copy()))
            return np.concatenate(found)


def kl(reference, other):
    divergence = Divergence()
    divergence.add(reference, other, np.zeros(len(reference), np.int64))
    return divergence.summary["kl_mean"]


def test_the_engine_computes_with_what_is_stored(folders):
    """Floats agree to rounding; with int8 activations no more is lost than on the decoded weights' 8-bit copy."""
    source, packed, dense = folders
    exact = logits(dense, activations="float32")
    np.testing.assert_allclose(logits(packed, activations="float32"), exact, rtol=0, atol=2e-4)
    eight = techniques("weights.formats")["int"](bits=8)
    groups = dict.fromkeys(("attn", "ffn"), eight)
    of_activations = kl(exact, logits(dense, weights=groups))
    assert kl(exact, logits(packed)) < 2 * of_activations
    assert of_activations < 0.1 * kl(logits(source, activations="float32"), exact)  # far below what 3 bits cost


@pytest.mark.parametrize("n_streamed_layers", [1, 4])
def test_streamed_layers_give_the_same_bits(folders, n_streamed_layers):
    resident = logits(folders[1], activations="float32")
    streamed = logits(folders[1], activations="float32", n_streamed_layers=n_streamed_layers)
    assert np.array_equal(streamed, resident)
    # Resident matrices lie in panels, whose int8 products add in another order.
    np.testing.assert_allclose(logits(folders[1], n_streamed_layers=n_streamed_layers), logits(folders[1]), atol=2e-4)


@pytest.mark.parametrize("store", [n for n, s in techniques("kv.stores").items() if not s.needs])
def test_any_cache_goes_with_it(folders, store):
    kv = techniques("kv.stores")[store]()
    np.testing.assert_allclose(
        logits(folders[1], kv=kv, activations="float32"),
        logits(folders[2], kv=kv, activations="float32"),
        rtol=0,
        atol=5e-3,
    )


def test_the_folder_has_the_bytes_of_the_formula(folders):
    with Checkpoint(folders[1]) as checkpoint:
        for weight in model_spec(checkpoint).weights:
            if weight.layer is None or weight.group == "norm":
                continue
            (part,) = weight.parts
            n = part.n_bytes // 4 - weight.rows - 1
            size = weight.rows * weight.cols
            assert stored_bytes(weight) * 8 == size * (3 + 0.625) + 32 * n + 32 * (weight.rows + 1)
            assert stored_bytes(weight) <= SPQR.most(weight.rows, weight.cols).n_bytes
            assert 0.8 * 0.02 * size <= n <= 0.02 * size
