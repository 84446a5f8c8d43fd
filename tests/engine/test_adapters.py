"""Adapters beside a model: the same logits as of the merged model, whatever it is stored as, and the stated bytes."""

import tracemalloc

import numpy as np
import pytest
import tiny
from adapter_folders import changes, merged, random_pairs, spec_of, write_random_adapter
from folders import save, values
from random_files import GEMMA, LLAMA, write_random
from test_architectures import TOLERANCE

from barefoot.adapters.files import Pair, read_adapter, write_adapter
from barefoot.core.errors import CorruptFile, Incompatible
from barefoot.core.measure import release_free_memory, resident
from barefoot.engine import adapter_files
from barefoot.engine.adapter_files import load_adapter, save_adapter
from barefoot.engine.beside import beside
from barefoot.engine.config import EngineConfig
from barefoot.engine.footprint import ADAPTER_BYTES_PER_NUMBER, PASSING, footprint
from barefoot.engine.gguf_export import export_gguf
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.io.safetensors import array_entry, write_safetensors
from barefoot.ops import blocks, lowrank
from barefoot.plan.job import parse_kv
from barefoot.weights.formats.integer import IntegerGroups

IDS = np.random.default_rng(6).integers(0, 97, 40).tolist()
MODELS = ("llama-gqa-9-3", "llama-head-dim", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "phi3-partial")


@pytest.fixture(scope="module", params=MODELS)
def reference(request, tmp_path_factory):
    """(folder, adapter's folder, how the engine takes it, logits of the merged model in transformers)"""
    model, folder = tiny.build(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "model")
    adapter = write_random_adapter(folder / "model", folder / "adapter", rank=lambda name: 3 + len(name) % 3)
    plain = tiny.expected(model, IDS)
    logits = tiny.expected(merged(model, folder / "adapter"), IDS)
    assert np.abs(logits - plain).max() > 0.5  # the adapter matters
    return folder / "model", adapter, logits


@pytest.mark.parametrize(("chunk", "n_prefill"), [(64, 40), (7, 30), (1, 5)])
def test_logits_equal_those_of_the_merged_model(reference, chunk, n_prefill):
    folder, adapter, logits = reference
    with tiny.engine(folder, chunk=chunk, adapter=adapter) as run:
        assert np.abs(tiny.all_logits(run, IDS, n_prefill) - logits).max() < TOLERANCE


def test_streamed_layers_have_their_factors(reference):
    """All that differs is where blocks are: bit for bit the same."""
    folder, adapter, _ = reference
    with tiny.engine(folder, chunk=16, adapter=adapter) as run:
        expected = tiny.all_logits(run, IDS, 30)
    for n_streamed in (1, run.spec.n_layers):
        with tiny.engine(folder, chunk=16, adapter=adapter, n_streamed_layers=n_streamed, stream_head=True) as run:
            assert np.array_equal(tiny.all_logits(run, IDS, 30), expected)


@pytest.mark.parametrize("roles", [("q", "v"), ("k",), ("gate", "down")])
def test_some_matrices_of_some_layers(tmp_path, roles):
    """Phi-3 keeps q, k and v, and gate and up, in one module each: those without an adapter get zeros."""
    for name in ("llama-gqa-9-3", "phi3"):
        model, folder = tiny.build(name), tmp_path / name
        model.save_pretrained(folder / "model")
        spec = spec_of(folder / "model")
        pairs = {n: p for n, p in random_pairs(spec, roles).items() if not n.startswith("layers.1.")}
        save_adapter(folder / "adapter", spec, pairs)
        assert {int(n.split(".")[2]) for n in changes(folder / "adapter")} == {0, 2}
        with tiny.engine(folder / "model", adapter=beside(spec, read_adapter(folder / "adapter"))) as run:
            logits = tiny.expected(merged(model, folder / "adapter"), IDS)
            assert np.abs(tiny.all_logits(run, IDS) - logits).max() < TOLERANCE


def test_matrices_that_share_a_module_may_differ_in_rank_and_scale(tmp_path):
    """Of a fused module q, k and v each keep what is theirs."""
    model = tiny.build("phi3")
    model.save_pretrained(tmp_path / "model")
    spec = spec_of(tmp_path / "model")
    pairs = {
        name: Pair(pair.a, pair.b, pair.scale * (1 + i % 3))
        for i, (name, pair) in enumerate(random_pairs(spec, "qkv", rank=lambda name: 2 + ord(name[-1]) % 4).items())
    }
    save_adapter(tmp_path / "adapter", spec, pairs)
    for module, change in changes(tmp_path / "adapter").items():
        layer = module.split(".")[2]
        own = [pairs[f"layers.{layer}.{role}"] for role in "qkv"]
        expected = np.concatenate([p.scale * p.b.astype(np.float64) @ p.a for p in own])
        assert np.abs(change - expected).max() < 1e-6


# --- the order of rows in GGUF files --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interleaved(tmp_path_factory, tiny_gguf):
    """(transformers model, its folder, the same model as a GGUF file, whose q and k have other rows)"""
    model, folder = tiny.build("llama-gqa-9-3"), tmp_path_factory.mktemp("interleaved")
    save(model, folder / "hf", tiny_gguf)
    with Checkpoint(folder / "hf") as checkpoint:
        export_gguf(checkpoint, model_spec(checkpoint), folder / "m.gguf")
    return model, folder / "hf", folder / "m.gguf"


def difference(path, adapter, logits) -> float:
    with tiny.engine(path, adapter=beside(spec_of(path), read_adapter(adapter))) as run:
        return float(np.abs(tiny.all_logits(run, IDS) - logits).max())


def test_an_adapter_of_a_folder_stands_beside_a_gguf_file(interleaved, tmp_path, monkeypatch):
    _, hf, gguf = interleaved
    write_random_adapter(hf, tmp_path / "adapter", roles="qk")
    logits = tiny.expected(merged(tiny.build("llama-gqa-9-3"), tmp_path / "adapter"), IDS)
    assert difference(hf, tmp_path / "adapter", logits) < TOLERANCE
    assert difference(gguf, tmp_path / "adapter", logits) < TOLERANCE
    monkeypatch.setattr(adapter_files, "halves_order_of", lambda spec, weight: None)
    assert difference(gguf, tmp_path / "adapter", logits) > 1000 * TOLERANCE  # rows as they come are of other channels


def test_an_adapter_of_a_gguf_file_is_written_in_the_order_of_transformers(interleaved, tmp_path, monkeypatch):
    """Pairs as they are trained beside the file's own rows; what is written must hold for the model of transformers."""
    _, hf, gguf = interleaved
    here, there = spec_of(gguf), spec_of(hf)
    pairs = random_pairs(here)
    save_adapter(tmp_path / "adapter", here, pairs)
    back = load_adapter(here, read_adapter(tmp_path / "adapter"))
    for name, pair in pairs.items():
        assert np.array_equal(back[name].b, pair.b)
        assert np.array_equal(back[name].a, pair.a)
    by_folder = load_adapter(there, read_adapter(tmp_path / "adapter"))
    (_, own), (_, theirs) = values(gguf), values(hf)
    for name, pair in pairs.items():  # rows that are the same in the matrices are the same in the factors
        order = [int(np.flatnonzero((own[name] == row).all(axis=1))[0]) for row in theirs[name]]
        assert np.array_equal(by_folder[name].b, pair.b[order]), name
    logits = tiny.expected(merged(tiny.build("llama-gqa-9-3"), tmp_path / "adapter"), IDS)
    assert difference(gguf, tmp_path / "adapter", logits) < TOLERANCE
    monkeypatch.setattr(adapter_files, "halves_order_of", lambda spec, weight: None)
    save_adapter(tmp_path / "wrong", here, pairs)
    logits = tiny.expected(merged(tiny.build("llama-gqa-9-3"), tmp_path / "wrong"), IDS)
    monkeypatch.undo()
    assert difference(gguf, tmp_path / "adapter", logits) > 1000 * TOLERANCE


# --- compositions ---------------------------------------------------------------------------------------------------

WIDE = LLAMA | {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160}
INT = {bits: dict.fromkeys(("attn", "ffn"), IntegerGroups(bits, 32)) for bits in (8, 4, 3)}
COMPOSED = {
    "stored": {},
    "8 bits": {"weights": INT[8]},
    "4 bits": {"weights": INT[4]},
    "3 bits, few tokens at once": {"weights": INT[3], "chunk": 5},
    "4 bits, rows of 8": {"weights": INT[4], "kv": parse_kv("q8")},
    "layers from disk": {"n_streamed_layers": 3, "stream_head": True},
    "some layers from disk": {"n_streamed_layers": 2, "weights": INT[4]},
    "a policy": {"weights": INT[4], "kv": parse_kv("h2o(keep=20)")},
    "a policy, from disk": {"n_streamed_layers": 4, "kv": parse_kv("snapkv(keep=20,window=6,room=40) > q8")},
}


def dense(path, folder, adapter, weights) -> None:
    """The model at ``path`` in float32, its matrices rounded to the formats ``weights``, the adapter added to them."""
    spec, found = values(path)
    added, entries = changes(adapter), []
    for w in spec.weights:
        value, fmt = found[w.name], weights.get(w.group)
        if fmt is not None:
            layout = fmt.layout(w.format)
            value = blocks.decode(layout, blocks.encode(layout, value), w.cols)
        value = value + added.get(w.source.removesuffix(".weight"), np.float32(0)).astype(np.float32)
        shift = np.float32(spec.norm_plus_one and w.name.endswith("norm"))
        entries.append(array_entry(w.source, value[0] - shift if w.group == "norm" else value))
    folder.mkdir()
    (folder / "config.json").write_text((path / "config.json").read_text())
    write_safetensors(folder / "model.safetensors", entries)


@pytest.mark.parametrize("model", ["llama", "gemma"])
@pytest.mark.parametrize("case", COMPOSED)
def test_any_composition_equals_the_same_on_the_merged_model(tmp_path, model, case):
    """In float32: the cache and placement as they are, matrices decoded and summed beforehand."""
    write_random(tmp_path / "model", {"llama": WIDE, "gemma": GEMMA | {"hidden_size": 96}}[model])
    adapter = write_random_adapter(tmp_path / "model", tmp_path / "adapter")
    settings = COMPOSED[case]
    n_whole = 4 - settings.get("n_streamed_layers", 0)
    assert n_whole == 4 or not settings.get("weights") or n_whole == 2
    rounded = settings.get("weights", {}) if n_whole == 4 else {}
    dense(tmp_path / "model", tmp_path / "dense", tmp_path / "adapter", rounded)
    if n_whole == 2:
        settings = {k: v for k, v in settings.items() if k != "weights"}
    other = {k: v for k, v in settings.items() if k not in ("weights", "n_streamed_layers", "stream_head")}
    with tiny.engine(tmp_path / "dense", **{"chunk": 16} | other) as run:
        expected = tiny.all_logits(run, IDS, 25)
    with tiny.engine(tmp_path / "model", **{"chunk": 16} | settings, adapter=adapter) as run:
        found = tiny.all_logits(run, IDS, 25)
    with tiny.engine(tmp_path / "model", **{"chunk": 16} | settings) as run:
        without = tiny.all_logits(run, IDS, 25)
    assert np.abs(found - expected).max() < TOLERANCE
    assert np.abs(found - without).max() > 100 * TOLERANCE


def test_sequences_of_a_batch_are_as_if_alone(tmp_path):
    write_random(tmp_path / "model", WIDE)
    adapter = write_random_adapter(tmp_path / "model", tmp_path / "adapter", type_id="f16")
    with tiny.engine(tmp_path / "model", n_sequences=3, adapter=adapter) as run:
        for s in range(3):
            run.prefill(IDS[s : s + 9], sequence=s)
        together = run.decode_batch({s: IDS[20 + s] for s in range(3)}).copy()
    for s in range(3):
        with tiny.engine(tmp_path / "model", adapter=adapter) as run:
            run.prefill(IDS[s : s + 9])
            assert np.array_equal(run.decode(IDS[20 + s]), together[s])


# --- numbers of the file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_id", lowrank.TYPES)
@pytest.mark.parametrize("scale", [2.0, 0.3])
def test_numbers_in_memory_are_those_of_the_file(tmp_path, type_id, scale):
    """None is rounded anew, whatever the scale."""
    write_random(tmp_path / "model", WIDE)
    adapter = write_random_adapter(tmp_path / "model", tmp_path / "adapter", type_id=type_id, scale=scale)
    exact = load_adapter(spec_of(tmp_path / "model"), read_adapter(tmp_path / "adapter"))
    with tiny.engine(tmp_path / "model", adapter=adapter) as run:
        for name, part in run._beside.items():
            a, b, found = lowrank.factors(type_id, part.rows, part.cols, part.buffer)
            assert np.array_equal(a, exact[name].a)
            assert np.array_equal(b, exact[name].b)
            assert found == np.float32(exact[name].scale)


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_id", lowrank.TYPES)
@pytest.mark.parametrize("model", [LLAMA, GEMMA, WIDE | {"intermediate_size": 1000}])
def test_bytes_are_those_that_are_stated(tmp_path, type_id, model):
    """By hand from the shapes; from the arrays that exist; and what the arena has handed out."""
    write_random(tmp_path / "model", model)
    adapter = write_random_adapter(tmp_path / "model", tmp_path / "adapter", type_id=type_id, rank=5, roles="qvo")
    spec = spec_of(tmp_path / "model")
    number = 4 if type_id == "f32" else 2
    shapes = [(w.rows, w.cols) for w in spec.weights if w.layer is not None and w.name.split(".")[2] in "qvo"]
    sizes = [64 + number * 5 * sum(-(-n // 16) * 16 for n in shape) for shape in shapes]
    with tiny.engine(tmp_path / "model", adapter=adapter) as run:
        assert sum(part.buffer.nbytes for part in run._beside.values()) == sum(sizes)
        used = run.arena.used_by_owner()
        assert used["adapter"] == sum(-(-size // 64) * 64 for size in sizes)
        run.prefill(IDS)
        assert run.arena.used_by_owner() == used
        assert run.arena.used()["adapter"] == used["adapter"]
        planned = {e.owner: e.bytes for e in footprint(spec, run.config) if e.owner not in PASSING}
    without = {e.owner: e.bytes for e in footprint(spec, EngineConfig(**vars(run.config) | {"adapter": None}))}
    assert planned["adapter"] == used["adapter"]
    assert {k: v for k, v in planned.items() if k not in ("adapter", "scratch")} == {
        k: v for k, v in without.items() if k not in ("scratch", *PASSING)
    }


def test_the_system_sees_these_bytes(tmp_path):
    write_random(tmp_path / "model", WIDE)
    adapter = write_random_adapter(tmp_path / "model", tmp_path / "adapter", rank=96)

    def grown(**settings):
        release_free_memory()
        before = resident()
        with tiny.engine(tmp_path / "model", **settings) as run:
            run.prefill(IDS)
            release_free_memory()
            after = resident()
            planned = sum(e.bytes for e in run.footprint.select(phase="decode"))
        return (after.anonymous - before.anonymous if before and after else None), planned

    if resident() is None:
        pytest.skip("this system does not tell what is resident")
    plain, with_adapter = grown(), grown(adapter=adapter)
    assert with_adapter[1] - plain[1] > 2 << 20
    assert abs((with_adapter[0] - plain[0]) - (with_adapter[1] - plain[1])) < 128 << 10


@pytest.mark.parametrize("type_id", lowrank.TYPES)
def test_reading_takes_what_is_stated(tmp_path, type_id):
    """Numpy's peak while factors of a wide matrix are read: B takes most, as it is stored, decoded, and stored anew."""
    from barefoot.engine import beside as module
    from barefoot.engine.arena import Arena

    write_random(tmp_path / "model", LLAMA | {"num_hidden_layers": 1, "intermediate_size": 1600})
    spec = spec_of(tmp_path / "model")
    rank = 1024
    adapter = write_random_adapter(tmp_path / "model", tmp_path / "adapter", rank=rank, roles=("up",), type_id=type_id)
    config = EngineConfig(context=16, chunk=1, kv=parse_kv("f32"), adapter=adapter)
    planned = footprint(spec, config)
    arena = Arena(planned)
    arena.release("adapter")
    tracemalloc.start()
    module.load(spec, adapter, arena)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    stated = next(e.bytes for e in planned if e.owner == "adapter reader")
    assert stated == rank * (96 + 1600) * ADAPTER_BYTES_PER_NUMBER
    assert peak < stated
    assert peak > {"bf16": 0.95, "f32": 0.85, "f16": 0.65}[type_id] * stated


# --- snapshots, and what does not go together -----------------------------------------------------------------------


def test_snapshots_are_of_one_adapter(tmp_path):
    write_random(tmp_path / "model", WIDE)
    one = write_random_adapter(tmp_path / "model", tmp_path / "one")
    other = write_random_adapter(tmp_path / "model", tmp_path / "other", seed=4)
    path = tmp_path / "at.kv"
    with tiny.engine(tmp_path / "model", adapter=one) as run:
        run.prefill(IDS[:9])
        run.save(path)
        expected = run.decode(3).copy()
    with tiny.engine(tmp_path / "model", adapter=one) as run:
        run.load(path)
        assert np.array_equal(run.decode(3), expected)
    for adapter in (other, None):
        with tiny.engine(tmp_path / "model", adapter=adapter) as run:
            with pytest.raises(Incompatible, match="taken of another adapter"):
                run.load(path)
            run.prefill(IDS[:9])
            run.save(tmp_path / "plain.kv")
        with tiny.engine(tmp_path / "model", adapter=one) as run:
            with pytest.raises(Incompatible, match="taken of another adapter"):
                run.load(tmp_path / "plain.kv")


def test_an_adapter_of_another_model_is_refused_with_names(tmp_path):
    write_random(tmp_path / "small", LLAMA)
    write_random(tmp_path / "wide", WIDE)
    write_random(tmp_path / "deep", LLAMA | {"num_hidden_layers": 5})
    adapter = write_random_adapter(tmp_path / "deep", tmp_path / "adapter")
    with pytest.raises(Incompatible, match=r"layers\.4\.self_attn\.q_proj.*has no such matrix"):
        beside(spec_of(tmp_path / "small"), read_adapter(tmp_path / "adapter"))
    with pytest.raises(Incompatible, match=r"q_proj are of a matrix \(96, 96\), in wide it is \(128, 128\)"):
        beside(spec_of(tmp_path / "wide"), read_adapter(tmp_path / "adapter"))
    with pytest.raises(Incompatible, match=r"no layers\.4\.q"):
        tiny.engine(tmp_path / "small", adapter=adapter)


@pytest.mark.parametrize(
    ("name", "is_read"),
    [
        ("model.layers.0.self_attn.q_proj", True),
        ("model.language_model.layers.0.self_attn.q_proj", True),
        ("language_model.model.layers.0.self_attn.q_proj", True),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj", False),
        ("model.layers.00.self_attn.q_proj", False),
        ("model.embed_tokens", False),
        ("lm_head", False),
    ],
)
def test_layers_of_the_language_model_and_no_others(tmp_path, name, is_read):
    write_random(tmp_path / "model", LLAMA)
    pair = next(iter(random_pairs(spec_of(tmp_path / "model")).values()))
    write_adapter(tmp_path / "adapter", {name: pair})
    if is_read:
        (part,) = beside(spec_of(tmp_path / "model"), read_adapter(tmp_path / "adapter")).parts
        assert part[0] == "layers.0.q"
        return
    with pytest.raises(Incompatible, match="no such matrix"):
        beside(spec_of(tmp_path / "model"), read_adapter(tmp_path / "adapter"))


def test_a_folder_that_changed_since_it_was_planned_is_refused(tmp_path):
    write_random(tmp_path / "model", LLAMA)
    adapter = write_random_adapter(tmp_path / "model", tmp_path / "adapter")
    write_random_adapter(tmp_path / "model", tmp_path / "adapter", rank=6)
    with pytest.raises(CorruptFile, match="has changed since"):
        tiny.engine(tmp_path / "model", adapter=adapter)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    write_random(tmp_path / "model", LLAMA)
    adapter = write_random_adapter(tmp_path / "model", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-4:] = np.array([np.nan], "<f4").tobytes()
    path.write_bytes(raw)
    with pytest.raises(CorruptFile, match="holds NaN or infinity"):
        tiny.engine(tmp_path / "model", adapter=adapter)
