"""Micro-batches: each token once an epoch, and the same batches wherever a run goes on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from barefoot.core.errors import InvalidInput
from barefoot.io.tokenizer import Tokenizer
from barefoot.train import NOTHING, MicroBatch
from barefoot.train.data import Batches, Position, all_of, hold_out, pack, terms
from barefoot.train.documents import Documents
from barefoot.train.encoding import Encoder


@pytest.fixture
def documents(tokenizer: Tokenizer, jsonl: Callable[..., Path]) -> Documents:
    rng = random.Random(1)
    rows = [{"prompt": f"{i:03d}", "completion": "ab" * rng.randrange(1, 20)} for i in range(60)]
    return Documents([jsonl(*rows, {"prompt": "x" * 99, "completion": "y"})], Encoder(tokenizer, None, 48))


def same(a: MicroBatch, b: MicroBatch) -> bool:
    return np.array_equal(a.ids, b.ids) and np.array_equal(a.labels, b.labels) and a.lengths == b.lengths


def pieces(batch: MicroBatch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(ids, labels) of each document."""
    ends = np.cumsum(batch.lengths)
    return [
        (tuple(batch.ids[e - n : e]), tuple(batch.labels[e - n : e])) for n, e in zip(batch.lengths, ends, strict=True)
    ]


@given(st.lists(st.integers(1, 50), max_size=120), st.integers(50, 100), st.integers(1, 9))
def test_packing_takes_each_once_and_never_too_much(sizes: list[int], room: int, ahead: int):
    taken = list(pack(sizes, room, ahead))
    assert sorted(place for places in taken for place in places) == list(range(len(sizes)))
    assert all(sum(sizes[place] for place in places) <= room for places in taken)
    left = set(range(len(sizes)))
    for places in taken:
        first = min(left)
        assert places[0] == first, "none waits while a later one goes first"
        assert max(places) < first + ahead + sum(1 for p in range(first, len(sizes)) if p not in left)
        left -= set(places)
        missed = [p for p in sorted(left)[: ahead - len(places)] if p < first + ahead]
        used = sum(sizes[place] for place in places)
        assert all(sizes[p] > room - used for p in missed), "what would have had room is taken"


def test_packing_fills_better_than_one_after_the_other():
    rng = random.Random(2)
    sizes = [rng.randrange(20, 1000) for _ in range(3000)]
    n, used = 1, 0
    for size in sizes:
        n, used = (n, used + size) if used + size <= 1024 else (n + 1, size)
    fewest = sum(sizes) / 1024
    packed = len(list(pack(sizes, 1024)))
    assert fewest <= packed < 1.08 * fewest < 1.25 * fewest < n


def test_each_token_of_each_document_once_an_epoch(documents: Documents):
    batches = Batches(documents, all_of(documents), 100, 5)
    expected = Counter((tuple(documents[i].ids), tuple(documents[i].labels())) for i in range(len(documents)))
    assert len(documents) == 60
    orders = []
    for epoch in range(3):
        made = list(batches.epoch(epoch))
        assert len(made) == batches.n_batches(epoch)
        assert Counter(piece for batch in made for piece in pieces(batch)) == expected
        assert all(len(b.ids) == len(b.labels) == sum(b.lengths) <= 100 for b in made)
        assert all(labels[-1] == NOTHING for batch in made for _, labels in pieces(batch))
        assert sum(batch.n_predicted for batch in made) == documents.statistics.n_learned
        assert made[0].ids.dtype == made[0].labels.dtype == np.int64
        orders.append(batches.order(epoch).tolist())
    assert orders[0] != orders[1] != orders[2] != list(range(60))
    assert Batches(documents, all_of(documents), 100, 6).order(0).tolist() != orders[0]
    assert Batches(documents, all_of(documents), 100, None).order(1).tolist() == list(range(60))


def test_labels_are_the_next_tokens_of_completions(documents: Documents, tokenizer: Tokenizer):
    batch = next(iter(Batches(documents, all_of(documents), 200, None).epoch()))
    assert len(batch.lengths) > 1
    for ids, labels in pieces(batch):
        assert labels[:2] == (NOTHING, NOTHING)
        assert labels[2:-1] == ids[3:]
        assert tokenizer.decode(ids[3:]).replace("ab", "") == ""


def test_a_run_goes_on_at_any_point_as_if_it_had_not_ended(documents: Documents):
    def fresh() -> Batches:
        again = Documents(documents.paths, documents.encoder)
        return Batches(again, hold_out(again, 0.1, 9)[0], 100, 9)

    whole = list(islice(fresh().endless(), 60))
    assert whole[-1][1].epoch > 2, "it passes several epochs"
    rng = random.Random(4)
    for n_done in [1, *rng.sample(range(2, 50), 8)]:
        epoch, done = whole[n_done - 1][1]
        rest = list(islice(fresh().endless(Position(epoch, done)), 60 - n_done))
        assert [position for _, position in rest] == [position for _, position in whole[n_done:]]
        assert all(same(a, b) for (a, _), (b, _) in zip(rest, whole[n_done:], strict=True))


def test_what_is_held_out_is_never_trained_on(tokenizer: Tokenizer, jsonl: Callable[..., Path]):
    rows = [{"text": f"{i:04d} " * (1 + 9 * (i % 3))} for i in range(100)]
    documents = Documents([jsonl(*rows)], Encoder(tokenizer, None, 40))
    assert len(documents) > 130, "some have several windows"
    train, held = hold_out(documents, 0.2, 3)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(len(documents)))
    starts = documents.entries["start"]
    assert not set(starts[train].tolist()) & set(starts[held].tolist())
    assert len(set(starts[held].tolist())) == 20
    assert train.dtype == held.dtype == np.int32
    assert hold_out(documents, 0.2, 3)[1].tolist() == held.tolist() != hold_out(documents, 0.2, 4)[1].tolist()
    assert len(set(starts[hold_out(documents, 0.0001, 3)[1]].tolist())) == 1
    assert len(hold_out(documents, 0, 3)[1]) == 0
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(InvalidInput, match="share held out"):
            hold_out(documents, share, 3)
    with pytest.raises(InvalidInput, match="100 of 100 records held out leave none"):
        hold_out(documents, 0.999, 3)


def test_files_of_one_record_each_are_apart(tokenizer: Tokenizer, jsonl: Callable[..., Path]):
    paths = [jsonl({"text": "ab"}, name=f"{i}.jsonl") for i in range(4)]
    train, held = hold_out(Documents(paths, Encoder(tokenizer, None, 40)), 0.25, 0)
    assert (len(train), len(held)) == (3, 1)


def test_too_small_batches(documents: Documents):
    with pytest.raises(InvalidInput, match="a document has 42 tokens, a micro-batch 41"):
        Batches(documents, all_of(documents), 41, 0)
    with pytest.raises(InvalidInput, match="no documents"):
        Batches(documents, np.empty(0, np.int32), 100, 0)


def test_the_bytes_of_orders_and_batches(documents: Documents):
    train, held = hold_out(documents, 0.1, 9)
    batches = Batches(documents, train, 100, 9)
    stated = {term.name: term.bytes for term in terms(documents, 100)}
    orders = batches.numbers.nbytes + batches.order(0).nbytes + held.nbytes
    assert stated["documents of the data"] - 4 * len(held) == documents.entries.nbytes + orders
    largest = max(batches.epoch(), key=lambda batch: len(batch.ids))
    made = largest.ids.nbytes + largest.labels.nbytes
    assert 0.9 * stated["tokens of a micro-batch"] < made <= stated["tokens of a micro-batch"]
    longest = max((documents[i] for i in train), key=lambda document: len(document.ids))
    made = longest.ids.nbytes + longest.learned.nbytes + longest.labels().nbytes
    assert 0.8 * stated["tokens of a document"] < made <= stated["tokens of a document"]
