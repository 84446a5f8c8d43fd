"""What the commands print: results on standard output, everything about the run on standard error.

Colour and progress only where a person looks on: the stream is a terminal, and NO_COLOR is not set (no-color.org).
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

STDOUT = "-"

_BOLD, _DIM, _RED, _GREEN, _RESET = "\033[1m", "\033[2m", "\033[31m", "\033[32m", "\033[0m"


def set_up_streams() -> None:
    """Characters that the terminal's encoding lacks are replaced, never an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def animated(stream: TextIO) -> bool:
    """Whether a line of ``stream`` can be rewritten in place."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def coloured(stream: TextIO) -> bool:
    return animated(stream) and not os.environ.get("NO_COLOR")


def style(text: str, code: str, stream: TextIO) -> str:
    return f"{code}{text}{_RESET}" if coloured(stream) else text


def bold(text: str, stream: TextIO) -> str:
    return style(text, _BOLD, stream)


def dim(text: str, stream: TextIO) -> str:
    return style(text, _DIM, stream)


def print_error(message: str, cure: str | None = None) -> None:
    """``error: …`` and, on its own line, what to do about it; on standard error."""
    print(f"{style('error:', _RED, sys.stderr)} {message}", file=sys.stderr)
    if cure:
        print(f"  → {cure}", file=sys.stderr)
    sys.stderr.flush()


def print_note(text: str) -> None:
    """A line about the run, on standard error."""
    print(text, file=sys.stderr, flush=True)


def write_json(value: Any, target: str) -> None:
    """One object, indented, to the file ``target``, or to standard output when it is ``-``."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    if target == STDOUT:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        with open(target, "w", encoding="utf-8") as file:
            file.write(text)


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] = (), right: Sequence[int] = ()) -> str:
    """Rows as aligned columns, two spaces apart; the columns numbered in ``right`` are flush right."""
    lines = [list(header), *map(list, rows)] if header else list(map(list, rows))
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def row(line: Sequence[str]) -> str:
        cells = (cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(line))
        return "  ".join(cells).rstrip()

    return "\n".join(map(row, lines))
