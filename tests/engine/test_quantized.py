"""Checkpoints of GPTQ, AWQ and compressed-tensors: their codes and scales in barefoot's blocks, and run."""

import functools
import json
import tracemalloc

import numpy as np
import packers
import pytest
import tiny
from folders import fitted, values
from random_files import LLAMA, write_random

from barefoot.core.errors import CorruptFile, Incompatible, UnsupportedFormat
from barefoot.engine.config import EngineConfig
from barefoot.engine.footprint import REPACK_BYTES_PER_WEIGHT
from barefoot.engine.repacking import repacked
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.io.quantized import unpack
from barefoot.io.safetensors import array_entry, read_safetensors, write_safetensors
from barefoot.kv.stores.f32 import FloatStore

IDS = np.random.default_rng(8).integers(0, 259, 24).tolist()
CONFIG = LLAMA | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}

GPTQ = {"quant_method": "gptq", "desc_act": False, "sym": False}
GROUP = {"type": "int", "strategy": "group"}


def gptq_settings(bits, group, **more):
    return GPTQ | {"bits": bits, "group_size": group} | more


def compressed_settings(bits, group, symmetric):
    weights = GROUP | {"num_bits": bits, "group_size": group, "symmetric": symmetric}
    if group == -1:
        weights |= {"strategy": "channel", "group_size": None}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


AWQ_SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}

# name: settings, packer, what repack is told, the format that must come out
CASES = {
    "gptq 4": (gptq_settings(4, 32), packers.gptq, {"bits": 4, "group": 32}, "int4_g32_asym"),
    "gptq 4 v2": (
        gptq_settings(4, 128, checkpoint_format="gptq_v2"),
        functools.partial(packers.gptq, less=0),
        {"bits": 4, "group": 128},
        "int4_g128_asym",
    ),
    "gptq 4 sym": (
        gptq_settings(4, 64, sym=True),
        packers.gptq,
        {"bits": 4, "group": 64, "symmetric": True},
        "int4_g64_sym",
    ),
    "gptq 4 row": (gptq_settings(4, -1), packers.gptq, {"bits": 4, "group": -1}, "int4_g128_asym"),
    "gptq 3": (gptq_settings(3, 64), packers.gptq, {"bits": 3, "group": 64}, "int3_g64_asym"),
    "gptq 2": (gptq_settings(2, 32), packers.gptq, {"bits": 2, "group": 32}, "int2_g32_asym"),
    "gptq 8 sym": (
        gptq_settings(8, 32, sym=True),
        packers.gptq,
        {"bits": 8, "group": 32, "symmetric": True},
        "int8_g32_sym",
    ),
    "gptq 8 v2": (
        gptq_settings(8, 32, checkpoint_format="gptq_v2"),
        functools.partial(packers.gptq, less=0),
        {"bits": 8, "group": 32},
        "int8_g32_asym",
    ),
    "gptq act-order": (
        gptq_settings(4, 32, desc_act=True),
        packers.gptq,
        {"bits": 4, "group": 32, "scatter": True},
        "f16",
    ),
    "awq": (AWQ_SETTINGS, packers.awq, {"bits": 4, "group": 64}, "int4_g64_asym"),
    "compressed 4 sym": (
        compressed_settings(4, 32, True),
        functools.partial(packers.compressed, bits=4, symmetric=True),
        {"bits": 4, "group": 32, "symmetric": True},
        "int4_g32_sym",
    ),
    "compressed 4 asym": (
        compressed_settings(4, 128, False),
        functools.partial(packers.compressed, bits=4),
        {"bits": 4, "group": 128},
        "int4_g128_asym",
    ),
    "compressed 8 row": (
        compressed_settings(8, -1, True),
        functools.partial(packers.compressed, bits=8, symmetric=True),
        {"bits": 8, "group": -1, "symmetric": True},
        "int8_g128_sym",
    ),
    "compressed 3": (
        compressed_settings(3, 32, False),
        functools.partial(packers.compressed, bits=3),
        {"bits": 3, "group": 32},
        "int3_g32_asym",
    ),
}


def written(case, tmp_path):
    """The checkpoint of a case, and what its packed matrices mean, float64 by name."""
    settings, pack, told, _ = CASES[case]
    if settings["quant_method"] == "gptq":
        pack = functools.partial(pack, bits=settings["bits"])
    write_random(tmp_path / "dense", CONFIG)
    return packers.repack(tmp_path / "dense", tmp_path / "packed", settings, pack, **told)


def bound(case, mean, bits):
    """How far a weight may be off: nothing where codes are symmetric, else half a unit in the minimum's last place."""
    if case == "gptq act-order":
        return np.abs(mean) * 2.0**-11
    if CASES[case][2].get("symmetric"):
        return 0.0
    # The largest minimum of a group is at most 2^bits steps; a step is at least the least difference of two weights.
    return np.abs(mean).max(axis=1, keepdims=True) * 2 * 2.0**-11


@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_become_blocks(case, tmp_path):
    means = written(case, tmp_path)
    spec, found = values(tmp_path / "packed")
    seen = 0
    for weight in spec.weights:
        if weight.source in means:
            assert weight.format == CASES[case][3]
            mean = means[weight.source]
            assert (np.abs(found[weight.name] - mean) <= bound(case, mean, CASES[case][2]["bits"])).all(), weight.name
            seen += 1
    assert seen == 7 * CONFIG["num_hidden_layers"]


@pytest.mark.parametrize("layout", ["float32", "int8"])
@pytest.mark.parametrize("case", ["gptq 4", "gptq act-order", "awq", "compressed 4 sym"])
def test_the_engine_runs_the_checkpoint_as_it_runs_the_same_dense_one(case, layout, tmp_path):
    means = written(case, tmp_path)
    with Checkpoint(tmp_path / "dense") as checkpoint:
        entries = []
        for name, info in checkpoint.tensors.items():
            raw = np.empty(info.n_bytes, np.uint8)
            checkpoint.read_into(name, raw)
            dense = raw.view(np.float32).reshape(info.shape)
            entries.append(array_entry(name, means.get(name, dense).astype(np.float32)))
    write_safetensors(tmp_path / "dense" / "model.safetensors", entries)
    with tiny.engine(tmp_path / "dense", chunk=16) as run:
        expected = tiny.all_logits(run, IDS)
    with tiny.engine(tmp_path / "packed", chunk=16, activations=layout) as run:
        logits = tiny.all_logits(run, IDS)
    off = np.sqrt(np.mean((logits - expected) ** 2)) / expected.std()
    # Rounding to f16 is off by 2^-11 at most, in each of the matrices that a token passes; activations by 1/254.
    exact = "sym" in case
    assert off < ({True: 1e-6, False: 2**-9}[exact] if layout == "float32" else 0.02)


def test_it_can_be_fitted_and_written_anew(tmp_path):
    """The codes of the folder that is written are those of the checkpoint."""
    written("awq", tmp_path)
    fitted(tmp_path / "packed", tmp_path / "folder", "stored")
    before, after = values(tmp_path / "packed"), values(tmp_path / "folder")
    assert [w.format for w in before[0].weights] == [w.format for w in after[0].weights]
    assert not any(w.packed_bytes for w in after[0].weights)
    for name, each in before[1].items():
        assert np.array_equal(each, after[1][name]), name


def test_it_is_not_streamed_from_disk(tmp_path):
    written("gptq 4", tmp_path)
    with Checkpoint(tmp_path / "packed") as checkpoint:
        config = EngineConfig(context=16, chunk=16, kv=FloatStore(), n_streamed_layers=1)
        with pytest.raises(Incompatible, match="another program's layout"):
            Engine(checkpoint, model_spec(checkpoint), config)


def test_what_repacking_takes_is_planned(tmp_path):
    """The most that numpy holds while a tile of 65,536 weights is put into blocks."""
    peaks = []
    for case in ("gptq 4", "gptq 3", "gptq act-order", "awq", "compressed 4 asym"):
        folder = tmp_path / case.replace(" ", "-")
        folder.mkdir()
        settings, pack, told, _ = CASES[case]
        if settings["quant_method"] == "gptq":
            pack = functools.partial(pack, bits=settings["bits"])
        write_random(folder / "dense", CONFIG | {"num_hidden_layers": 1, "intermediate_size": 512})
        packers.repack(folder / "dense", folder / "packed", settings, pack, **told)
        with Checkpoint(folder / "packed") as checkpoint:
            linear = checkpoint.linears["model.layers.0.mlp.up_proj.weight"]
            raw = {name: np.empty(part.n_bytes, np.uint8) for name, part in linear.parts.items()}
            for name, part in linear.parts.items():
                checkpoint.read_into(part.name, raw[name])
            repacked(linear, raw, 0, 512)
            tracemalloc.start()
            repacked(linear, raw, 0, 512)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    planned = 512 * 128 * REPACK_BYTES_PER_WEIGHT
    assert 0.8 * planned <= max(peaks) <= planned + 16384, [peak / 65536 for peak in peaks]


def test_bits_across_words():
    assert unpack(np.frombuffer((0o76543210).to_bytes(3, "little"), np.uint8)[None], 3).tolist() == [list(range(8))]
    assert unpack(np.array([[0x21, 0x43]], np.uint8), 4).tolist() == [[1, 2, 3, 4]]
    assert unpack(np.array([[0b11100100]], np.uint8), 2).tolist() == [[0, 1, 2, 3]]


# --- what is wrong is said, before anything is read ------------------------------------------------------------------


def changed(tmp_path, change_settings=None, drop=None, replace=None, add=None):
    """The "gptq 4" checkpoint with other settings, without a tensor, with others in place, or with one more."""
    tmp_path.mkdir(exist_ok=True)
    written("gptq 4", tmp_path)
    folder = tmp_path / "packed"
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change_settings or {}
    (folder / "config.json").write_text(json.dumps(config))
    file = read_safetensors(folder / "model.safetensors")
    forms = {"i32": np.int32, "f16": np.float16, "f32": np.float32}
    raw = (folder / "model.safetensors").read_bytes()
    arrays = {t.name: np.frombuffer(raw, forms[t.type], t.n_elements, t.offset).reshape(t.shape) for t in file.tensors}
    arrays |= {name: change(arrays[name]) for name, change in (replace or {}).items()} | (add or {})
    entries = [array_entry(name, array) for name, array in arrays.items() if name != drop]
    write_safetensors(folder / "model.safetensors", entries)
    return folder


UP = "model.layers.0.mlp.up_proj"
WRONG = {
    "bits": ({"change_settings": {"bits": 5}}, UnsupportedFormat, "bits must be one of 2, 3, 4, 8, got 5"),
    "other bits": ({"change_settings": {"bits": 8}}, CorruptFile, "its settings imply"),
    "group": ({"change_settings": {"group_size": 16}}, UnsupportedFormat, "groups of 16"),
    "odd group": ({"change_settings": {"group_size": 96}}, UnsupportedFormat, "groups of 96"),
    "huge group": (
        {"change_settings": {"group_size": 1 << 80}},
        UnsupportedFormat,
        "groups of 1208925819614629174706176",
    ),
    "format": ({"change_settings": {"checkpoint_format": "marlin"}}, UnsupportedFormat, "marlin"),
    "no scales": ({"drop": f"{UP}.scales"}, CorruptFile, rf"lacks the tensor '{UP}.scales'"),
    "short scales": (
        {"replace": {f"{UP}.scales": lambda a: a[:-1]}},
        CorruptFile,
        r"scales' is f16 of shape \(3, 256\)",
    ),
    "wide zeros": ({"replace": {f"{UP}.qzeros": lambda a: a.repeat(2, 1)}}, CorruptFile, "qzeros"),
    "float codes": ({"replace": {f"{UP}.qweight": lambda a: a.view(np.float32)}}, CorruptFile, "qweight' is f32"),
    "flat codes": ({"replace": {f"{UP}.qweight": lambda a: a.reshape(-1)}}, CorruptFile, "a matrix is expected"),
}


@pytest.mark.parametrize("what", WRONG)
def test_settings_and_tensors_that_contradict_each_other(what, tmp_path):
    change, error, says = WRONG[what]
    folder = changed(tmp_path, **change)
    with pytest.raises(error, match=says):
        Checkpoint(folder)


def test_numbers_that_contradict_the_settings(tmp_path):
    folder = changed(tmp_path, {"sym": True}, replace={f"{UP}.scales": lambda a: np.full_like(a, np.nan)})
    with Checkpoint(folder) as checkpoint:
        config = EngineConfig(context=16, chunk=16, kv=FloatStore())
        with pytest.raises(CorruptFile, match="zeros other than 8 in a symmetric matrix"):
            Engine(checkpoint, model_spec(checkpoint), config)
        linear = checkpoint.linears[f"{UP}.weight"]
        raw = {name: np.empty(part.n_bytes, np.uint8) for name, part in linear.parts.items()}
        for name, part in linear.parts.items():
            checkpoint.read_into(part.name, raw[name])
        with pytest.raises(CorruptFile, match="NaN or infinite"):
            repacked(linear, raw, 0, 32)


def test_a_bias_that_the_model_has_no_place_for(tmp_path):
    zeros, ones = np.zeros(256, np.float16), np.ones(256, np.float16)
    with Checkpoint(changed(tmp_path / "a", add={f"{UP}.bias": zeros})) as checkpoint:
        assert model_spec(checkpoint).n_layers == 4
    with Checkpoint(changed(tmp_path / "b", add={f"{UP}.bias": ones})) as checkpoint:
        with pytest.raises(UnsupportedFormat, match=r"up_proj\.bias"):
            model_spec(checkpoint)


def test_group_numbers_outside_the_scales_are_refused(tmp_path):
    written("gptq act-order", tmp_path)
    with Checkpoint(tmp_path / "packed") as checkpoint:
        linear = checkpoint.linears[f"{UP}.weight"]
        raw = {name: np.zeros(part.n_bytes, np.uint8) for name, part in linear.parts.items()}
        raw["g_idx"].view(np.int32)[5] = 4
        with pytest.raises(CorruptFile, match="columns of groups 0 to 4"):
            repacked(linear, raw, 0, 32)
        raw["g_idx"].view(np.int32)[5] = -1
        with pytest.raises(CorruptFile, match="columns of groups -1 to 0"):
            repacked(linear, raw, 0, 32)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"format": "int-quantized"}, UnsupportedFormat, "int-quantized"),
        ({"config_groups": {}}, CorruptFile, "config_groups"),
        ({"config_groups": {"a": {"weights": GROUP | {"num_bits": 4}}}}, CorruptFile, "weights and targets"),
        (
            {"config_groups": {"a": {"targets": ["Linear"], "weights": GROUP | {"type": "float", "num_bits": 4}}}},
            UnsupportedFormat,
            "weights of float by group",
        ),
        (
            {"config_groups": {"a": {"targets": ["Linear"], "weights": GROUP | {"num_bits": 7}}}},
            UnsupportedFormat,
            "got 7",
        ),
    ],
)
def test_settings_of_compressed_tensors_that_are_not_read(change, error, says, tmp_path):
    written("compressed 4 sym", tmp_path)
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(error, match=says):
        Checkpoint(tmp_path / "packed")


def test_a_checkpoint_that_holds_nothing_packed(tmp_path):
    write_random(tmp_path / "dense", CONFIG)
    config = json.dumps(CONFIG | {"quantization_config": gptq_settings(4, 32)})
    (tmp_path / "dense" / "config.json").write_text(config)
    with pytest.raises(CorruptFile, match="no tensor is packed"):
        Checkpoint(tmp_path / "dense")
