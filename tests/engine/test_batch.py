"""Several sequences in one engine: each is as if it were alone, whatever the others do."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from random_files import GEMMA, LLAMA, write_random

from barefoot.core.errors import CorruptFile, InvalidInput
from barefoot.core.registry import techniques
from barefoot.engine.config import EngineConfig
from barefoot.engine.generate import Generation, Limits, generate, generate_batch
from barefoot.engine.runner import Engine
from barefoot.engine.sampling import SamplingParams
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.kv.stores.f16 import HalfStore
from barefoot.weights.formats.integer import IntegerGroups

STORES = {n: s for n, s in techniques("kv.stores").items() if not s.needs}
LENGTHS = (3, 61, 1, 24, 40)  # prompts; GEMMA's rings hold 16 - 1 + 8 positions
INT4 = dict.fromkeys(("attn", "ffn", "embed", "head"), IntegerGroups(4, 32))
PLACES = {
    "resident": {},
    "streamed": {"n_streamed_layers": 2},
    "all streamed": {"n_streamed_layers": 4, "stream_head": True},
}


def open_engine(folder, **settings) -> Engine:
    with Checkpoint(folder) as checkpoint:
        values = {"context": 96, "kv": HalfStore(), "chunk": 8, "activations": "float32", "n_threads": 2} | settings
        return Engine(checkpoint, model_spec(checkpoint), EngineConfig(**values))


@pytest.fixture(scope="module", params=["llama", "gemma", "tied"])
def folder(request, tmp_path_factory):
    models = {"llama": LLAMA, "gemma": GEMMA, "tied": LLAMA | {"tie_word_embeddings": True}}
    path = tmp_path_factory.mktemp("batch") / request.param
    write_random(path, models[request.param])
    return path


@pytest.fixture
def llama(tmp_path):
    write_random(tmp_path / "llama", LLAMA)
    return tmp_path / "llama"


def prompt(sequence: int) -> list[int]:
    return [(11 * sequence + 7 * i) % 250 for i in range(LENGTHS[sequence])]


def token(sequence: int, step: int) -> int:
    return (31 * sequence + 5 * step) % 250


def batched(run: Engine, steps) -> dict[int, list[np.ndarray]]:
    """Logits of each sequence after its prompt and after each of its steps; ``steps`` list who takes part."""
    rows = {s: [run.prefill(prompt(s), sequence=s).copy()] for s in range(len(LENGTHS))}
    for sequences in steps:
        tokens = {s: token(s, len(rows[s])) for s in sequences}
        for s, logits in zip(sequences, run.decode_batch(tokens), strict=True):
            rows[s].append(logits.copy())
    return rows


def alone(run: Engine, sequence: int, n: int) -> list[np.ndarray]:
    rows = [run.prefill(prompt(sequence)).copy()]
    for step in range(1, n):
        rows.append(run.decode(token(sequence, step)).copy())
    return rows


STEPS = ([0, 1, 2, 3, 4], [4, 2, 0], [1], [3, 2, 1, 0], [0, 1, 2, 3, 4])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("store", STORES)
def test_a_batch_is_each_sequence_alone_bit_for_bit(folder, store, place):
    settings = {"kv": STORES[store](), **PLACES[place]}
    with open_engine(folder, n_sequences=5, **settings) as run:
        rows = batched(run, STEPS)
        assert run.positions == tuple(n + sum(s in step for step in STEPS) for s, n in enumerate(LENGTHS))
    with open_engine(folder, **settings) as run:
        for s in range(5):
            run.reset()
            assert np.array_equal(rows[s], alone(run, s, len(rows[s])))


def test_int8_rounds_a_batch_no_worse_than_one_sequence(folder):
    """How sums are ordered depends on the number of tokens, so that now and then a code is rounded to the other side.

    That moves logits less than rounding the codes does in the first place.
    """
    results = {}
    for activations in ("int8", "float32"):
        settings = {"weights": INT4, "activations": activations}
        with open_engine(folder, n_sequences=5, **settings) as run:
            together = batched(run, STEPS)
        with open_engine(folder, **settings) as run:
            one_by_one = {}
            for s in range(5):
                run.reset()
                one_by_one[s] = alone(run, s, len(together[s]))
        results[activations] = [np.concatenate([r[s] for s in range(5)]) for r in (together, one_by_one)]
    together, one_by_one = results["int8"]
    rounding = np.abs(one_by_one - results["float32"][1]).max()
    assert 0 < rounding < 0.2 * np.abs(one_by_one).max()
    assert np.abs(together - one_by_one).max() < rounding


def test_a_slot_that_is_used_again_is_as_new(folder):
    with open_engine(folder, n_sequences=2, kv=STORES["q4"]()) as run:
        fresh = run.prefill(prompt(1), sequence=1).copy()
        step = run.decode_batch({1: 9}).copy()
        run.prefill(prompt(3), sequence=0)
        run.reset(1)
        assert run.positions == (24, 0)
        run.prefill(prompt(4), sequence=1)
        run.reset(1)
        assert np.array_equal(run.prefill(prompt(1), sequence=1), fresh)
        assert np.array_equal(run.decode_batch({0: 5, 1: 9})[1], step[0])
        assert run.positions == (25, 62)


def test_truncating_one_sequence_leaves_the_others(llama):
    with open_engine(llama, n_sequences=2) as run:
        run.prefill(prompt(1), sequence=0)
        run.prefill(prompt(3), sequence=1)
        expected = run.decode_batch({0: 4, 1: 8}).copy()
        run.truncate(24, 1)
        assert run.positions == (62, 24)
        assert np.array_equal(run.decode(8, 1), expected[1])
        run.truncate(61)
        assert np.array_equal(run.decode_batch({1: 1, 0: 4})[1], expected[0])


def test_more_sequences_than_a_chunk_has_tokens(llama):
    """The arrays of a pass hold a token of each sequence, however small the chunk."""
    settings = {"chunk": 2, "n_sequences": 20, "context": 16}
    with open_engine(llama, **settings) as run:
        for s in range(20):
            run.prefill([s, s + 1, s + 2], sequence=s)
        rows = run.decode_batch({s: 100 + s for s in range(20)}).copy()
        for s in range(20):
            run.reset()
            run.prefill([s, s + 1, s + 2])
            assert np.array_equal(run.decode(100 + s), rows[s])


def test_what_cannot_be_decoded_changes_nothing(llama):
    with open_engine(llama, n_sequences=3, context=8) as run:
        run.prefill([1, 2, 3], sequence=0)
        run.prefill(list(range(8)), sequence=1)
        for tokens, message in (
            ({0: 5, 1: 5}, "1 tokens don't fit: 0 of 8 positions are left"),
            ({0: 5, 2: 259}, "token ids must be 0 to 258, got 259"),
            ({0: 5, 3: 5}, "sequence must be 0 to 2, got 3"),
            ({-1: 5}, "sequence must be 0 to 2, got -1"),
            ({}, "a batch needs at least one"),
        ):
            with pytest.raises(InvalidInput, match=message):
                run.decode_batch(tokens)
        assert run.positions == (3, 8, 0)
        with pytest.raises(InvalidInput, match="sequence must be 0 to 2, got 3"):
            run.prefill([1], sequence=3)
        with pytest.raises(InvalidInput, match="sequence must be 0 to 2, got 4"):
            run.reset(4)


def test_a_read_that_fails_grows_no_sequence(llama):
    file = llama / "model.safetensors"
    content = file.read_bytes()
    with open_engine(llama, n_sequences=2, n_streamed_layers=4) as run:
        run.prefill([1, 2, 3], sequence=0)
        run.prefill([4], sequence=1)
        good = run.decode_batch({0: 7, 1: 8}).copy()
        run.truncate(3, 0)
        run.truncate(1, 1)
        os.truncate(file, len(content) // 4)
        with pytest.raises(CorruptFile):
            run.decode_batch({0: 7, 1: 8})
        assert run.positions == (3, 1)
        file.write_bytes(content)
        assert np.array_equal(run.decode_batch({0: 7, 1: 8}), good)


def test_the_numpy_backend_obeys_the_same_schema(llama, tmp_path):
    """A process without the compiled kernels: its logits of a batch beside theirs."""
    code = (
        "import sys; sys.modules['barefoot.ops._native'] = None\n"
        "import numpy as np, test_batch\n"
        "from barefoot import ops\n"
        "assert ops.backend() == 'reference:numpy'\n"
        "with test_batch.open_engine(sys.argv[1], n_sequences=5) as run:\n"
        "    rows = test_batch.batched(run, test_batch.STEPS)\n"
        "np.save(sys.argv[2], np.concatenate([rows[s] for s in range(5)]))\n"
    )
    out = tmp_path / "rows.npy"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    environment.pop("BAREFOOT_ISA", None)
    subprocess.run([sys.executable, "-c", code, str(llama), str(out)], env=environment, check=True)
    with open_engine(llama, n_sequences=5) as run:
        rows = batched(run, STEPS)
    mine, theirs = np.concatenate([rows[s] for s in range(5)]), np.load(out)
    assert np.abs(mine - theirs).max() < 2e-4 * np.abs(theirs).max()  # an f16 key rounds to the other side at times


# --- generating ---------------------------------------------------------------------------------------------------


class Letters:
    def feed(self, token_id):
        return f"<{token_id}>"

    def flush(self):
        return ""


PROMPTS = [[5, 9], [200, 31, 77], [1] * 30, [8], [12, 250, 3, 4], [99], [7, 7, 7]]


def answers(run, prompts, limits) -> tuple[dict[int, Generation], list[int]]:
    """The generations by index, and the indices in the order in which they ended."""
    found, texts = {}, dict.fromkeys(range(len(prompts)), "")
    for index, event in generate_batch(run, prompts, Letters, limits):
        assert index not in found, "the generation is an answer's last event"
        if isinstance(event, Generation):
            found[index] = event
        else:
            texts[index] += event.text
    assert texts == {i: made.text for i, made in found.items()}
    return found, list(found)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("n_sequences", [1, 3, 16])
def test_answers_do_not_depend_on_the_batch(llama, temperature, n_sequences):
    """7 prompts, some answers ended early by a stop id or string: the same as one by one, each with its own seed."""
    params = SamplingParams(temperature, seed=3)
    with open_engine(llama) as run:
        alone = []
        for i, ids in enumerate(PROMPTS):
            run.reset()
            made = Generation()
            seeded = SamplingParams(temperature, seed=3 + i)
            list(generate(run, ids, Letters(), max_tokens=9, params=seeded, result=made))
            alone.append(made)
    stop_id, stop = alone[2].ids[4], f"<{alone[5].ids[2]}>"

    def expected(ids: list[int]) -> tuple[list[int], str, int]:
        """Tokens, reason and passes: a stop string's own token counts, a stop id was decoded for and does not."""
        for n, token in enumerate(ids):
            if token == stop_id:
                return ids[:n], "stop", n
            if f"<{token}>" == stop:
                return ids[: n + 1], "stop", n
        return ids, "length", len(ids) - 1

    with open_engine(llama, n_sequences=n_sequences) as run:
        found, order = answers(run, PROMPTS, Limits(9, params, stop=(stop,), stop_ids=(stop_id,)))
    assert {i: (m.ids, m.finish_reason, m.n_decoded) for i, m in found.items()} == {
        i: expected(made.ids) for i, made in enumerate(alone)
    }
    assert {found[2].finish_reason, found[5].finish_reason} == {"stop"}
    assert [found[i].n_prompt for i in range(7)] == list(map(len, PROMPTS))
    if n_sequences == 1:
        assert order == list(range(7))


def test_the_next_prompt_takes_the_place_of_an_answer_that_ended(llama):
    """Two sequences; the first answer is short by its full context, and is followed while the second goes on."""
    prompts = [[1] * 14, [2, 3], [4] * 15, [5] * 16, [6]]
    with open_engine(llama, n_sequences=2, context=16) as run:
        found, order = answers(run, prompts, Limits(6))
    # Answer 0 has 3 tokens (2 more positions, and a token beyond them), answer 2 has 2, answer 3 only that of its
    # prefill; answer 1 ends by its length meanwhile.
    assert {i: (len(m.ids), m.finish_reason) for i, m in found.items()} == {
        0: (3, "context"),
        1: (6, "length"),
        2: (2, "context"),
        3: (1, "context"),
        4: (6, "length"),
    }
    assert order == [0, 2, 3, 1, 4]


def test_prompts_that_no_context_holds_are_refused_at_once(llama):
    with open_engine(llama, n_sequences=2, context=16) as run:
        for bad, n in (([1] * 17, 17), ([], 0)):
            with pytest.raises(InvalidInput, match=f"prompt 1 has {n} tokens, expected 1 to 16"):
                generate_batch(run, [[1], bad], Letters, Limits(3))
        assert run.positions == (0, 0)
