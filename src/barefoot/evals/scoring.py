"""A text scored by engines: perplexity of one, and divergence of another from it, tile by tile in bounded memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from barefoot.core.errors import InvalidInput
from barefoot.evals.divergence import Divergence, windows

if TYPE_CHECKING:
    from barefoot.core.model import ModelSpec
    from barefoot.engine.config import EngineConfig
    from barefoot.io.tokenizer import Tokenizer

Floats = NDArray[np.float32]
LONGEST_TOKEN = 12  # characters; few are longer
COMPARE_ROWS = 4  # rows of logits whose probabilities are held in double precision at a time

Progress = Callable[[int, int], None]  # tokens scored, tokens to score


class Scored(Protocol):
    """What can be scored: an ``Engine``, or another driver with the same methods for one sequence."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def config(self) -> EngineConfig: ...
    def reset(self) -> None: ...
    def prefill(self, ids: Sequence[int], *, all_logits: Callable[[int, Floats], None] | None = None) -> Floats: ...


def text_windows(text: str, tokenizer: Tokenizer, window: int, n_tokens: int | None = None) -> list[list[int]]:
    """The text as whole windows of ``window`` ids; of ``n_tokens`` in all, rounded up to windows, when it is given.

    Raises
    ------
    InvalidInput : the text does not fill one window.
    """
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    most = None if n_tokens is None else -(-n_tokens // window)
    if most is not None:  # texts are cut before they are encoded
        text = text[: LONGEST_TOKEN * most * window]
    found = list(windows(tokenizer.encode(text, add_bos=False), window, bos))[:most]
    if not found:
        raise InvalidInput(
            f"the text does not fill one window of {window} tokens", cure="use more text, or a smaller window"
        )
    return found


def spread_windows(text: str, tokenizer: Tokenizer, window: int, n_windows: int) -> NDArray[np.int32]:
    """At most ``n_windows`` whole windows from all over the text, int32 (n, window), each encoded by itself.

    Raises
    ------
    InvalidInput : the text does not fill one window.
    """
    length = LONGEST_TOKEN * window
    n = max(1, min(n_windows, len(text) // length))
    starts = [i * (len(text) - length) // max(1, n - 1) for i in range(n)] if n > 1 else [0]
    # A piece begins behind a space: what comes before may be half a word.
    pieces = (text[start : start + length].partition(" " if start else "\0") for start in starts)
    found = [text_windows(rest or head, tokenizer, window, window)[0] for head, _, rest in pieces]
    return np.array(found, np.int32)


def workspace_bytes(vocab_size: int) -> int:
    """What comparing logits takes beside the engines: a tile of each, and probabilities of a few rows."""
    return 2 * 64 * 4 * vocab_size + 8 * COMPARE_ROWS * 8 * vocab_size


def score(
    texts: Sequence[Sequence[int]], engine: Scored, reference: Scored | None = None, progress: Progress | None = None
) -> dict[str, float]:
    """Score the second half of each window; the first half is its context.

    Returns perplexity and n_tokens, and with a ``reference`` also kl_mean, kl_p99, same_top and reference_perplexity,
    as :class:`~barefoot.evals.divergence.Divergence` sums them up. Engines need contexts of a whole window. Memory:
    tiles of ``n_logits`` rows of logits, those of the engine with fewer.

    Raises
    ------
    InvalidInput : two engines of different vocabularies, or windows that a context does not hold.
    """
    if reference is not None and reference.spec.vocab_size != engine.spec.vocab_size:
        raise InvalidInput(
            f"vocabularies of {engine.spec.vocab_size} and {reference.spec.vocab_size} tokens can't be compared",
            cure="compare models with the same tokenizer",
        )
    engines = [engine] if reference is None else [engine, reference]
    total = sum(len(ids) - 1 - len(ids) // 2 for ids in texts)
    divergence, done = Divergence(), 0
    for ids in texts:
        for tiles, targets in _tiles(engines, ids):
            for row in range(0, len(targets), COMPARE_ROWS):
                some = slice(row, row + COMPARE_ROWS)
                divergence.add(tiles[-1][some], tiles[0][some], targets[some])
            done += len(targets)
            if progress is not None:
                progress(done, total)
    summary = divergence.summary
    return summary if reference is not None else {name: summary[name] for name in ("perplexity", "n_tokens")}


def _keep(tiles: list[Floats], _: int, logits: Floats) -> None:
    tiles.append(logits.copy())


def _tiles(engines: Sequence[Scored], ids: Sequence[int]) -> Iterator[tuple[list[Floats], NDArray[np.int64]]]:
    """The logits of each engine for some tokens of the second half, and the tokens that follow them."""
    half, last = len(ids) // 2, len(ids) - 1
    step = min(engine.config.n_logits for engine in engines)
    for engine in engines:
        engine.reset()
        engine.prefill(ids[:half])
    for start in range(half, last, step):
        stop = min(start + step, last)
        tiles: list[Floats] = []
        for engine in engines:
            engine.prefill(ids[start:stop], all_logits=functools.partial(_keep, tiles))
        yield tiles, np.asarray(ids[start + 1 : stop + 1], np.int64)
