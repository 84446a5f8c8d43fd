"""The frozen decoder in PyTorch: the engine's logits, gradients of adapters, what is passed again, what it takes."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from random_files import GEMMA, LLAMA, write_random
from test_architectures import TOLERANCE

torch = pytest.importorskip("torch", reason="training is PyTorch's")

from allocations import Allocations  # noqa: E402

from barefoot.adapters.lora import LoRA  # noqa: E402
from barefoot.core.errors import Incompatible  # noqa: E402
from barefoot.engine.specs import model_spec  # noqa: E402
from barefoot.io.inventory import Checkpoint  # noqa: E402
from barefoot.plan.job import parse_weights  # noqa: E402
from barefoot.train import NOTHING, MicroBatch  # noqa: E402
from barefoot.train.driver.decoder import Decoder  # noqa: E402
from barefoot.train.footprint import Tuning, footprint  # noqa: E402
from barefoot.train.losses.cce import CutCrossEntropy  # noqa: E402
from barefoot.train.losses.plain import Plain  # noqa: E402
from barefoot.weights.module import PackedLinear  # noqa: E402
from barefoot.weights.recycling import Recycler, recycled  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")
LENGTHS = (23, 9, 1)


@pytest.fixture(scope="module", params=[LLAMA, GEMMA], ids=["llama", "gemma"])
def folder(request, tmp_path_factory):
    found = tmp_path_factory.mktemp("model")
    write_random(found, request.param)
    return found


def stream(seed: int = 0, lengths: tuple[int, ...] = LENGTHS, vocab: int = 259) -> MicroBatch:
    ids = np.random.default_rng(seed).integers(0, vocab, sum(lengths))
    labels, ends = np.roll(ids, -1), np.cumsum(lengths) - 1
    labels[ends] = NOTHING
    return MicroBatch(ids, labels, lengths)


def decoder(folder, adapter=None, **settings) -> Decoder:
    with Checkpoint(folder) as checkpoint:
        return Decoder(checkpoint, model_spec(checkpoint), adapter or LoRA(rank=4), **settings)


def perturb(model: Decoder, seed: int = 1) -> None:
    """Adapters that do something: B begins at zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.adapters().values():
            parameter.normal_(0, 0.05, generator=draw)


def gradients(model: Decoder, batch: MicroBatch, loss=None) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model.loss(batch, loss or Plain()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.adapters().items()}


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_documents_of_a_stream_have_the_engines_logits(folder, activations):
    batch, model = stream(), decoder(folder, activations=activations)
    logits = (model.hidden(batch) @ model.head.dense().T).detach().numpy()
    if cap := model.spec.logit_softcap:
        logits = cap * np.tanh(logits / cap)
    start = 0
    for n in LENGTHS:
        with tiny.engine(folder, chunk=16) as run:
            expected = tiny.all_logits(run, batch.ids[start : start + n].tolist(), n)
        assert np.abs(logits[start : start + n] - expected).max() < TOLERANCE
        start += n


def test_gradients_are_those_of_dense_matrices_with_the_product_added(folder):
    """W + scale B A as one matrix, differentiated by PyTorch."""
    batch, model = stream(), decoder(folder)
    perturb(model)
    found = gradients(model, batch)
    dense, leaves = decoder(folder, activations="keep"), {}

    class Whole(torch.nn.Module):
        def __init__(self, module, name):
            super().__init__()
            self.weight = module.base.dense()
            self.pair = [model.adapters()[f"{name}.{letter}"].detach().clone().requires_grad_() for letter in "AB"]
            leaves.update(zip((f"{name}.A", f"{name}.B"), self.pair, strict=True))
            self.scale = module.scale

        def forward(self, x):
            a, b = self.pair
            return x @ (self.weight + self.scale * b @ a).T

    for index, layer in enumerate(dense.layers):
        for role in list(layer):
            layer[role] = Whole(layer[role], f"layers.{index}.{role}")
    logits = dense.hidden(batch) @ dense.head.dense().T
    if cap := dense.spec.logit_softcap:
        logits = cap * torch.tanh(logits / cap)
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels), ignore_index=NOTHING).backward()
    assert found.keys() == leaves.keys()
    for name, gradient in found.items():
        error = (gradient - leaves[name].grad).norm() / leaves[name].grad.norm()
        assert error < 2e-5, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_passed_again_has_the_same_gradients(folder, dropout):
    batch, found = stream(), []
    for activations in ("keep", "recompute"):
        model = decoder(folder, LoRA(rank=4, dropout=dropout), activations=activations)
        perturb(model)
        model.train()
        torch.manual_seed(3)
        found.append(gradients(model, batch))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    torch.manual_seed(4)
    other = gradients(model, batch)
    assert all(torch.equal(other[name], found[1][name]) for name in other) == (dropout == 0)


def test_products_that_no_gradient_needs_are_not_taken_again(folder, monkeypatch):
    """The last of a layer, where no norm is behind it."""
    model, product, taken = decoder(folder, activations="recompute"), PackedLinear.product, []
    names = {id(module.base): role for layer in model.layers for role, module in layer.items()}
    monkeypatch.setattr(
        PackedLinear, "product", lambda self, x: (taken.append(names.get(id(self), "head")), product(self, x))[1]
    )
    gradients(model, stream())
    normed = "post_ffn_norm" in model._vectors[0]
    n = model.spec.n_layers
    assert {role: taken.count(role) for role in ("q", "up", "down")} == {
        "q": 2 * n,
        "up": 2 * n,
        "down": n + n * normed,
    }


def test_recycling_changes_no_gradient(folder):
    batch, found = stream(lengths=(97, 60)), []
    for recycler in (None, Recycler()):
        model = decoder(folder, activations="keep")
        perturb(model)
        for _ in range(2):
            with recycled(recycler):
                found.append(gradients(model, batch))
        if recycler is not None:
            assert recycler.most > 0
    assert all(torch.equal(found[0][name], each[name]) for each in found[1:] for name in found[0])


def test_a_rounded_base_is_frozen_and_learned_beside(folder):
    model = decoder(folder, formats=parse_weights("int(bits=8,group=32)"))
    batch = stream()
    before = model.layers[0]["q"].base.weight.clone()
    assert all(torch.count_nonzero(g) for name, g in gradients(model, batch).items() if name.endswith("B"))
    assert torch.equal(before, model.layers[0]["q"].base.weight)
    assert before.shape[1] == 96 * 9 // 8 + 96 // 32 or before.dtype == torch.uint8
    exact = decoder(folder).hidden(batch)
    error = ((model.hidden(batch) - exact).norm() / exact.norm()).item()
    assert 1e-4 < error < 0.05  # 8 bits: near, and not the same


def test_a_base_with_doubly_quantized_scales_is_its_decoded_matrices(folder):
    """In its bytes, its products and its adapters' gradients; the embedding's rows stay."""
    formats = {group: parse_weights("nf4(double=true)")[group] for group in ("attn", "ffn")}
    model, dense = decoder(folder, formats=formats), decoder(folder, formats=parse_weights("dense(dtype=f32)"))
    bases = [module for layer in model.layers for module in layer.values()]
    held = [module.base.weight.untyped_storage().nbytes() for module in bases]
    stated = footprint(model.spec, Tuning(LoRA(rank=4), Plain(), 33, 23, formats)).select(kind="weights")
    rest = [model.embed.weight, *(() if model.spec.tied else (model.head.weight,)), model.norm]
    rest += [vector for vectors in model._vectors for vector in vectors.values()]
    assert sum(held) + sum(t.untyped_storage().nbytes() for t in rest) == stated.bytes
    for module, other in zip(bases, (m for layer in dense.layers for m in layer.values()), strict=True):
        error = (module.base.dense() - other.base.dense()).norm() / other.base.dense().norm()
        assert 0.02 < error.item() < 0.15
        other.base.pack(module.base.dense())
    perturb(model)
    perturb(dense)
    found, expected = (gradients(each, stream()) for each in (model, dense))
    for name, gradient in found.items():
        assert ((gradient - expected[name]).norm() / expected[name].norm()).item() < 1e-5, name


def test_doubly_quantized_embeddings_are_refused_before_anything_is_read(folder):
    formats = parse_weights("nf4(double=true)")
    with Checkpoint(folder) as checkpoint:
        spec = model_spec(checkpoint)
    for refused in (
        lambda: footprint(spec, Tuning(LoRA(), Plain(), 32, 32, formats)),
        lambda: decoder(folder, formats=formats),
    ):
        with pytest.raises(Incompatible, match="embeddings and heads"):
            refused()


def test_bfloat16_products_stay_near(folder):
    batch = stream()
    exact, near = (decoder(folder, compute=kind).hidden(batch) for kind in ("float32", "bfloat16"))
    assert 1e-4 < ((near - exact).norm() / exact.norm()).item() < 0.05


SIZES = {"hidden_size": 192, "intermediate_size": 512}
WIDE = LLAMA | SIZES | {"num_attention_heads": 3, "num_hidden_layers": 5}


@pytest.mark.usefixtures("no_scratch")
@pytest.mark.parametrize("shape", [WIDE, GEMMA | SIZES], ids=["llama", "gemma"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("loss", [Plain(), CutCrossEntropy()], ids=str)
@pytest.mark.parametrize("rank", [4, 32])
def test_passes_take_what_is_stated(tmp_path, shape, compute, activations, loss, rank):
    """Live storages at their peak, the base and the adapters apart."""
    write_random(tmp_path, shape)
    adapter, batch = LoRA(rank=rank), stream(lengths=(300, 100))
    model = decoder(tmp_path, adapter, activations=activations, compute=compute)
    held = [*model.parameters(), *model.buffers(), model.norm, *(v for d in model._vectors for v in d.values())]
    tuning = Tuning(adapter, loss, 400, 300, {}, activations, compute)
    stated = footprint(model.spec, tuning)
    with Allocations(held) as seen:
        model.loss(batch, loss).backward()
    predicted = max(
        sum(e.bytes for e in stated.select(phase=phase) if e.kind not in ("weights", "adapter", "optimizer"))
        for phase in ("forward", "backward")
    )
    assert seen.peak <= predicted <= (1.06 if shape is WIDE and compute == "float32" else 1.1) * seen.peak
