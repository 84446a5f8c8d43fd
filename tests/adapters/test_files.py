"""PEFT's folders: the bytes that are written, what is read, and what is refused before anything is allocated."""

from __future__ import annotations

import json

import numpy as np
import pytest

from barefoot.adapters.files import CONFIG, PICKLE, TENSORS, Pair, read_adapter, write_adapter
from barefoot.core.errors import BarefootError, CorruptFile, InvalidInput, SourceNotFound, UnsupportedFormat
from barefoot.io.safetensors import array_entry, write_safetensors

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def pair(rng, rows, cols, rank, scale=2.0) -> Pair:
    a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in ((rank, cols), (rows, rank)))
    return Pair(a, b, scale)


@pytest.fixture
def folder(tmp_path, rng):
    write_adapter(tmp_path / "a", {Q: pair(rng, 6, 4, 2), UP: pair(rng, 10, 4, 2)}, base="org/model")
    return tmp_path / "a"


def change_config(folder, **settings) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | settings))


def write_tensors(folder, tensors) -> None:
    write_safetensors(folder / TENSORS, [array_entry(*each) for each in tensors.items()])


# --- what is written ------------------------------------------------------------------------------------------------


def test_a_folder_to_the_byte(tmp_path):
    """Written down by hand: two tensors of float16, one and two rows of two and one numbers."""
    one = Pair(np.array([[1, 2]], np.float32), np.array([[0.5], [-1]], np.float32), 4.0)
    write_adapter(tmp_path, {Q: one}, base="org/model", targets=["q_proj"], type_id="f16")
    header = (
        f'{{"__metadata__":{{"format":"pt"}},"base_model.model.{Q}.lora_A.weight":{{"dtype":"F16","shape":[1,2],'
        f'"data_offsets":[0,4]}},"base_model.model.{Q}.lora_B.weight":{{"dtype":"F16","shape":[2,1],'
        f'"data_offsets":[4,8]}}}}'
    ).encode()
    header += b" " * (-len(header) % 8)
    numbers = b"\x00\x3c\x00\x40" + b"\x00\x38\x00\xbc"
    assert (tmp_path / TENSORS).read_bytes() == len(header).to_bytes(8, "little") + header + numbers
    assert json.loads((tmp_path / CONFIG).read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/model",
        "r": 1,
        "lora_alpha": 4.0,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": ["q_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, TENSORS]


@pytest.mark.parametrize(("type_id", "step"), [("f32", 0), ("f16", 2.0**-11), ("bf16", 2.0**-8)])
def test_what_was_written_is_read_back(tmp_path, rng, type_id, step):
    """Ranks and scales of their own go through the patterns; numbers up to half a step of the type."""
    pairs = {
        Q: pair(rng, 6, 4, 2),
        UP: pair(rng, 10, 4, 3),
        "model.layers.2.mlp.up_proj": pair(rng, 10, 4, 3, scale=0.7),
        "model.layers.12.mlp.up_proj": pair(rng, 10, 4, 3),
    }
    write_adapter(tmp_path, pairs, type_id=type_id)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 6.0, {Q: 2})
    assert config["alpha_pattern"] == {Q: 4.0, "model.layers.2.mlp.up_proj": 0.7 * 3}
    assert config["target_modules"] == sorted(pairs)
    file = read_adapter(tmp_path)
    assert [module.name for module in file.modules] == list(pairs)
    for module in file.modules:
        found, written = file.pair(module), pairs[module.name]
        assert found.scale == pytest.approx(written.scale, rel=1e-15)
        assert module.type == type_id
        for got, expected in ((found.a, written.a), (found.b, written.b)):
            assert (np.abs(got - expected) <= step * np.abs(expected)).all()


def test_a_folder_that_is_written_again_is_never_a_mixture(folder, rng, monkeypatch):
    """Killed between the two files: the old settings never stand beside new factors, or new ones beside old."""
    import barefoot.adapters.files as files

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    before = read_adapter(folder)
    old = before.pair(before.modules[0])
    again = {Q: Pair(old.a + 1, old.b, old.scale), UP: pair(rng, 10, 4, 2)}
    for name in ("write_safetensors", "atomic_writer"):
        with monkeypatch.context() as patched:
            patched.setattr(files, name, killed)
            with pytest.raises(KeyboardInterrupt):
                write_adapter(folder, {n: Pair(p.a, p.b, 3.0) for n, p in again.items()}, base="org/model")
        with pytest.raises(SourceNotFound, match=f"lacks {CONFIG}"):
            read_adapter(folder)
        write_adapter(folder, again, base="org/model")
    # With the same settings, either factors are whole and right: nothing needs to go.
    with monkeypatch.context() as patched:
        patched.setattr(files, "write_safetensors", killed)
        with pytest.raises(KeyboardInterrupt):
            write_adapter(folder, again, base="org/model")
    assert np.array_equal(read_adapter(folder).pair(read_adapter(folder).modules[0]).a, old.a + 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e5])
def test_what_a_type_cant_hold_is_not_written(tmp_path, rng, bad):
    pairs = {Q: pair(rng, 6, 4, 2)}
    pairs[Q].b[3, 1] = bad
    with pytest.raises(InvalidInput, match="lora_B holds NaN, infinity, or numbers beyond those of f16"):
        write_adapter(tmp_path / "a", pairs, type_id="f16")
    assert not (tmp_path / "a").exists()
    with pytest.raises(InvalidInput, match="at least one module"):
        write_adapter(tmp_path / "a", {})


# --- what is read ---------------------------------------------------------------------------------------------------


def scales(folder, **settings) -> dict[str, float]:
    change_config(folder, **settings)
    return {module.name: module.scale for module in read_adapter(folder).modules}


def test_scales_as_peft_computes_them(folder):
    assert scales(folder, lora_alpha=7) == {Q: 3.5, UP: 3.5}
    assert scales(folder, use_rslora=True) == {Q: 7 / 2**0.5, UP: 7 / 2**0.5}
    assert scales(folder, use_rslora=False, alpha_pattern={"q_proj": 1}) == {Q: 0.5, UP: 3.5}
    assert scales(folder, alpha_pattern={"proj": 1}) == {Q: 3.5, UP: 3.5}  # names end in it at a dot only
    assert scales(folder, alpha_pattern={"^layers.0.self_attn.q_proj": 1}) == {Q: 3.5, UP: 3.5}
    assert scales(folder, alpha_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 1}) == {Q: 0.5, UP: 3.5}
    assert scales(folder, alpha_pattern={"mlp.up_proj": 4, "up_proj": 8}) == {Q: 3.5, UP: 2.0}  # the first counts


def test_settings_of_training_change_nothing(folder):
    more = {
        "lora_dropout": 0.1,
        "target_modules": "all-linear",
        "peft_version": "0.18",
        "unknown_yet": None,
        "other": {},
    }
    assert scales(folder, **more) == {Q: 2.0, UP: 2.0}


NOT_READ = {
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3'; LORA is read"),
    "no method": ({"peft_type": None}, "peft_type is None"),
    "DoRA": ({"use_dora": True}, "sets use_dora, which is not read"),
    "biases": ({"bias": "all"}, "bias is 'all'"),
    "biases of factors": ({"lora_bias": True}, "sets lora_bias"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
    "layers made of others": ({"layer_replication": [[0, 2], [1, 3]]}, "sets layer_replication"),
    "transposed": ({"fan_in_fan_out": True}, "sets fan_in_fan_out"),
    "tokens": ({"trainable_token_indices": [3]}, "sets trainable_token_indices"),
    "a start that changes the base": ({"init_lora_weights": "pissa_niter_4"}, "changes the model"),
    "LoftQ": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "changes the model"),
    "what is not known": ({"use_something_new": 1, "and_more": "x"}, "sets and_more, use_something_new"),
    "a regular expression": ({"alpha_pattern": {".*q_proj": 1}}, r"alpha_pattern has the key '\.\*q_proj'"),
    "one that takes long": ({"rank_pattern": {"(a+)+b": 1}}, "rank_pattern has the key"),
}


@pytest.mark.parametrize("what", NOT_READ)
def test_what_is_no_plain_lora_is_refused_by_name(folder, what):
    settings, message = NOT_READ[what]
    change_config(folder, **settings)
    with pytest.raises(UnsupportedFormat, match=message):
        read_adapter(folder)


def test_pickles_are_not_opened(folder):
    (folder / TENSORS).rename(folder / PICKLE)
    with pytest.raises(SourceNotFound, match=f"lacks {TENSORS}") as error:
        read_adapter(folder)
    assert "a pickle can run code" in error.value.cure
    with pytest.raises(SourceNotFound, match="is no adapter"):
        read_adapter(folder / "nowhere")


# --- files that lie -------------------------------------------------------------------------------------------------


def key(letter, name=Q):
    return f"base_model.model.{name}.lora_{letter}.weight"


A, B = np.zeros((2, 4), np.float32), np.zeros((6, 2), np.float32)
BAD_TENSORS = {
    "another tensor": ({key("A"): A, key("B"): B, "base_model.model.lm_head.weight": B}, UnsupportedFormat, "lm_head"),
    "a magnitude": ({key("A"): A, "base_model.model.x.lora_magnitude_vector": B}, UnsupportedFormat, "magnitude"),
    "an embedding": ({"base_model.model.x.lora_embedding_A": A}, UnsupportedFormat, "lora_embedding_A"),
    "the adapter's name": ({f"base_model.model.{Q}.lora_A.default.weight": A}, UnsupportedFormat, "default"),
    "one factor": ({key("A"): A}, CorruptFile, "has lora_A, and not the other"),
    "nothing": ({}, CorruptFile, "no factors"),
    "another rank than stated": ({key("A"): A[:1], key("B"): B[:, :1]}, CorruptFile, "states r 2"),
    "ranks that differ": ({key("A"): A, key("B"): B[:, :1]}, CorruptFile, "states r 2"),
    "three axes": ({key("A"): A[None], key("B"): B}, CorruptFile, r"shape \(1, 2, 4\)"),
    "no columns": ({key("A"): A[:, :0], key("B"): B}, CorruptFile, r"shape \(2, 0\)"),
    "doubles": ({key("A"): A.astype("f8"), key("B"): B}, UnsupportedFormat, "stored as f64"),
    "integers": ({key("A"): A, key("B"): B.astype("i1")}, UnsupportedFormat, "stored as i8"),
    "two types": ({key("A"): A.astype("f2"), key("B"): B}, UnsupportedFormat, "f16 and f32"),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_tensors_that_are_no_factors_are_refused_by_name(folder, what):
    tensors, error, message = BAD_TENSORS[what]
    write_tensors(folder, tensors)
    with pytest.raises(error, match=message):
        read_adapter(folder)


BAD_SETTINGS = {
    "no rank": {"r": None},
    "a rank of text": {"r": "2"},
    "a rank of yes": {"r": True},
    "an endless alpha": {"lora_alpha": 1e300},
    "an alpha of text": {"lora_alpha": "4"},
    "no alpha": {"lora_alpha": None},
    "a pattern of ranks": {"rank_pattern": {"q_proj": 1 << 62}},
    "a pattern of texts": {"alpha_pattern": {"q_proj": "x"}},
    "patterns in a list": {"rank_pattern": ["q_proj"]},
    "very many patterns": {"alpha_pattern": {f"m{i}": 1 for i in range(20_000)}},
}


@pytest.mark.parametrize("what", BAD_SETTINGS)
def test_settings_that_contradict_the_tensors_are_refused(folder, what):
    change_config(folder, **BAD_SETTINGS[what])
    with pytest.raises(CorruptFile):
        read_adapter(folder)


def test_damaged_files_end_in_a_named_error(folder, rng):
    """Any byte of either file: it is refused, or what is read has the shapes that it states."""
    for name in (CONFIG, TENSORS):
        good = (folder / name).read_bytes()
        for _ in range(150):
            raw = bytearray(good)
            for at in rng.integers(0, len(raw), 2):
                raw[at] = rng.integers(0, 256)
            if rng.random() < 0.2:
                del raw[int(rng.integers(0, len(raw))) :]
            (folder / name).write_bytes(raw)
            try:
                file = read_adapter(folder)
                for module in file.modules:
                    found = file.pair(module)
                    assert (found.a.shape, found.b.shape) == (module.a.shape, module.b.shape)
                    assert np.isfinite(found.a).all()
            except BarefootError:
                pass
        (folder / name).write_bytes(good)
