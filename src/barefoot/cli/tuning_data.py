"""What ``barefoot tune`` trains on, and what it holds out, of its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from barefoot.cli import teachers

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from barefoot.io.inventory import Checkpoint
    from barefoot.train import MicroBatch

HELD_OUT, HELD_OUT_TOKENS = 0.05, 16_384  # share of the records, and the most tokens that are gone through
DOCUMENTS, JUDGED = "documents.safetensors", "held_out.safetensors"  # tables of the data


class TuningData:
    """What is trained on, and what is held out; micro-batches as the loop asks for them."""

    def __init__(
        self, args: argparse.Namespace, checkpoint: Checkpoint, length: int, teacher: Checkpoint | None = None
    ) -> None:
        from barefoot.cli import progress
        from barefoot.engine.source import source_key
        from barefoot.io.chat import find_chat_template
        from barefoot.io.tokenizer import load_tokenizer
        from barefoot.train.data import all_of, hold_out
        from barefoot.train.documents import Documents
        from barefoot.train.encoding import Encoder

        tokenizer = load_tokenizer(checkpoint)
        if teacher is not None:
            teachers.check_words(tokenizer, load_tokenizer(teacher))
        encoder = Encoder(tokenizer, find_chat_template(checkpoint), length, args.train_on)
        with progress.line() as report:

            def read(path: str, table: str) -> Documents:
                return Documents(
                    [Path(path)],
                    encoder,
                    progress=lambda done, total: report(done, total, f"reading {path}"),
                    index=Path(args.output) / table,
                    model=source_key(checkpoint),
                )

            self.documents, self.seed = read(args.data, DOCUMENTS), args.seed
            if args.held_out is not None:
                self.judged = read(args.held_out, JUDGED)
                self.numbers, self.held = all_of(self.documents), all_of(self.judged)
            else:
                self.judged = self.documents
                share = HELD_OUT if len(self.documents) >= 1 / HELD_OUT else 0.0
                self.numbers, self.held = hold_out(self.documents, share, args.seed)

    def keep(self, folder: Path) -> None:
        """Have no pass over the data when this training goes on."""
        self.documents.keep(folder / DOCUMENTS)
        if self.judged is not self.documents:
            self.judged.keep(folder / JUDGED)

    def begin(self, n_tokens: int, per_step: int) -> None:
        """Have micro-batches of so many tokens, so many of them in a step."""
        from barefoot.train.data import Batches

        self._batches, self._per_step = Batches(self.documents, self.numbers, n_tokens, self.seed), per_step

    def first(self) -> MicroBatch:
        """The first of the first epoch in which something is predicted."""
        return next(batch for batch in self._batches.epoch() if batch.n_predicted)

    def n_steps(self, epochs: float) -> int:
        return max(1, round(epochs * self._batches.n_batches(0) / self._per_step))

    def go_on(self, place: dict[str, int] | None) -> None:
        from barefoot.train.data import START, Position

        self._at = START if place is None else Position(place["epoch"], place["n_done"])
        self._coming = self._batches.endless(self._at)

    def step(self) -> Sequence[MicroBatch]:
        found = []
        for _ in range(self._per_step):
            batch, self._at = next(self._coming)
            found.append(batch)
        return found

    @property
    def place(self) -> dict[str, int]:
        return self._at._asdict()

    def n_held_out(self, n_tokens: int) -> int:
        """Tokens that ``held_out`` goes through at most, in micro-batches of at most ``n_tokens``."""
        return min(int(self.judged.entries["tokens"][self.held].sum()), HELD_OUT_TOKENS + n_tokens)

    def held_out(self, n_tokens: int) -> Iterator[MicroBatch]:
        """The first ``HELD_OUT_TOKENS`` of what isn't trained on."""
        from barefoot.train.data import Batches

        left = HELD_OUT_TOKENS
        if len(self.held):
            for batch in Batches(self.judged, self.held, n_tokens, None).epoch():
                yield batch
                left -= len(batch.ids)
                if left <= 0:
                    return
