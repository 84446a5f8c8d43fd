"""Weights on disk: where they are read from, what happens when the file changes, and that nothing is left behind."""

import itertools
import os
import threading

import numpy as np
import pytest
from random_files import GEMMA, LLAMA, write_random

from barefoot.core.errors import CorruptFile, InvalidInput
from barefoot.engine.config import EngineConfig
from barefoot.engine.placement import PAGE, item_bytes
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.engine.stream import arrange_item, layer_item
from barefoot.io.inventory import Checkpoint
from barefoot.kv.stores.f16 import HalfStore
from barefoot.weights.formats.integer import IntegerGroups


@pytest.fixture
def folder(tmp_path):
    write_random(tmp_path / "model", LLAMA)
    return tmp_path / "model"


def open_engine(folder, **settings) -> Engine:
    with Checkpoint(folder) as checkpoint:
        config = EngineConfig(**{"context": 128, "kv": HalfStore(), "chunk": 8} | settings)
        return Engine(checkpoint, model_spec(checkpoint), config)


@pytest.mark.parametrize("model", [LLAMA, GEMMA, LLAMA | {"tie_word_embeddings": True, "vocab_size": 9001}])
@pytest.mark.parametrize("n_streamed_layers", [0, 1, 2, 4])
def test_streamed_equals_resident_bit_for_bit(model, n_streamed_layers, tmp_path):
    write_random(tmp_path, model)
    ids = [5, 17, 200, 3] * 6
    results = []
    for settings in ({}, {"n_streamed_layers": n_streamed_layers, "stream_head": True}):
        with open_engine(tmp_path, **settings) as run:
            rows = [run.prefill(ids).copy()]
            rows += [run.decode(token).copy() for token in (9, 8, 7)]
            run.reset()
            rows.append(run.prefill(ids[:5]).copy())
            results.append(np.array(rows))
    assert np.array_equal(*results)


def test_extents_cover_the_pieces(folder):
    with Checkpoint(folder) as checkpoint:
        spec = model_spec(checkpoint)
        data = checkpoint.paths[0].read_bytes()
        tensors = checkpoint.tensors
    for layer in range(spec.n_layers):
        weights = [w for w in spec.weights if w.layer == layer and w.group != "norm"]
        item = layer_item(weights, tensors, [len(data)])
        buffer = bytearray(item_bytes(weights))
        for extent in item.extents:
            assert extent.offset % PAGE == 0
            assert extent.at % PAGE == 0
            assert extent.n_bytes % PAGE == 0 or extent.offset + extent.n_bytes == len(data)
            buffer[extent.at : extent.at + extent.n_bytes] = data[extent.offset : extent.offset + extent.n_bytes]
        for weight, (start, stop) in zip(weights, item.spans, strict=True):
            tensor = tensors[weight.source]
            assert buffer[start:stop] == data[tensor.offset : tensor.offset + tensor.n_bytes]


def test_pieces_far_apart_are_read_each_by_itself():
    item = arrange_item([(0, 10_000_000, 100), (0, 50, 100)], [20_000_000], join=False)
    assert [(e.offset, e.n_bytes, e.at) for e in item.extents] == [(0, PAGE, 0), (9_998_336, PAGE, PAGE)]
    assert item.spans == ((PAGE + 1664, PAGE + 1764), (50, 150))


def test_a_truncated_file_gives_one_error_and_a_restored_one_goes_on(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    with open_engine(folder, n_streamed_layers=4) as run:
        run.prefill([1, 2, 3])
        good = run.decode(4).copy()
        run.truncate(3)
        os.truncate(file, len(content) // 4)
        with pytest.raises(CorruptFile, match=r"model.safetensors: bytes \d+ to \d+ can't be read"):
            run.decode(4)
        file.write_bytes(content)
        run.truncate(3)
        assert np.array_equal(run.decode(4), good)


def test_a_file_that_shrinks_before_loading_is_refused(folder):
    with Checkpoint(folder) as checkpoint:
        spec = model_spec(checkpoint)
        os.truncate(folder / "model.safetensors", 4096)
        with pytest.raises(CorruptFile, match="can't be read from a file of 4096 bytes"):
            Engine(checkpoint, spec, EngineConfig(context=16, kv=HalfStore(), chunk=8))


def test_closing_ends_the_thread_and_closes_files(folder):
    threads = threading.active_count()
    n_open = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    run = open_engine(folder, n_streamed_layers=2)
    run.prefill([1])
    assert threading.active_count() == threads + 1
    run.close()
    assert threading.active_count() == threads
    if n_open is not None:
        assert len(os.listdir("/proc/self/fd")) == n_open


def test_progress_reaches_the_bytes_of_the_file(folder):
    with Checkpoint(folder) as checkpoint:
        spec = model_spec(checkpoint)
        seen: list[tuple[int, int]] = []
        formats = dict.fromkeys(("attn", "ffn"), IntegerGroups(4, 32))
        config = EngineConfig(context=16, kv=HalfStore(), chunk=8, weights=formats)
        Engine(checkpoint, spec, config, progress=lambda done, total: seen.append((done, total))).close()
        total = sum(t.n_bytes for t in checkpoint.tensors.values())
    assert seen[-1] == (total, total)
    assert all(a < b for (a, _), (b, _) in itertools.pairwise(seen))


def test_context_overflow_says_what_is_left(folder):
    with open_engine(folder, context=16) as run:
        run.prefill(list(range(10)))
        with pytest.raises(InvalidInput, match="7 tokens don't fit: 6 of 16 positions are left"):
            run.prefill(list(range(7)))
        run.prefill(list(range(6)))
        with pytest.raises(InvalidInput, match="1 tokens don't fit: 0 of 16"):
            run.decode(1)
        with pytest.raises(InvalidInput, match="token ids must be 0 to 258, got 259"):
            run.decode(259)
        with pytest.raises(InvalidInput, match="no tokens were given"):
            run.prefill([])


def test_truncate_and_its_limits(tmp_path):
    write_random(tmp_path, GEMMA)
    with open_engine(tmp_path, context=128) as run:
        expected = run.prefill([*range(40), 99]).copy()
        run.reset()
        run.prefill(list(range(44)))
        run.truncate(40)
        assert np.array_equal(run.decode(99), expected)
        run.prefill(list(range(20)))
        with pytest.raises(InvalidInput, match="can't go back from 61 tokens to 30: layers with a window of 16"):
            run.truncate(30)
        with pytest.raises(InvalidInput, match="can keep 0 to 61 tokens, got 62"):
            run.truncate(62)
        run.truncate(0)
        assert (run.position, run.remaining) == (0, 128)
