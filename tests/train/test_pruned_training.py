"""A smaller copy as a base: it computes what the whole model does without those units, in the bytes that are stated."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from random_files import LLAMA, write_random

torch = pytest.importorskip("torch", reason="training is PyTorch's")

from barefoot.adapters.driver.whole import whole_matrices  # noqa: E402
from barefoot.adapters.lora import LoRA  # noqa: E402
from barefoot.adapters.pruning import Pruning, entries, pruned_spec, recovered, sizes_of  # noqa: E402
from barefoot.core.model import ModelSpec  # noqa: E402
from barefoot.engine.specs import model_spec  # noqa: E402
from barefoot.io.inventory import Checkpoint  # noqa: E402
from barefoot.io.safetensors import array_entry, write_safetensors  # noqa: E402
from barefoot.plan.job import parse_weights  # noqa: E402
from barefoot.train import NOTHING, MicroBatch  # noqa: E402
from barefoot.train.driver.decoder import Decoder  # noqa: E402
from barefoot.train.driver.importance import importance  # noqa: E402
from barefoot.train.footprint import Tuning, footprint  # noqa: E402
from barefoot.train.losses.plain import Plain  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

GROUPED = LLAMA | {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 3}
PRUNING = Pruning(0.4, first=1, last=1)
IDS = np.random.default_rng(0).integers(0, 64, 33)
BATCH = MicroBatch(IDS, np.append(IDS[1:], NOTHING), (33,))


def values(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, np.ndarray]:
    found = {}
    for weight in spec.weights:
        raw = np.empty(weight.rows * weight.cols, np.float32)
        checkpoint.read_into(weight.source, raw.view(np.uint8))
        found[weight.name] = raw.reshape(weight.rows, weight.cols)
    return found


def opened(folder):
    checkpoint = Checkpoint(folder)
    return SimpleNamespace(checkpoint=checkpoint, spec=model_spec(checkpoint))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "whole"
    write_random(folder, GROUPED)
    found = opened(folder)
    found.folder, found.kept = folder, PRUNING.random(found.spec, 3)
    yield found
    found.checkpoint.close()


def hidden(model, **settings) -> torch.Tensor:
    with torch.no_grad():
        return Decoder(model.checkpoint, model.spec, LoRA(rank=2), **settings).hidden(BATCH)


def test_the_copy_is_the_model_without_those_units(model, tmp_path):
    """What feeds the removed columns of o and down is of no account where these are 0."""
    weights, entered = values(model.checkpoint, model.spec), []
    for weight in model.spec.weights:
        w = weights[weight.name]
        if weight.name.endswith((".o", ".down")) and weight.layer in model.kept:
            _, cols = entries(model.spec, weight, model.kept[weight.layer])
            gone = np.setdiff1d(np.arange(weight.cols), cols)
            assert len(gone)
            w[:, gone] = 0
        entered.append(array_entry(weight.source, w[0] if weight.group == "norm" else w))
    write_safetensors(tmp_path / "model.safetensors", entered)
    (tmp_path / "config.json").write_bytes((model.folder / "config.json").read_bytes())
    zeroed = opened(tmp_path)
    with zeroed.checkpoint:
        full, copy = hidden(zeroed), hidden(zeroed, kept=model.kept)
    # Sums of fewer terms, the others exactly 0: other orders of float32 sums.
    assert (full - copy).abs().max() < 2e-5 * full.abs().max()
    assert (hidden(model) - hidden(model, kept=model.kept)).abs().max() > 0.1, "in the model itself they count"


@pytest.mark.parametrize("base", ["stored", "nf4(group=32)"])
def test_the_base_takes_what_is_stated_and_less(model, base):
    formats = {} if base == "stored" else parse_weights(base)
    small = pruned_spec(model.spec, sizes_of(model.kept))
    made = Decoder(model.checkpoint, model.spec, LoRA(rank=2), formats=formats, kept=model.kept)
    held = sum(b.untyped_storage().nbytes() for b in made.buffers())
    norms = [v for vectors in made._vectors for v in vectors.values()] + [made.norm]
    held += sum(v.untyped_storage().nbytes() for v in norms)
    tuning = Tuning(LoRA(rank=2), Plain(), 33, 33, formats)
    assert held == footprint(small, tuning).select(kind="weights").bytes
    whole = footprint(model.spec, tuning).select(kind="weights").bytes
    assert held < 0.9 * whole, "cut out, not masked"
    assert made.spec.n_parameters == small.n_parameters < model.spec.n_parameters


def test_an_adapter_of_the_copy_is_put_back_beside_the_model(model):
    made = Decoder(model.checkpoint, model.spec, LoRA(rank=2), kept=model.kept)
    with torch.no_grad():
        for parameter in made.adapters().values():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    whole = recovered(model.spec, made.pairs(), model.kept)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    (weight,) = (w for w in model.spec.weights if w.name == "layers.1.gate")
    module = made.layers[1]["gate"]
    base = Decoder(model.checkpoint, model.spec, LoRA(rank=2)).layers[1]["gate"].base.dense()
    pair = whole[weight.name]
    rows, _ = entries(model.spec, weight, model.kept[1])
    full = x @ (base + pair.scale * torch.from_numpy(pair.b @ pair.a)).T
    with torch.no_grad():
        copy = module(x)
    assert torch.allclose(full[:, torch.from_numpy(rows).long()], copy, rtol=1e-4, atol=1e-4 * copy.abs().max())
    gone = np.setdiff1d(np.arange(weight.rows), rows)
    assert torch.allclose(full[:, gone], (x @ base.T)[:, gone], atol=1e-5)


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_importance_is_of_the_gradient_of_each_weight(model, activations):
    """Against PyTorch's own, where the matrix is a parameter of a product that it knows."""
    made = Decoder(model.checkpoint, model.spec, LoRA(rank=2), activations=activations)
    rows, cols = importance(made, BATCH, Plain())
    assert type(made.layers[0]["q"]).__name__ == "LowRank", "the decoder is as it was"
    for name in ("layers.0.q", "layers.1.k", "layers.2.down", "layers.3.o"):
        _, index, role = name.split(".")
        dense = torch.nn.Linear(made.layers[int(index)][role].base.cols, 1, bias=False)
        dense.weight = torch.nn.Parameter(made.layers[int(index)][role].base.dense())
        kept, made.layers[int(index)][role] = made.layers[int(index)][role], dense
        made.loss(BATCH, Plain()).backward()
        made.layers[int(index)][role] = kept
        expected = (dense.weight * dense.weight.grad).abs().detach().numpy()
        np.testing.assert_allclose(rows[name], expected.sum(1), rtol=1e-3, atol=1e-3 * expected.sum(1).max())
        np.testing.assert_allclose(cols[name], expected.sum(0), rtol=1e-3, atol=1e-3 * expected.sum(0).max())


def test_a_copy_is_aligned_by_training_its_own_matrices(model):
    made = Decoder(model.checkpoint, model.spec, LoRA(rank=2), kept=model.kept)
    before = {f"{i}.{role}": m.base.dense() for i, layer in enumerate(made.layers) for role, m in layer.items()}
    with whole_matrices(made.layers):
        learned = made.adapters()
        assert sum(p.numel() for p in learned.values()) == sum(w.numel() for w in before.values())
        optimizer = torch.optim.SGD(learned.values(), lr=0.05)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = made.loss(BATCH, Plain())
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        wanted = {name: p.detach().clone() for name, p in learned.items()}
    assert losses == sorted(losses, reverse=True)
    for name, w in wanted.items():
        _, index, role, _ = name.split(".")
        module = made.layers[int(index)][role]
        assert torch.equal(module.base.dense(), w), "the base holds what they became"
        assert not torch.equal(w, before[f"{index}.{role}"])
    with torch.no_grad():
        assert float(made.loss(BATCH, Plain())) < losses[-1]
