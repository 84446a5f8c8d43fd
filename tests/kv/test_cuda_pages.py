"""CUDA's pages, driven with a stand-in that keeps the driver's rules; and on a GPU, where there is one."""

import ctypes

import numpy as np
import pytest

from barefoot.core.errors import BackendMissing, InvalidInput, OverBudget
from barefoot.kv.placement import cuda
from barefoot.kv.placement.cuda import CudaPages, load_driver
from barefoot.kv.placement.geometry import Geometry, VirtualTensor
from barefoot.kv.placement.vattention import VAttention

PAGE = 2 << 20
TENSORS = [VirtualTensor(1, 100, PAGE // 4)] * 2
INVALID_VALUE, OUT_OF_MEMORY = 1, 2
BASE = 0x7F0000000000


def value(argument):
    """Of an integer or of what a pointer points to."""
    return argument._obj if hasattr(argument, "_obj") else argument.value


class Driver:
    """The driver's virtual memory: every call checks what the driver would."""

    def __init__(self, n_bytes=1 << 30, granularity=PAGE):
        self.left, self.granularity = n_bytes, granularity
        self.reserved, self.handles, self.mapped, self.accessible = {}, set(), {}, set()
        self.contexts, self.retained, self.n_maps, self.fails = 0, 0, 0, {}

    def __getattr__(self, name):
        def call(*arguments):
            if name != "cuGetErrorString" and self.fails.get(name, 0) > 0:
                self.fails[name] -= 1
                return INVALID_VALUE
            return getattr(self, f"do_{name}")(*arguments)

        return call

    def do_cuInit(self, flags):
        return 0

    def do_cuGetErrorString(self, result, text):
        text._obj.value = b"invalid argument"
        return 0

    def do_cuDeviceGet(self, device, ordinal):
        device._obj.value = ordinal.value
        return 0

    def do_cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value, self.retained = 77, self.retained + 1
        return 0

    def do_cuDevicePrimaryCtxRelease_v2(self, device):
        assert self.contexts == 0
        self.retained -= 1
        return 0

    def do_cuCtxPushCurrent_v2(self, context):
        assert context.value == 77
        assert self.retained
        self.contexts += 1
        return 0

    def do_cuCtxPopCurrent_v2(self, context):
        self.contexts -= 1
        return 0

    def do_cuMemGetAllocationGranularity(self, granularity, properties, option):
        assert option.value == 0
        granularity._obj.value = self.granularity
        return 0

    def do_cuMemAddressReserve(self, address, size, alignment, at, flags):
        assert size.value % self.granularity == alignment.value == at.value == flags.value == 0
        address._obj.value = BASE
        self.reserved[BASE] = size.value
        return 0

    def do_cuMemAddressFree(self, address, size):
        assert not self.mapped
        assert self.reserved.pop(address.value) == size.value
        return 0

    def do_cuMemCreate(self, handle, size, properties, flags):
        asked = properties._obj
        assert (asked.type, asked.location.type, flags.value) == (1, 1, 0)
        if size.value > self.left:
            return OUT_OF_MEMORY
        self.left -= size.value
        handle._obj.value = 1000 + len(self.handles)
        self.handles.add(handle._obj.value)
        return 0

    def do_cuMemRelease(self, handle):
        assert handle.value not in self.mapped.values()
        self.handles.remove(handle.value)
        self.left += PAGE
        return 0

    def do_cuMemMap(self, address, size, offset, handle, flags):
        ((base, n_bytes),) = self.reserved.items()
        assert self.contexts > 0
        assert size.value == PAGE
        assert base <= address.value <= base + n_bytes - PAGE
        assert address.value % PAGE == offset.value == flags.value == 0
        assert address.value not in self.mapped
        assert handle.value in self.handles - set(self.mapped.values())
        self.mapped[address.value] = handle.value
        self.n_maps += 1
        return 0

    def do_cuMemSetAccess(self, address, size, access, count):
        assert (access._obj.location.type, access._obj.flags, count.value) == (1, 3, 1)
        pages = set(range(address.value, address.value + size.value, PAGE))
        assert pages <= set(self.mapped)
        self.accessible |= pages
        return 0

    def do_cuMemUnmap(self, address, size):
        assert size.value == PAGE
        del self.mapped[address.value]
        self.accessible.discard(address.value)
        return 0


def test_structures_are_laid_out_as_in_the_header():
    """Sizes and offsets that a C compiler gives for cuda.h on 64-bit Linux."""
    offsets = {name: getattr(cuda.AllocationProperties, name).offset for name, _ in cuda.AllocationProperties._fields_}
    assert offsets == {"type": 0, "handle_types": 4, "location": 8, "windows": 16, "flags": 24}
    assert ctypes.sizeof(cuda.AllocationProperties) == 32
    assert (ctypes.sizeof(cuda.Access), cuda.Access.flags.offset) == (12, 8)


def test_mapped_handles_follow_the_lengths():
    driver = Driver()
    cache = VAttention(page_bytes=PAGE, pool_bytes=20 * PAGE).open(TENSORS, 3, CudaPages(driver=driver))
    geometry = cache.geometry
    assert len(driver.handles) == 20
    for lengths in ([4, 0, 0], [5, 1, 0], [12, 9, 0], [0, 13, 16], [1, 1, 1]):
        cache.step(lengths)
        assert cache.committed_bytes == PAGE * len(driver.mapped) <= 20 * PAGE
        needed = {
            BASE + start + i * PAGE
            for slot, n in enumerate(lengths)
            for start, n_bytes in geometry.spans(slot, 0, geometry.groups(n))
            for i in range(n_bytes // PAGE)
        }
        assert len(needed) == 2 * sum(-(-n // 4) for n in lengths)
        assert needed <= driver.accessible == set(driver.mapped)
    cache.trim()
    assert len(driver.mapped) == 6
    cache.close()
    assert (driver.mapped, driver.handles, driver.reserved) == ({}, set(), {})
    assert (driver.retained, driver.contexts, driver.left) == (0, 0, 1 << 30)
    cache.close()  # once more is no error


def test_a_step_makes_and_frees_no_memory():
    driver = Driver()
    cache = VAttention(page_bytes=PAGE, pool_bytes=8 * PAGE).open(TENSORS, 2, CudaPages(driver=driver))
    left = driver.left
    for i in range(40):
        cache.step([i % 13 + 1, 0])
        assert driver.left == left
    cache.close()


def test_a_pool_beyond_the_gpu_is_refused_and_given_back():
    driver = Driver(n_bytes=7 * PAGE)
    with pytest.raises(
        OverBudget, match=r"has 14\.0 MiB for keys and values, and the pool is to have 20\.0 MiB"
    ) as raised:
        VAttention(page_bytes=PAGE, pool_bytes=10 * PAGE).open(TENSORS, 3, CudaPages(driver=driver))
    assert (raised.value.needed, raised.value.available) == (10 * PAGE, 7 * PAGE)
    assert (driver.left, driver.handles, driver.reserved, driver.retained) == (7 * PAGE, set(), {}, 0)


def test_pages_below_the_granularity_are_refused():
    driver = Driver()
    with pytest.raises(InvalidInput, match=f"multiple of {PAGE} on this GPU, got 65536"):
        VAttention(page_bytes=1 << 16).open(TENSORS, 3, CudaPages(driver=driver))
    assert driver.retained == 0


@pytest.mark.parametrize("name", ["cuMemMap", "cuMemSetAccess"])
def test_a_failing_call_leaves_no_page_mapped(name):
    driver = Driver()
    cache = VAttention(page_bytes=PAGE, background=False).open(TENSORS, 3, CudaPages(driver=driver))
    driver.fails[name] = 1
    with pytest.raises(BackendMissing, match=f"CUDA's {name} failed with 1: invalid argument"):
        cache.step([40, 0, 0])
    assert driver.mapped == {}
    assert driver.contexts == 0
    cache.step([40, 0, 0])
    assert len(driver.mapped) == 20
    cache.close()


def test_without_a_driver_the_backend_is_missing(monkeypatch):
    def absent(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda.ctypes, "CDLL", absent)
    with pytest.raises(BackendMissing, match="no CUDA driver here"):
        CudaPages()


def gpu_reason():
    try:
        CudaPages().close()
    except BackendMissing as error:
        return str(error)
    return None


@pytest.mark.skipif(gpu_reason() is not None, reason=f"no GPU: {gpu_reason()}")
def test_on_a_gpu_rows_stay_and_memory_is_that_of_the_pool():
    driver, pages = load_driver(), CudaPages()
    cache = VAttention(page_bytes=PAGE, pool_bytes=64 * PAGE).open(TENSORS, 4, pages)
    geometry, rng = Geometry(TENSORS, 4, PAGE), np.random.default_rng(1)

    def copy(name, *arguments):
        with pages._current():
            assert getattr(driver, name)(*arguments) == 0

    written = {}
    for lengths in ([3, 0, 0, 0], [9, 30, 0, 1], [17, 31, 0, 40]):
        cache.step(lengths)
        for slot, n in enumerate(lengths):
            for start, n_bytes in geometry.spans(slot, 0, geometry.groups(n)):
                row = written.setdefault(start, rng.integers(0, 256, PAGE, np.uint8))
                last = pages.address + start + n_bytes - PAGE
                copy("cuMemcpyHtoD_v2", ctypes.c_uint64(last), row.ctypes.data_as(ctypes.c_void_p), PAGE)
                found = np.empty(PAGE, np.uint8)
                copy("cuMemcpyDtoH_v2", found.ctypes.data_as(ctypes.c_void_p), ctypes.c_uint64(last), PAGE)
                assert (found == row).all()
    cache.close()
