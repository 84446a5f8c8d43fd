"""The bytes of a fit, predicted, against what Python and numpy allocate at most."""

import numpy as np
import pytest
from random_files import GEMMA, LLAMA, write_random

from barefoot.core.measure import TracedPeak
from barefoot.engine.config import EngineConfig
from barefoot.engine.fit_footprint import PACK_BYTES_PER_WEIGHT, PART_BYTES_PER_WEIGHT, fitted, footprint
from barefoot.engine.fitting import Fit, fit
from barefoot.engine.footprint import footprint as running
from barefoot.engine.sensitivity import sensitivity, workspace_bytes
from barefoot.engine.source import Source, decode
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.kv.stores.f16 import HalfStore
from barefoot.ops import blocks
from barefoot.weights.solvers import Inputs
from barefoot.weights.solvers.gptq import Gptq
from barefoot.weights.solvers.hessian import BLOCK, lapack_bytes
from barefoot.weights.solvers.hqq import Hqq
from barefoot.weights.solvers.mse import Mse
from barefoot.weights.solvers.range import Range
from barefoot.weights.structures.bitstack import BitStack
from barefoot.weights.structures.spqr import Spqr

WIDE = LLAMA | {"hidden_size": 192, "intermediate_size": 640, "num_hidden_layers": 2, "vocab_size": 300}
TWO_OF_GEMMA = GEMMA | {"intermediate_size": 512, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
CASES = {
    "hessian, wide": (WIDE, Gptq(), "int4_g64_asym", (4, 64)),
    "hessian, much text": (LLAMA | {"num_hidden_layers": 2}, Gptq(), "int3_g32_asym", (24, 128)),
    "hessian, nothing followed": (WIDE, Gptq(drift=0), "int4_g64_asym", (4, 64)),
    "squares": (WIDE, Mse(weighted=True), "int4_g32_sym", (8, 64)),
    "no text": (LLAMA | {"num_hidden_layers": 1, "vocab_size": 20_000}, Range(), "int8_g32_sym", (0, 0)),
    "hqq": (LLAMA | {"num_hidden_layers": 1, "vocab_size": 20_000}, Hqq(), "int4_g32_asym", (0, 0)),
    "spqr": (WIDE, Gptq(), Spqr(), (4, 64)),
    "bitstack": (WIDE, Gptq(), BitStack(blocks=4), (4, 64)),
    "gemma": (TWO_OF_GEMMA, Gptq(), "int4_g32_asym", (4, 64)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fit_allocates_what_is_predicted(case, tmp_path):
    config, solver, layout, (n_windows, window) = CASES[case]
    write_random(tmp_path / "source", config)
    texts = np.random.default_rng(1).integers(0, 259, (n_windows, window)).astype(np.int32)
    with Checkpoint(tmp_path / "source") as checkpoint:
        spec = model_spec(checkpoint)
        matrices = [w for w in spec.weights if w.group != "norm" and (w.layer is not None or isinstance(layout, str))]
        job = Fit({w.name: layout for w in matrices}, solver, texts)
        predicted = footprint(spec, job).peak()[1]
        with TracedPeak() as peak:
            fit(checkpoint, spec, job, tmp_path / "out")
    assert 0.7 * predicted < peak.result.peak - peak.result.before < 1.02 * predicted + 200_000  # Python's own objects


@pytest.mark.parametrize("layout", [Spqr(), BitStack(blocks=4), "int4_g64_asym"], ids=str)
def test_the_fitted_model_takes_what_is_predicted(layout, tmp_path):
    """Parts of a random matrix's own size: no fewer outliers than 0.93 of what there may be."""
    write_random(tmp_path / "source", WIDE)
    texts = np.random.default_rng(1).integers(0, 259, (4, 64)).astype(np.int32)
    with Checkpoint(tmp_path / "source") as checkpoint:
        spec = model_spec(checkpoint)
        job = Fit({w.name: layout for w in spec.weights if w.layer is not None and w.group != "norm"}, Gptq(), texts)
        fit(checkpoint, spec, job, tmp_path / "out").finish({})
        foreseen = fitted(spec, job)
    with Checkpoint(tmp_path / "out") as checkpoint:
        found = model_spec(checkpoint)
    for ours, theirs in zip(foreseen.weights, found.weights, strict=True):
        assert ours.format == theirs.format
        assert [(p.label, p.kind) for p in ours.parts] == [(p.label, p.kind) for p in theirs.parts]
        for most, part in zip(ours.parts, theirs.parts, strict=True):
            assert 0.9 * most.n_bytes <= part.n_bytes <= most.n_bytes
    # So a run takes what is predicted, as sorting a stack does.
    config = EngineConfig(context=64, kv=HalfStore(), chunk=32, n_logits=16)
    taken, predicted = (running(each, config).peak()[1] for each in (found, foreseen))
    assert taken <= predicted <= 1.05 * taken
    assert [p.n_bytes for p in foreseen.stack] == [p.n_bytes for p in found.stack]


@pytest.mark.parametrize("shape", [(96, 64), (192, 640), (640, 192), (576, 576)])
@pytest.mark.parametrize(
    "structure",
    [Spqr(), Spqr(drift=0), Spqr(outliers=0.0, drift=0), Spqr(tau=0.2), BitStack(), BitStack(blocks=2)],
    ids=str,
)
def test_structures_allocate_what_they_state(structure, shape):
    rng = np.random.default_rng(3)
    weight, x = (rng.standard_normal((n, shape[1])).astype(np.float32) for n in (shape[0], 2 * shape[1]))
    hessian = x.T @ x / len(x)
    follows = structure.wants == "drift"
    inputs = Inputs(np.diag(hessian).copy(), hessian, drift=0.01 * hessian if follows else None)
    with TracedPeak() as peak:
        matrix = structure.solve(weight, inputs)
    stated = structure.workspace_bytes(*shape)
    unseen = lapack_bytes(min(BLOCK, shape[1]), shape[0]) if follows else 0  # by tracemalloc
    assert 0.9 * (stated - unseen) < peak.result.peak - peak.result.before - matrix.n_bytes < 1.02 * stated + 40_000
    with TracedPeak() as peak:
        floats = decode(matrix, shape[1])
    took = (peak.result.peak - peak.result.before - floats.nbytes) / weight.size
    assert took < 1.1 * PART_BYTES_PER_WEIGHT
    if matrix.parts:
        assert took > 0.8 * PART_BYTES_PER_WEIGHT


def test_packing_takes_what_is_stated():
    weight = np.random.default_rng(2).standard_normal((256, 1024)).astype(np.float32)
    took = {}
    for name in blocks.names():
        grid = blocks.lookup(name).grid
        if grid is not None:
            solution = Range().solve(weight, grid, None)
            with TracedPeak() as peak:
                rows = blocks.pack(name, solution.codes, solution.params)
            took[name] = (peak.result.peak - peak.result.before - rows.nbytes) / weight.size
    assert 0.8 * PACK_BYTES_PER_WEIGHT < max(took.values()) <= PACK_BYTES_PER_WEIGHT


@pytest.mark.parametrize(
    "config",
    [
        WIDE | {"vocab_size": 4000},
        LLAMA | {"num_hidden_layers": 12, "hidden_size": 384, "vocab_size": 300},
        LLAMA | {"vocab_size": 9000, "num_hidden_layers": 1},
    ],
    ids=["layers", "states", "head"],
)
def test_measuring_sensitivity_allocates_what_is_predicted(config, tmp_path):
    write_random(tmp_path / "source", config)
    texts = np.random.default_rng(5).integers(0, 259, (2, 64)).astype(np.int32)
    with Checkpoint(tmp_path / "source") as checkpoint:
        spec = model_spec(checkpoint)
        with TracedPeak() as peak:
            sensitivity(Source(checkpoint, spec), spec, texts)
    predicted = workspace_bytes(spec, *texts.shape)
    assert 0.7 * predicted < peak.result.peak - peak.result.before < 1.02 * predicted + 200_000
