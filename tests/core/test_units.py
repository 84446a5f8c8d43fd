import pytest

from barefoot.core.errors import InvalidInput
from barefoot.core.units import flag_bytes, format_bytes, parse_bytes, parse_count, round_up


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("128MiB", 134_217_728),
        ("1.5GB", 1_500_000_000),
        ("1.5GiB", 1_610_612_736),
        ("4096", 4096),
        (" 2 kb ", 2000),
        ("0.1KiB", 102),
        ("7B", 7),
        ("3TiB", 3 * 2**40),
    ],
)
def test_bytes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MiB", "-1MiB", "1.5", "1e9", "12 QB", "1,000", "0x10", "1MiB2", "١MiB", "nan"])
def test_bad_bytes_are_refused_with_an_example(text):
    with pytest.raises(InvalidInput) as error:
        parse_bytes(text)
    assert "128MiB" in str(error.value.cure)


@pytest.mark.parametrize(("text", "expected"), [("1024", 1024), ("32k", 32_768), ("1M", 1_048_576), ("0.5k", 512)])
def test_counts(text, expected):
    assert parse_count(text) == expected


def test_printing():
    assert format_bytes(0) == "0 B"
    assert format_bytes(1023) == "1023 B"
    assert format_bytes(98_362_432) == "93.8 MiB"
    assert format_bytes(-1536) == "-1.5 KiB"
    assert format_bytes(1_610_612_736) == "1.50 GiB"


def test_a_flag_reads_back_as_at_least_as_much():
    for n in (1, 2**20, 2**20 + 1, 123_456_789):
        assert n <= parse_bytes(flag_bytes(n)) < n + 2**20


def test_round_up():
    assert [round_up(n, 64) for n in (0, 1, 64, 65)] == [0, 64, 64, 128]
