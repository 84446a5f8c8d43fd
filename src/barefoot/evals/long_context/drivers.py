"""What is evaluated: one sequence of a model with a cache, the ways to branch it, and to feed it tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from barefoot.core.model import ModelSpec

Floats = NDArray[np.float32]
Take = Callable[[int, Floats], None]  # index of the first token, logits (n, vocabulary) valid during the call


class Driver(Protocol):
    """An ``Engine``, or another driver of one sequence. Logits are float32 (vocabulary,), valid until the next call.

    A cache that compresses its prompt does so at the end of the first ``prefill`` after ``reset``.
    """

    @property
    def spec(self) -> ModelSpec: ...
    def reset(self) -> None: ...
    def prefill(self, ids: Sequence[int], *, all_logits: Take | None = None) -> Floats: ...
    def decode(self, token: int) -> Floats: ...
    def truncate(self, n: int) -> None: ...


# A driver and the tokens that it holds → a driver that holds the same, to be used inside the context only; the given
# driver rests meanwhile and stands afterwards where it stood.
Fork = Callable[[Driver, int], AbstractContextManager[Driver]]


@contextmanager
def going_back(driver: Driver, n_held: int) -> Iterator[Driver]:
    """The fork of a cache that keeps every token: the driver itself, cut back afterwards.

    Raises
    ------
    InvalidInput : the cache has dropped what the kept tokens saw.
    """
    yield driver
    driver.truncate(n_held)


def feed(driver: Driver, ids: Sequence[int], take: Take, *, stepwise: bool) -> None:
    """Append ``ids`` and give the logits after each of them to ``take``.

    ``stepwise`` decodes token by token, so that a cache which evicts while it generates does so; else one prefill.
    """
    if not stepwise and len(ids):
        driver.prefill(ids, all_logits=take)
        return
    for index, token in enumerate(ids):
        take(index, driver.decode(token)[None])
