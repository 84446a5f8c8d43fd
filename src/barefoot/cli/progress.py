"""Progress on standard error: rich's bars where a person looks on, nothing where nobody does.

Importing rich takes about 3 MiB on top of what a run needs anyway (7 MiB by itself), so :func:`prepare` is called
before a run measures what is reserved.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from barefoot.cli import console

Report = Callable[[int, "int | None", str], None]
"""Called with how much is done, how much there is (None: not known), and what is being done."""


def prepare() -> None:
    """Import what bars will need, and draw one into nowhere, so that showing them later takes no new memory."""
    if console.coloured(sys.stderr):
        import io

        from rich.console import Console

        with _rich_bar(Console(file=io.StringIO(), force_terminal=True), size=True) as report:
            report(1, 2, "")


@contextlib.contextmanager
def bar(*, size: bool = False) -> Iterator[Report]:
    """A bar that disappears when its block ends, however it ends; ``size`` shows the numbers as bytes."""
    if not console.coloured(sys.stderr):
        yield lambda done, total, label: None
        return
    from rich.console import Console

    with _rich_bar(Console(stderr=True), size=size) as report:
        yield report


@contextlib.contextmanager
def _rich_bar(rich_console: object, *, size: bool) -> Iterator[Report]:
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    numbers = DownloadColumn(binary_units=True) if size else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), numbers, TimeRemainingColumn())
    with Progress(*columns, console=rich_console, transient=True) as progress:  # type: ignore[arg-type]
        task = progress.add_task("", total=None)
        yield lambda done, total, label: progress.update(task, completed=done, total=total, description=label)
