"""The model that a tuning trains, by where its adapter stands."""

from __future__ import annotations

from barefoot.adapters import Beside
from barefoot.adapters.qst import QST
from barefoot.core.errors import Incompatible
from barefoot.core.model import ModelSpec
from barefoot.io.inventory import Checkpoint
from barefoot.train.driver.decoder import Decoder
from barefoot.train.driver.side_decoder import SideDecoder
from barefoot.train.footprint import Tuning


def learner(checkpoint: Checkpoint, spec: ModelSpec, tuning: Tuning, seed: int) -> Decoder | SideDecoder:
    """A frozen base with an adapter whose first values come from ``seed``.

    Raises
    ------
    Incompatible : nothing trains this adapter.
    """
    adapter, formats, compute = tuning.adapter, tuning.formats, tuning.compute
    if isinstance(adapter, Beside):
        return Decoder(
            checkpoint, spec, adapter, formats=formats, seed=seed, activations=tuning.activations, compute=compute
        )
    if isinstance(adapter, QST):
        return SideDecoder(checkpoint, spec, adapter, formats=formats, seed=seed, compute=compute)
    raise Incompatible(f"{adapter} can't be trained here")
