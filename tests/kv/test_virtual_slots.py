"""The addresses of growing sequences, and vAttention's slots against a plain model that writes down each page."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from barefoot.core.errors import InvalidInput
from barefoot.kv.placement.geometry import Geometry, VirtualTensor, layered, sliced
from barefoot.kv.placement.slots import PoolExhausted, Slots

PAGE = 4096

# --- geometry -------------------------------------------------------------------------------------------------------


def ceil(a, b):
    return -(-a // b)


@pytest.mark.parametrize("n_layers", [1, 3, 30])
@pytest.mark.parametrize(
    ("row", "page"), [(384, 4096), (40, 4096), (4096, 4096), (10_000, 4096), (384, 65536), (7, 64)]
)
def test_pages_are_the_papers_formula(n_layers, row, page):
    capacity = 300
    apart = Geometry(layered(n_layers, capacity, row), 2, page)
    together = Geometry(sliced(n_layers, capacity, row), 2, page)
    for n in range(capacity + 1):
        assert apart.n_pages(apart.groups(n)) == 2 * n_layers * ceil(n * row, page)
        assert together.n_pages(together.groups(n)) == 2 * ceil(n * n_layers * row, page)
    assert apart.groups(capacity + 50) == apart.n_groups
    assert apart.n_bytes == 2 * 2 * n_layers * ceil(capacity * row, page) * page
    if row <= page:  # a group is a page of each tensor
        assert apart.pages_of_groups() == [2 * n_layers] * ceil(capacity * row, page)


def test_slack_of_the_layouts_at_the_size_of_smollm2():
    """By hand: 30 layers, 3 heads of 64 channels of 2 bytes; one token."""
    for page, apart, together in ((4096, 240 << 10, 2 * 3 * 4096), (2 << 20, 120 << 20, 2 * (2 << 20))):
        for tensors, expected in ((layered(30, 2048, 384), apart), (sliced(30, 2048, 384), together)):
            geometry = Geometry(tensors, 8, page)
            assert geometry.n_pages(geometry.groups(1)) * page == expected


@st.composite
def geometries(draw):
    """Few tensors of unequal ranges, rows and rings, on small pages."""
    tensor = st.builds(VirtualTensor, st.integers(1, 3), st.integers(1, 40), st.integers(1, 90))
    return Geometry(draw(st.lists(tensor, min_size=1, max_size=4)), draw(st.integers(1, 5)), draw(st.integers(8, 64)))


def pages_of(geometry, slot, n_tokens):
    """The pages that a slot's first tokens touch, by walking over every row of every range."""
    memory = np.arange(geometry.n_bytes)
    found = set()
    for array in geometry.arrays(memory):
        touched = array[slot, :, :n_tokens]
        found |= set((touched // geometry.page_bytes).ravel().tolist())
    return found


@settings(max_examples=150, deadline=None)
@given(geometries(), st.data())
def test_spans_are_the_pages_of_the_rows(geometry, data):
    slot = data.draw(st.integers(0, geometry.n_slots - 1))
    n, more = (data.draw(st.integers(0, 45)) for _ in "ab")
    first, stop = sorted((geometry.groups(n), geometry.groups(more)))
    page, covered = geometry.page_bytes, []
    for start, n_bytes in geometry.spans(slot, first, stop):
        assert start % page == n_bytes % page == 0 < n_bytes
        covered += range(start // page, (start + n_bytes) // page)
    before, after = (pages_of(geometry, slot, tokens) for tokens in sorted((n, more)))
    assert len(covered) == len(set(covered))
    assert set(covered) == after - before
    assert geometry.n_pages(stop) == len(after)
    others = set().union(*(pages_of(geometry, s, 45) for s in range(geometry.n_slots) if s != slot))
    assert not others & set(covered)


def test_rows_that_fill_their_pages_give_contiguous_arrays():
    geometry = Geometry([VirtualTensor(3, 64, 128), VirtualTensor(2, 60, 100)], 4, PAGE)
    full, padded = geometry.arrays(np.zeros(geometry.n_bytes, np.uint8))
    assert full.shape == (4, 3, 64, 128)
    assert full.flags.c_contiguous
    assert padded.shape == (4, 2, 60, 100)
    assert padded.strides == (2 * 2 * PAGE, 2 * PAGE, 100, 1)


@pytest.mark.parametrize("sizes", [(0, 5, 5), (1, 0, 5), (1, 5, -1)])
def test_tensors_without_rows_are_refused(sizes):
    with pytest.raises(InvalidInput, match="at least 1"):
        VirtualTensor(*sizes)


# --- slots, against a plain model -----------------------------------------------------------------------------------


class Model:
    """Slots whose pages are written down one by one."""

    def __init__(self, geometry, n_pages, reclaim):
        self.slots = Slots(geometry, n_pages, reclaim=reclaim)
        self.geometry, self.n_pages, self.reclaim = geometry, n_pages, reclaim
        self.lengths = [0] * geometry.n_slots
        self.pages = [set() for _ in self.lengths]

    def needed(self, lengths):
        return [pages_of(self.geometry, slot, n) for slot, n in enumerate(lengths)]

    def total(self, pages):
        return sum(map(len, pages))

    def make(self, changes):
        """Commit what is not, give back what is, and never have more than the pool."""
        for change in changes:
            spans = self.geometry.spans(change.slot, change.first, change.stop)
            page = self.geometry.page_bytes
            pages = {p for start, size in spans for p in range(start // page, (start + size) // page)}
            assert pages
            if change.commit:
                assert not pages & self.pages[change.slot]
                self.pages[change.slot] |= pages
            else:
                assert pages <= self.pages[change.slot]
                self.pages[change.slot] -= pages
            assert self.total(self.pages) <= self.n_pages
            self.slots.apply(change)
        assert self.total(self.pages) == self.slots.n_committed

    def check_taken(self, changes, needed):
        """Only what was short was taken, no page that is needed, and of a slot only when those above had no more."""
        taken = [c for c in changes if not c.commit]
        assert changes[: len(taken)] == taken
        assert [c.slot for c in taken] == sorted((c.slot for c in taken), reverse=True)
        if not taken:
            return
        grown = sum(len(want - has) for want, has in zip(needed, self.pages, strict=True))
        free = self.n_pages - self.total(self.pages)
        group = self.geometry.pages_of_groups()
        n_taken = sum(sum(group[c.first : c.stop]) for c in taken)
        assert 0 <= free + n_taken - grown < group[taken[-1].first]
        for change in taken:
            assert change.first >= self.geometry.groups(self.asked[change.slot])
        for slot in range(taken[-1].slot + 1, len(self.pages)):
            left = [c.first for c in taken if c.slot == slot] or [self.slots.mapped[slot]]
            assert left[0] <= max(self.geometry.groups(self.asked[slot]), 0) or left[0] == 0

    def step(self, lengths):
        needed = self.needed(lengths)
        before = list(self.slots.mapped), list(self.slots.lengths)
        if self.total(needed) > self.n_pages:
            with pytest.raises(PoolExhausted) as raised:
                self.slots.step(lengths)
            assert raised.value.needed == self.total(needed) * self.geometry.page_bytes
            assert raised.value.available == self.n_pages * self.geometry.page_bytes
            assert "preempt" in raised.value.cure
            assert (self.slots.mapped, self.slots.lengths) == before
            return
        self.asked = lengths
        changes = self.slots.step(lengths)
        self.check_taken(changes, needed)
        self.make(changes)
        self.lengths = list(lengths)
        assert all(want <= has for want, has in zip(needed, self.pages, strict=True))

    def ahead(self):
        self.asked = [n + 1 if n else 0 for n in self.lengths]
        needed = self.needed(self.asked)
        changes = self.slots.ahead()
        had = list(self.slots.mapped)
        if self.total(needed) > self.n_pages:
            assert changes == []
            return
        further = self.needed([n + 9 if n else 0 for n in self.lengths])
        self.make(changes)
        assert all(want <= has for want, has in zip(needed, self.pages, strict=True))
        commits = [c for c in changes if c.commit]
        for change in commits:
            assert self.pages[change.slot] <= further[change.slot]
        next_one = sum(self.geometry.groups(n) > has for n, has in zip(self.asked, had, strict=True))
        assert len(commits) <= next_one + 2
        if not commits and changes:  # one group of an idle slot, not of the fullest
            (change,) = changes
            assert self.reclaim == "idle"
            assert change.stop - change.first == 1
            assert not self.lengths[change.slot]
            idle = [had[s] for s, n in enumerate(self.lengths) if not n]
            assert len([n for n in idle if n]) > 1
            assert max(self.slots.mapped[s] for s, n in enumerate(self.lengths) if not n) == max(idle)

    def alloc(self, n_tokens):
        idle = {s: self.slots.mapped[s] for s, n in enumerate(self.lengths) if not n}
        if not idle:
            with pytest.raises(InvalidInput, match="slots are taken"):
                self.slots.alloc(n_tokens)
            return
        slot = self.slots.alloc(n_tokens)
        need = self.geometry.groups(n_tokens)
        order = sorted(idle, key=lambda s: (idle[s] < need, idle[s] if idle[s] >= need else -idle[s], s))
        assert slot == order[0]
        self.lengths[slot] = n_tokens
        self.step(self.lengths)
        if self.slots.mapped[slot] < need:  # it could not start
            self.free(slot)

    def free(self, slot):
        self.lengths[slot] = 0
        self.make(self.slots.free(slot))
        if self.reclaim == "eager":
            assert not self.pages[slot]

    def trim(self):
        self.make(self.slots.trim())
        assert self.pages == self.needed(self.lengths)


@settings(max_examples=150, deadline=None)
@given(geometries(), st.sampled_from(["demand", "idle", "eager"]), st.data())
def test_slots_are_those_of_a_plain_model(geometry, reclaim, data):
    least = geometry.n_pages(1)
    n_pages = data.draw(st.integers(least, geometry.n_slots * geometry.n_pages(geometry.n_groups)))
    model = Model(geometry, n_pages, reclaim)
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["grow", "grow", "ahead", "alloc", "free", "set", "trim"]))
        if action == "grow":
            steps = data.draw(st.integers(1, 7))
            model.step([n + steps if n else 0 for n in model.lengths])
        elif action == "set":
            lengths = [data.draw(st.integers(0, 45)) for _ in model.lengths]
            model.step(lengths)
        elif action == "alloc":
            model.alloc(data.draw(st.integers(1, 45)))
        elif action == "free":
            model.free(data.draw(st.integers(0, geometry.n_slots - 1)))
        else:
            getattr(model, action)()
    model.step([0] * geometry.n_slots)
    model.trim()
    assert model.slots.n_committed == 0


def test_taken_from_the_highest_slot_and_no_more_than_is_short():
    """Six pages of one group each: slots 1 to 3 ended with two each; slot 0 needs three."""
    slots = Slots(Geometry([VirtualTensor(1, 64, 8)], 4, 64), 6)
    made(slots, slots.step([0, 16, 16, 16]))
    for slot in (1, 2, 3):
        assert slots.free(slot) == []
    made(slots, slots.step([24, 0, 0, 0]))
    assert slots.mapped == [3, 2, 1, 0]


def test_the_next_token_of_one_is_not_taken_for_another():
    slots = Slots(Geometry([VirtualTensor(1, 64, 8)], 2, 64), 4)
    made(slots, slots.step([8, 8]))
    made(slots, slots.ahead())
    assert slots.mapped == [2, 2]
    assert slots.ahead() == []


def test_looks_no_further_than_two_groups():
    """Eight tokens a page: all five slots will need another within nine tokens."""
    slots = Slots(Geometry([VirtualTensor(1, 640, 8)], 5, 64), 100)
    made(slots, slots.step([4, 3, 2, 1, 7]))
    made(slots, slots.ahead())
    assert slots.mapped == [2, 1, 1, 1, 2]  # at len + 2 the last one, at len + 5 the first
    made(slots, slots.ahead())
    assert slots.mapped == [2, 2, 2, 1, 2]


def test_every_next_token_gets_its_page_however_many():
    """Nothing is looked at beyond it, and five slots are at the end of a page."""
    slots = Slots(Geometry([VirtualTensor(1, 640, 8)], 5, 64), 100, look_ahead=0)
    made(slots, slots.step([8, 16, 0, 8, 24]))
    made(slots, slots.ahead())
    assert slots.mapped == [2, 3, 0, 2, 4]


def test_idle_slots_give_back_a_group_at_a_time_but_the_fullest():
    slots = Slots(Geometry([VirtualTensor(1, 640, 8)], 4, 64), 100, reclaim="idle")
    made(slots, slots.step([1, 16, 24, 16]))
    for slot in (1, 2, 3):
        assert slots.free(slot) == []
    seen = []
    for _ in range(6):
        made(slots, slots.ahead())
        seen.append(slots.mapped[1:])
    assert seen[1:] == [[2, 3, 1], [2, 3, 0], [1, 3, 0], [0, 3, 0], [0, 3, 0]]


def made(slots, changes):
    for change in changes:
        slots.apply(change)


@pytest.mark.parametrize("lengths", [[1], [1, 2, 3], [1, -1]])
def test_lengths_that_are_none_are_refused(lengths):
    with pytest.raises(InvalidInput, match="2 lengths"):
        Slots(Geometry([VirtualTensor(1, 64, 8)], 2, 64), 6).step(lengths)
