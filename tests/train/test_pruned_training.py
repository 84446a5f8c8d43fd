"""A smaller copy as a base: it computes what the whole model does without those units, in the bytes that are stated."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from random_files import LLAMA, write_random

torch = pytest.importorskip("torch", reason="training is PyTorch's")

from allocations import Allocations  # noqa: E402

from barefoot.adapters.driver.whole import whole_matrices  # noqa: E402
from barefoot.adapters.lora import LoRA  # noqa: E402
from barefoot.adapters.pruning import entries, pruned_spec, recovered, sizes_of  # noqa: E402
from barefoot.adapters.pruning.drawn import Drawn  # noqa: E402
from barefoot.adapters.pruning.files import NAME, read_units, write_units  # noqa: E402
from barefoot.adapters.pruning.taylor import Taylor  # noqa: E402
from barefoot.core.errors import InvalidInput, SourceNotFound  # noqa: E402
from barefoot.core.model import ModelSpec  # noqa: E402
from barefoot.engine.source import source_key  # noqa: E402
from barefoot.engine.specs import model_spec  # noqa: E402
from barefoot.io.inventory import Checkpoint  # noqa: E402
from barefoot.io.safetensors import array_entry, write_safetensors  # noqa: E402
from barefoot.plan.job import parse_weights  # noqa: E402
from barefoot.train import NOTHING, MicroBatch  # noqa: E402
from barefoot.train.driver.cutting import kept_units  # noqa: E402
from barefoot.train.driver.decoder import Decoder, Frozen  # noqa: E402
from barefoot.train.driver.importance import importance  # noqa: E402
from barefoot.train.footprint import Tuning, footprint  # noqa: E402
from barefoot.train.losses.plain import Plain  # noqa: E402
from barefoot.weights.double_quantization import encode  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

GROUPED = LLAMA | {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 3}
PRUNING = Drawn(0.4, first=1, last=1)
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
    found.folder, found.kept = folder, PRUNING.kept(found.spec, PRUNING.sizes(found.spec), 3, dict)
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
    tuning = Tuning(LoRA(rank=2), Plain(), 33, 33, formats, pruning=PRUNING)
    stated = footprint(model.spec, tuning)
    assert held == stated.select(kind="weights").bytes
    assert stated.select(kind="index").bytes == sum(each.n_bytes for each in model.kept.values())
    learned = sum(p.untyped_storage().nbytes() for p in made.adapters().values())
    assert learned == stated.select(kind="adapter").bytes
    assert 2 * learned == stated.select(kind="optimizer").bytes
    whole = footprint(model.spec, replace(tuning, pruning=None)).select(kind="weights").bytes
    assert held < 0.9 * whole, "cut out, not masked"
    assert made.spec.n_parameters == small.n_parameters < model.spec.n_parameters


def test_a_doubly_quantized_copy_is_what_is_left_rounded(model):
    """Its blocks span rows, and are those of the copy: what is cut out is in none."""
    formats = {group: parse_weights("nf4(double=true)")[group] for group in ("attn", "ffn")}
    made, exact = (
        Decoder(model.checkpoint, model.spec, LoRA(rank=2), formats=f, kept=model.kept) for f in (formats, {})
    )
    for layer, other in zip(made.layers, exact.layers, strict=True):
        for role, module in layer.items():
            left = other[role].base.dense().numpy()
            stored = encode([left], left.size, 64)
            assert np.array_equal(module.base.weight.numpy(), stored)
    tuning = Tuning(LoRA(rank=2), Plain(), 33, 33, formats, pruning=PRUNING)
    held = sum(b.untyped_storage().nbytes() for b in made.buffers())
    held += sum(v.untyped_storage().nbytes() for vectors in made._vectors for v in vectors.values())
    assert held + made.norm.untyped_storage().nbytes() == footprint(model.spec, tuning).select(kind="weights").bytes


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


def test_importance_is_of_the_gradient_of_each_weight(model):
    """Against PyTorch's own, where the matrix is a parameter of a product that it knows."""
    base = Frozen(model.checkpoint, model.spec, resident=False)
    rows, cols = importance(base, BATCH, Plain(), range(1, 4))
    assert not any(len(layer) for layer in base.layers), "no layer is left behind"
    assert {name.split(".")[1] for name in rows} == {name.split(".")[1] for name in cols} == {"1", "2", "3"}
    made = Decoder(model.checkpoint, model.spec, LoRA(rank=2))
    for name in ("layers.1.q", "layers.1.k", "layers.2.down", "layers.3.o"):
        _, index, role = name.split(".")
        dense = torch.nn.Linear(made.layers[int(index)][role].base.cols, 1, bias=False)
        dense.weight = torch.nn.Parameter(made.layers[int(index)][role].base.dense())
        kept, made.layers[int(index)][role] = made.layers[int(index)][role], dense
        made.loss(BATCH, Plain()).backward()
        made.layers[int(index)][role] = kept
        expected = (dense.weight * dense.weight.grad).abs().detach().numpy()
        np.testing.assert_allclose(rows[name], expected.sum(1), rtol=1e-3, atol=1e-3 * expected.sum(1).max())
        np.testing.assert_allclose(cols[name], expected.sum(0), rtol=1e-3, atol=1e-3 * expected.sum(0).max())


@pytest.mark.usefixtures("no_scratch")
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_scores_take_what_is_stated(tmp_path, compute):
    """One layer of the model at a time; what the file's rows take while they are read is not PyTorch's."""
    write_random(tmp_path, GROUPED | {"hidden_size": 192, "intermediate_size": 512})
    n, ids = 2048, np.random.default_rng(1).integers(0, 64, 2048)
    batch = MicroBatch(ids, np.append(ids[1:], NOTHING), (512,) * 4)
    tuning = Tuning(LoRA(rank=2), Plain(), n, 512, {}, compute=compute, pruning=Taylor(0.4, first=1, last=1))
    model = opened(tmp_path)
    with model.checkpoint, Allocations() as seen:
        base = Frozen(model.checkpoint, model.spec, compute=compute, resident=False)
        importance(base, batch, Plain(), range(1, 3))
    stated = footprint(model.spec, tuning).select(phase="convert").bytes
    assert 0.75 * stated < seen.peak <= stated


def tuning_of(pruning) -> Tuning:
    return Tuning(LoRA(rank=2), Plain(), 33, 33, {}, pruning=pruning)


def test_units_are_chosen_once_and_kept_with_the_state(model, tmp_path):
    """Where there is a state nothing is scored again; what stands beside it is what counts."""
    asked = []

    def batch() -> MicroBatch:
        asked.append(1)
        return BATCH

    def units(pruning, seed=0):
        return kept_units(model.checkpoint, model.spec, tuning_of(pruning), seed, tmp_path, batch)

    first = units(Taylor(0.4, first=1, last=1))
    assert asked == [1]
    assert sizes_of(first) == Taylor(0.4, first=1, last=1).sizes(model.spec)
    assert units(None) == {}
    (tmp_path / "training.safetensors").write_bytes(b"a state")
    again = units(Taylor(0.4, first=1, last=1))
    assert asked == [1], "read, not scored"
    for layer, each in first.items():
        assert np.array_equal(again[layer].groups, each.groups)
        assert np.array_equal(again[layer].channels, each.channels)
    for other in (Taylor(0.5, first=1, last=1), Drawn(0.4, first=1, last=1)):
        with pytest.raises(InvalidInput, match="beside another copy"):
            units(other)
    (tmp_path / NAME).unlink()
    with pytest.raises(SourceNotFound):
        units(Taylor(0.4, first=1, last=1))
    write_units(tmp_path, PRUNING, model.kept, source_key(model.checkpoint))
    assert sizes_of(units(PRUNING, seed=3)) == sizes_of(model.kept)
    with pytest.raises(InvalidInput, match="beside another copy"):
        units(PRUNING, seed=4)
    given = read_units(tmp_path, model.spec, source_key(model.checkpoint))
    assert sizes_of(units(given, seed=4)) == sizes_of(model.kept), "units that are given follow from no seed"


def test_layers_of_two_sizes_are_counted_one_by_one(model):
    """What passes keep of a layer is in proportion to what is left of it."""
    tuning = replace(tuning_of(None), activations="keep", n_tokens=1000, length=1000)
    parts = {}
    for ratio in (0.0, 0.4):
        stated = footprint(model.spec, replace(tuning, pruning=Drawn(ratio, first=1, last=1)))
        parts[ratio] = stated.select(kind="activations", phase="backward").bytes
    (groups, left), head_dim = PRUNING.counts(model.spec), model.spec.head_dim
    keys, channels = head_dim * (3 - groups), model.spec.d_ff - left  # cut out of each of two layers
    queries = 2 * keys
    # For each token: queries and outputs, keys and values, sums of two heads; gate, up and what they make together.
    less = 2 * 1000 * 4 * (2 * queries + 2 * keys + queries // head_dim + 3 * channels)
    assert parts[0.0] - parts[0.4] == less


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
