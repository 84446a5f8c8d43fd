"""Sequences in files: another engine goes on as the first one does, and files that lie are refused before they harm."""

from __future__ import annotations

import json

import numpy as np
import pytest
from random_files import GEMMA, LLAMA, write_random
from test_batch import open_engine

from barefoot.core.errors import CorruptFile, Incompatible, InvalidInput, SourceNotFound
from barefoot.plan.job import parse_kv

IDS = [(7 * i + 3) % 250 for i in range(70)]
KV = (
    "f16",
    "q8",
    "h2o(keep=20)",
    "h2o(keep=20,layers=measured) > q8",
    "scissorhands(keep=20,window=9,recent=4)",
    "snapkv(keep=20,window=6,room=40) > kivi(residual=32)",
    "kivi(residual=32)",
    "comet(group=32)",
    "d2o(keep=20,first=1,mass=bias)",
    "elastic(ratio=0.4)",
    "kvmerger(keep=20,alike=-1.0,mass=bias)",
    "h2o(keep=30) > minicache(start=0,recent=3) > q8",
    "minicache(recent=5)",
    "h2o(keep=20) > think(recent=8)",
    "think(recent=70,window=9)",  # nothing is thin yet
    "think(window=9) > kivi(residual=32)",
    "h2o(keep=20) > mikv > q8",
    "snapkv(keep=20,window=6,room=40) > mikv(bits=4,balance=false)",
)


@pytest.fixture(scope="module", params=["llama", "gemma"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("snapshots") / request.param
    write_random(path, {"llama": LLAMA, "gemma": GEMMA}[request.param])
    return path


def go_on(engine, tokens, sequence=0):
    return np.array([engine.decode(t, sequence).copy() for t in tokens])


@pytest.mark.parametrize("kv", KV)
def test_another_engine_goes_on_as_the_first_one(folder, kv, tmp_path):
    """A prompt, tokens, saved; more tokens and another prompt, bit by bit the same; into a sequence that had others."""
    path = tmp_path / "at.kv"
    with open_engine(folder, kv=parse_kv(kv)) as engine, open_engine(folder, kv=parse_kv(kv), n_sequences=2) as other:
        engine.prefill(IDS[:45])
        go_on(engine, IDS[45:57])
        engine.save(path)
        other.prefill(IDS[10:20], sequence=1)
        other.load(path, 1)
        assert other.positions == (0, 57)
        assert np.array_equal(go_on(engine, IDS[57:62]), go_on(other, IDS[57:62], 1))
        if "kivi" not in kv and "comet" not in kv:
            assert np.array_equal(engine.prefill(IDS[:9]), other.prefill(IDS[:9], sequence=1))
            assert np.array_equal(go_on(engine, IDS[5:9]), go_on(other, IDS[5:9], 1))


def test_a_file_has_what_is_there_and_no_more(folder, tmp_path):
    """Rows of 57 positions, not of the context's 96: bytes by the shapes."""
    path = tmp_path / "at.kv"
    with open_engine(folder) as engine:
        engine.prefill(IDS[:57])
        engine.save(path)
        spec = engine.spec
        rows = [min(57, pair[0].shape[2]) for pair in engine.kv.arrays.values()]
    stated = 2 * spec.n_kv_heads * sum(rows) * 2 * spec.head_dim
    n_header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + n_header + stated


def rewritten(path, change):
    """The file with its own header changed, ``change(header)``."""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    outer = json.loads(raw[8 : 8 + n])
    inner = json.loads(outer["__metadata__"]["barefoot.kv"])
    change(inner)
    outer["__metadata__"]["barefoot.kv"] = json.dumps(inner)
    header = json.dumps(outer).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + n :])


def put(header, keys, value):
    *outer, last = keys
    for key in outer:
        header = header[key]
    header[last] = value


@pytest.mark.parametrize(
    ("kv", "keys", "value"),
    [
        ("h2o(keep=20)", ("cache", "entries", "n", 0), 1 << 40),
        ("h2o(keep=20)", ("cache", "entries", "n", 0), 22),
        ("h2o(keep=20)", ("cache", "entries", "n", 0), 19),
        ("h2o(keep=20)", ("cache", "entries"), None),
        ("h2o(keep=20)", ("cache", "tokens"), 56),
        ("h2o(keep=20)", ("cache", "tokens"), -1),
        ("h2o(keep=20)", ("cache", "evicted_at"), 58),
        ("h2o(keep=20)", ("cache",), []),
        ("h2o(keep=20)", ("tokens",), True),
        ("h2o(keep=20,layers=measured)", ("cache", "keeps", 0), 100),
        ("h2o(keep=20,layers=measured)", ("cache", "keeps", 0), 1),
        ("d2o(keep=20,first=1)", ("cache", "carried", 0, 0), "1"),
        ("d2o(keep=20,first=1)", ("cache", "carried", 0), [1.0]),
        ("scissorhands(keep=20,window=9,recent=4)", ("cache", "part"), 9),
        ("kivi(residual=32)", ("cache", "entries", "keys", 0), 31),
        ("kivi(residual=32)", ("cache", "entries", "values", 0), 57),
        ("comet(group=32)", ("cache", "entries", "keys", 0), 0),
        ("comet(group=32)", ("cache", "entries", "n", 0), 70),
        ("minicache(start=0,recent=3)", ("cache", "entries", "merged", 0), 1 << 40),
        ("minicache(start=0,recent=3)", ("cache", "entries", "merged", 1), 40),
        ("minicache(start=0,recent=3)", ("cache", "entries", "exact", 0), 7),  # of 96 slots 4 are kept, 3 wait
        ("minicache(start=0,recent=3)", ("cache", "entries", "exact"), [4]),
        ("think(recent=8)", ("cache", "entries", "chosen", 0), 0),
        ("think(recent=8)", ("cache", "entries", "chosen", 0), 2),
        ("think > kivi(residual=32)", ("cache", "entries", "chosen", 0), 0),
        ("h2o(keep=20) > mikv", ("cache", "entries", "codes", 0), 1 << 40),
        ("h2o(keep=20) > mikv", ("cache", "entries", "codes", 0), 36),
        ("h2o(keep=20) > mikv", ("cache", "entries", "fixed", 0), 0),
        ("f16", ("highest",), 1 << 35),
        ("f16", ("highest",), 60),
    ],
)
def test_counters_that_lie_leave_an_empty_sequence(kv, keys, value, tmp_path):
    folder, path = tmp_path / "llama", tmp_path / "at.kv"
    write_random(folder, LLAMA)
    with open_engine(folder, kv=parse_kv(kv)) as engine:
        expected = engine.prefill(IDS[:57]).copy()
        engine.save(path)
        rewritten(path, lambda header: put(header, keys, value))
        with pytest.raises(CorruptFile):
            engine.load(path)
        engine.reset()
        assert np.array_equal(engine.prefill(IDS[:57]), expected)


def test_positions_that_lie_are_refused(tmp_path):
    folder, path = tmp_path / "llama", tmp_path / "at.kv"
    write_random(folder, LLAMA)
    with open_engine(folder, kv=parse_kv("h2o(keep=20)")) as engine:
        engine.prefill(IDS[:57])
        engine.save(path)
        raw = bytearray(path.read_bytes())
        n = int.from_bytes(raw[:8], "little")
        first = json.loads(raw[8 : 8 + n])["cache.0.position"]["data_offsets"][0] + 8 + n
        for value in (57, -1, int.from_bytes(raw[first + 4 : first + 8], "little")):
            raw[first : first + 4] = value.to_bytes(4, "little", signed=True)
            path.write_bytes(raw)
            with pytest.raises(CorruptFile, match="positions of layer 0"):
                engine.load(path)
            assert engine.position == 0


@pytest.mark.parametrize(
    ("kv", "tensor", "first", "match"),
    [
        ("think(recent=8)", "0.channels", [300], "channels of layer 0 are not different ones below"),
        ("think(recent=8)", "0.channels", [3, 3], "channels of layer 0 are not different ones below"),
        ("think(recent=70)", "1.asked", np.array([np.nan], np.float32), "sums of squares of queries of layer 1"),
        ("think(recent=8)", "0.position", np.arange(57, dtype=np.int32), "whole keys of layer 0 are not the newest"),
        ("h2o(keep=20) > mikv", "0.position.codes", np.array([57], np.int32), "positions of layer 0 and its codes"),
        ("h2o(keep=20) > mikv", "0.position.codes", np.array([56], np.int32), "positions of layer 0 and its codes"),
        ("h2o(keep=20) > mikv", "balance", np.array([0], np.float32), "channels of layer 0 have a balance that can't"),
    ],
)
def test_contents_that_lie_are_refused(kv, tensor, first, match, tmp_path):
    """The beginning of a tensor overwritten; position 56, the prompt's last, is kept by the policy."""
    folder, path = tmp_path / "llama", tmp_path / "at.kv"
    write_random(folder, LLAMA)
    with open_engine(folder, kv=parse_kv(kv)) as engine:
        expected = engine.prefill(IDS[:57]).copy()
        engine.save(path)
        raw = bytearray(path.read_bytes())
        n = int.from_bytes(raw[:8], "little")
        at = json.loads(raw[8 : 8 + n])[f"cache.{tensor}"]["data_offsets"][0] + 8 + n
        new = (np.array(first, np.uint16) if isinstance(first, list) else first).tobytes()
        raw[at : at + len(new)] = new
        path.write_bytes(raw)
        with pytest.raises(CorruptFile, match=match):
            engine.load(path)
        assert engine.position == 0
        assert np.array_equal(engine.prefill(IDS[:57]), expected)


def test_what_is_of_another_model_store_or_size_is_refused_and_nothing_changes(folder, tmp_path):
    path, other = tmp_path / "at.kv", tmp_path / "other"
    write_random(other, LLAMA, seed=5)
    with open_engine(folder, kv=parse_kv("q8")) as engine:
        engine.prefill(IDS[:57])
        engine.save(path)
        with pytest.raises(InvalidInput, match="no tokens to save"):
            open_engine(folder).save(path)
        refusals = [
            (open_engine(folder), Incompatible, "another kv"),
            (open_engine(other, kv=parse_kv("q8")), Incompatible, "norms"),
            (
                open_engine(folder, kv=parse_kv("q8"), context=50),
                InvalidInput,
                "57 tokens, more than the context of 50",
            ),
        ]
        for refusing, error, match in refusals:
            with refusing:
                refusing.prefill(IDS[:5])
                with pytest.raises(error, match=match):
                    refusing.load(path)
                assert refusing.position == 5
        for content in (b"", b"\x08\0\0\0\0\0\0\0{}      ", path.read_bytes()[:-1]):
            bad = tmp_path / "bad.kv"
            bad.write_bytes(content)
            with pytest.raises(CorruptFile):
                engine.load(bad)
        with pytest.raises(SourceNotFound):
            engine.load(tmp_path / "none.kv")
        assert engine.position == 57
        expected = go_on(engine, IDS[57:60])
        engine.load(path)
        assert np.array_equal(go_on(engine, IDS[57:60]), expected)
