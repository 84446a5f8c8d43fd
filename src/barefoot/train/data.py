"""Micro-batches out of documents: which ones, in which order, and how many go together.

The order of an epoch is a permutation that follows from the seed and the epoch alone, and how it is packed follows from
the documents' token counts. So (epoch, micro-batches taken) says where a run stands, and the same batches follow after
it whenever one asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple

import numpy as np

from barefoot.core.errors import InvalidInput
from barefoot.core.ledger import Term
from barefoot.io.tokenizer import workspace_bytes
from barefoot.train import MicroBatch
from barefoot.train.documents import Documents
from barefoot.train.encoding import I32
from barefoot.train.index import ENTRY

AHEAD = 64  # documents that may be taken before their turn, to fill a batch
LINE_BYTES = 32  # of Python's for a byte of a line of empty messages; of long texts it is a third of that

_ORDER, _HELD = 0, 1  # what a seed is used for


class Position(NamedTuple):
    """Where a run stands: in which epoch, and how many of its micro-batches are done."""

    epoch: int = 0
    n_done: int = 0


START = Position()


class Batches:
    """
    Parameters
    ----------
    documents : what to read from.
    numbers : int32, those of them that take part.
    tokens : of a micro-batch, at most.
    seed : of the order; None keeps that of ``numbers``.

    Raises
    ------
    InvalidInput : a document is longer than a micro-batch, or there is none.
    """

    def __init__(self, documents: Documents, numbers: I32, tokens: int, seed: int | None) -> None:
        if not len(numbers):
            raise InvalidInput("no documents to train on")
        longest = int(documents.entries["tokens"][numbers].max())
        if longest > tokens:
            raise InvalidInput(
                f"a document has {longest} tokens, a micro-batch {tokens}",
                cure=f"allow {longest} tokens, or cut earlier",
            )
        self.documents, self.numbers, self.tokens, self.seed = documents, numbers, tokens, seed

    def order(self, epoch: int) -> I32:
        """The documents' numbers as they are due in an epoch, int32."""
        order = self.numbers.copy()
        if self.seed is not None:
            np.random.default_rng([_ORDER, self.seed, epoch]).shuffle(order)
        return order

    def packed(self, epoch: int) -> Iterator[list[int]]:
        """The documents' numbers of each micro-batch of an epoch."""
        order, sizes = self.order(epoch), self.documents.entries["tokens"]
        for taken in pack((int(sizes[i]) for i in order), self.tokens):
            yield [int(order[at]) for at in taken]

    def n_batches(self, epoch: int) -> int:
        """Micro-batches of an epoch."""
        return sum(1 for _ in self.packed(epoch))

    def epoch(self, epoch: int = 0, n_done: int = 0) -> Iterator[MicroBatch]:
        """The micro-batches of one epoch behind the first ``n_done``."""
        return map(self._read, islice(self.packed(epoch), n_done, None))

    def endless(self, position: Position = START) -> Iterator[tuple[MicroBatch, Position]]:
        """Epoch after epoch, each micro-batch with where a run stands behind it."""
        skipped = position.n_done
        for epoch in count(position.epoch):
            for n_done, batch in enumerate(self.epoch(epoch, skipped), skipped + 1):
                yield batch, Position(epoch, n_done)
            skipped = 0

    def _read(self, numbers: Sequence[int]) -> MicroBatch:
        lengths = tuple(int(n) for n in self.documents.entries["tokens"][numbers])
        ids, labels = np.empty(sum(lengths), np.int64), np.empty(sum(lengths), np.int64)
        end = 0
        for number, length in zip(numbers, lengths, strict=True):
            document = self.documents[number]
            place = slice(end, end := end + length)
            ids[place], labels[place] = document.ids, document.labels()
        return MicroBatch(ids, labels, lengths)


def pack(sizes: Iterable[int], room: int, ahead: int = AHEAD) -> Iterator[list[int]]:
    """Places of the sizes that go together, no more than ``room`` in all, each place once.

    The first that waits always goes; of the next ``ahead`` each that still has room, in order. So none waits for longer
    than ``ahead`` others.
    """
    coming = iter(enumerate(sizes))
    waiting: deque[tuple[int, int]] = deque(islice(coming, ahead))
    while waiting:
        taken, left, others = [], room, deque[tuple[int, int]]()
        for place, size in waiting:
            if size <= left:
                taken.append(place)
                left -= size
            else:
                others.append((place, size))
        yield taken
        waiting = others
        waiting.extend(islice(coming, ahead - len(waiting)))


def hold_out(documents: Documents, share: float, seed: int) -> tuple[I32, I32]:
    """Numbers of the documents to train on and of those held out, int32, in the order of the files.

    ``share`` of the records is held out, at least one where it is not 0; windows of one line stay together.

    Raises
    ------
    InvalidInput : ``share`` is not in [0, 1), or leaves nothing to train on.
    """
    if not 0 <= share < 1:
        raise InvalidInput(f"share held out must be at least 0 and less than 1, got {share}")
    entries = documents.entries
    is_new = (np.diff(entries["start"], prepend=-1) != 0) | (np.diff(entries["file"], prepend=0) != 0)
    record = np.cumsum(is_new, dtype=np.int32) - 1
    n_records = int(record[-1]) + 1
    n_held = max(1, round(share * n_records)) if share else 0
    if n_held == n_records:
        raise InvalidInput(
            f"{n_held} of {n_records} records held out leave none to train on",
            cure="give more records, or a file of its own",
        )
    held = np.random.default_rng([_HELD, seed]).choice(n_records, n_held, replace=False)
    is_held = np.zeros(n_records, bool)
    is_held[held] = True
    numbers = np.arange(len(entries), dtype=np.int32)
    return numbers[~is_held[record]], numbers[is_held[record]]


def all_of(documents: Documents) -> I32:
    """The numbers of all documents."""
    return np.arange(len(documents), dtype=np.int32)


def terms(documents: Documents, tokens: int) -> tuple[Term, ...]:
    """What data takes while it is read, at most: the table and orders, a micro-batch, and the record in the making."""
    length = documents.encoder.length
    return (
        Term("documents of the data", len(documents), ENTRY.itemsize + 2 * 4),
        Term("tokens of a micro-batch", tokens, 8 + 8),
        Term("tokens of a document", length, 4 + 1 + 8),
        Term("a line and what it says", documents.statistics.longest_bytes, LINE_BYTES),
        Term("encoding a document", 1, workspace_bytes(documents.encoder.reach)),
    )
