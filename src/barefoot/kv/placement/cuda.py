"""Pages of a GPU's memory behind reserved addresses, by CUDA's driver: the paper's own form.

All pages are made at the start (cuMemCreate, one handle each), so that a step neither allocates nor frees memory: it
maps handles into the reserved range (cuMemMap, then cuMemSetAccess for a span) and unmaps them, page by page, since a
mapping can only be taken away whole. The driver library is opened by ctypes; no CUDA package is needed.

NOT YET RUN ON A GPU: tests drive this file with a stand-in for the driver that keeps its rules, and the structures'
layouts were compared with CUDA's header. Kernels that use a slot must have ended before its pages are given back.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint64, c_ushort, c_void_p
from typing import Any

from barefoot.core.errors import BackendMissing, InvalidInput, OverBudget
from barefoot.core.units import format_bytes

# Names and values of cuda.h
OUT_OF_MEMORY = 2
ALLOCATION_TYPE_PINNED = 1
LOCATION_TYPE_DEVICE = 1
ACCESS_READ_WRITE = 3
GRANULARITY_MINIMUM = 0


class Location(ctypes.Structure):
    """CUmemLocation"""

    _fields_ = (("type", c_int), ("id", c_int))


class AllocationFlags(ctypes.Structure):
    _fields_ = (
        ("compression", c_ubyte),
        ("rdma", c_ubyte),
        ("usage", c_ushort),
        ("reserved", c_ubyte * 4),
    )


class AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp"""

    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location", Location),
        ("windows", c_void_p),
        ("flags", AllocationFlags),
    )


class Access(ctypes.Structure):
    """CUmemAccessDesc"""

    _fields_ = (("location", Location), ("flags", c_int))


def load_driver() -> Any:
    """CUDA's driver library.

    Raises
    ------
    BackendMissing : there is none.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise BackendMissing(f"no CUDA driver here: {error}", cure="keep the cache on the host") from error


class CudaPages:
    """Memory of a GPU.

    Parameters
    ----------
    device : the driver's number of it.
    driver : for tests.

    Attributes
    ----------
    address : of the first reserved byte, in the device's addresses.

    Raises
    ------
    BackendMissing : no driver, or it fails.
    """

    address: int

    def __init__(self, device: int = 0, driver: Any = None) -> None:
        self._driver = load_driver() if driver is None else driver
        self._call("cuInit", ctypes.c_uint(0))
        number, self._context = c_int(), c_void_p()
        self._call("cuDeviceGet", byref(number), c_int(device))
        self._call("cuDevicePrimaryCtxRetain", byref(self._context), number)
        self._number = number
        self._location = Location(LOCATION_TYPE_DEVICE, number.value)
        self._properties = AllocationProperties(type=ALLOCATION_TYPE_PINNED, location=self._location)
        self._n_bytes = self._page = 0
        self._handles: list[int] = []  # of pages, the free ones last
        self._mapped: dict[int, int] = {}  # start in the range → handle

    @property
    def committed_bytes(self) -> int:
        return len(self._mapped) * self._page

    def reserve(self, n_bytes: int, page_bytes: int, n_pages: int) -> None:
        least, address = c_size_t(), c_uint64()
        properties = byref(self._properties)
        with self._current():
            self._call("cuMemGetAllocationGranularity", byref(least), properties, c_int(GRANULARITY_MINIMUM))
            if page_bytes % least.value:
                raise InvalidInput(f"page_bytes must be a multiple of {least.value} on this GPU, got {page_bytes}")
            self._call("cuMemAddressReserve", byref(address), c_size_t(n_bytes), c_size_t(0), c_uint64(0), c_uint64(0))
            self.address, self._n_bytes, self._page = address.value, n_bytes, page_bytes
            try:
                for _ in range(n_pages):
                    handle = c_uint64()
                    self._call("cuMemCreate", byref(handle), c_size_t(page_bytes), properties, c_uint64(0))
                    self._handles.append(handle.value)
            except OverBudget as error:
                made = len(self._handles) * page_bytes
                raise OverBudget(
                    f"the GPU has {format_bytes(made)} for keys and values, and the pool is to have "
                    f"{format_bytes(n_pages * page_bytes)}",
                    needed=n_pages * page_bytes,
                    available=made,
                    cure="give the cache a smaller pool",
                ) from error

    def commit(self, start: int, n_bytes: int) -> None:
        access = Access(self._location, ACCESS_READ_WRITE)
        pages = range(start, start + n_bytes, self._page)
        assert len(pages) <= len(self._handles)
        with self._current():
            try:
                for at in pages:
                    self._call(
                        "cuMemMap",
                        c_uint64(self.address + at),
                        c_size_t(self._page),
                        c_size_t(0),
                        c_uint64(self._handles[-1]),
                        c_uint64(0),
                    )
                    self._mapped[at] = self._handles.pop()
                first = c_uint64(self.address + start)
                self._call("cuMemSetAccess", first, c_size_t(n_bytes), byref(access), c_size_t(1))
            except BaseException:
                self._unmap([at for at in pages if at in self._mapped])
                raise

    def release(self, start: int, n_bytes: int) -> None:
        with self._current():
            self._unmap(range(start, start + n_bytes, self._page))

    def close(self) -> None:
        if not self._context:
            return
        with self._current():
            self._unmap(list(self._mapped))
            while self._handles:
                self._call("cuMemRelease", c_uint64(self._handles.pop()))
            if self._n_bytes:
                self._call("cuMemAddressFree", c_uint64(self.address), c_size_t(self._n_bytes))
                self._n_bytes = 0
        self._call("cuDevicePrimaryCtxRelease_v2", self._number)
        self._context = c_void_p()

    def _unmap(self, starts: Iterable[int]) -> None:
        for at in starts:
            self._call("cuMemUnmap", c_uint64(self.address + at), c_size_t(self._page))
            self._handles.append(self._mapped.pop(at))

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The device's primary context, which torch uses too, as that of this thread."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._driver, name)(*arguments)
        if result == OUT_OF_MEMORY:
            raise OverBudget(f"{name}: the GPU has no more memory", needed=self._page, available=0)
        if result:
            text = c_char_p()
            self._driver.cuGetErrorString(c_int(result), byref(text))
            message = text.value.decode(errors="replace") if text.value else "unknown"
            raise BackendMissing(f"CUDA's {name} failed with {result}: {message}")
