"""compressed-tensors checkpoints: the same weights, unpacked here from the layout's definition."""

import json

import numpy as np
import pytest
import safetensors.numpy
import tiny
from folders import add_tokenizer, fitted, logits, save, values
from random_files import LLAMA, write_random

from barefoot.core.errors import Incompatible
from barefoot.engine.compressed_export import export_compressed
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint

CONFIG = LLAMA | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def exported(source, folder) -> dict[str, str]:
    with Checkpoint(source) as checkpoint:
        return export_compressed(checkpoint, model_spec(checkpoint), folder)


def unpacked(folder) -> dict[str, np.ndarray]:
    """float64 weights by name: scale × (field − 2^(b-1)), fields low bits first in the words of a row."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(file)
    schemes = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    bits = {name: scheme["weights"]["num_bits"] for scheme in schemes for name in scheme["targets"]}
    found = {}
    for name, array in tensors.items():
        stem, part = name.rsplit(".", 1)
        if part == "weight_packed":
            b = bits[stem]
            shifts = np.arange(0, 32, b)
            fields = (array.view(np.uint32)[..., None] >> shifts) & ((1 << b) - 1)
            rows, cols = tensors[f"{stem}.weight_shape"]
            codes = fields.reshape(rows, cols).astype(np.float64) - (1 << (b - 1))
            scales = tensors[f"{stem}.weight_scale"].astype(np.float64)
            found[f"{stem}.weight"] = codes * scales.repeat(cols // scales.shape[1], axis=1)
        elif part not in ("weight_scale", "weight_shape"):
            found[name] = array.astype(np.float64)
    return found


@pytest.mark.parametrize(
    "weights",
    [
        "int(bits=4,group=32,symmetric=true)",
        "embed=dense(dtype=f16) attn=int(bits=8,group=64,symmetric=true) ffn=int(bits=4,group=128,symmetric=true)",
        "embed=stored attn=int(bits=3,group=32,symmetric=true) ffn=ternary(group=64)",
    ],
)
def test_every_matrix_is_the_same(weights, tmp_path, tiny_gguf):
    write_random(tmp_path / "hf", CONFIG)
    add_tokenizer(tmp_path / "hf", tiny_gguf)
    fitted(tmp_path / "hf", tmp_path / "fitted", weights)
    exported(tmp_path / "fitted", tmp_path / "made")
    spec, expected = values(tmp_path / "fitted")
    found = unpacked(tmp_path / "made")
    for weight in spec.weights:
        there, here = found[weight.source].reshape(weight.rows, weight.cols), expected[weight.name]
        if weight.group == "embed":
            assert (np.abs(there - here) <= np.abs(here) * 2.0**-11).all()
        else:
            assert np.array_equal(there, here), weight.name
    assert set(found) == {w.source for w in spec.weights}


def test_barefoot_reads_it_back(tmp_path, tiny_gguf):
    """Through its own reader of such checkpoints: from a GGUF file, rows of q and k in the other order and tied."""
    ids = list(range(30, 60))
    exported(tiny_gguf.path, tmp_path / "made")
    assert np.abs(logits(tmp_path / "made", ids) - logits(tiny_gguf.path, ids)).max() < 2e-3  # the embedding is f16


def test_fused_tensors(tmp_path, tiny_gguf):
    save(tiny.build("phi3"), tmp_path / "hf", tiny_gguf)
    formats = exported(tmp_path / "hf", tmp_path / "made")
    assert set(formats.values()) == {"f32"}
    ids = list(range(20))
    assert np.array_equal(logits(tmp_path / "made", ids), logits(tmp_path / "hf", ids))


def test_minimums_are_refused(tmp_path, tiny_gguf):
    write_random(tmp_path / "hf", CONFIG)
    add_tokenizer(tmp_path / "hf", tiny_gguf)
    fitted(tmp_path / "hf", tmp_path / "fitted", "int(bits=4,group=32)")
    with pytest.raises(Incompatible, match=r"nothing holds int4_g32_asym without loss.*int4_g32_sym"):
        exported(tmp_path / "fitted", tmp_path / "made")
    assert not (tmp_path / "made").exists()
