"""Known models: shapes from ``known_models.toml``, so that a model can be planned for without being there."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from barefoot.core.errors import unknown_name
from barefoot.core.model import ModelSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@functools.cache
def known_models() -> Mapping[str, Mapping[str, Any]]:
    """Name → config, in the keys of a Hugging Face config.json."""
    return tomllib.loads((Path(__file__).parent / "known_models.toml").read_text(encoding="utf-8"))


def known_spec(name: str) -> ModelSpec:
    """The shapes of a known model; its weights count as stored in bf16.

    Raises
    ------
    InvalidInput : no such model in the table.
    """
    from barefoot.engine.specs import spec_from_config

    wanted = name.strip().lower().replace("_", "-")
    if wanted not in known_models():
        raise unknown_name("model", name, known_models())
    return spec_from_config(known_models()[wanted], wanted)
