"""Fits whose solver refines whole layers: what is gained, resumed, and refused."""

import hashlib

import numpy as np
import pytest
from random_files import GEMMA, LLAMA, write_random
from tiny import all_logits, engine

from barefoot.core.errors import BackendMissing, Incompatible
from barefoot.core.measure import TracedPeak
from barefoot.engine.fit_footprint import footprint
from barefoot.engine.fitting import Fit, fit
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.ops import blocks
from barefoot.ops.grids import Shifted, Special
from barefoot.weights.solvers.omniquant import OmniQuant
from barefoot.weights.solvers.qat import Qat
from barefoot.weights.solvers.range import Range

pytest.importorskip("torch", reason="layer solvers learn with PyTorch")

TEXTS = np.random.default_rng(3).integers(0, 259, (12, 32)).astype(np.int32)
LAYOUT = "int2_g32_asym"
QAT = Qat(start="range", epochs=6, rate=0.01, scale_rate=0.005)
OMNI = OmniQuant(epochs=6, batch=4, rate=0.05, transform=True, transform_rate=0.02)


def fitted(source, target, solver, progress=None, formats=None):
    with Checkpoint(source) as checkpoint:
        spec = model_spec(checkpoint)
        layouts = formats or {w.name: LAYOUT for w in spec.weights if w.layer is not None and w.group != "norm"}
        fit(checkpoint, spec, Fit(layouts, solver, TEXTS), target, progress).finish({})
    return target


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def logits(folder) -> np.ndarray:
    """Of every token of every window."""
    with engine(folder) as run:
        found = []
        for ids in TEXTS:
            run.reset()
            found.append(all_logits(run, ids.tolist()))
    return np.stack(found)


def error(folder, exact) -> float:
    return float(np.square(logits(folder) - exact).mean())


@pytest.mark.parametrize("model", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_layers_refined_together_lose_less_and_are_ordinary_packed_models(model, tmp_path):
    write_random(tmp_path / "source", model)
    exact = logits(tmp_path / "source")
    plain = error(fitted(tmp_path / "source", tmp_path / "plain", Range()), exact)
    # Clipping alone has little to gain on weights that are drawn from one normal distribution.
    for name, solver, share in (("qat", QAT, 0.9), ("omniquant", OMNI, 0.98)):
        folder = fitted(tmp_path / "source", tmp_path / name, solver)
        assert error(folder, exact) < share * plain, name
        with Checkpoint(folder) as checkpoint:
            stored = {w.format for w in model_spec(checkpoint).weights if w.layer is not None and w.group != "norm"}
        assert stored == {LAYOUT}
        assert sum(p.stat().st_size for p in folder.iterdir()) == pytest.approx(
            sum(p.stat().st_size for p in (tmp_path / "plain").iterdir()), abs=64
        )


@pytest.mark.parametrize("stop_at", [3, 8, 12])
def test_an_interrupted_fit_goes_on_to_the_same_bytes(stop_at, tmp_path):
    """Both streams are kept: without the exact one the targets of later layers would differ."""
    write_random(tmp_path / "source", LLAMA)
    whole = fitted(tmp_path / "source", tmp_path / "whole", QAT)

    def stop(done, total, label):
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "source", tmp_path / "parts", QAT, stop)
    assert digest(fitted(tmp_path / "source", tmp_path / "parts", QAT)) == digest(whole)


def test_a_layer_that_keeps_its_blocks_still_carries_the_exact_stream(tmp_path):
    """Only the last layer is fitted: its targets are those of the model as it was."""
    write_random(tmp_path / "source", LLAMA)
    exact = logits(tmp_path / "source")
    with Checkpoint(tmp_path / "source") as checkpoint:
        last = model_spec(checkpoint).n_layers - 1
    layouts = {f"layers.{last}.{role}": LAYOUT for role in ("q", "k", "v", "o", "gate", "up", "down")}
    plain = error(fitted(tmp_path / "source", tmp_path / "plain", Range(), formats=layouts), exact)
    assert error(fitted(tmp_path / "source", tmp_path / "qat", QAT, formats=layouts), exact) < 0.9 * plain


def test_without_torch_a_learning_solver_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    write_random(tmp_path / "source", LLAMA)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendMissing, match="learns with PyTorch"):
        fitted(tmp_path / "source", tmp_path / "out", QAT)
    assert not (tmp_path / "out").exists()


def test_a_format_whose_parameters_cannot_move_is_refused_before_anything_is_written(tmp_path):
    write_random(tmp_path / "source", LLAMA)
    layout = next(name for name in blocks.names() if isinstance(blocks.lookup(name).grid, Shifted | Special))
    with pytest.raises(Incompatible, match=f"can't learn the parameters of {layout}"):
        fitted(tmp_path / "source", tmp_path / "out", QAT, formats={"layers.1.up": layout})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("some", [False, True], ids=["all", "some matrices"])
def test_refining_allocates_what_is_predicted(some, tmp_path):
    """numpy's part of it, traced; PyTorch's is held against dispatched storages in tests/weights."""
    write_random(tmp_path / "source", LLAMA | {"num_hidden_layers": 1, "hidden_size": 192, "intermediate_size": 640})
    texts = np.random.default_rng(4).integers(0, 259, (32, 64)).astype(np.int32)
    solver = Qat(start="range", epochs=1, batch=2)
    with Checkpoint(tmp_path / "source") as checkpoint:
        spec = model_spec(checkpoint)
        groups = ("ffn",) if some else ("attn", "ffn")
        layouts = {w.name: LAYOUT for w in spec.weights if w.group in groups}
        job = Fit(layouts, solver, texts)
        fit(checkpoint, spec, job, tmp_path / "first")  # imports are not counted
        with TracedPeak() as peak:
            fit(checkpoint, spec, job, tmp_path / "out")
    grids = {name.rsplit(".", 1)[-1]: blocks.lookup(LAYOUT).grid for name in layouts}
    learning = sum(term.bytes for term in solver.terms(spec, 0, grids, 64))
    predicted, traced = footprint(spec, job).peak()[1], peak.result.peak - peak.result.before
    assert 0.8 * (predicted - learning) < traced <= predicted
