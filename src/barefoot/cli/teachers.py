"""A teacher that is named on the command line: its file, what is kept of it, and whether it has the model's words."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from barefoot.cli import models

if TYPE_CHECKING:
    from collections.abc import Iterator

    from barefoot.core.model import ModelSpec
    from barefoot.io.inventory import Checkpoint
    from barefoot.io.tokenizer import Tokenizer
    from barefoot.train.lesson import Lesson


@contextlib.contextmanager
def opened(name: str | None) -> Iterator[Checkpoint | None]:
    """The file of what is imitated, where something is."""
    from barefoot.io.inventory import Checkpoint

    if name is None:
        yield None
        return
    with Checkpoint(models.fetch(name)) as checkpoint:
        yield checkpoint


def lesson(spec: ModelSpec, teacher: Checkpoint | None, step_tokens: int, held_out: int) -> Lesson | None:
    """What a training keeps of it.

    Raises
    ------
    Incompatible : it has another number of words than the model.
    """
    from barefoot.core.errors import Incompatible
    from barefoot.engine.specs import model_spec
    from barefoot.train.lesson import Lesson

    if teacher is None:
        return None
    theirs = model_spec(teacher)
    if theirs.vocab_size != spec.vocab_size:
        raise Incompatible(
            f"the teacher {theirs.name} has {theirs.vocab_size:,} words, {spec.name} has {spec.vocab_size:,}",
            cure="name the model that this one was made from",
        )
    return Lesson(theirs, step_tokens, held_out)


def check_words(own: Tokenizer, theirs: Tokenizer) -> None:
    """Refuse a teacher whose words have other numbers.

    Raises
    ------
    Incompatible : with the first word that differs.
    """
    from barefoot.core.errors import Incompatible

    for i in range(min(own.n_vocab, theirs.n_vocab)):
        if own.decode_bytes(i) != theirs.decode_bytes(i):
            raise Incompatible(
                f"word {i:,} of the teacher is {theirs.piece(i)!r}, and the model's is {own.piece(i)!r}",
                cure="name the model that this one was made from",
            )
