"""Several texts in one engine, a sequence each: their prompts one by one, then a token of each in a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.kv.stores import KVStore

F32 = npt.NDArray[np.float32]
CHUNK, N_LOGITS = 128, 64


def engine(
    checkpoint: Checkpoint, kv: KVStore, context: int, n_sequences: int, n_threads: int, **settings: Any
) -> Engine:
    """``settings`` : others of the configuration; activations are float32 without."""
    config = EngineConfig(
        context=context,
        kv=kv,
        chunk=min(CHUNK, context),
        n_logits=min(N_LOGITS, context),
        n_sequences=n_sequences,
        n_threads=n_threads,
        **{"activations": "float32", **settings},
    )
    return Engine(checkpoint, model_spec(checkpoint), config)


def in_step(run: Engine, texts: Sequence[Sequence[int]], n_prompt: int, take: Callable[[int, int, F32], None]) -> None:
    """``n_prompt`` tokens of each text as its prompt, the others decoded, but for the last one, which is foreseen.

    texts : equally long, one for each of the first sequences. take : gets the number of a text, that of the token that
    is foreseen, and the logits, float32 (1, vocabulary), valid during the call.
    """
    for number, text in enumerate(texts):
        run.reset(number)
        run.prefill(text[:n_prompt], sequence=number)
    for at in range(n_prompt, len(texts[0]) - 1):
        logits = run.decode_batch({number: text[at] for number, text in enumerate(texts)})
        for number in range(len(texts)):
            take(number, at + 1, logits[number : number + 1])
