"""Fitting layer by layer: what is stored, that interruptions leave no trace, and what can't be."""

import hashlib

import numpy as np
import pytest
from random_files import GEMMA, LLAMA, write_random
from tiny import all_logits, engine

from barefoot.core.errors import InvalidInput
from barefoot.engine.calibration import measure
from barefoot.engine.exact import last_states
from barefoot.engine.fit_state import STATE
from barefoot.engine.fitting import Fit, fit
from barefoot.engine.source import Source, decode
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.ops import blocks
from barefoot.weights.solvers.gptq import Gptq
from barefoot.weights.solvers.mse import Mse
from barefoot.weights.solvers.range import Range
from barefoot.weights.structures import Matrix

TEXTS = np.random.default_rng(3).integers(0, 259, (3, 40)).astype(np.int32)
NO_TEXT = np.empty((0, 0), np.int32)
UNIFORM = "int4_g32_asym"


def formats(spec, each=UNIFORM):
    return {w.name: each for w in spec.weights if w.group != "norm"}


def fitted(source, target, job, progress=None):
    with Checkpoint(source) as checkpoint:
        spec = model_spec(checkpoint)
        fit(checkpoint, spec, job(spec), target, progress).finish({})
    return target


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(params=[LLAMA, GEMMA], ids=["llama", "gemma"])
def source(request, tmp_path):
    write_random(tmp_path / "source", request.param)
    return tmp_path / "source"


def test_plain_rounding_stores_the_blocks_that_conversion_at_loading_makes(source, tmp_path):
    folder = fitted(source, tmp_path / "out", lambda spec: Fit(formats(spec), Range(), NO_TEXT))
    with Checkpoint(source) as before, Checkpoint(folder) as after:
        spec = model_spec(before)
        assert {w.format for w in model_spec(after).weights if w.group != "norm"} == {UNIFORM}
        for weight in model_spec(after).weights:
            rows = np.empty((weight.rows, blocks.row_bytes(weight.format, weight.cols)), np.uint8)
            after.read_into(weight.source, rows)
            original = np.empty((weight.rows, weight.cols * 4), np.uint8)
            before.read_into(next(w.source for w in spec.weights if w.name == weight.name), original)
            floats = original.view(np.float32)
            expected = floats.view(np.uint8) if weight.group == "norm" else blocks.encode(UNIFORM, floats)
            np.testing.assert_array_equal(rows, expected, err_msg=weight.name)


def test_the_fitted_folder_computes_with_what_it_stores(source, tmp_path):
    """The engine on the folder against the engine on a folder of the decoded weights."""
    folder = fitted(source, tmp_path / "out", lambda spec: Fit(formats(spec), Gptq(), TEXTS))
    dense = fitted(folder, tmp_path / "dense", lambda spec: Fit(formats(spec, "f32"), Range(), NO_TEXT))
    ids = TEXTS[0].tolist()
    with engine(folder) as packed, engine(dense) as floats:
        np.testing.assert_allclose(all_logits(packed, ids), all_logits(floats, ids), rtol=0, atol=1e-4)


def test_solving_with_the_inputs_lowers_what_the_inputs_see(source, tmp_path):
    """The error of the last hidden states, which every matrix adds to: with feedback below plain rounding."""
    folders = {
        "plain": fitted(source, tmp_path / "plain", lambda spec: Fit(formats(spec, "int2_g32_asym"), Range(), NO_TEXT)),
        "gptq": fitted(source, tmp_path / "gptq", lambda spec: Fit(formats(spec, "int2_g32_asym"), Gptq(), TEXTS)),
    }
    with engine(source) as reference:
        exact = all_logits(reference, TEXTS[0].tolist())
    errors = {}
    for name, folder in folders.items():
        with engine(folder) as run:
            errors[name] = np.square(all_logits(run, TEXTS[0].tolist()) - exact).mean()
    assert errors["gptq"] < 0.9 * errors["plain"]


def test_the_head_meets_the_exact_models_last_states(source):
    with Checkpoint(source) as checkpoint, engine(source) as run:
        spec = model_spec(checkpoint)
        origin = Source(checkpoint, spec)
        head = origin.floats("embed" if spec.tied else "head")
        for ids, states in zip(TEXTS, last_states(origin, spec, TEXTS), strict=True):
            run.reset()
            np.testing.assert_allclose(states @ head.T, all_logits(run, ids.tolist()), rtol=0, atol=1e-4)


def test_a_tied_embedding_is_solved_for_what_the_head_meets(tmp_path):
    """The error of logits: the Hessian of the head's inputs against ranges of least error."""
    write_random(tmp_path / "source", LLAMA | {"tie_word_embeddings": True})
    with Checkpoint(tmp_path / "source") as checkpoint:
        origin = Source(checkpoint, model_spec(checkpoint))
        exact = origin.floats("embed")
        states = np.concatenate(list(last_states(origin, model_spec(checkpoint), TEXTS)))
    errors = {}
    for solver in (Mse(), Mse(weighted=True), Gptq()):
        job = Fit({"embed": "int3_g32_asym"}, solver, TEXTS)
        folder = fitted(tmp_path / "source", tmp_path / str(solver), lambda spec, job=job: job)
        with Checkpoint(folder) as checkpoint:
            stored = Source(checkpoint, model_spec(checkpoint)).floats("embed")
        errors[str(solver)] = np.square(states @ (exact - stored).T).mean()
    plain, weighted, gptq = errors.values()
    assert weighted < 0.95 * plain
    assert gptq < 0.8 * weighted


@pytest.mark.parametrize("stop_at", [0, 1, 5, 9, 20, 27])
def test_an_interrupted_fit_goes_on_to_the_same_bytes(stop_at, tmp_path):
    write_random(tmp_path / "source", LLAMA)

    def job(spec):
        return Fit(formats(spec), Gptq(), TEXTS)

    whole = fitted(tmp_path / "source", tmp_path / "whole", job)

    class Killed(BaseException):
        pass

    def stop(done, total, label):
        if done == stop_at:
            raise Killed

    done_again = []
    with pytest.raises(Killed):
        fitted(tmp_path / "source", tmp_path / "parts", job, stop)
    resumed = fitted(tmp_path / "source", tmp_path / "parts", job, lambda done, total, label: done_again.append(done))
    assert digest(resumed) == digest(whole)
    assert not (resumed / STATE).exists()
    # embed, then 7 matrices a layer: what is done again begins with the first matrix of the file that was not written
    assert done_again[0] == (0 if stop_at == 0 else 1 + (stop_at - 1) // 7 * 7)


def test_another_fit_in_the_same_folder_is_refused(tmp_path):
    write_random(tmp_path / "source", LLAMA)

    def stop(done, total, label):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "source", tmp_path / "out", lambda spec: Fit(formats(spec), Gptq(), TEXTS), stop)
    with pytest.raises(InvalidInput, match="another fit that was interrupted"):
        fitted(tmp_path / "source", tmp_path / "out", lambda spec: Fit(formats(spec), Gptq(), TEXTS[:2]))


def test_a_solver_that_looks_at_text_needs_some(tmp_path):
    write_random(tmp_path / "source", LLAMA)
    with pytest.raises(InvalidInput, match="looks at text"):
        fitted(tmp_path / "source", tmp_path / "out", lambda spec: Fit(formats(spec), Gptq(), NO_TEXT))


def test_matrices_that_are_not_named_keep_their_blocks(tmp_path):
    write_random(tmp_path / "source", LLAMA)
    folder = fitted(
        tmp_path / "source", tmp_path / "out", lambda spec: Fit({"layers.1.up": "int8_g32_sym"}, Range(), NO_TEXT)
    )
    with Checkpoint(folder) as checkpoint:
        stored = {w.name: w.format for w in model_spec(checkpoint).weights}
    assert stored.pop("layers.1.up") == "int8_g32_sym"
    assert set(stored.values()) == {"f32"}


def test_inputs_are_measured_over_all_windows(rng):
    windows = [rng.standard_normal((n, 5)).astype(np.float32) for n in (3, 4)]
    x = np.concatenate(windows).astype(np.float64)
    inputs = measure(iter(windows), "hessian")
    np.testing.assert_allclose(inputs.hessian, x.T @ x / 7, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(inputs.squares, np.square(x).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(measure(iter(windows), "squares").squares, inputs.squares, rtol=1e-6)
    assert measure(iter(windows), "nothing") is None


def test_a_matrix_without_blocks_decodes_to_zeros():
    assert not decode(Matrix("zero", np.empty((3, 0), np.uint8)), 8).any()
