"""The engine with weights in other layouts: the same model, another order of bytes."""

import numpy as np
import pytest
from random_files import LLAMA, write_random

from barefoot import ops
from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.kv.stores.f32 import FloatStore
from barefoot.weights.formats.integer import IntegerGroups

CONFIG = LLAMA | {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 192}
LUT = {"2/small": "lut", "4-sym/small": "lut", "8-sym/small": "lut"}
WEIGHTS = {"attn": IntegerGroups(2, 32), "ffn": IntegerGroups(4, 64, True)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts") / "model"
    write_random(folder, CONFIG)
    return folder


def open_engine(model, **settings) -> Engine:
    values = {"context": 64, "chunk": 32, "kv": FloatStore(), "weights": WEIGHTS} | settings
    with Checkpoint(model) as checkpoint:
        return Engine(checkpoint, model_spec(checkpoint), EngineConfig(**values))


def decoded(run: Engine, n: int = 12) -> np.ndarray:
    return np.stack([run.decode(token).copy() for token in range(n)])


def test_matrices_lie_as_the_config_says(model):
    with open_engine(model, layouts=LUT) as run:
        assert {name.split(".")[-1]: w.blocks.layout for name, w in run._matrices.items()} == {
            **dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), "lut"),
            **dict.fromkeys(("embed", "head"), "rows"),
        }
    with open_engine(model, layouts=LUT, activations="float32") as run:
        assert {w.blocks.layout for w in run._matrices.values()} == {"rows"}


def test_inputs_are_tabulated_once_for_all_their_matrices(model, monkeypatch):
    """A product builds its tables once: q, k, v share one, gate and up share one."""
    products = []

    class Recording:
        def __init__(self, program=ops.Program):
            self.program = program()

        def matmul(self, x, weights, outs, **more):
            products.append((x.shape[1], [(w.rows, w.layout) for w in weights]))
            self.program.matmul(x, weights, outs, **more)

        def __getattr__(self, name):
            return getattr(self.program, name)

    monkeypatch.setattr(ops, "Program", Recording)
    with open_engine(model, layouts=LUT):
        pass
    layer = [
        (128, [(128, "lut"), (64, "lut"), (64, "lut")]),
        (128, [(128, "lut")]),
        (128, [(192, "lut"), (192, "lut")]),
        (192, [(128, "lut")]),
    ]
    assert products == 4 * layer


def test_prompts_are_computed_alike(model):
    """Codes and scales unpacked from either layout are the same numbers, and the same kernel multiplies them."""
    ids = list(range(1, 33))
    with open_engine(model, layouts=LUT) as looked_up, open_engine(model) as multiplied:
        np.testing.assert_array_equal(looked_up.prefill(ids), multiplied.prefill(ids))


def test_decoding_differs_by_the_rounding_of_tables(model):
    """Sums of four inputs are rounded to 127 steps of the largest of eight: about 5 of their own deviations of 2, so
    that a product is off by 5 / 127 / sqrt(12) / 2, 0.6 %; 16 products stand behind one another."""
    with open_engine(model, activations="float32") as run:
        exact = decoded(run)
    with open_engine(model, layouts=LUT) as run:
        looked_up = decoded(run)
    with open_engine(model) as run:
        multiplied = decoded(run)
    assert not np.array_equal(looked_up, multiplied)
    error = np.linalg.norm(looked_up - exact) / np.linalg.norm(exact)
    assert error < 0.006 * 16**0.5
    assert error < 1.5 * np.linalg.norm(multiplied - exact) / np.linalg.norm(exact)
