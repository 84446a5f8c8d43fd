"""A teacher that is read layer by layer: the whole model's hidden states, what is in memory, how often it is read."""

from __future__ import annotations

import pytest
from random_files import GEMMA, LLAMA, write_random

torch = pytest.importorskip("torch", reason="training is PyTorch's")

from allocations import Allocations  # noqa: E402
from test_decoder import WIDE, decoder, stream  # noqa: E402

from barefoot.adapters.lora import LoRA  # noqa: E402
from barefoot.core.errors import Incompatible  # noqa: E402
from barefoot.core.model import PartSpec, WeightSpec  # noqa: E402
from barefoot.engine.specs import model_spec  # noqa: E402
from barefoot.io.inventory import Checkpoint  # noqa: E402
from barefoot.plan.job import parse_weights  # noqa: E402
from barefoot.train.driver import decoder as decoders  # noqa: E402
from barefoot.train.driver.teacher import Lessons, StoredRows, Teacher  # noqa: E402
from barefoot.train.footprint import Tuning, footprint  # noqa: E402
from barefoot.train.lesson import Lesson  # noqa: E402
from barefoot.train.losses.lrec import LREC  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")
TWO_BITS = "attn=int(bits=2,group=32) ffn=int(bits=2,group=32)"


@pytest.fixture(
    scope="module", params=[LLAMA, LLAMA | {"tie_word_embeddings": True}, GEMMA], ids=["llama", "tied", "gemma"]
)
def folder(request, tmp_path_factory):
    found = tmp_path_factory.mktemp("model")
    write_random(found, request.param)
    return found


@pytest.fixture
def teacher(folder):
    with Checkpoint(folder) as checkpoint:
        yield Teacher(checkpoint, model_spec(checkpoint))


def test_it_says_what_the_whole_model_says(folder, teacher):
    batches, whole = [stream(i, lengths) for i, lengths in enumerate(((23, 9, 1), (5,)))], decoder(folder)
    for plain, found in zip(batches, teacher.taught(batches), strict=True):
        with torch.no_grad():
            assert torch.equal(found.taught.hidden, whole.hidden(plain))
        assert (found.ids is plain.ids, found.lengths, plain.taught) == (True, plain.lengths, None)
    head, ids = teacher.head, torch.tensor([258, 0, 0, 13])
    assert torch.equal(head.dense(), whole.head.dense())
    assert torch.equal(head.dense(7, 19), whole.head.dense(7, 19))
    assert torch.equal(head.at(ids), whole.head.at(ids))


def test_a_base_that_is_its_parent_diverges_by_nothing(folder, teacher):
    (batch,) = teacher.taught([stream()])
    whole, rounded = decoder(folder), decoder(folder, formats=parse_weights(TWO_BITS))
    assert abs(float(whole.loss(batch, LREC(ce=0)).detach())) < 1e-6
    assert float(rounded.loss(batch, LREC(ce=0)).detach()) > 1e-4


def test_a_step_reads_each_layer_once(teacher, monkeypatch):
    """However many micro-batches it has."""
    read, plain = [], decoders.read_rows

    def reading(checkpoint, weight, first=0, n_rows=None):
        read.append((weight.name, n_rows or weight.rows))
        return plain(checkpoint, weight, first, n_rows)

    class Data:
        def __init__(self):
            self.place = {"epoch": 3}

        def step(self):
            return [stream(i) for i in range(3)]

    monkeypatch.setattr(decoders, "read_rows", reading)
    lessons = Lessons(Data(), teacher)
    assert len(lessons.step()) == 3
    assert lessons.place == {"epoch": 3}
    rows: dict[str, int] = {}
    for name, n in read:
        rows[name] = rows.get(name, 0) + n
    assert rows == {w.name: w.rows for w in teacher.spec.weights if w.layer is not None}


def test_one_layer_is_in_memory(tmp_path):
    """Live storages while three micro-batches pass, against what is stated of a pass."""
    write_random(tmp_path, WIDE | {"num_hidden_layers": 12})
    batches = [stream(i, (150, 50)) for i in range(3)]
    with Checkpoint(tmp_path) as checkpoint:
        spec = model_spec(checkpoint)
        found = Teacher(checkpoint, spec)
        held = [*found.buffers(), found.norm]
        assert sum(t.untyped_storage().nbytes() for t in found.buffers() if not t.is_meta) == 0
        with Allocations(held) as seen:
            taught = found.taught(batches)
    assert not any(len(layer) for layer in found.layers)
    layers = sum(4 * w.n_elements for w in spec.weights if w.layer is not None)
    assert seen.peak < layers / 2
    lesson = Lesson(spec, 600, 0)
    passes = footprint(spec, Tuning(LoRA(rank=1), LREC(), 200, 150, {}, lesson=lesson))
    (states,) = passes.select(kind="activations", phase="step")
    assert states.bytes == 600 * 192 * 4 == sum(b.taught.hidden.untyped_storage().nbytes() for b in taught)
    terms = {term.name: term.bytes for term in lesson.passing(200)}
    assert terms.pop("rows that are read") == 512 * 192 * 4  # by numpy, which is not seen here
    stated = states.bytes + sum(terms.values())
    print(seen.peak, stated, terms)
    assert seen.peak <= stated <= 1.1 * seen.peak


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_passes_with_a_teacher_take_what_is_stated(tmp_path, activations):
    write_random(tmp_path, WIDE)
    adapter, loss = LoRA(rank=4), LREC()
    model = decoder(tmp_path, adapter, activations=activations)
    with Checkpoint(tmp_path) as checkpoint:
        theirs = Teacher(checkpoint, model.spec)
        lessons = theirs.taught([stream(lengths=(300, 100))])
        held = [*model.parameters(), *model.buffers(), model.norm, *(v for d in model._vectors for v in d.values())]
        with Allocations(held) as seen:
            model.loss(lessons[0], loss).backward()
    stated = footprint(model.spec, Tuning(adapter, loss, 400, 300, {}, activations, lesson=Lesson(model.spec, 400, 0)))
    predicted = max(
        sum(e.bytes for e in stated.select(phase=phase) if e.kind not in ("weights", "adapter", "optimizer"))
        for phase in ("forward", "backward")
    )
    print(seen.peak, predicted)
    assert seen.peak <= predicted <= 1.1 * seen.peak


def test_a_sum_of_parts_has_no_rows():
    part = PartSpec("csr", "spqr", "w+csr", 8)
    with pytest.raises(Incompatible, match="head is a sum"):
        StoredRows(None, WeightSpec("head", "head", 4, 32, "q8_0", parts=(part,)))
