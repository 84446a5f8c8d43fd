"""What a run measures, a line of JSON each, that survives being killed.

Every line has its ``step`` and goes to the operating system at once, so a killed process loses none; :meth:`sync` puts
them on disk. A run that goes on from a step takes the lines behind that step away, and a line that was never finished,
and so the curve is the one of a run without interruption.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from barefoot.core.errors import BackendMissing, CorruptFile
from barefoot.io.strict_json import parse_object

MAX_LINE_BYTES = 1 << 16

Value = float | int | str | None


class Writer(Protocol):
    """What TensorBoard's ``SummaryWriter`` offers."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...
    def flush(self) -> Any: ...
    def close(self) -> Any: ...


class Metrics:
    """A file of metrics to write to.

    Parameters
    ----------
    path : is created where it is not there.
    last_step : the run goes on behind this step, whose lines are the last ones that stay; -1 begins anew.
    writer : gets every number as well.
    """

    def __init__(self, path: Path, last_step: int = -1, writer: Writer | None = None) -> None:
        keep(path, last_step)
        self._file = open(path, "ab")  # noqa: SIM115  (closed by close)
        self._writer = writer

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def write(self, step: int, **values: Value) -> None:
        """Add a line. Numbers that are not finite become null."""
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        line = json.dumps({"step": step, **finite}, ensure_ascii=False, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        for key, value in values.items():
            if self._writer is not None and isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, step)

    def sync(self) -> None:
        """Put all lines on disk: before a checkpoint, so that none is missing when the run goes on from it."""
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of metrics, one after the other; none where there is no file.

    Raises
    ------
    CorruptFile : a line, other than an unfinished last one, is no metrics.
    """
    return (found for found, _ in _lines(path))


def keep(path: Path, last_step: int) -> None:
    """Cut a file of metrics behind the lines of ``last_step``.

    Raises
    ------
    CorruptFile : a line, other than an unfinished last one, is no metrics.
    """
    end = 0
    for found, behind in _lines(path):
        if found["step"] > last_step:
            break
        end = behind
    if path.exists():
        os.truncate(path, end)


def require_tensorboard() -> None:
    """Import TensorBoard, which takes memory: before what is reserved is measured.

    Raises
    ------
    BackendMissing : it is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise BackendMissing("TensorBoard is not installed", cure="pip install tensorboard, or leave it out") from None


def tensorboard(folder: Path, last_step: int = -1) -> Writer:
    """A writer of TensorBoard's files, which hides what an interrupted run wrote behind ``last_step``."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Writer = SummaryWriter(str(folder), purge_step=last_step + 1)
    return writer


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each whole line, and where it ends in the file."""
    if not path.exists():
        return
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
            if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                return  # the end of the file: the process was killed as it wrote
            where = f"{path.name}, line {number}"
            found = parse_object(line, where)
            if type(found.get("step")) is not int:
                raise CorruptFile(f"{where}: expected a step, got {found.get('step')!r}")
            end += len(line)
            yield found, end
