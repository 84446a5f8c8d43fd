"""The model that a tuning trains, by where its adapter stands."""

from __future__ import annotations

from collections.abc import Mapping

from barefoot.adapters import Beside
from barefoot.adapters.pruning import Kept
from barefoot.adapters.qst import QST
from barefoot.core.errors import Incompatible
from barefoot.core.model import ModelSpec
from barefoot.io.inventory import Checkpoint
from barefoot.train.driver.decoder import Decoder
from barefoot.train.driver.side_decoder import SideDecoder
from barefoot.train.footprint import Tuning


def learner(
    checkpoint: Checkpoint, spec: ModelSpec, tuning: Tuning, seed: int, kept: Mapping[int, Kept] | None = None
) -> Decoder | SideDecoder:
    """A frozen base with an adapter whose first values come from ``seed``; ``kept`` is what is left of a pruned one.

    Raises
    ------
    Incompatible : nothing trains this adapter.
    """
    adapter, formats, compute = tuning.adapter, tuning.formats, tuning.compute
    if isinstance(adapter, Beside):
        activations = tuning.activations
        return Decoder(
            checkpoint, spec, adapter, formats=formats, seed=seed, activations=activations, compute=compute, kept=kept
        )
    if isinstance(adapter, QST) and not kept:
        return SideDecoder(checkpoint, spec, adapter, formats=formats, seed=seed, compute=compute)
    raise Incompatible(f"{adapter} can't be trained here")
