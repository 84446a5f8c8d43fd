"""Every weight format × every KV store × resident or streamed, through the engine: each cell runs and is right.

Right means: the same logits as an engine that reads a file of the decoded weights, in f32, with the same KV store. A
combination that can't work must raise the error that its parts declare; a cell that does neither fails.
"""

import itertools
import json

import numpy as np
import pytest
from random_files import LLAMA, write_random

from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.registry import techniques
from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.io.safetensors import array_entry, write_safetensors
from barefoot.kv.ruled import Ruled
from barefoot.kv.stores.f16 import HalfStore
from barefoot.ops import blocks

FORMATS = techniques("weights.formats")
STORES = {n: s for n, s in techniques("kv.stores").items() if not s.needs}
POLICIES = techniques("kv.policies")
GROUPS = ("embed", "attn", "ffn", "head")
IDS = [5, 9, 200, 31, 77, 5, 12]


def logits(folder, **settings) -> np.ndarray:
    with Checkpoint(folder) as checkpoint:
        config = EngineConfig(context=32, chunk=4, activations="float32", **settings)
        with Engine(checkpoint, model_spec(checkpoint), config) as engine:
            engine.prefill(IDS[:-1])
            return engine.decode(IDS[-1]).copy()


def write_decoded(source, target, layout: str, n_streamed: int) -> None:
    """The model with the matrices that are resident rounded to ``layout``, and all else as it was."""
    entries = []
    with Checkpoint(source) as checkpoint:
        spec = model_spec(checkpoint)
        for weight in spec.weights:
            values = np.empty((weight.rows, weight.cols), np.float32)
            checkpoint.read_into(weight.source, values.reshape(-1).view(np.uint8))
            resident = weight.layer is None or weight.layer < spec.n_layers - n_streamed
            if weight.group != "norm" and resident:
                values = blocks.decode(layout, blocks.encode(layout, values), weight.cols)
            entries.append(array_entry(weight.source, values[0] if weight.group == "norm" else values))
    target.mkdir()
    (target / "config.json").write_text(json.dumps(LLAMA))
    write_safetensors(target / "model.safetensors", entries)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix") / "model"
    write_random(folder, LLAMA)
    return folder


@pytest.mark.parametrize("n_streamed", [0, 2])
@pytest.mark.parametrize(("fmt", "store"), list(itertools.product(FORMATS, STORES)))
def test_every_cell_is_right_or_says_why_not(model, tmp_path, fmt, store, n_streamed):
    technique = FORMATS[fmt]()
    try:
        got = logits(model, kv=STORES[store](), weights=dict.fromkeys(GROUPS, technique), n_streamed_layers=n_streamed)
    except (Incompatible, InvalidInput) as refusal:
        assert fmt in str(refusal) or store in str(refusal)  # noqa: PT017 - either outcome is allowed, silence is not
    else:
        write_decoded(model, tmp_path / "decoded", technique.layout("f32"), n_streamed)
        expected = logits(tmp_path / "decoded", kv=STORES[store]())
        assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("fmt", "policy"), list(itertools.product(FORMATS, POLICIES)))
def test_every_policy_over_every_weight_format_is_right(model, tmp_path, fmt, policy):
    """As over the decoded weights, or the format says why it can't be had."""
    technique, kv = FORMATS[fmt](), Ruled(POLICIES[policy](), HalfStore())
    try:
        got = logits(model, kv=kv, weights=dict.fromkeys(GROUPS, technique))
    except (Incompatible, InvalidInput) as refusal:
        assert fmt in str(refusal)  # noqa: PT017 - either outcome is allowed, silence is not
    else:
        write_decoded(model, tmp_path / "decoded", technique.layout("f32"), 0)
        expected = logits(tmp_path / "decoded", kv=kv)
        assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("store", STORES)
def test_streaming_changes_nothing(model, store):
    resident = logits(model, kv=STORES[store]())
    streamed = logits(model, kv=STORES[store](), n_streamed_layers=2, stream_head=True)
    assert (resident == streamed).all()
