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

TYPICAL_PROMPT_BYTES = 4096  # what a plan assumes of a text that is not known yet
_RUN_PHASES: tuple[Phase, ...] = ("load", "prefill", "decode")


@dataclass(frozen=True)
class Shapes:
    """A model's shapes, and the bytes of its tokenizer (for a single prompt) where its file is here."""

    spec: ModelSpec
    tokenizer: Footprint


def tokenizer_footprint(checkpoint: Checkpoint, n_text_bytes: int, *, is_chat: bool = False) -> Footprint:
    """The vocabulary's tables, held throughout, and what encoding texts of that many bytes takes, gives back and keeps.

    A single prompt is encoded before weights are loaded, those of a chat beside everything.
    """
    from barefoot.io.tokenizer import kept_bytes, load_tokenizer, workspace_bytes
    from barefoot.io.tokenizer_files import footprint_bytes

    if checkpoint.kind == "gguf":
        tables = footprint_bytes(checkpoint.config)
    else:  # tokenizer.json does not state its sizes in a header
        tables = load_tokenizer(checkpoint).resident_bytes()
    encoding = [Term("library objects", 1, workspace_bytes(n_text_bytes))]
    held = [Term("tables", 1, tables), Term("heap that encoding leaves in pieces", 1, kept_bytes(n_text_bytes))]
    return entry("tokenizer", "workspace", held, phases=_RUN_PHASES) + entry(
        "encoding", "workspace", encoding, phases=("prefill",) if is_chat else ("load",)
    )


def fetch(name: str) -> Path:
    """The path of a model that can be run, fetched first where needed."""
    from barefoot.io.sources import resolve

    with progress.line() as report:
        return resolve(name, progress=report)


def load_shapes(name: str) -> Shapes:
    """The shapes of a model: from its header, from a config.json, or from the table of well-known models.

    Raises
    ------
    SourceNotFound : nothing under that name.
    """
    from barefoot.engine.specs import model_spec, spec_from_config
    from barefoot.io.inventory import Checkpoint
    from barefoot.io.sources import resolve_config
    from barefoot.io.strict_json import read_object
    from barefoot.plan.known import known_models, known_spec

    if name.lower() in known_models():
        return Shapes(known_spec(name), Footprint())
    path = Path(name).expanduser()
    if path.suffix == ".json" and path.is_file():
        return Shapes(spec_from_config(read_object(path), path.parent.resolve().name), Footprint())
    config = resolve_config(name)
    if config is not None:
        return Shapes(spec_from_config(read_object(config), name), Footprint())
    with Checkpoint(fetch(name)) as checkpoint:
        return Shapes(model_spec(checkpoint), tokenizer_footprint(checkpoint, TYPICAL_PROMPT_BYTES))
