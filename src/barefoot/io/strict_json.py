"""JSON of a file that is not trusted: one object, no key twice, no NaN, no endless nesting."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from barefoot.core.errors import CorruptFile
from barefoot.io.files import BinaryFile

MAX_CONFIG_BYTES = 64 << 20  # config.json and indexes of shards; the largest known have a few MB


def parse_object(raw: bytes | bytearray, what: str) -> dict[str, Any]:
    """The object that ``raw`` (UTF-8) spells; CorruptFile when it is anything else."""

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CorruptFile(f"{what}: key {key!r} occurs twice")
            found[key] = value
        return found

    def constant(name: str) -> Any:
        raise CorruptFile(f"{what}: {name} is not a JSON number")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{what}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptFile(f"{what}: expected a JSON object, got {type(value).__name__}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most ``MAX_CONFIG_BYTES``."""
    with BinaryFile(path) as file:
        if file.n_bytes > MAX_CONFIG_BYTES:
            raise CorruptFile(f"{path.name}: {file.n_bytes} bytes, at most {MAX_CONFIG_BYTES} are read")
        return parse_object(file.read_at(0, file.n_bytes), path.name)
