"""The loop: steps in closed form, micro-batches that add up, and a state that goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from random_files import LLAMA, write_random

torch = pytest.importorskip("torch", reason="training is PyTorch's")

from test_decoder import decoder, stream  # noqa: E402

from barefoot.adapters.lamda import LaMDA  # noqa: E402
from barefoot.adapters.lora import LoRA  # noqa: E402
from barefoot.core.errors import CorruptFile, InvalidInput  # noqa: E402
from barefoot.optim.adamw import Adam  # noqa: E402
from barefoot.optim.driver.paged import PagedAdamW  # noqa: E402
from barefoot.optim.paged import PagedAdam  # noqa: E402
from barefoot.train import MicroBatch  # noqa: E402
from barefoot.train.driver import state  # noqa: E402
from barefoot.train.driver.loop import Settings, Trainer  # noqa: E402
from barefoot.train.losses.plain import Plain  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")
SETTINGS = Settings(steps=7, rate=lambda step: 1e-2 / (step + 1), save_every=2)


class Data:
    """Micro-batches by number, ``per_step`` to a step."""

    def __init__(self, at: int = 0, per_step: int = 1) -> None:
        self.at, self.per_step = at, per_step

    def step(self) -> list[MicroBatch]:
        self.at += self.per_step
        return [stream(i, (11, 6)) for i in range(self.at - self.per_step, self.at)]

    @property
    def place(self) -> dict[str, int]:
        return {"at": self.at}


class Listed(Data):
    """These steps."""

    def __init__(self, steps: list[list[MicroBatch]]) -> None:
        super().__init__()
        self.steps = steps

    def step(self) -> list[MicroBatch]:
        return self.steps.pop(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("model")
    write_random(found, LLAMA | {"num_hidden_layers": 2})
    return found


def trainer(folder, out, settings=SETTINGS, adapter=None, **more) -> Trainer:
    return Trainer(decoder(folder, adapter or LoRA(rank=3, dropout=0.2)), Plain(), settings, "same", out, **more)


def learned(found: Trainer) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy().copy() for name, parameter in found.learned.items()}


def test_a_first_step_is_adams(folder, tmp_path):
    """Behind the first step the moments cancel: each number moves by rate × g / (|g| + eps), where nothing is cut."""
    settings = dataclasses.replace(SETTINGS, clip=0.0)
    found = trainer(folder, tmp_path, settings, LoRA(rank=3))
    before, batch = learned(found), stream(0, (11, 6))
    found.decoder.loss(batch, Plain()).backward()
    gradients = {name: parameter.grad.numpy().copy() for name, parameter in found.learned.items()}
    found.decoder.zero_grad(set_to_none=True)
    step = next(found.run(Data()))
    for name, now in learned(found).items():
        g = gradients[name].astype(np.float64)
        assert np.allclose(now, before[name] - 1e-2 * g / (np.abs(g) + 1e-8), atol=1e-7), name
    assert step.norm == pytest.approx(
        np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values())), rel=1e-5
    )


def test_a_step_that_is_not_finite_changes_nothing(folder, tmp_path, monkeypatch):
    """Nor its moments: what follows is as if it had not been, also behind a state that was read again."""
    spoiled = dataclasses.replace(SETTINGS, rate=lambda step: 1e-2, steps=4, save_every=1)
    plain = dataclasses.replace(spoiled, steps=3)

    adapter, clean = LoRA(rank=3), tmp_path / "clean"
    clean.mkdir()
    expected = trainer(folder, clean, plain, adapter)
    for _ in expected.run(Listed([Data(i).step() for i in (0, 2, 3)])):
        pass

    found = trainer(folder, tmp_path, spoiled, adapter)
    loss = found.decoder.loss

    def spoiling(batch, kind):
        return loss(batch, kind) * (np.nan if found.progress.step == 1 else 1)

    monkeypatch.setattr(found.decoder, "loss", spoiling)
    steps = found.run(Data())
    first, before = next(steps), learned(found)
    second = next(steps)
    assert np.isfinite(first.norm)
    assert not np.isfinite(second.norm)
    assert all(np.array_equal(before[name], now) for name, now in learned(found).items())
    assert found.progress.skipped == 1
    steps.close()
    found.save()
    again = trainer(folder, tmp_path, spoiled, adapter)
    assert (again.progress.step, again.progress.skipped) == (2, 1)
    for _ in again.run(Data(2)):
        pass
    assert all(np.array_equal(now, learned(again)[name]) for name, now in learned(expected).items())


def test_gradients_are_cut_together(folder, tmp_path):
    found = trainer(folder, tmp_path, dataclasses.replace(SETTINGS, clip=1e-3), LoRA(rank=3))
    seen = []
    step_of = found._optimizer.step
    found._optimizer.step = lambda: (seen.append([p.grad.clone() for p in found.learned.values()]), step_of())
    step = next(found.run(Data()))
    assert step.norm > 1e-2
    assert float(torch.stack([g.norm() for g in seen[0]]).norm()) == pytest.approx(1e-3, rel=1e-5)


def test_micro_batches_add_up_to_one_stream(folder, tmp_path):
    """Documents of unequal length in two micro-batches: the mean is over all predicted tokens of the step."""
    parts = [stream(1, (11, 6)), stream(2, (4,))]
    whole = MicroBatch(
        np.concatenate([p.ids for p in parts]), np.concatenate([p.labels for p in parts]), (*parts[0].lengths, 4)
    )
    found = []
    for name, batches in (("parts", parts), ("whole", [whole])):
        one = trainer(folder, tmp_path / name, dataclasses.replace(SETTINGS, clip=0.0), LoRA(rank=3))
        loss, norm = one._step(batches, 1e-2)
        found.append((loss, norm, learned(one)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_a_training_goes_on_bit_for_bit(folder, tmp_path):
    """Wherever it is stopped: losses, adapters, and what dropout drew are those of a training that wasn't."""
    whole = trainer(folder, tmp_path / "whole")
    expected = [dataclasses.replace(step, seconds=0) for step in whole.run(Data(per_step=2))]
    for stopped in (1, 2, 3, 6):
        out, seen = tmp_path / str(stopped), []
        first = trainer(folder, out)
        seen += itertools.islice(first.run(Data(per_step=2)), stopped)  # killed before it could save what came last
        second = trainer(folder, out)
        assert second.progress.step == (stopped - 1) // 2 * 2
        place = second.progress.data or {"at": 0}
        seen = seen[: second.progress.step] + list(second.run(Data(place["at"], per_step=2)))
        assert [dataclasses.replace(step, seconds=0) for step in seen] == expected
        for name, numbers in learned(second).items():
            assert np.array_equal(numbers, learned(whole)[name]), (stopped, name)


class FewPages(PagedAdam):
    """Pages so small that the tiny model's moments don't fit into those that stay."""

    def over(self, parameters, folder, **rule):
        return PagedAdamW(parameters, folder, 1024, 3 * 1024, **rule)


@pytest.mark.parametrize("adapter", [LoRA(rank=3, dropout=0.2), LaMDA(rank=8)], ids=["lora", "lamda"])
def test_paged_moments_change_neither_what_is_learned_nor_the_state(folder, tmp_path, adapter):
    """Also where rows stop learning. A state that one optimizer wrote, the other goes on from."""
    found = {}
    for name, optimizer in (("resident", Adam()), ("paged", FewPages())):
        one = trainer(folder, tmp_path / name, adapter=adapter, optimizer=optimizer)
        n_bytes = sum(8 * p.numel() for p in one.learned.values())
        losses = [step.loss for step in one.run(Data())]
        found[name] = losses, learned(one), (tmp_path / name / state.NAME).read_bytes()
    assert one._optimizer.pager.frames.nbytes < n_bytes / 2
    (losses, numbers, file), (losses_too, numbers_too, file_too) = found.values()
    assert losses == losses_too
    assert file == file_too
    assert all(np.array_equal(numbers[name], numbers_too[name]) for name in numbers)
    first = trainer(folder, tmp_path / "both", adapter=adapter, optimizer=FewPages())
    list(itertools.islice(first.run(Data()), 5))
    second = trainer(folder, tmp_path / "both", adapter=adapter)
    assert second.progress.step == 4
    rest = [step.loss for step in second.run(Data(4))]
    assert rest == losses[4:]
    assert (tmp_path / "both" / state.NAME).read_bytes() == file


def test_the_best_is_kept_and_remembered(folder, tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=6, evaluate_every=2, rate=lambda step: 0.0 if step > 1 else 1e-3)
    kept = []
    found = trainer(folder, tmp_path, settings, keep_best=lambda: kept.append(found.progress.step))
    steps = list(found.run(Data(), [stream(0, (11, 6))]))
    judged = [step.held_out for step in steps]
    assert [j is not None for j in judged] == [False, True, False, True, False, True]
    assert judged[1] == judged[3] == judged[5]  # nothing moves at rate 0
    assert kept == [2]
    again = trainer(folder, tmp_path, settings)
    assert (again.progress.best, again.progress.best_step) == (judged[1], 2)


def test_evaluation_changes_nothing(folder, tmp_path):
    held = [stream(9, (11, 6))]
    losses = []
    for every in (0, 1):
        found = trainer(folder, tmp_path / str(every), dataclasses.replace(SETTINGS, evaluate_every=every))
        losses.append([step.loss for step in found.run(Data(), held)])
    assert losses[0] == losses[1]


def test_states_of_others_are_refused(folder, tmp_path):
    found = trainer(folder, tmp_path)
    list(found.run(Data()))
    path = tmp_path / state.NAME
    with pytest.raises(InvalidInput, match="another"):
        Trainer(decoder(folder, LoRA(rank=3)), Plain(), SETTINGS, "other", tmp_path)
    with pytest.raises(CorruptFile, match="shape"):  # the same name, and other shapes
        trainer(folder, tmp_path, adapter=LoRA(rank=4))
    raw = path.read_bytes()
    path.write_bytes(raw[:-100])
    with pytest.raises(CorruptFile):
        trainer(folder, tmp_path)
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    facts = json.loads(header["__metadata__"][state.KEY])
    for wrong in ({"step": -1}, {"step": "3"}, {"data": [1]}, {"data": {"at": -4}}, {"best": "low"}, {"best_step": 99}):
        header["__metadata__"][state.KEY] = json.dumps(facts | wrong)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
        with pytest.raises(CorruptFile):
            trainer(folder, tmp_path)
