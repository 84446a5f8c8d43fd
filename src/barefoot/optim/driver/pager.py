"""Pages of bytes in a file, some of which are in memory: the next one comes while one is worked on."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput

U8 = npt.NDArray[np.uint8]


class Pager:
    """``n_pages`` pages of ``page_bytes``, all zeros at first, at most ``n_frames`` of them in memory.

    The page that was not used for the longest time makes room for another. A page that never changed isn't written,
    and one that was never written isn't read. The file has no name: it is gone when the process is.

    While a page is held, nothing else may be asked of the pager: what its second thread does then needs no locks.

    Raises
    ------
    InvalidInput : the folder has no room for the file.
    """

    def __init__(self, folder: Path, n_pages: int, page_bytes: int, n_frames: int) -> None:
        assert n_frames >= min(2, n_pages), "one is held while the next one comes"
        self.frames: U8 = np.zeros((min(n_frames, n_pages), page_bytes), np.uint8)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        try:
            if hasattr(os, "posix_fallocate") and n_pages > n_frames:
                os.posix_fallocate(self._file.fileno(), 0, n_pages * page_bytes)
        except OSError as error:
            self._file.close()
            if error.errno == errno.ENOSPC:
                needed = f"{folder} has no room for {n_pages * page_bytes:,} bytes of pages"
                raise InvalidInput(needed, cure="name a folder on a larger disk") from None
            raise
        self._frame_of: OrderedDict[int, int] = OrderedDict()  # of each page in memory; the last one was used last
        self._changed: set[int] = set()
        self._written: set[int] = set()
        self._helper = ThreadPoolExecutor(1, "pager")
        self._coming: Future[None] | None = None

    def close(self) -> None:
        """Let go of the file, and of all that is in it."""
        self._helper.shutdown()
        self._file.close()

    @contextlib.contextmanager
    def page(self, number: int, *, changes: bool, ahead: int | None = None) -> Iterator[U8]:
        """Bytes of a page, which stay where they are meanwhile; page ``ahead`` comes beside that.

        changes : whether they are written to.
        """
        if self._coming is not None:
            coming, self._coming = self._coming, None
            coming.result()
        self._bring(number)
        if changes:
            self._changed.add(number)
        frame = self.frames[self._frame_of[number]]
        if ahead is not None and ahead not in self._frame_of:
            self._coming = self._helper.submit(self._bring, ahead)
        yield frame

    def _bring(self, number: int) -> None:
        """Have a page in memory, as the one that was used last."""
        if number not in self._frame_of:
            frame = len(self._frame_of)
            if frame == len(self.frames):
                out, frame = self._frame_of.popitem(last=False)
                if out in self._changed:
                    self._write(out, self.frames[frame])
            if number in self._written:
                self._read(number, self.frames[frame])
            else:
                self.frames[frame] = 0
            self._frame_of[number] = frame
        self._frame_of.move_to_end(number)

    def _write(self, number: int, page: U8) -> None:
        self._file.seek(number * len(page))
        done = 0
        while done < len(page):
            done += self._file.write(page[done:].data)
        self._changed.discard(number)
        self._written.add(number)

    def _read(self, number: int, page: U8) -> None:
        self._file.seek(number * len(page))
        done = 0
        while done < len(page):
            n = self._file.readinto(page[done:].data)  # type: ignore[attr-defined]
            assert n, "a page that was written is there"
            done += n
