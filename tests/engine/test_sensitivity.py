"""What rounding costs: against the definition of the Fisher matrix, and against the divergence that rounding makes."""

import numpy as np
import pytest
from random_files import GEMMA, LLAMA, write_random
from tiny import all_logits, engine

from barefoot.engine.allocation import candidates, choose, options
from barefoot.engine.fitting import Fit, fit
from barefoot.engine.sensitivity import _Head, probe_of, sensitivity
from barefoot.engine.source import Source
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.ops import blocks
from barefoot.weights.solvers.range import Range

TEXTS = np.random.default_rng(5).integers(0, 259, (2, 24)).astype(np.int32)
NO_TEXT = np.empty((0, 0), np.int32)


@pytest.fixture(params=[LLAMA, GEMMA | {"tie_word_embeddings": True}], ids=["llama", "gemma tied"])
def model(request, tmp_path):
    write_random(tmp_path / "source", request.param)
    with Checkpoint(tmp_path / "source") as checkpoint:
        yield checkpoint, model_spec(checkpoint)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def logits_of(path):
    with engine(path) as run:
        rows = []
        for ids in TEXTS:
            run.reset()
            rows.append(all_logits(run, ids.tolist()))
    return np.concatenate(rows)


def test_the_fisher_matrix_is_the_one_of_the_definition(model, rng):
    checkpoint, spec = model
    hidden = rng.standard_normal((2, 6, spec.d_model)).astype(np.float32)
    head = _Head(Source(checkpoint, spec), spec, hidden)
    w = Source(checkpoint, spec).floats(head.name).astype(np.float64)
    z = head.z.astype(np.float64)
    p = np.exp(log_softmax(z @ w.T))
    expected = np.mean([w.T @ (np.diag(each) - np.outer(each, each)) @ w for each in p], axis=0)
    np.testing.assert_allclose(head._fisher, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    change = (blocks.decode(probe_of(96), blocks.encode(probe_of(96), w.astype(np.float32)), 96) - w) @ z.T
    variance = np.einsum("tv,vt,vt->t", p, change, change) - np.einsum("tv,vt->t", p, change) ** 2
    assert head.cost_of_rounding() == pytest.approx(0.5 * variance.mean(), rel=1e-3)


def test_costs_follow_the_divergence_that_rounding_makes(model, tmp_path):
    """Each matrix rounded by itself and the whole model run: the mean over tokens of the Fisher matrix stands for each
    token's own, and the change is not small, so costs are compared by their order."""
    checkpoint, spec = model
    found = sensitivity(Source(checkpoint, spec), spec, TEXTS)
    exact = log_softmax(logits_of(checkpoint.path))
    measured = {}
    for name in (n for n in found.cost if n.split(".")[-1] in ("q", "o", "down", "embed", "head")):
        weight = next(w for w in spec.weights if w.name == name)
        folder = tmp_path / name
        fit(checkpoint, spec, Fit({name: probe_of(weight.cols)}, Range(), NO_TEXT), folder).finish({})
        changed = log_softmax(logits_of(folder))
        measured[name] = (np.exp(exact) * (exact - changed)).sum(axis=1).mean()
    names = sorted(measured)
    ours, theirs = (np.argsort(np.argsort([each[n] for n in names])) for each in (found.cost, measured))
    assert np.corrcoef(ours, theirs)[0, 1] > 0.9  # of ranks


def test_an_interrupted_measurement_goes_on(model):
    checkpoint, spec = model
    source = Source(checkpoint, spec)
    steps = []
    whole = sensitivity(source, spec, TEXTS, keep=lambda cost: steps.append(dict(cost)))
    assert [len(cost) for cost in steps[:-1]] == [7, 14, 21, 28]
    for kept in steps:
        assert sensitivity(source, spec, TEXTS, known=kept).cost == whole.cost


def test_formats_cost_less_the_more_bits_they_have_and_fill_the_budget(model):
    checkpoint, spec = model
    source = Source(checkpoint, spec)
    found = sensitivity(source, spec, TEXTS)
    choices = options(source, found, candidates())
    for name, each in choices.items():
        cost = {option.name: option.cost for option in each}
        assert cost["int2_g32_asym"] > cost["int3_g32_asym"] > cost["int4_g32_asym"] > cost["int8_g32_asym"], name
    n_matrices = sum(w.n_elements for w in spec.weights if w.group != "norm")
    vectors = sum(4 * w.n_elements for w in spec.weights if w.group == "norm")
    last = np.inf
    for bits in (3.0, 4.0, 5.5):
        budget = vectors + int(bits * n_matrices / 8)
        chosen = choose(spec, choices, budget)
        total = vectors + sum(option.n_bytes for option in chosen.values())
        assert 0.97 * budget < total <= budget
        cost = sum(option.cost for option in chosen.values())
        assert cost < last
        last = cost
