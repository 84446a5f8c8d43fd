"""The description of packed matrices in a safetensors file: 6,000 damaged ones, and each thing that can be wrong."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from craft import safetensors_file
from test_hostile import CONSTANT_BYTES, N_EACH, SEED, TEXT

from barefoot.core.errors import CorruptFile, UnsupportedFormat
from barefoot.io.packed import KEY, MAX_BYTES, VERSION, describe, interpret
from barefoot.io.safetensors import read_safetensors
from barefoot.io.types import TensorInfo

SIZES = {"int4_g32_asym": (32, 20), "int3_g64_sym": (64, 26), "zero": (1, 0)}
MATRICES = {"a": ("int4_g32_asym", 64), "b": ("int3_g64_sym", 128), "c": ("zero", 64)}
PARTS = {"c+1": ("csr", 2, 64)}


def base() -> bytes:
    header = {
        "__metadata__": describe(MATRICES, SIZES, PARTS),
        "a": {"dtype": "U8", "shape": [3, 40], "data_offsets": [0, 120]},
        "b": {"dtype": "U8", "shape": [2, 52], "data_offsets": [120, 224]},
        "c": {"dtype": "U8", "shape": [2, 0], "data_offsets": [224, 224]},
        "c+1": {"dtype": "U8", "shape": [24], "data_offsets": [224, 248]},
        "norm": {"dtype": "F32", "shape": [4], "data_offsets": [248, 264]},
    }
    return safetensors_file(header, bytes(264))


def read(path: Path) -> tuple[TensorInfo, ...]:
    file = read_safetensors(path)
    return interpret(path.name, file.metadata, file.tensors)


def test_what_is_described_is_read(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(base())
    found = {t.name: (t.type, t.shape, t.n_bytes) for t in read(path)}
    assert found == {
        "a": ("int4_g32_asym", (3, 64), 120),
        "b": ("int3_g64_sym", (2, 128), 104),
        "c": ("zero", (2, 64), 0),
        "c+1": ("csr", (2, 64), 24),
        "norm": ("f32", (4,), 16),
    }


def test_damaged_descriptions(tmp_path: Path):
    """The damage is done to the description alone, whose text then stands in a sound header."""
    rng = random.Random(SEED)
    path = tmp_path / "damaged.safetensors"
    header = json.loads(base()[8:-264])
    text = header["__metadata__"][KEY].encode()
    outcomes: Counter[str] = Counter()
    unplaced = []
    tracemalloc.start()
    try:
        for _ in range(N_EACH):
            raw = bytearray(text)
            for mutate in rng.choices(TEXT, k=rng.randrange(1, 3)):
                if len(raw) > 16:
                    mutate(raw, rng)
            header["__metadata__"][KEY] = raw.decode("utf-8", "replace")
            whole = safetensors_file(header, bytes(264))
            path.write_bytes(whole)
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            try:
                tensors = read(path)
            except (CorruptFile, UnsupportedFormat) as error:
                unplaced += [str(error)] if path.name not in str(error) else []
                outcomes[type(error).__name__] += 1
            else:
                outcomes["parsed"] += 1
                assert sum(t.n_bytes for t in tensors) == 264
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak <= 2 * len(whole) + CONSTANT_BYTES, f"{peak} bytes for a file of {len(whole)}"
    finally:
        tracemalloc.stop()
    assert unplaced == []
    assert outcomes.total() == N_EACH
    assert outcomes["CorruptFile"] > N_EACH // 3
    assert outcomes["parsed"] > N_EACH // 200
    assert outcomes["UnsupportedFormat"] > 0


def described(**changes: object) -> str:
    content = json.loads(describe(MATRICES, SIZES, PARTS)[KEY])
    return json.dumps({key: value for key, value in (content | changes).items() if value is not None})


WRONG = {
    "no object": ("[]", CorruptFile, "expected a JSON object"),
    "twice": ('{"version": 1, "version": 1}', CorruptFile, "occurs twice"),
    "version": (described(version=VERSION + 1), UnsupportedFormat, f"version {VERSION + 1}, known: {VERSION}"),
    "no version": (described(version=None), UnsupportedFormat, "version None"),
    "no formats": (described(formats=None), CorruptFile, "must have formats"),
    "no parts": (described(parts=[]), CorruptFile, "must have parts"),
    "absent matrix": (described(matrices=MATRICES | {"z": ("zero", 4)}), CorruptFile, "does not hold: z"),
    "unknown block": (described(formats={}), CorruptFile, "weights and bytes of a block, got None"),
    "negative block": (described(formats=SIZES | {"zero": [1, -1]}), CorruptFile, "weights and bytes of a block"),
    "no weights": (described(formats=SIZES | {"zero": [0, 0]}), CorruptFile, "weights and bytes of a block"),
    "huge block": (described(formats=SIZES | {"zero": [1 << 70, 1]}), CorruptFile, "weights and bytes of a block"),
    "columns": (described(matrices=MATRICES | {"a": ["int4_g32_asym", 96]}), CorruptFile, "96 columns .* take 60"),
    "part block": (described(matrices=MATRICES | {"a": ["int4_g32_asym", 33]}), CorruptFile, "can't be 33 columns"),
    "float columns": (described(matrices=MATRICES | {"a": ["zero", 64.0]}), CorruptFile, "a format and columns"),
    "of floats": (described(matrices=MATRICES | {"norm": ["zero", 4]}), CorruptFile, r"f32 \(4,\), can't be 4 columns"),
    "part of nothing": (described(parts={"norm": ["csr", 2, 64]}), CorruptFile, "can't be a part"),
    "part without size": (described(parts={"c+1": ["csr"]}), CorruptFile, "a kind, rows and columns"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said(tmp_path: Path, what: str):
    text, error, says = WRONG[what]
    header = json.loads(base()[8:-264])
    header["__metadata__"][KEY] = text
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_file(header, bytes(264)))
    with pytest.raises(error, match=says):
        read(path)


def test_a_description_is_bounded_by_itself():
    with pytest.raises(CorruptFile, match=f"{MAX_BYTES + 1} bytes, at most {MAX_BYTES}"):
        interpret("model.safetensors", {KEY: " " * (MAX_BYTES + 1)}, ())
