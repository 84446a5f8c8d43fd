"""Positioned reads from a file of known size, and files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO

from barefoot.core.errors import CorruptFile, SourceNotFound

WINDOW_BYTES = 256 * 1024  # read at a time while walking a header: large enough to be quick, small enough to forget
HEADER_ALLOWANCE_BYTES = 1 << 20  # what a header's objects may take beyond twice the file, so that tiny files parse


class BinaryFile:
    """A file opened for positioned reads from any thread; every read is checked against its size at opening.

    Plain reads rather than a mapping: mapped pages stay in the resident set of the process, read ones do not.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file = FileIO(self.path)
        except OSError as error:
            raise SourceNotFound(f"can't open {self.path}: {error.strerror}") from None
        self._lock = threading.Lock()
        self.n_bytes = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> BinaryFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` (contiguous bytes) from ``offset``."""
        if offset < 0 or offset + out.nbytes > self.n_bytes:
            raise CorruptFile(
                f"{self.path.name}: bytes {offset} to {offset + out.nbytes} of a file of {self.n_bytes} bytes"
            )
        done = 0
        while done < out.nbytes:
            n = self._read_some(offset + done, out[done:])
            if n == 0:
                raise CorruptFile(f"{self.path.name}: the file became shorter than its {self.n_bytes} bytes")
            done += n

    def read_at(self, offset: int, n_bytes: int) -> bytearray:
        """``n_bytes`` bytes from ``offset``; nothing is allocated unless the file holds them."""
        if n_bytes < 0 or offset < 0 or offset + n_bytes > self.n_bytes:
            raise CorruptFile(
                f"{self.path.name}: bytes {offset} to {offset + n_bytes} of a file of {self.n_bytes} bytes"
            )
        out = bytearray(n_bytes)
        self.read_into(offset, memoryview(out))
        return out

    def window(self, offset: int, n_bytes: int = WINDOW_BYTES) -> bytearray:
        """Up to ``n_bytes`` bytes from ``offset``, fewer at the end of the file."""
        return self.read_at(offset, min(n_bytes, max(self.n_bytes - offset, 0)))

    def _read_some(self, offset: int, out: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [out], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(out) or 0


@contextmanager
def atomic_writer(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes its name only when the block ends well: written beside it, synced, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
