"""Progress on standard error, where a person looks on; nothing where nobody does.

:func:`bar` draws rich's bars. Importing rich takes 3 to 7 MiB, so runs inside a budget use :func:`line` instead.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from barefoot.cli import console

Report = Callable[[int, "int | None", str], None]
"""Called with how much is done, how much there is (None: not known), and what is being done."""

_REDRAW_SECONDS = 0.1
_CLEAR_LINE = "\r\033[K"


def _nothing(done: int, total: int | None, label: str) -> None:
    """The report that nobody sees."""


@contextlib.contextmanager
def line() -> Iterator[Report]:
    """One line of text, rewritten in place, that disappears when all is done, or when its block ends.

    Whatever is printed after that stands where the line stood.
    """
    if not console.animated(sys.stderr):
        yield _nothing
        return
    last_drawn, is_shown = time.monotonic(), False

    def clear() -> None:
        nonlocal is_shown
        if is_shown:
            print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)
            is_shown = False

    def draw(done: int, total: int | None, label: str) -> None:
        nonlocal last_drawn, is_shown
        now = time.monotonic()
        if total is not None and done >= total:
            clear()
        elif now - last_drawn >= _REDRAW_SECONDS:
            last_drawn, is_shown = now, True
            share = f" {done / total:.0%}" if total else ""
            print(f"{_CLEAR_LINE}{label}{share}", end="", file=sys.stderr, flush=True)

    try:
        yield draw
    finally:
        clear()


@contextlib.contextmanager
def bar() -> Iterator[Report]:
    """A bar of bytes that disappears when its block ends, however it ends."""
    if not console.animated(sys.stderr):
        yield _nothing
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total, label: progress.update(task, completed=done, total=total, description=label)
