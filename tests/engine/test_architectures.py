"""Every architecture against transformers in float32, from safetensors."""

import json

import numpy as np
import pytest
import tiny

from barefoot.engine.specs import architectures, spec_from_config

TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=tiny.MODELS)
def reference(request, tmp_path_factory):
    """(folder, ids, logits of transformers)"""
    model = tiny.build(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    ids = np.random.default_rng(5).integers(0, model.config.vocab_size, 45).tolist()
    logits = tiny.expected(model, ids)
    assert np.abs(logits).max() > 1  # a difference of TOLERANCE is small beside the logits
    return folder, ids, logits


@pytest.mark.parametrize(
    ("chunk", "n_prefill", "n_logits"), [(64, 45, 1), (7, 45, 3), (1, 20, 1), (16, 30, 16), (64, 1, 1)]
)
def test_logits_equal_transformers(reference, chunk, n_prefill, n_logits):
    folder, ids, logits = reference
    with tiny.engine(folder, chunk=chunk, n_logits=n_logits) as run:
        assert np.abs(tiny.all_logits(run, ids, n_prefill) - logits).max() < TOLERANCE


def test_streaming_equals_resident_bit_for_bit(reference):
    folder, ids, _ = reference
    with tiny.engine(folder, chunk=16) as run:
        resident = tiny.all_logits(run, ids, 30)
    n_layers = run.spec.n_layers
    for settings in ({"n_streamed_layers": 1}, {"n_streamed_layers": n_layers, "stream_head": True, "n_logits": 4}):
        with tiny.engine(folder, chunk=16, **settings) as run:
            assert np.array_equal(tiny.all_logits(run, ids, 30), resident)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_config_written_from_a_spec_reads_back_as_the_same_spec(name, tmp_path):
    """So that what was fitted from a file without a config.json loads everywhere."""
    transformers = pytest.importorskip("transformers", reason="the reference reading needs transformers")
    config_class, _, settings = tiny.MODELS[name]
    spec = spec_from_config(
        getattr(transformers, config_class)(dtype="float32", **tiny.COMMON | settings).to_dict(), name
    )
    written = architectures()[spec.arch].to_hf(spec)
    assert spec_from_config(json.loads(json.dumps(written)), name) == spec
    (tmp_path / "config.json").write_text(json.dumps(written))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(read).__name__ == config_class
    assert spec_from_config(read.to_dict(), name) == spec
