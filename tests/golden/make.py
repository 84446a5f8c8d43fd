"""Write the golden files that are missing: ``python tests/golden/make.py``. What is there is never written again.

A folder for each version of the description (:mod:`barefoot.io.packed`) holds a file for each of barefoot's own block
formats, with one matrix (3, 256), one for each structure, a sum (16, 64), and ``model``, a fitted model of one layer.
``expected.json`` says what they decode to: of each matrix the first eight numbers, as hexadecimal floats, and a digest
of all. A change of these numbers is a change of the format and needs a new version; the files of the old one then leave
with the code that reads it.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "engine"))

from folders import fitted, logits, values  # noqa: E402
from random_files import LLAMA, write_random  # noqa: E402

from barefoot.core.registry import techniques  # noqa: E402
from barefoot.io.packed import VERSION, describe  # noqa: E402
from barefoot.io.safetensors import write_safetensors  # noqa: E402
from barefoot.io.types import FILE_TYPES  # noqa: E402
from barefoot.ops import blocks, parts  # noqa: E402
from barefoot.weights.solvers import Inputs  # noqa: E402
from barefoot.weights.structures import Matrix  # noqa: E402

CONFIG = LLAMA | {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MIXED = "embed=int(bits=8,symmetric=true) attn=int(bits=4) ffn=int(bits=3) head=ternary(group=32)"
IDS = [3, 1, 4, 1, 5, 9, 2, 6]
ROWS, COLS = 3, 256
SUM = 16, 64  # rows and columns of a structure's matrix


def own_formats() -> list[str]:
    """The block formats that only barefoot's files have."""
    return [name for name in blocks.names() if name not in FILE_TYPES and name != "zero"]


def summary(numbers: np.ndarray) -> dict[str, object]:
    """What is stated of an array of float32."""
    flat = np.ascontiguousarray(numbers, np.float32).reshape(-1)
    first = [float(x).hex() for x in flat[:8]]
    return {"first": first, "sha256": hashlib.sha256(flat.astype("<f4").tobytes()).hexdigest()}


def total(matrix: Matrix) -> np.ndarray:
    """The sum that a matrix is, float32, by numpy alone."""
    found = blocks.decode(matrix.format, matrix.rows, SUM[1])
    return sum((parts.lookup(kind).decode(*SUM, data) for kind, data in matrix.parts.values()), found)


def main() -> None:
    folder = HERE / str(VERSION)
    folder.mkdir(exist_ok=True)
    path = folder / "expected.json"
    expected = json.loads(path.read_text()) if path.exists() else {}
    for name in own_formats():
        if name in expected:
            continue
        weights = np.random.default_rng(17).standard_normal((ROWS, COLS), np.float32)
        rows = blocks.encode(name, weights)
        size = blocks.block_elements(name), blocks.block_bytes(name)
        entry = ("w", "u8", rows.shape, [rows.data])
        write_safetensors(folder / f"{name}.safetensors", [entry], describe({"w": (name, COLS)}, {name: size}))
        expected[name] = summary(blocks.decode(name, rows, COLS))
    for name, structure in techniques("weights.structures").items():
        if name in expected:
            continue
        weights = np.random.default_rng(18).standard_normal(SUM, np.float32)
        matrix = structure().solve(weights, Inputs(np.ones(SUM[1], np.float32), np.eye(SUM[1], dtype=np.float32)))
        entries = [("w", "u8", matrix.rows.shape, [matrix.rows.tobytes()])]
        entries += [(f"w+{label}", "u8", (data.size,), [data.data]) for label, (_, data) in matrix.parts.items()]
        added = {f"w+{label}": (kind, *SUM) for label, (kind, _) in matrix.parts.items()}
        size = blocks.block_elements(matrix.format), blocks.block_bytes(matrix.format)
        about = describe({"w": (matrix.format, SUM[1])}, {matrix.format: size}, added)
        write_safetensors(folder / f"{name}.safetensors", entries, about)
        # Parts are products, whose sums may be added up in any order.
        expected[name] = {"about": [float(x) for x in total(matrix).reshape(-1)[:8]]}
    if "model" not in expected:
        with tempfile.TemporaryDirectory() as temporary:
            write_random(Path(temporary) / "source", CONFIG)
            fitted(Path(temporary) / "source", folder / "model", MIXED)
        weights_of = {name: summary(each) for name, each in values(folder / "model")[1].items()}
        last = [round(float(x), 4) for x in logits(folder / "model", IDS)[-1][:8]]
        expected["model"] = {"weights": weights_of, "logits": last}
    path.write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
