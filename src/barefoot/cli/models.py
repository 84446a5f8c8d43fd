"""From the name of a model to its shapes, without its weights where they are not here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from barefoot.cli import progress
from barefoot.core.ledger import Footprint, Phase, Term, entry

if TYPE_CHECKING:
    from barefoot.core.model import ModelSpec
    from barefoot.io.inventory import Checkpoint

_RUN_PHASES: tuple[Phase, ...] = ("load", "convert", "prefill", "decode")


@dataclass(frozen=True)
class Shapes:
    """A model's shapes, and the bytes of its tokenizer where its file is here."""

    spec: ModelSpec
    tokenizer: Footprint


def tokenizer_footprint(checkpoint: Checkpoint) -> Footprint:
    """The vocabulary's tables, held throughout, and what encoding a text takes and gives back."""
    from barefoot.io.tokenizer import workspace_bytes
    from barefoot.io.tokenizer_files import footprint_bytes

    tables = footprint_bytes(checkpoint)
    return entry("tokenizer", "workspace", [Term("tables", 1, tables)], phases=_RUN_PHASES) + entry(
        "encoding", "workspace", [Term("text", 1, workspace_bytes(0))], phases=("load",)
    )


def fetch(name: str) -> Path:
    """The path of a model that can be run, fetched first where needed."""
    from barefoot.io.sources import resolve

    with progress.bar(size=True) as report:
        return resolve(name, progress=report)


def load_shapes(name: str) -> Shapes:
    """The shapes of a model: from its header, from a config.json, or from the table of well-known models.

    Raises
    ------
    SourceNotFound : nothing under that name.
    """
    from barefoot.engine.specs import model_spec, spec_from_config
    from barefoot.io.inventory import Checkpoint
    from barefoot.io.strict_json import read_object
    from barefoot.plan.known_models import known_models

    if name in known_models():
        return Shapes(known_models()[name], Footprint())
    path = Path(name).expanduser()
    if path.suffix == ".json" and path.is_file():
        return Shapes(spec_from_config(read_object(path), path.parent.resolve().name), Footprint())
    with Checkpoint(fetch(name)) as checkpoint:
        return Shapes(model_spec(checkpoint), tokenizer_footprint(checkpoint))
