"""Reading weight files past the page cache, whose pages would count against a memory cgroup.

Direct reads (O_DIRECT) need offsets, lengths and addresses on whole pages and a file system that allows them; all other
reads are plain, and tell the system that their pages are not needed again.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.errors import CorruptFile
from barefoot.engine.placement import PAGE

U8 = npt.NDArray[np.uint8]


class WeightFiles:
    """The files of a checkpoint, open for positioned reads from any thread."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        binary = getattr(os, "O_BINARY", 0)
        self._plain = [os.open(path, os.O_RDONLY | binary) for path in self._paths]
        self._direct = [_open_direct(path) for path in self._paths]

    @property
    def n_shards(self) -> int:
        return len(self._paths)

    def size(self, shard: int) -> int:
        return os.fstat(self._plain[shard]).st_size

    def read(self, shard: int, offset: int, out: U8) -> None:
        """Fill ``out`` from byte ``offset``, by a direct read where possible.

        Raises
        ------
        CorruptFile : the file has become shorter since its header was read, or can't be read there.
        """
        direct = self._direct[shard]
        end = offset + out.nbytes
        aligned = offset % PAGE == 0 and out.nbytes % PAGE == 0 and out.ctypes.data % PAGE == 0
        try:
            if direct is not None and aligned and end <= self.size(shard):
                ops.read_at(direct, offset, out)
            else:
                ops.read_at(self._plain[shard], offset, out)
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(self._plain[shard], offset, out.nbytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise CorruptFile(
                f"{self._paths[shard].name}: bytes {offset} to {end} can't be read from a file of "
                f"{self.size(shard)} bytes ({error})",
                cure="fetch the file again, and leave it in place while it is in use",
            ) from None

    def close(self) -> None:
        for descriptor in (*self._plain, *self._direct):
            if descriptor is not None:
                os.close(descriptor)
        self._plain, self._direct = [], []


def _open_direct(path: Path) -> int | None:
    """A descriptor for direct reads, or None where the system or the file system has none."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    try:  # some file systems accept the flag and refuse the read
        with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
            os.preadv(descriptor, [page], 0)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
