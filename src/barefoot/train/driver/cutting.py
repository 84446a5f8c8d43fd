"""Which units of a base are left: chosen when a training begins, and kept beside its state for when it goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from barefoot.adapters.pruning import Kept, Scores
from barefoot.adapters.pruning.files import read_units, write_units
from barefoot.adapters.pruning.taylor import group_scores
from barefoot.core.errors import InvalidInput
from barefoot.core.model import ModelSpec
from barefoot.engine.source import source_key
from barefoot.io.inventory import Checkpoint
from barefoot.train import MicroBatch
from barefoot.train.driver import state
from barefoot.train.driver.decoder import Frozen
from barefoot.train.driver.importance import importance
from barefoot.train.footprint import Tuning


def kept_units(
    checkpoint: Checkpoint, spec: ModelSpec, tuning: Tuning, seed: int, folder: Path, batch: Callable[[], MicroBatch]
) -> dict[int, Kept]:
    """What is left of each layer that loses something.

    Parameters
    ----------
    folder : of the training. Where it holds a state, its units are taken; else they are chosen, and written there.
    batch : what scores are computed of.

    Raises
    ------
    InvalidInput : the folder's training is one with other units.
    SourceNotFound, CorruptFile : it has a state, and its units are missing or damaged.
    """
    pruning, model = tuning.pruning, source_key(checkpoint)
    if pruning is None:
        return {}
    goes_on = (folder / state.NAME).is_file()
    if goes_on and pruning.scored:
        chosen = {}
    else:
        chosen = pruning.kept(spec, tuning.sizes(spec), seed, lambda: _scores(checkpoint, spec, tuning, batch()))
    if not goes_on:
        write_units(folder, pruning, chosen, model)
        return chosen
    found = read_units(folder, spec, model)
    if str(found) != str(pruning) or not (pruning.scored or fingerprint(found.units) == fingerprint(chosen)):
        raise InvalidInput(
            f"{folder} holds a training beside another copy, of {found}",
            cure="go on with the same, or name another folder",
        )
    return dict(found.units)


def _scores(checkpoint: Checkpoint, spec: ModelSpec, tuning: Tuning, batch: MicroBatch) -> Scores:
    assert tuning.pruning is not None
    layers = tuning.pruning.layers(spec)
    model = Frozen(checkpoint, spec, formats=tuning.formats, compute=tuning.compute, resident=False)
    return group_scores(spec, *importance(model, batch, tuning.loss, layers), layers)


def fingerprint(kept: Mapping[int, Kept]) -> str:
    """Tells units from others."""
    found = hashlib.sha256()
    for layer, each in sorted(kept.items()):
        found.update(repr((layer, len(each.groups), len(each.channels))).encode())
        found.update(each.groups.tobytes() + each.channels.tobytes())
    return found.hexdigest()
