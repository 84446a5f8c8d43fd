"""Texts to measure on: a file, or the English that every Python brings."""

from __future__ import annotations

from pathlib import Path

from barefoot.core.errors import InvalidInput, SourceNotFound

BUILT_IN = "topics"  # the help texts of Python's own documentation
PROBE_WINDOW, PROBE_WINDOWS = 128, 2  # of a text, on which sensitivities are measured
MAX_BYTES = 1 << 28


def read_text(name: str) -> str:
    """The built-in text, or that of a UTF-8 file.

    Raises
    ------
    SourceNotFound : no such file.
    InvalidInput : the file is larger than 256 MiB, or not UTF-8.
    """
    if name == BUILT_IN:
        import pydoc_data.topics

        return "\n\n".join(pydoc_data.topics.topics.values())
    path = Path(name).expanduser()
    if not path.is_file():
        raise SourceNotFound(f"no text file {name}", cure=f"name a file, or {BUILT_IN!r} for the built-in text")
    if path.stat().st_size > MAX_BYTES:
        raise InvalidInput(
            f"{name} has {path.stat().st_size} bytes, at most {MAX_BYTES} are read", cure="use a part of it"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None
