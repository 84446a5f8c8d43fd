"""Files of every version that is read must decode to the same numbers for ever; make.py says how they came to be."""

import json
from pathlib import Path

import numpy as np
import pytest
from folders import logits, values

from barefoot.core.registry import techniques
from barefoot.io.files import BinaryFile
from barefoot.io.packed import VERSION, interpret
from barefoot.io.safetensors import read_safetensors
from barefoot.io.types import FILE_TYPES
from barefoot.ops import blocks, parts

HERE = Path(__file__).parent / str(VERSION)
EXPECTED = json.loads((HERE / "expected.json").read_text())
MODEL = EXPECTED.pop("model")
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def assert_states(expected, numbers):
    """Against what is stated: eight numbers in the open, all of them by their digest."""
    import hashlib

    flat = np.ascontiguousarray(numbers, "<f4").reshape(-1)
    assert [float(x).hex() for x in flat[:8]] == expected["first"]
    assert hashlib.sha256(flat.tobytes()).hexdigest() == expected["sha256"]


STRUCTURES = [name for name in EXPECTED if "about" in EXPECTED[name]]


def held(name):
    """The tensors of a golden file by name, and their bytes."""
    path = HERE / f"{name}.safetensors"
    file = read_safetensors(path)
    tensors = {t.name: t for t in interpret(path.name, file.metadata, file.tensors)}
    with BinaryFile(path) as raw:
        return tensors, {t.name: np.frombuffer(raw.read_at(t.offset, t.n_bytes), np.uint8) for t in file.tensors}


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_sum_decodes_to_what_is_stated(name):
    tensors, data = held(name)
    found = blocks.decode(tensors["w"].type, data["w"].reshape(16, -1), 64)
    for label, part in tensors.items():
        if label != "w":
            found = found + parts.lookup(part.type).decode(*part.shape, data[label])
    assert (
        np.abs(found.reshape(-1)[:8] - EXPECTED[name]["about"]).max() < 1e-5
    )  # products of f16 numbers, added up in float32


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in STRUCTURES])
def test_a_matrix_decodes_to_what_is_stated(name):
    tensors, data = held(name)
    (tensor,) = tensors.values()
    assert (tensor.type, tensor.shape) == (name, (3, 256))
    assert tensor.n_bytes == 3 * 256 // blocks.block_elements(name) * blocks.block_bytes(name)
    assert_states(EXPECTED[name], blocks.decode(name, data["w"].reshape(3, -1), 256))


def test_every_format_and_structure_has_a_golden_file():
    """A new one: python tests/golden/make.py."""
    own = {name for name in blocks.names() if name not in FILE_TYPES and name != "zero"}
    own |= set(techniques("weights.structures"))
    assert own == set(EXPECTED) == {path.stem for path in HERE.glob("*.safetensors")}


def test_a_fitted_model_decodes_to_what_is_stated():
    spec, found = values(HERE / "model")
    assert set(found) == set(MODEL["weights"])
    for name, expected in MODEL["weights"].items():
        assert_states(expected, found[name])
    assert {w.name: w.format for w in spec.weights if w.group == "head"} == {"head": "ternary_g32"}


def test_a_fitted_model_computes_what_is_stated():
    """Four decimals of its logits, which float32 sums in any order keep."""
    assert np.abs(logits(HERE / "model", IDS)[-1][:8] - MODEL["logits"]).max() < 1e-4
