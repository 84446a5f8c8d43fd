"""vAttention's memory against what the system says is resident, its thread, and what can go wrong."""

import errno
import mmap
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from barefoot.core.errors import Incompatible, InvalidInput, OverBudget
from barefoot.core.measure import resident, resident_at
from barefoot.kv.placement import pages as host
from barefoot.kv.placement.geometry import Geometry, VirtualTensor
from barefoot.kv.placement.pages import HostPages, refusal_reason
from barefoot.kv.placement.slots import PoolExhausted
from barefoot.kv.placement.vattention import VAttention

PAGE = 4096
needs_linux = pytest.mark.skipif(resident() is None, reason="this system does not tell what a process has resident")

# --- memory ---------------------------------------------------------------------------------------------------------

# Two layers of three heads of 64 channels in half precision, head by head: 12 ranges a slot, 32 tokens a page.
CONTEXT, N_SLOTS, N_RANGES, ROW = 2048, 8, 12, 128
TENSORS = [VirtualTensor(3, CONTEXT, ROW)] * 4
STATIC = N_SLOTS * N_RANGES * CONTEXT * ROW
GROUP = N_RANGES * PAGE


def formula(lengths):
    return sum(N_RANGES * PAGE * -(-n * ROW // PAGE) for n in lengths)


def requests(seed, n=40):
    """(prompt, tokens in all) of each: a few long, most short, 490 tokens on average."""
    rng = random.Random(seed)
    for _ in range(n):
        total = min(CONTEXT, int(rng.lognormvariate(5.8, 0.7)))
        yield max(1, total // 2), total


class Trace:
    """Requests served over the slots, several tokens a step; each request's rows hold its number."""

    def __init__(self, cache, pages, waiting):
        self.cache, self.pages, self.waiting = cache, pages, [(i + 1, *each) for i, each in enumerate(waiting)]
        self.arrays = cache.geometry.arrays(pages.memory)
        self.lengths = [0] * cache.geometry.n_slots
        self.running = {}  # slot → number, prompt, tokens in all
        self.finished = []
        self.n_preempted = self.peak_bytes = 0

    def resident(self):
        return resident_at(self.pages.memory.ctypes.data, self.pages.memory.nbytes)

    def steps(self, tokens):
        """Serve them all, pausing after each change of the lengths."""
        while self.waiting or self.running:
            while self.waiting and 0 in self.lengths:
                number, prompt, total = self.waiting.pop(0)
                slot = self.cache.alloc(prompt)
                self.running[slot] = number, prompt, total
                if not self.advance({slot: prompt}):
                    break
                yield
            self.advance({s: min(total, self.lengths[s] + tokens) for s, (_, _, total) in self.running.items()})
            yield
            for slot in [s for s, (_, _, total) in self.running.items() if self.lengths[s] == total]:
                self.end(slot)
            yield

    def advance(self, grown):
        """A step to these lengths; while the pool is too small, the latest request waits again. Whether none did."""
        n_before = self.n_preempted
        while True:
            after = [grown.get(slot, n) for slot, n in enumerate(self.lengths)]
            try:
                self.cache.step(after)
                break
            except PoolExhausted:
                slot = max(self.running, key=lambda s: self.running[s][0])
                self.waiting.insert(0, self.running.pop(slot))
                self.lengths[slot] = 0
                grown.pop(slot, None)
                self.cache.free(slot)
                self.n_preempted += 1
        for slot, (number, _, _) in self.running.items():
            for array in self.arrays:
                array[slot, :, self.lengths[slot] : after[slot]] = number
        self.lengths = after
        self.peak_bytes = max(self.peak_bytes, self.cache.committed_bytes)
        return self.n_preempted == n_before

    def end(self, slot):
        """Its rows are all still there."""
        number, _, total = self.running.pop(slot)
        for array in self.arrays:
            assert (array[slot, :, :total] == number).all()
        self.finished.append((number, total))
        self.cache.free(slot)
        self.lengths[slot] = 0


def opened(pages=None, **knobs):
    pages = HostPages() if pages is None else pages
    return VAttention(**knobs).open(TENSORS, N_SLOTS, pages), pages


def follow(pages, n=40):
    """A trace whose memory is at each moment that of its lengths, and of no page more."""
    cache, _ = opened(pages, background=False, reclaim="eager")
    trace = Trace(cache, pages, requests(24, n))
    largest = 0
    for _ in trace.steps(tokens=24):
        largest = max(largest, formula(trace.lengths))
        assert trace.resident() == cache.committed_bytes == formula(trace.lengths)
    cache.close()
    return trace, largest


@needs_linux
def test_resident_memory_is_the_formula_at_every_step():
    trace, largest = follow(HostPages())
    assert [number for number, _ in sorted(trace.finished)] == list(range(1, 41))
    assert sum(total for _, total in trace.finished) / 40 <= CONTEXT / 4
    assert largest == trace.peak_bytes <= STATIC / 2
    assert trace.resident() == 0


class FreedLater(HostPages):
    """Gives pages back when the system runs short of memory."""

    def release(self, start, n_bytes):
        self._mapping.madvise(mmap.MADV_FREE, start, n_bytes)
        self.committed_bytes -= n_bytes


class Large(HostPages):
    """Lets the system choose pages of 2 MiB."""

    def reserve(self, n_bytes, page_bytes, n_pages):
        super().reserve(n_bytes, page_bytes, n_pages)
        self._mapping.madvise(mmap.MADV_HUGEPAGE)


class AllAtOnce(HostPages):
    """A cache made of zeros that are written."""

    def reserve(self, n_bytes, page_bytes, n_pages):
        super().reserve(n_bytes, page_bytes, n_pages)
        self.memory[:] = 0


@needs_linux
@pytest.mark.skipif(refusal_reason() != "", reason=f"addresses are limited here{refusal_reason()}")
def test_addresses_beyond_the_machines_memory_take_none():
    pages = HostPages()
    pages.reserve(1 << 40, PAGE, 1)
    pages.commit(1 << 39, PAGE)
    start = pages.memory.ctypes.data + (1 << 39)
    assert resident_at(start - 1000 * PAGE, 2000 * PAGE) == PAGE


@needs_linux
@pytest.mark.parametrize("imitation", [FreedLater, Large, AllAtOnce])
def test_what_only_looks_like_it_is_found_out(imitation):
    if imitation is Large and "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this system has no large pages")
    with pytest.raises(AssertionError):
        follow(imitation(), n=4)


@needs_linux
def test_kernels_that_cannot_populate_are_touched(monkeypatch):
    monkeypatch.setattr(host, "_POPULATE_WRITE", 9999)
    trace, _ = follow(HostPages(), n=4)
    assert trace.resident() == 0


@needs_linux
@pytest.mark.parametrize("reclaim", ["demand", "idle"])
def test_with_the_thread_memory_is_what_is_committed_within_the_pool(reclaim):
    pool = 70 * GROUP + 5 * PAGE  # the longest request takes 64
    cache, pages = opened(pool_bytes=pool, reclaim=reclaim)
    trace = Trace(cache, pages, requests(11))
    for _ in trace.steps(tokens=1 << 5):
        committed = cache.committed_bytes
        assert formula(trace.lengths) <= committed == trace.resident() <= 70 * GROUP
    assert len(trace.finished) == 40
    assert trace.n_preempted > 0
    cache.trim()
    assert trace.resident() == cache.committed_bytes == 0
    cache.close()


@pytest.mark.parametrize("background", [True, False])
def test_steady_decoding_waits_for_no_page_with_the_thread(background):
    cache, _ = opened(background=background)
    lengths = [70, 1, 500, 32, 33, 64, 0, 900]
    cache.step(lengths)
    prefilled = cache.n_waited
    assert prefilled * PAGE == formula(lengths)
    for _ in range(200):
        lengths = [n + 1 if n else 0 for n in lengths]
        cache.step(lengths)
    assert cache.committed_bytes >= formula(lengths)
    grown = formula(lengths) // PAGE - prefilled
    assert (cache.n_waited - prefilled) == (0 if background else grown)
    assert 0 <= cache.n_ahead - grown <= 7 * N_RANGES if background else cache.n_ahead == 0
    cache.close()


def test_pages_of_the_first_wave_serve_the_second():
    """Eight sequences end, eight of other lengths begin: pages committed for them, by how pages are reclaimed."""
    rng = random.Random(5)
    waves = [[rng.randint(300, 600) for _ in range(N_SLOTS)] for _ in "ab"]
    committed = {}
    for reclaim in ("demand", "eager"):
        cache, _ = opened(background=False, reclaim=reclaim)
        for wave in waves:
            before, lengths = cache.n_waited, [0] * N_SLOTS
            for n in wave:
                lengths[cache.alloc(n)] = n
                cache.step(lengths)
            committed[reclaim] = cache.n_waited - before
            for slot in range(N_SLOTS):
                cache.free(slot)
        cache.close()
    assert committed["eager"] * PAGE == formula(waves[1])
    assert committed["demand"] <= 0.2 * committed["eager"]


# --- when something goes wrong --------------------------------------------------------------------------------------


class Failing:
    """Pages that fail at a commit, once; memory is a set."""

    def __init__(self, fails_at):
        self.pages, self.calls, self.fails_at = set(), 0, fails_at

    @property
    def committed_bytes(self):
        return PAGE * len(self.pages)

    def reserve(self, n_bytes, page_bytes, n_pages):
        pass

    def commit(self, start, n_bytes):
        self.calls += 1
        if self.calls == self.fails_at:
            raise OverBudget("none left", needed=n_bytes, available=0)
        new = set(range(start, start + n_bytes, PAGE))
        assert not new & self.pages
        self.pages |= new

    def release(self, start, n_bytes):
        old = set(range(start, start + n_bytes, PAGE))
        assert old <= self.pages
        self.pages -= old

    def close(self):
        self.pages.clear()


def test_a_failing_step_leaves_pages_as_they_were():
    cache, pages = opened(Failing(N_RANGES + 7), background=False)  # within the second slot's change
    with pytest.raises(OverBudget, match="none left"):
        cache.step([40, 40, 0, 0, 0, 0, 0, 0])
    assert pages.committed_bytes == formula([40])
    cache.step([40, 40, 0, 0, 0, 0, 0, 0])
    assert pages.committed_bytes == formula([40, 40])


def test_an_error_of_the_thread_is_that_of_the_next_step():
    cache, pages = opened(Failing(N_RANGES + 7))
    cache.step([32, 0, 0, 0, 0, 0, 0, 0])  # the thread maps the 33rd token's pages
    with pytest.raises(OverBudget, match="none left"):
        cache.step([33, 0, 0, 0, 0, 0, 0, 0])
    assert pages.committed_bytes == formula([32])
    cache.step([33, 0, 0, 0, 0, 0, 0, 0])
    assert cache.committed_bytes == formula([33])
    cache.close()


def test_the_thread_ends_with_the_cache():
    before = set(threading.enumerate())
    cache, pages = opened()
    cache.step([31] * N_SLOTS)
    (thread,) = set(threading.enumerate()) - before
    cache.close()
    assert not thread.is_alive()
    assert pages.committed_bytes == 0


class Full:
    """A mapping in a system that has no memory left."""

    def __init__(self):
        self.advice = []

    def madvise(self, *advice):
        self.advice.append(advice)
        if advice[0] != mmap.MADV_DONTNEED:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")


@needs_linux
def test_a_system_without_memory_is_named_and_keeps_none(monkeypatch):
    cache, pages = opened(background=False)
    cache.step([40, 0, 0, 0, 0, 0, 0, 0])
    full = Full()
    monkeypatch.setattr(pages, "_mapping", full)
    with pytest.raises(OverBudget, match=r"no 4\.0 KiB more for keys and values") as raised:
        cache.step([70, 0, 0, 0, 0, 0, 0, 0])
    (_, start, n_bytes), given_back = full.advice
    assert given_back == (mmap.MADV_DONTNEED, start, n_bytes)
    assert raised.value.needed == formula([40]) + PAGE
    assert cache.committed_bytes == formula([40])


LIMITED = """
import resource
from barefoot.core.errors import Incompatible
from barefoot.kv.placement.pages import HostPages, refusal_reason
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
try:
    HostPages().reserve(8 << 30, 4096, 1)
except Incompatible as error:
    print(error, error.cure, sep="|")
"""


@needs_linux
def test_a_limit_of_addresses_is_named():
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    message, _, cure = done.stdout.partition("|")
    assert "reserve 8.00 GiB of addresses" in message, done.stderr
    assert "may have 4.00 GiB of them (ulimit -v)" in message
    assert "lift that limit" in cure


def test_a_system_that_promises_strictly_is_named(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    (tmp_path / "overcommit").write_text("2\n")
    monkeypatch.setattr(host, "_OVERCOMMIT", tmp_path / "overcommit")
    monkeypatch.setattr(host, "map_private", refuse)
    with pytest.raises(Incompatible, match=r"vm\.overcommit_memory=2"):
        opened()


def test_a_system_that_takes_nothing_back_is_refused(monkeypatch):
    monkeypatch.setattr(host, "TAKES_BACK", False)
    with pytest.raises(Incompatible, match="does not take back"):
        opened()


def test_pages_that_the_system_does_not_have():
    with pytest.raises(InvalidInput, match=f"multiple of {mmap.PAGESIZE}"):
        opened(page_bytes=1000)


# --- the technique --------------------------------------------------------------------------------------------------


def test_the_pool_is_whole_groups_and_no_more_than_all_slots_take():
    geometry = Geometry(TENSORS, N_SLOTS, PAGE)
    assert VAttention().n_pages(geometry) * PAGE == STATIC
    assert VAttention(pool_bytes=1 << 40).n_pages(geometry) * PAGE == STATIC
    for pool in (GROUP, GROUP + 1, 7 * GROUP - 1, 50 * GROUP + 3 * PAGE):
        n_pages = VAttention(pool_bytes=pool).n_pages(geometry)
        assert n_pages == pool // GROUP * N_RANGES
        (term,) = VAttention(pool_bytes=pool).terms(TENSORS, N_SLOTS)
        assert term.bytes == n_pages * PAGE
    unequal = Geometry([VirtualTensor(2, 100, 128), VirtualTensor(4, 32, 128)], 1, PAGE)  # groups of 6, 2, 2, 2
    assert VAttention(pool_bytes=9 * PAGE).n_pages(unequal) == 8


def test_a_pool_too_small_for_one_token_is_refused():
    with pytest.raises(OverBudget, match=r"first pages of a sequence, 48\.0 KiB") as raised:
        VAttention(pool_bytes=GROUP - 1).terms(TENSORS, N_SLOTS)
    assert (raised.value.needed, raised.value.available) == (GROUP, GROUP - 1)


@pytest.mark.parametrize("knobs", [{"pool_bytes": 0}, {"page_bytes": 0}, {"look_ahead": -1}, {"reclaim": "never"}])
def test_knobs_outside_their_range(knobs):
    with pytest.raises(InvalidInput, match=next(iter(knobs))):
        VAttention(**knobs)
