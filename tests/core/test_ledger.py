import pytest

from barefoot.core.ledger import Footprint, Term, entry
from barefoot.core.lifetimes import Buffer, arrange, live_peak


def job() -> Footprint:
    return (
        entry("model", "weights", [Term("codes", 10, 16), Term("scales", 10, 2)], phases=["load", "prefill", "decode"])
        + entry("loader", "workspace", [Term("staging", 1, 500)], phases=["load"])
        + entry("runner", "activations", [Term("x", 64, 8)], phases=["prefill"])
        + entry("runner", "activations", [Term("x", 1, 8)], phases=["decode"])
        + entry("model", "weights", [Term("copy", 1, 9999)], phases=["decode"], place="disk")
    )


def test_peak_is_the_largest_phase_not_the_sum():
    assert job().peak("host") == ("prefill", 180 + 512)
    assert job().select(place="host").bytes == 180 + 500 + 512 + 8


def test_places_are_kept_apart():
    assert job().peak("disk") == ("decode", 9999)
    assert job().peak("accelerator")[1] == 0


def test_by_kind_is_of_the_peak_phase_unless_told():
    assert job().by_kind() == {"weights": 180, "activations": 512}
    assert job().by_kind(phase="load") == {"weights": 180, "workspace": 500}


def test_phases_come_in_the_order_of_a_job():
    assert job().phases == ("load", "prefill", "decode")


def test_an_empty_footprint_has_no_peak():
    assert Footprint().peak() == (None, 0)


@pytest.mark.parametrize(("count", "size"), [(-1, 2), (1, -2), (1.5, 2), (1, 0.5)])
def test_terms_are_whole_and_not_negative(count, size):
    with pytest.raises(ValueError, match="non-negative int"):
        Term("bad", count, size)


def test_json_has_every_term():
    codes = job().to_json()[0]
    assert codes["bytes"] == sum(count * size for _, count, size in codes["terms"]) == 180


def test_arrangement_reuses_memory_and_never_overlaps():
    buffers = [Buffer("a", 1000, 0, 1), Buffer("b", 1000, 2, 3), Buffer("c", 500, 1, 2), Buffer("d", 64, 0, 3)]
    placed = arrange(buffers)
    for one in buffers:
        for other in buffers:
            if one is not other and one.overlaps(other):
                a, b = placed.offsets[one.name], placed.offsets[other.name]
                assert a + one.bytes <= b or b + other.bytes <= a
    assert placed.bytes == live_peak(buffers) == 1024 + 512 + 64


def test_arrangement_of_random_lifetimes_is_sound_and_bounded():
    import random

    rng = random.Random(7)
    for _ in range(200):
        buffers = []
        for i in range(rng.randint(1, 14)):
            start = rng.randint(0, 9)
            buffers.append(Buffer(f"b{i}", rng.randint(1, 5000), start, rng.randint(start, 9)))
        placed = arrange(buffers)
        cells: dict[tuple[int, int], str] = {}
        for b in buffers:
            offset = placed.offsets[b.name]
            assert offset % 64 == 0
            assert offset + b.bytes <= placed.bytes
            for step in range(b.start, b.end + 1):
                for line in range(offset // 64, -(-(offset + b.bytes) // 64)):
                    assert cells.setdefault((step, line), b.name) == b.name
        assert placed.bytes >= live_peak(buffers)
