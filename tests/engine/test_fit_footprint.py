"""The bytes of a fit, predicted, against what Python and numpy allocate at most."""

import numpy as np
import pytest
from random_files import GEMMA, LLAMA, write_random

from barefoot.core.measure import TracedPeak
from barefoot.engine.fit_footprint import PACK_BYTES_PER_WEIGHT, footprint
from barefoot.engine.fitting import Fit, fit
from barefoot.engine.sensitivity import sensitivity, workspace_bytes
from barefoot.engine.source import Source
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.ops import blocks
from barefoot.weights.solvers.gptq import Gptq
from barefoot.weights.solvers.mse import Mse
from barefoot.weights.solvers.range import Range

WIDE = LLAMA | {"hidden_size": 192, "intermediate_size": 640, "num_hidden_layers": 2, "vocab_size": 300}
TWO_OF_GEMMA = GEMMA | {"intermediate_size": 512, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
CASES = {
    "hessian, wide": (WIDE, Gptq(), "int4_g64_asym", (4, 64)),
    "hessian, much text": (LLAMA | {"num_hidden_layers": 2}, Gptq(), "int3_g32_asym", (24, 128)),
    "hessian, nothing followed": (WIDE, Gptq(drift=0), "int4_g64_asym", (4, 64)),
    "squares": (WIDE, Mse(weighted=True), "int4_g32_sym", (8, 64)),
    "no text": (LLAMA | {"num_hidden_layers": 1, "vocab_size": 20_000}, Range(), "int8_g32_sym", (0, 0)),
    "gemma": (TWO_OF_GEMMA, Gptq(), "int4_g32_asym", (4, 64)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fit_allocates_what_is_predicted(case, tmp_path):
    config, solver, layout, (n_windows, window) = CASES[case]
    write_random(tmp_path / "source", config)
    texts = np.random.default_rng(1).integers(0, 259, (n_windows, window)).astype(np.int32)
    with Checkpoint(tmp_path / "source") as checkpoint:
        spec = model_spec(checkpoint)
        job = Fit({w.name: layout for w in spec.weights if w.group != "norm"}, solver, texts)
        predicted = footprint(spec, job).peak()[1]
        with TracedPeak() as peak:
            fit(checkpoint, spec, job, tmp_path / "out")
    assert 0.7 * predicted < peak.result.peak - peak.result.before < 1.02 * predicted + 200_000  # Python's own objects


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
