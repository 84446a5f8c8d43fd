"""The side network in PyTorch: the model as it is at first, no gradient of it, what stays, two caches, its files."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from random_files import GEMMA, LLAMA, write_random

torch = pytest.importorskip("torch", reason="training is PyTorch's")

from allocations import Allocations  # noqa: E402
from test_decoder import perturb, stream  # noqa: E402
from test_loop import SETTINGS, Data  # noqa: E402

from barefoot.adapters import folders  # noqa: E402
from barefoot.adapters.files import read_adapter  # noqa: E402
from barefoot.adapters.folders import read_arrays, write_arrays  # noqa: E402
from barefoot.adapters.lora import LoRA  # noqa: E402
from barefoot.adapters.qst import QST  # noqa: E402
from barefoot.core.errors import CorruptFile, Incompatible, InvalidInput, UnsupportedFormat  # noqa: E402
from barefoot.engine.specs import model_spec, spec_from_config  # noqa: E402
from barefoot.io.inventory import Checkpoint  # noqa: E402
from barefoot.io.safetensors import array_entry, write_safetensors  # noqa: E402
from barefoot.plan.job import parse_weights  # noqa: E402
from barefoot.train import MicroBatch  # noqa: E402
from barefoot.train.driver.decoder import Decoder, Frozen  # noqa: E402
from barefoot.train.driver.loop import Trainer  # noqa: E402
from barefoot.train.driver.side_decoder import SideDecoder  # noqa: E402
from barefoot.train.driver.two_caches import TwoCaches  # noqa: E402
from barefoot.train.footprint import Tuning, footprint  # noqa: E402
from barefoot.train.losses.cce import CutCrossEntropy  # noqa: E402
from barefoot.train.losses.plain import Plain  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")
LENGTHS = (40, 23, 9)
THIN = QST(r=8, rank=4)
DOWNSAMPLES = ("adapter", "lora", "linear", "max", "average")
SMOLLM2 = LLAMA | {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module", params=[LLAMA, GEMMA], ids=["llama", "gemma"])
def folder(request, tmp_path_factory):
    found = tmp_path_factory.mktemp("model")
    write_random(found, request.param)
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    found = tmp_path_factory.mktemp("model")
    write_random(found, LLAMA)
    return found


def side(folder, adapter=THIN, **settings) -> SideDecoder:
    with Checkpoint(folder) as checkpoint:
        return SideDecoder(checkpoint, model_spec(checkpoint), adapter, **settings)


def frozen(model: Frozen) -> list[torch.Tensor]:
    return [*model.buffers(), model.norm, *(v for layer in model._vectors for v in layer.values())]


def saved(model, batch: MicroBatch, loss) -> dict[int, torch.Tensor]:
    """What a pass keeps for the backward one, by storage, besides what there was before."""
    held = {t.untyped_storage().data_ptr() for t in [*frozen(model), *model.adapters().values()]}
    found = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage().data_ptr()
        if key not in held:
            found[key] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.loss(batch, loss)
    return found


def n_bytes(tensors: dict[int, torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


# --- shapes and bytes ---------------------------------------------------------------------------------------------


def test_smollm2_trains_what_the_paper_counts():
    """23,761 numbers a layer, and 36 × 576 + 576 + 36 + 1 for the head."""
    spec = spec_from_config(SMOLLM2, "smollm2")
    factors = QST().factors(spec)
    assert sum(f.n_elements for f in factors if f.name.startswith("layers.7.")) == 23_761
    assert QST().n_trained(spec) == 30 * 23_761 + 36 * 576 + 576 + 36 + 1 == 734_179
    assert QST(downsample="average").n_trained(spec) == 734_179 - 30 * (16 * 576 + 16 * 36 + 2 * 36)
    assert QST().side(spec).head_dim == 4
    base, thin = QST().cache_terms(spec, 100)
    assert (base.bytes, thin.bytes) == (100 * 30 * 2 * 192 * 4, 100 * 30 * 2 * 12 * 4)


@pytest.mark.parametrize("knobs", [{"r": 0}, {"rank": 0}, {"downsample": "mean"}])
def test_bad_knobs_are_refused(knobs):
    with pytest.raises(InvalidInput, match=f"qst: {next(iter(knobs))}"):
        QST(**knobs)


@pytest.mark.parametrize("r", [3, 64, 32])
def test_r_must_leave_pairs_to_turn(r):
    """Heads of 64 channels: of 64 parts each would have one, and 3 don't divide them."""
    spec = spec_from_config(SMOLLM2, "smollm2")
    if r == 32:
        assert QST(r=r).side(spec).head_dim == 2
    else:
        with pytest.raises(Incompatible, match=f"r {r} must divide") as found:
            QST(r=r).factors(spec)
        assert found.value.cure == "for smollm2, r can be 2, 4, 8, 16, 32"


@pytest.mark.parametrize("downsample", DOWNSAMPLES)
def test_passes_keep_what_is_stated(folder, downsample):
    """To the byte."""
    model, batch = side(folder, dataclasses.replace(THIN, downsample=downsample)), stream(3, LENGTHS)
    passing = model.adapter.passing(model.spec, sum(LENGTHS), max(LENGTHS), 4)
    stated = sum(term.bytes for term in (*passing.kept, *passing.head))
    loss = saved(model, batch, CutCrossEntropy())
    assert n_bytes(loss) == stated


@pytest.mark.usefixtures("no_scratch")
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_passes_take_what_is_stated(folder, compute):
    model, batch = side(folder, compute=compute), stream(3, LENGTHS)
    found = footprint(model.spec, Tuning(THIN, Plain(), sum(LENGTHS), max(LENGTHS), {}, "keep", compute))
    with Allocations([*frozen(model), *model.adapters().values()]) as seen:
        loss = model.loss(batch, Plain())
        forward = seen.peak
        seen.mark()
        loss.backward()
        backward = seen.peak
    for phase, measured in (("forward", forward), ("backward", backward)):
        passes = found.select(phase=phase)
        stated = sum(passes.select(kind=kind).bytes for kind in ("activations", "workspace", "gradients"))
        assert 0.8 * stated <= measured <= stated, phase


def test_a_third_of_what_adapters_beside_all_matrices_keep(tmp_path):
    """Shapes of SmolLM2 divided by three, QST at r = 16 against LoRA at rank 16 with nothing passed again."""
    third = {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 512}
    write_random(tmp_path, LLAMA | third)
    batch = stream(0, (128,) * 4)
    with Checkpoint(tmp_path) as checkpoint:
        beside = Decoder(checkpoint, model_spec(checkpoint), LoRA(), activations="keep")
    aside = side(tmp_path, QST())
    kept = [n_bytes(saved(model, batch, CutCrossEntropy())) for model in (aside, beside)]
    assert kept[0] <= 0.35 * kept[1]


# --- passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("downsample", DOWNSAMPLES)
def test_at_first_it_is_the_model_bit_for_bit(folder, downsample):
    batch = stream(0, LENGTHS)
    with Checkpoint(folder) as checkpoint:
        formats = {group: parse_weights("nf4(group=32)")[group] for group in ("attn", "ffn")}
        spec = model_spec(checkpoint)
        plain = Decoder(checkpoint, spec, LoRA(), formats=formats)  # its B is 0
    model = side(folder, dataclasses.replace(THIN, downsample=downsample), formats=formats)
    with torch.no_grad():
        assert torch.equal(model.hidden(batch), plain.hidden(batch))


def test_nothing_of_the_base_is_in_the_graph(llama):
    """Every hidden state that is read is a constant, and nothing d_ff wide is kept."""
    model, batch = side(llama), stream(0, LENGTHS)
    read = []
    narrowed = model.narrowed
    model.narrowed = lambda index, x: (read.append(x), narrowed(index, x))[1]
    kept = saved(model, batch, CutCrossEntropy())
    assert len(read) == model.spec.n_layers + 1
    assert all(x.grad_fn is None and not x.requires_grad for x in read)
    assert not any(tensor.shape[-1] in (160, 96 * 4) for tensor in kept.values())
    model.loss(batch, Plain()).backward()
    assert {id(p) for p in model.parameters()} == {id(p) for p in model.adapters().values()}
    assert all(p.grad is not None for p in model.adapters().values())


def test_it_reads_what_the_layers_compute(llama):
    """With α = 0 only the side network is heard: another base behind the same embeddings is heard in it. An imitation
    that reads the embeddings has learned nothing of the model, and says the same."""

    class Blind(SideDecoder):
        def embedded(self, batch: MicroBatch) -> torch.Tensor:
            self.first = super().embedded(batch)
            return self.first

        def narrowed(self, index: int, x: torch.Tensor) -> torch.Tensor:
            return super().narrowed(index, self.first)

    batch, changed = stream(0, LENGTHS), {}
    for kind in (SideDecoder, Blind):
        with Checkpoint(llama) as checkpoint:
            model = kind(checkpoint, model_spec(checkpoint), THIN)
        perturb(model)
        with torch.no_grad():
            model.adapters()["alpha"].zero_()
            before = model.hidden(batch)
            model.layers[0]["down"].weight.zero_()
            changed[kind] = float((model.hidden(batch) - before).abs().max())
    assert changed[Blind] == 0
    assert changed[SideDecoder] > 1e-3


def test_alpha_leaves_one_and_then_all_learn(llama):
    """At α = 1 only α has a gradient; a step later everything has."""
    model, batch = side(llama), stream(0, LENGTHS)
    alpha = model.adapters()["alpha"]
    model.loss(batch, Plain()).backward()
    moved = {name for name, p in model.adapters().items() if p.grad.abs().max() > 0}
    assert moved == {"alpha"}
    with torch.no_grad():
        alpha -= 0.1 * alpha.grad.sign()
    model.zero_grad()
    model.loss(batch, Plain()).backward()
    assert all(p.grad.abs().max() > 0 for p in model.adapters().values())


def test_gradients_are_slopes(llama):
    """Of the loss along a random direction, from both sides, through every part of the side network."""
    model, batch = side(llama), stream(0, LENGTHS)
    perturb(model)
    own = list(model.adapters().values())
    draw = torch.Generator().manual_seed(5)
    model.loss(batch, Plain()).backward()
    step = [torch.randn(p.shape, generator=draw) for p in own]
    slope = sum(float((p.grad * s).sum()) for p, s in zip(own, step, strict=True))
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, s in zip(own, step, strict=True):
                p += sign * 1e-3 * s
            ends.append(float(model.loss(batch, Plain())))
            for p, s in zip(own, step, strict=True):
                p -= sign * 1e-3 * s
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(slope, rel=0.02)


def test_a_document_sees_only_itself(folder):
    model = side(folder)
    perturb(model)
    with torch.no_grad():
        together = model.hidden(stream(0, LENGTHS))
        ids, start = stream(0, LENGTHS).ids, 0
        for n in LENGTHS:
            alone = model.hidden(MicroBatch(ids[start : start + n], ids[start : start + n], (n,)))
            assert torch.allclose(together[start : start + n], alone, atol=1e-4)
            start += n


# --- training, decoding, files ------------------------------------------------------------------------------------


def test_a_training_goes_on_bit_for_bit(llama, tmp_path):
    def trainer(out) -> Trainer:
        return Trainer(side(llama), Plain(), SETTINGS, "same", out)

    def values(found: Trainer) -> list[np.ndarray]:
        return [p.detach().numpy().copy() for p in found.learned.values()]

    for name in "ab":
        (tmp_path / name).mkdir()
    whole = trainer(tmp_path / "a")
    losses = [step.loss for step in whole.run(Data())]
    begun = trainer(tmp_path / "b")
    steps = begun.run(Data())
    first = [next(steps).loss for _ in range(5)]  # the state on disk is of step 4
    again = trainer(tmp_path / "b")
    rest = [step.loss for step in again.run(Data(again.progress.data["at"]))]
    assert again.progress.step == 7
    assert first[:4] + rest == losses
    assert all(np.array_equal(a, b) for a, b in zip(values(whole), values(again), strict=True))
    assert float(whole.learned["alpha"].detach()) != 1.0


def test_two_caches_decode_what_passing_it_all_again_does(folder):
    """Over windows too: the document grows beyond Gemma's 16."""
    model = side(folder)
    perturb(model)
    prompt, n = stream(0, (13,)).ids.tolist(), 24
    caches = TwoCaches(model, len(prompt) + n)
    found = caches.greedy(prompt, n)
    ids = list(prompt)
    for _ in range(n):
        array = np.array(ids)
        with torch.no_grad():
            logits = model.logits(model.hidden(MicroBatch(array, array, (len(ids),))))
        ids.append(int(logits[-1].argmax()))
    assert found == ids[len(prompt) :]
    stated = [term.bytes for term in model.adapter.cache_terms(model.spec, caches.n_positions)]
    assert [c.keys.nbytes + c.values.nbytes for c in (caches.base, caches.side)] == stated
    assert stated[0] == 8 * stated[1]
    with pytest.raises(InvalidInput, match="cache of 37"):
        caches.append([1, 2])


@pytest.fixture
def written(llama, tmp_path):
    model = side(llama)
    perturb(model)
    model.write(tmp_path / "a", "model")
    return model, tmp_path / "a"


def test_a_folder_is_read_back(written):
    model, path = written
    adapter, arrays = read_arrays(path, model.spec)
    assert adapter == THIN
    assert arrays.keys() == model.adapters().keys()
    assert all(np.array_equal(arrays[name], p.detach().numpy()) for name, p in model.adapters().items())
    assert sorted(each.name for each in path.iterdir()) == [folders.CONFIG, folders.TENSORS]


def test_another_task_takes_its_place(written, llama):
    model, path = written
    other, batch = side(llama, seed=9), stream(0, LENGTHS)
    other.read(path)
    with torch.no_grad():
        assert torch.equal(other.hidden(batch), model.hidden(batch))
    with pytest.raises(Incompatible, match="this side network is qst\\(r=4"):
        side(llama, QST(r=4)).read(path)


def test_it_is_no_adapter_for_the_engine(written):
    with pytest.raises(UnsupportedFormat, match="the engine doesn't run it"):
        read_adapter(written[1])


@pytest.mark.parametrize(
    ("facts", "error"),
    [
        ({"version": 2}, UnsupportedFormat),
        ({"adapter": 7}, CorruptFile),
        ({"adapter": "qst(r=7)"}, Incompatible),
        ({"adapter": "qst(r=8, rank=3)"}, CorruptFile),
        ({"adapter": "qst(r=0)"}, CorruptFile),
        ({"adapter": "qst" * 1000}, CorruptFile),
        ({"model": {}}, Incompatible),
    ],
)
def test_what_contradicts_itself_is_refused(written, facts, error):
    model, path = written
    config = json.loads((path / folders.CONFIG).read_text())
    (path / folders.CONFIG).write_text(json.dumps(config | facts))
    with pytest.raises(error):
        read_arrays(path, model.spec)


@pytest.mark.parametrize("change", ["less", "more", "shape", "type", "nan"])
def test_other_arrays_are_refused(written, change):
    model, path = written
    arrays = {name: p.detach().numpy() for name, p in model.adapters().items()}
    if change == "less":
        del arrays["alpha"]
    elif change == "more":
        arrays["beta"] = arrays["alpha"]
    else:
        shape, kind = (2 if change == "shape" else 1, 1), np.float16 if change == "type" else np.float32
        arrays["alpha"] = np.full(shape, np.nan if change == "nan" else 1, kind)
    write_safetensors(path / folders.TENSORS, [array_entry(*each) for each in arrays.items()], {})
    with pytest.raises(CorruptFile, match="beta" if change == "more" else "alpha"):
        read_arrays(path, model.spec)
    if change != "type":
        with pytest.raises(InvalidInput):
            write_arrays(path, THIN, model.spec, arrays)
