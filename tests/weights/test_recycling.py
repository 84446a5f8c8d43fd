"""Memory that is lent again: whose it is, and how much of it there is at any time."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")

from barefoot.weights.recycling import ALIGN, LEAST, Recycler, empty, product, recycled  # noqa: E402

FLOATS = torch.empty(0)


def numbers(n_bytes: int) -> torch.Tensor:
    return empty((n_bytes // 4,), FLOATS)


def test_memory_is_lent_again_when_nothing_refers_to_it():
    recycler = Recycler()
    with recycled(recycler):
        x = numbers(LEAST)
        at = x.data_ptr()
        view, array = x[4:].view(2, -1), x.numpy()
        del x
        assert (recycler.lent, recycler.left) == (LEAST, 0)
        del view
        assert (recycler.lent, recycler.left) == (LEAST, 0)
        del array
        assert (recycler.lent, recycler.left) == (0, LEAST)
        assert numbers(LEAST).data_ptr() == at
        assert numbers(2 * LEAST).data_ptr() != at
    assert at % ALIGN == 0


def test_no_more_is_held_than_was_lent_at_once():
    recycler, draw = Recycler(), random.Random(0)
    lent: list[torch.Tensor] = []
    expected, most = 0, 0
    with recycled(recycler):
        for _ in range(2000):
            if lent and draw.random() < 0.5:
                expected -= lent.pop(draw.randrange(len(lent))).numel() * 4
            else:
                size = LEAST * draw.choice((1, 2, 3, 5, 8))
                lent.append(numbers(size))
                expected += size
            most = max(most, expected)
            assert (recycler.lent, recycler.most) == (expected, most)
            assert 0 <= recycler.left <= most - expected
            held = sum(size * len(free) for size, free in recycler._left.items())
            assert held == recycler.left
        lent.clear()
        recycler.clear()
    assert (recycler.lent, recycler.left) == (0, 0)


def test_contents_are_each_ones_own():
    recycler, draw = Recycler(), random.Random(1)
    kept: dict[int, torch.Tensor] = {}
    with recycled(recycler):
        for i in range(500):
            if len(kept) > 8:
                at = draw.choice(list(kept))
                assert bool((kept.pop(at) == at).all())
            kept[i] = numbers(LEAST * draw.choice((1, 2))).fill_(i)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64])
def test_tensors_are_like_the_given_one(dtype):
    with recycled(Recycler()):
        x = empty((3, 17, 2048), torch.empty(0, dtype=dtype))
        assert (x.dtype, x.shape, x.is_contiguous()) == (dtype, (3, 17, 2048), True)
        x.fill_(2)
        assert not x._is_view()  # or gradients could not pass changes in place
        assert bool((x == 2).all())


def test_small_ones_and_those_outside_are_of_the_heap():
    recycler = Recycler()
    with recycled(recycler):
        numbers(LEAST - 4)
    numbers(LEAST)
    assert recycler.most == 0


def test_scopes_lie_within_each_other():
    outer, inner = Recycler(), Recycler()
    with recycled(outer):
        with recycled(inner):
            a = numbers(LEAST)
        with recycled(None):
            numbers(LEAST)
        b = numbers(2 * LEAST)
        assert (outer.lent, inner.lent) == (2 * LEAST, LEAST)
        del a, b
    assert (outer.left, inner.left) == (2 * LEAST, LEAST)


def test_products():
    torch.manual_seed(0)
    a, b = torch.randn(130, 70), torch.randn(70, 90)
    with recycled(Recycler()):
        assert torch.equal(product(a, b), a @ b)
        narrow = product(a.bfloat16(), b.bfloat16(), a)
        assert narrow.dtype == torch.float32
        assert torch.equal(narrow, (a.bfloat16() @ b.bfloat16()).float())
