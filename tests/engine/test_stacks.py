"""Stacks: what is in memory at each size, that growing and shrinking move only the difference, and their order."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from random_files import LLAMA, write_random
from tiny import all_logits, engine

from barefoot.core.errors import CorruptFile, Incompatible, InvalidInput
from barefoot.core.ledger import Entry, Footprint, Term
from barefoot.core.measure import COUNTER_SLACK, resident
from barefoot.core.units import MIB
from barefoot.engine.arena import Arena
from barefoot.engine.fitting import Fit, fit
from barefoot.engine.footprint import footprint as engine_footprint
from barefoot.engine.specs import model_spec
from barefoot.engine.stacks import RECORD, loaded
from barefoot.evals.scoring import score
from barefoot.evals.sorting import measure_gains, sort_stack, stack_levels
from barefoot.io.inventory import Checkpoint
from barefoot.io.safetensors import array_entry, write_safetensors
from barefoot.ops import signs
from barefoot.weights.solvers.range import Range
from barefoot.weights.structures.bitstack import BitStack

TEXTS = np.random.default_rng(3).integers(0, 259, (3, 40)).astype(np.int32)
NO_TEXT = np.empty((0, 0), np.int32)
BLOCKS, MATRICES = 4, 28
IDS = TEXTS[0].tolist()


def fitted(source, target, formats):
    with Checkpoint(source) as checkpoint:
        spec = model_spec(checkpoint)
        fit(checkpoint, spec, Fit(formats(spec), Range(), TEXTS), target).finish({})
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four layers, each matrix in four blocks."""
    path = tmp_path_factory.mktemp("stack")
    write_random(path / "source", LLAMA)
    how = BitStack(blocks=BLOCKS)
    return fitted(
        path / "source", path / "out", lambda s: {w.name: how for w in s.weights if w.group in ("attn", "ffn")}
    )


def spec_of(folder):
    with Checkpoint(folder) as checkpoint:
        return model_spec(checkpoint)


def sorted_like(folder, target, order):
    """The same folder with that order in its record."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).symlink_to(path)
    record = json.loads((folder / RECORD).read_text())
    (target / RECORD).unlink()
    (target / RECORD).write_text(json.dumps(record | {"stack": order}))
    return target


# --- what is computed ---


@pytest.mark.parametrize("n", [0, 1, 40, (BLOCKS - 1) * MATRICES])
def test_a_size_is_the_sum_of_its_blocks(folder, tmp_path, n):
    """Against the engine on float32 matrices, each the sum of the blocks that are in memory."""
    dense = tmp_path / "dense"
    dense.mkdir()
    with Checkpoint(folder) as checkpoint:
        whole = model_spec(checkpoint)
        entries = [array_entry(w.source, floats(checkpoint, w)) for w in loaded(whole, n).weights]
    (dense / "config.json").write_text(json.dumps(LLAMA))
    write_safetensors(dense / "model.safetensors", entries)
    with engine(folder, n_stacked=n) as stacked, engine(dense) as reference:
        expected = all_logits(reference, IDS, 20)
        np.testing.assert_allclose(all_logits(stacked, IDS, 20), expected, rtol=0, atol=1e-4)


def floats(checkpoint, weight):
    """A weight in float32: what its file has, or the sum of its blocks."""
    if not weight.parts:
        rows = np.empty((weight.rows, weight.cols * 4), np.uint8)
        checkpoint.read_into(weight.source, rows)
        return rows.view(np.float32)[0] if weight.group == "norm" else rows.view(np.float32)
    raw = {p: checkpoint.paths[checkpoint.tensors[p.source].shard].read_bytes() for p in weight.parts}
    starts = {p: checkpoint.tensors[p.source].offset for p in weight.parts}
    blocks = (np.frombuffer(raw[p], np.uint8, p.n_bytes, starts[p]) for p in weight.parts)
    return sum(signs.decode(weight.rows, weight.cols, block) for block in blocks)


def test_what_is_in_memory_is_what_the_ledger_says(folder):
    """Blocks of one shape have one size, in closed form: a bit a weight, and 16 for each number of the factors."""
    spec = spec_of(folder)
    d, ff, kv = LLAMA["hidden_size"], LLAMA["intermediate_size"], 32
    sizes = {(r, c): r * c // 8 + 2 * (r + c) for r, c in ((d, d), (kv, d), (ff, d), (d, ff))}  # all of rank 1
    expected = [sizes[w.rows, w.cols] for _ in range(BLOCKS - 1) for w in spec.weights if w.parts]
    assert [part.n_bytes for part in spec.stack] == expected
    for n in (0, 1, 7, 50, len(spec.stack)):
        with engine(folder, n_stacked=n) as run:
            aligned = sum(-(-size // 64) * 64 for size in expected[:n])
            assert run.arena.used_by_owner()["stack"] == -(-aligned // 4096) * 4096
            always = sum(sizes[w.rows, w.cols] for w in spec.weights if w.parts)
            weights = sum(e.bytes for e in run.footprint if e.owner in ("weights.attn", "weights.ffn"))
            assert always <= weights < always + 64 * MATRICES


# --- growing and shrinking ---


def test_resizing_reads_only_what_is_new_and_changes_nothing_else(folder):
    spec = spec_of(folder)
    sizes = [part.n_bytes for part in spec.stack]
    seen = {}
    with engine(folder, n_stacked=10, activations="int8") as run:
        assert run.stacks.n_read_bytes == sum(sizes[:10])
        for n in (10, 11, len(sizes), 30, 0, 84, 30, 10, 11):
            before, read = run.stacks.n, run.stacks.n_read_bytes
            run.resize(n)
            assert run.stacks.n_read_bytes - read == sum(sizes[before:n])
            assert run.config.n_stacked == run.stacks.n == n
            assert run.footprint.entries == engine_footprint(spec, run.config).entries
            run.reset()
            logits = all_logits(run, IDS, 30).tobytes()
            assert seen.setdefault(n, logits) == logits
    for n, logits in seen.items():
        with engine(folder, n_stacked=n, activations="int8") as fresh:
            assert all_logits(fresh, IDS, 30).tobytes() == logits


def test_a_conversation_goes_on_after_resizing(folder):
    """Keys and values stay: what comes next depends on them, and on the new weights."""
    with engine(folder) as run:
        run.prefill(IDS[:20])
        run.resize(5)
        assert run.position == 20
        went_on = run.decode(IDS[20]).copy()
        run.reset()
        run.prefill(IDS[:20])
        assert not np.array_equal(run.decode(IDS[20]), went_on)


@pytest.mark.parametrize("n", [-1, 85])
def test_sizes_that_do_not_exist(folder, n):
    with engine(folder, n_stacked=3) as run:
        with pytest.raises(InvalidInput, match=f"n_stacked must be 0 to 84 for out, got {n}"):
            run.resize(n)
        assert run.stacks.n == 3
        with pytest.raises(InvalidInput, match="must be 0 to 84"):
            engine(folder, n_stacked=n)


def test_a_file_that_has_become_shorter_leaves_the_engine_as_it_was(folder, tmp_path):
    broken = sorted_like(folder, tmp_path / "broken", [p.source for p in spec_of(folder).stack])
    with Checkpoint(broken) as checkpoint:
        spec = model_spec(checkpoint)
        last = checkpoint.tensors[spec.stack[-1].source]
        path = checkpoint.paths[last.shard]
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    with engine(broken, n_stacked=20) as run:
        expected = all_logits(run, IDS)
        used = run.arena.used_by_owner()
        with open(path, "r+b") as file:
            file.truncate(last.offset)
        with pytest.raises(CorruptFile, match="can't be read"):
            run.resize(84)
        assert run.stacks.n == 20
        assert run.arena.used_by_owner() == used
        run.reset()
        assert np.array_equal(all_logits(run, IDS), expected)


@pytest.mark.skipif(resident() is None, reason="this system does not tell what a process has resident")
def test_memory_is_taken_and_given_back_page_by_page():
    """The region of a stack grows to 64 MiB and shrinks again: what is resident follows, and its content stays."""

    def planned(n_bytes):
        return Entry("stack", "weights", "host", ("decode",), (Term("blocks", 1, n_bytes),))

    arena = Arena(Footprint((planned(0),)))
    arena.resize(planned(0), 64 * MIB)
    start, before = resident().anonymous, 0
    for size in (MIB, 48 * MIB, 64 * MIB, 20 * MIB, 20 * MIB - 4096, 0, 64 * MIB, 4096):
        memory = arena.resize(planned(size), 64 * MIB)
        assert memory.size == 64 * MIB
        assert not memory[before:size:4096].any()
        memory[before:size] = 7
        assert (memory[: min(before, size) : 4096] == 7).all()
        assert abs(resident().anonymous - start - size) <= COUNTER_SLACK + 256 * 1024
        assert arena.used_by_owner() == {"stack": size}
        before = size


# --- the order ---


def test_without_a_record_levels_follow_one_another(folder):
    spec = spec_of(folder)
    assert [p.label for p in spec.stack] == ["02"] * MATRICES + ["03"] * MATRICES + ["04"] * MATRICES
    assert len({p.source for p in spec.stack}) == 3 * MATRICES


def test_the_record_orders_the_stack(folder, tmp_path):
    order = [p.source for p in spec_of(folder).stack][::-1]
    order.sort(key=lambda source: source[-2:])
    spec = spec_of(sorted_like(folder, tmp_path / "sorted", order))
    assert [p.source for p in spec.stack] == order


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda order: order[:-1], "must name each of the 84 blocks"),
        (lambda order: [*order[:-1], order[0]], "must name each of the 84 blocks"),
        (lambda order: [*order[:-1], "elsewhere+02"], "must name each of the 84 blocks"),
        (lambda order: [*order[:-1], 7], "must name each of the 84 blocks"),
        (lambda order: [*order[:-1], ["x"]], "must name each of the 84 blocks"),
        (lambda order: {"a": 1}, "must name each of the 84 blocks"),
        (lambda order: order[::-1], "behind a later block of its matrix"),
    ],
)
def test_orders_that_are_none(folder, tmp_path, change, match):
    order = [p.source for p in spec_of(folder).stack]
    with pytest.raises(CorruptFile, match=match):
        spec_of(sorted_like(folder, tmp_path / "bad", change(order)))


def test_blocks_of_different_ranks_are_refused(folder, tmp_path):
    source = tmp_path / "source"
    write_random(source, LLAMA)

    class Mixed(BitStack):
        def solve(self, weight, inputs):
            first, second = (BitStack(blocks=1, scale=False).solve(w, None) for w in (weight, weight))
            u, v = np.ones((len(weight), 2), np.float16), np.ones((2, weight.shape[1]), np.float16)
            parts = {**first.parts, "02": ("signs", signs.pack(weight < 0, u, v))}
            return replace(second, parts=parts)

    mixed = fitted(source, tmp_path / "mixed", lambda spec: {"layers.0.up": Mixed(scale=False)})
    with pytest.raises(CorruptFile, match=r"ranks \[1, 2\]"):
        engine(mixed)


def test_stacks_are_not_streamed(folder):
    with pytest.raises(Incompatible, match="not streamed"):
        engine(folder, n_streamed_layers=1)


def test_sorting_puts_first_what_helps_most(folder):
    with engine(folder, activations="float32") as run:
        levels = stack_levels(run.spec)
        order = sort_stack(run, TEXTS.tolist(), n_measured=1)
        assert [source[-2:] for source in order] == ["02"] * MATRICES + ["03"] * MATRICES + ["04"] * MATRICES
        assert set(order) == {p.source for p in run.spec.stack}
        gains = measure_gains(run, TEXTS.tolist(), 1, levels[0])
        by_gain = sorted(levels[0], key=gains.__getitem__, reverse=True)
        assert order[:MATRICES] == [levels[0][name] for name in by_gain]
        best = levels[0][by_gain[0]].removesuffix("+02")
        counts = {w.name: 1 for w in run.spec.weights if w.parts}
        run.stacks.show(counts)
        base = score(TEXTS.tolist(), run)["perplexity"]
        (raised,) = (w.name for w in run.spec.weights if w.source == best)
        run.stacks.show(counts | {raised: 2})
        assert np.log(base / score(TEXTS.tolist(), run)["perplexity"]) == pytest.approx(gains[raised], abs=1e-6)
        run.stacks.show({})
        run.resize(3)
        with pytest.raises(InvalidInput, match="all in memory"):
            sort_stack(run, TEXTS.tolist())
