"""LaMDA while it trains: what it computes, keeps, lets go of, resumes from, and writes."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from allocations import Allocations
from random_files import LLAMA, write_random

torch = pytest.importorskip("torch", reason="training is PyTorch's")

from barefoot.adapters.lamda import LaMDA, energy, squares  # noqa: E402
from barefoot.adapters.lora import LoRA  # noqa: E402
from barefoot.core.errors import CorruptFile, Incompatible  # noqa: E402
from barefoot.engine.specs import model_spec  # noqa: E402
from barefoot.io.inventory import Checkpoint  # noqa: E402
from barefoot.plan.job import parse_weights  # noqa: E402
from barefoot.train import NOTHING, MicroBatch  # noqa: E402
from barefoot.train.driver import state  # noqa: E402
from barefoot.train.driver.decoder import Decoder  # noqa: E402
from barefoot.train.driver.loop import Settings, Trainer  # noqa: E402
from barefoot.train.footprint import Tuning, footprint  # noqa: E402
from barefoot.train.losses.cce import CutCrossEntropy  # noqa: E402
from barefoot.weights.module import PackedLinear  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LENGTHS = (19, 12)
LOSS = CutCrossEntropy()


def batch(seed: int, lengths: tuple[int, ...] = LENGTHS) -> MicroBatch:
    ids = np.random.default_rng(seed).integers(0, 64, sum(lengths))
    labels = np.append(ids[1:], NOTHING)
    labels[np.cumsum(lengths) - 1] = NOTHING
    return MicroBatch(ids, labels, lengths)


SMALL = LLAMA | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "random"
    write_random(folder, SMALL)
    with Checkpoint(folder) as checkpoint:
        yield SimpleNamespace(path=folder, checkpoint=checkpoint, spec=model_spec(checkpoint))


def decoder(model, adapter, **settings) -> Decoder:
    return Decoder(model.checkpoint, model.spec, adapter, **settings)


class Numbered:
    """Two micro-batches a step, by its number."""

    def __init__(self, at: int = 0) -> None:
        self.at = at

    def step(self) -> Sequence[MicroBatch]:
        self.at += 1
        return batch(2 * self.at), batch(2 * self.at + 1)

    @property
    def place(self) -> dict[str, int]:
        return {"at": self.at}


def trainer(model, adapter, folder, steps=10, **settings) -> Trainer:
    made = Settings(steps, lambda step: 3e-3, weight_decay=0.1, save_every=0)
    return Trainer(decoder(model, adapter, **settings), LOSS, made, "one", folder)


# --- what it computes ---


@pytest.mark.parametrize("knobs", [{}, {"init": "zero_core"}, {"ranks": "spectrum", "rank": 8}])
def test_training_begins_with_the_model_as_it_is(model, knobs):
    with torch.no_grad():
        base = decoder(model, LoRA(rank=4)).hidden(batch(0))  # whose B begins at 0
        found = decoder(model, LaMDA(**{"rank": 16} | knobs)).hidden(batch(0))
    assert (found - base).abs().max() <= 1e-4


def test_leaving_the_base_whole_beside_a_full_core_would_not():
    """The teeth: the imitation counts what the adapter took from the matrix twice."""
    w = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    weight = SimpleNamespace(name="layers.0.q", rows=24, cols=32)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    base = PackedLinear("f32", 32, 24)
    base.pack(w)
    made = LaMDA(rank=4).module(base, weight, 4, lambda _: w.numpy().copy(), None)
    assert (made(x) - x @ w.T).abs().max() < 1e-4
    base.pack(w)
    assert (made(x) - x @ w.T).abs().max() > 1


@pytest.mark.parametrize("order", ["largest_first", "smallest_first"])
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_gradients_are_those_of_the_factors_multiplied_out(order, step):
    rng = torch.Generator().manual_seed(2)
    w, x = torch.randn(10, 14, generator=rng), torch.randn(2, 5, 14, generator=rng, requires_grad=True)
    weight = SimpleNamespace(name="layers.0.q", rows=10, cols=14)
    base = PackedLinear("f32", 14, 10)
    made = LaMDA(rank=6, order=order).module(base, weight, 6, lambda _: w.numpy().copy(), None)
    whole, core = made.B.detach().clone(), made.S.detach().clone().requires_grad_()
    made.advance(step, 10)
    left = (6, 4, 2, 0)[step]
    stay = slice(6 - left, 6) if order == "largest_first" else slice(left)
    assert torch.equal(made.B, whole[stay]), "the rows of the larger singular values come first"
    rows = whole.clone().requires_grad_()
    g = torch.randn(2, 5, 10, generator=rng)
    expected = torch.autograd.grad(
        x @ base.dense().T + x @ made.A.T @ core @ rows, [x, core, rows], g, retain_graph=False
    )
    y = made(x)
    y.backward(g)
    exact = 64 * torch.finfo(torch.float32).eps * g.norm() * x.norm() * (1 + w.norm())
    assert (x.grad - expected[0]).abs().max() < exact
    assert (made.S.grad - expected[1]).abs().max() < exact
    if left:
        assert (made.B.grad - expected[2][stay]).abs().max() < exact
    else:
        assert made.B.grad is None
        assert list(made.learned) == ["S"]


def test_rounding_what_is_left_errs_less_than_rounding_the_matrix(model):
    formats = parse_weights("nf4(group=32)")
    with torch.no_grad():
        exact = decoder(model, LoRA(rank=4)).hidden(batch(0))
        plain = decoder(model, LoRA(rank=4), formats=formats).hidden(batch(0))
        ours = decoder(model, LaMDA(rank=32), formats=formats).hidden(batch(0))
    assert (ours - exact).norm() < 0.85 * (plain - exact).norm()


def test_a_base_that_can_not_be_made_anew_is_refused():
    weight = SimpleNamespace(name="layers.0.q", rows=8, cols=256)
    base = PackedLinear("tq1_0", 256, 8)
    w = np.ones((8, 256), np.float32)
    with pytest.raises(Incompatible, match=r"what is left of layers\.0\.q can't be stored") as caught:
        LaMDA(rank=2).module(base, weight, 2, lambda _: w, None)
    assert "zero_core" in str(caught.value.cure)
    LaMDA(rank=2, init="zero_core").module(base, weight, 2, lambda _: w, None)


# --- what it keeps ---


def kept(module, x) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        module(x)
    return found


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_no_input_is_kept(model, step):
    spec, n = model.spec, 37
    weight = next(w for w in spec.weights if w.name == "layers.0.down")
    adapter = LaMDA(rank=12)
    module = decoder(model, adapter).layers[0]["down"]
    module.advance(step, 10)
    x = torch.randn(1, n, weight.cols, requires_grad=True)
    tensors = [t for t in kept(module, x) if not isinstance(t, torch.nn.Parameter)]
    assert all(t.shape[-1] <= 12 for t in tensors)
    assert sum(t.untyped_storage().nbytes() for t in tensors) == 4 * n * adapter.kept(12, step, 10)
    assert 4 * n * adapter.kept(12, step, 10) == 4 * n * (12 + (12, 8, 4, 0)[step])


def test_the_instrument_sees_the_input_that_lora_keeps(model):
    module = decoder(model, LoRA(rank=12)).layers[0]["down"]
    x = torch.randn(1, 37, 96, requires_grad=True)
    assert any(t.shape[-1] == 96 and t.numel() == x.numel() for t in kept(module, x))


def test_a_pass_keeps_less_by_the_inputs_of_its_products(model):
    """All that a pass holds at its end, measured, between this adapter and LoRA: the inputs of the products."""

    def live(adapter):
        made = decoder(model, adapter, activations="keep")
        many = batch(0, (128,))
        with Allocations(held=[*made.parameters(), *made.buffers()]) as seen:
            hidden = made.hidden(many)
            found = seen.live
            del hidden
        return found

    def stated(adapter):
        tuning = Tuning(adapter, LOSS, 128, 128, {}, "keep")
        terms = [t for e in footprint(model.spec, tuning).select(kind="activations").entries for t in e.terms]
        return sum(t.bytes for t in terms)

    lora, lamda = LoRA(rank=8), LaMDA(rank=8)
    measured, expected = live(lora) - live(lamda), stated(lora) - stated(lamda)
    inputs = 4 * 128 * model.spec.n_layers * (2 * 64 + 96 - 7 * 8)
    assert expected == inputs
    # Heads' outputs are kept by attention anyway; all that is left are temporaries of a layer.
    assert measured == pytest.approx(expected, rel=0.02)


# --- what it lets go of ---


def state_bytes(run: Trainer) -> int:
    states = run._optimizer.state.values()
    return sum(m.untyped_storage().nbytes() for s in states for m in (s["exp_avg"], s["exp_avg_sq"]))


def test_moments_and_parameters_fall_with_the_schedule(model, tmp_path):
    adapter = LaMDA(rank=6)
    run = trainer(model, adapter, tmp_path)
    seen = []
    for step in run.run(Numbered()):
        # What is stated for the next step is what is held, storages and all.
        n = adapter.n_trained(model.spec, step.step, 10)
        assert state_bytes(run) == 8 * n
        assert sum(p.untyped_storage().nbytes() for p in run.learned.values()) == 4 * n
        held = [*run.decoder.adapters().values(), *run.decoder.settled().values()]
        assert sum(t.untyped_storage().nbytes() for t in held) == 4 * adapter.n_trained(model.spec)
        stated = footprint(model.spec, Tuning(adapter, LOSS, 31, 19, {}, step=step.step, steps=10))
        assert stated.select(kind="optimizer").bytes == 8 * n
        seen.append(n)
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) == 3
    n_matrices = 7 * model.spec.n_layers
    assert state_bytes(run) == 8 * n_matrices * 6**2


def test_frozen_without_being_let_go_moments_would_stay(model, tmp_path):
    """The teeth: requires_grad alone keeps them."""
    run = trainer(model, LaMDA(rank=6, eta=1.0), tmp_path, steps=100)
    next(run.run(Numbered()))
    before = state_bytes(run)
    for name, parameter in run.learned.items():
        parameter.requires_grad_(not name.endswith("B"))
    assert state_bytes(run) == before > 8 * 7 * model.spec.n_layers * 6**2


def test_settled_rows_stay_as_they_were(model, tmp_path):
    run = trainer(model, LaMDA(rank=6), tmp_path)
    steps = run.run(Numbered())
    for _ in range(2):
        next(steps)
    before = {name: rows.clone() for name, rows in run.decoder.settled().items()}
    assert {len(rows) for rows in before.values()} == {4}
    for _ in steps:
        pass
    after = run.decoder.settled()
    assert {len(rows) for rows in after.values()} == {6}
    assert all(torch.equal(after[name][:4], rows) for name, rows in before.items())


# --- what it resumes from, and writes ---


@pytest.mark.parametrize("adapter", [LaMDA(rank=6), LaMDA(rank=6, order="smallest_first", init="zero_core"), LoRA(4)])
def test_going_on_is_as_never_having_stopped(model, tmp_path, adapter):
    whole = trainer(model, adapter, tmp_path, steps=7)
    states, losses = {}, []
    for step in whole.run(Numbered()):
        losses.append(step.loss)
        if step.step in (1, 2, 5):
            whole.save()
            states[step.step] = (tmp_path / state.NAME).read_bytes()
    expected = whole.decoder.pairs()
    for stop, content in states.items():
        (tmp_path / state.NAME).write_bytes(content)
        again = trainer(model, adapter, tmp_path, steps=7)
        assert again.progress.step == stop
        assert [step.loss for step in again.run(Numbered(stop))] == losses[stop:]
        found = again.decoder.pairs()
        assert all(np.array_equal(found[n].a, p.a) and np.array_equal(found[n].b, p.b) for n, p in expected.items())


def test_a_state_of_another_step_is_refused(model, tmp_path):
    """Rows that the header's step says are settled must be there as such."""
    run = trainer(model, LaMDA(rank=6), tmp_path)
    next(run.run(Numbered()))
    run.progress.step = 5
    run.save()
    with pytest.raises(CorruptFile, match=r"has no f32 tensor 'settled\.layers\.0\.q\.B' of shape \(6, 96\)"):
        trainer(model, LaMDA(rank=6), tmp_path)
    assert (tmp_path / state.NAME).is_file()


@pytest.mark.parametrize("init", ["spectral", "zero_core"])
@pytest.mark.parametrize("n_steps", [2, 7])
def test_the_pair_is_what_was_learned_beside_the_model_as_it_was(model, tmp_path, init, n_steps):
    run = trainer(model, LaMDA(rank=6, init=init), tmp_path, steps=7)
    steps = run.run(Numbered())
    for _ in range(n_steps):
        next(steps)
    pairs = run.decoder.pairs()
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    for role in ("q", "gate"):
        module = run.decoder.layers[1][role]
        (weight,) = (w for w in model.spec.weights if w.name == f"layers.1.{role}")
        original, pair = run.decoder._original(weight), pairs[weight.name]
        assert pair.rank == 6
        merged = original + np.float32(pair.scale) * pair.b @ pair.a
        with torch.no_grad():
            y = module(x).numpy()
        scale = np.abs(x.numpy()).sum(1).max() * np.abs(original).max()
        assert np.abs(y - x.numpy() @ merged.T).max() < 64 * 2.0**-24 * scale
        assert np.abs(pair.b @ pair.a).max() > 1000 * 2.0**-24 * np.abs(original).max(), "something was learned"


# --- LaMDA++ ---


def test_ranks_by_spectra_are_no_worse_than_equal_ones():
    """Six matrices whose principal parts are to be relearned: three of them peaked at 2, three flat up to 12.

    What is to be learned lies in the subspace that each matrix shows the most of: a rank that holds it reaches a lower
    loss. Only the cores learn (eta = 0), so that what rank a matrix has is all there is.
    """
    from barefoot.adapters.lamda import allocate

    rng, n = np.random.default_rng(4), 24
    matrices, shares = {}, {}
    for i in range(6):
        wide = 2 if i % 2 else 12
        values = np.where(np.arange(n) < wide, 1.0, 0.02).astype(np.float32)
        u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0].astype(np.float32) for _ in range(2))
        matrices[str(i)] = ((u * values) @ v.T, (u[:, :wide] * rng.standard_normal(wide)) @ v[:, :wide].T)
        shares[str(i)] = energy(squares(matrices[str(i)][0]), 8)
    by_spectrum = allocate(shares, 8)
    assert min(by_spectrum[str(i)] for i in (0, 2, 4)) >= max(by_spectrum[str(i)] for i in (1, 3, 5))
    assert sum(by_spectrum.values()) == 6 * 8

    def final_loss(ranks) -> float:
        total = 0.0
        for name, (w, change) in matrices.items():
            weight = SimpleNamespace(name=name, rows=n, cols=n)
            base = PackedLinear("f32", n, n)
            made = LaMDA(rank=ranks[name], eta=0.0).module(base, weight, ranks[name], lambda _, w=w: w.copy(), None)
            made.advance(0, 1)
            target, eye = torch.from_numpy((w + change).T.astype(np.float32)), torch.eye(n)
            optimizer = torch.optim.Adam(made.learned.values(), lr=0.05)
            for _ in range(100):
                optimizer.zero_grad()
                loss = (made(eye) - target).square().sum()
                loss.backward()
                optimizer.step()
            total += float(loss.detach())
        return total

    uniform, spectrum = (final_loss(ranks) for ranks in (dict.fromkeys(matrices, 8), by_spectrum))
    reversed_ranks = {name: 16 - rank for name, rank in by_spectrum.items()}
    assert spectrum < 0.7 * uniform < uniform < final_loss(reversed_ranks)
