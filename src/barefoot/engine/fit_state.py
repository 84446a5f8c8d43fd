"""Where a fit stands, on disk: how many files are written, and the hidden states behind them.

Hidden states are in a file and come into memory window by window, so a fit's memory does not grow with its text. While
a layer is fitted those behind it go into a second file, which takes the place of the first one when the layer's own
file is there: what an interruption loses is one layer.

Layout: 4096 bytes of JSON, padded with spaces, ``{"version", "key", "n_files", "shape"}``; then float32, little-endian,
of ``shape`` (n_streams, n_windows, window, d).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput

F32 = npt.NDArray[np.float32]

STATE = "fit-state"
VERSION = 1
HEADER_BYTES = 4096


def key_of(folder: Path) -> str | None:
    """The key of the fit that was interrupted in this folder; None where there is none."""
    try:
        with open(folder / STATE, "rb") as file:
            return str(json.loads(file.read(HEADER_BYTES))["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Stream:
    """Hidden states of one model in an open file, from ``offset`` on: windows of ``shape`` (n_windows, window, d)."""

    file: FileIO
    offset: int
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, window: int) -> F32:
        out = np.empty(self.shape[1:], "<f4")
        self.file.seek(self._position(window))
        self._all(self.file.readinto, out)
        return out

    def __setitem__(self, window: int, states: F32) -> None:
        self.file.seek(self._position(window))
        self._all(self.file.write, np.ascontiguousarray(states, "<f4"))

    def __iter__(self) -> Iterator[F32]:
        return (self[window] for window in range(len(self)))

    def whole(self) -> F32:
        out = np.empty(self.shape, np.float32)
        for window, states in enumerate(self):
            out[window] = states
        return out

    def _position(self, window: int) -> int:
        if not 0 <= window < len(self):
            raise IndexError(window)
        return self.offset + window * 4 * math.prod(self.shape[1:])

    @staticmethod
    def _all(move, states: F32) -> None:  # type: ignore[no-untyped-def]
        left = states.reshape(-1).view(np.uint8).data
        while len(left):
            done = move(left)
            if not done:
                raise InvalidInput("the hidden states of a fit are cut off", cure=f"remove {STATE} and begin again")
            left = left[done:]


class FitState:
    """What ``folder`` holds of the fit that ``key`` identifies; a context, in which the file is open.

    Parameters
    ----------
    shape : (n_streams, n_windows, window, d).

    Attributes
    ----------
    n_files : written so far; 0 where nothing is there.
    streams : the hidden states behind them, none before the first file.

    Raises
    ------
    InvalidInput : on entering: the folder holds another fit that was interrupted, or this one's state is damaged.
    """

    def __init__(self, folder: Path, key: str, shape: tuple[int, int, int, int]) -> None:
        self.path, self._key, self._shape = folder / STATE, key, shape
        self.n_files = 0
        self.streams: list[Stream] = []
        self._file: FileIO | None = None

    def __enter__(self) -> FitState:
        if self.path.exists():
            self._open()
            try:
                self.n_files = self._checked()
            except InvalidInput:
                self._close()
                raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    @contextmanager
    def advance(self) -> Iterator[list[Stream]]:
        """The streams behind one more file, to be filled in the block; they count once it ends well."""
        following = self.path.with_suffix(".next")
        with FileIO(following, "w+") as file:
            yield self._streams(file)
            header = {"version": VERSION, "key": self._key, "n_files": self.n_files + 1, "shape": self._shape}
            file.seek(0)
            file.write(json.dumps(header).encode().ljust(HEADER_BYTES))
            os.fsync(file.fileno())
        self._close()
        os.replace(following, self.path)
        self._open()
        self.n_files += 1

    def _open(self) -> None:
        self._file = FileIO(self.path)
        self.streams = self._streams(self._file)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self.streams = None, []

    def _streams(self, file: FileIO) -> list[Stream]:
        n_streams, n_windows, window, d = self._shape
        each = 4 * n_windows * window * d
        return [Stream(file, HEADER_BYTES + i * each, (n_windows, window, d)) for i in range(n_streams)]

    def _checked(self) -> int:
        """The number of files that the header tells."""
        assert self._file is not None
        damaged = InvalidInput(f"{self.path} is damaged", cure="remove it and begin again")
        try:
            header = json.loads(self._file.read(HEADER_BYTES))
            version, key, n_files, shape = (header[name] for name in ("version", "key", "n_files", "shape"))
        except (ValueError, KeyError, TypeError):
            raise damaged from None
        if (version, key, shape) != (VERSION, self._key, list(self._shape)):
            raise InvalidInput(
                f"{self.path.parent} holds another fit that was interrupted",
                cure=f"repeat its command to go on with it, or remove {self.path}",
            )
        expected = HEADER_BYTES + 4 * math.prod(self._shape) if math.prod(self._shape) else HEADER_BYTES
        if type(n_files) is not int or n_files < 1 or os.fstat(self._file.fileno()).st_size != expected:
            raise damaged
        return n_files
