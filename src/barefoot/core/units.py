"""Bytes, counts and how they are printed. 1 MB = 10^6 bytes, 1 MiB = 2^20 bytes; a bare number is bytes."""

from __future__ import annotations

import re
from fractions import Fraction

from barefoot.core.errors import InvalidInput

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_BYTE_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": TIB,
}
_COUNT_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def _parse(text: str, units: dict[str, int], what: str, example: str) -> int:
    match = _NUMBER.fullmatch(text.strip())
    unit = match.group(2).upper() if match else ""
    if match is None or unit not in units:
        raise InvalidInput(f"{text!r} is not {what}", cure=f"write it as {example}")
    value = Fraction(match.group(1)) * units[unit]
    if value.denominator != 1 and units[unit] == 1:
        raise InvalidInput(f"{text!r} is not a whole number of {what}", cure=f"write it as {example}")
    return int(value)


def parse_bytes(text: str) -> int:
    """Bytes in ``"128MiB"``, ``"1.5GB"``, ``"4096"``; fractions of a unit are rounded down to whole bytes.

    Raises
    ------
    InvalidInput : not a number with a known unit (B KB MB GB TB KiB MiB GiB TiB), negative, or a fraction of a byte.
    """
    return _parse(text, _BYTE_UNITS, "a size in bytes", "128MiB, 1.5GB or 4096")


def parse_count(text: str) -> int:
    """A count of tokens such as ``"1024"``, ``"32k"`` (32 × 1,024) or ``"1M"`` (2^20), as context lengths are named."""
    return _parse(text, _COUNT_UNITS, "a count", "1024, 32k or 1M")


def format_bytes(n: int) -> str:
    """``n`` bytes in binary units: ``"92.1 MiB"``, ``"512 B"``, ``"-1.5 KiB"``."""
    size = abs(n)
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= factor:
            return f"{n / factor:,.{2 if factor >= GIB else 1}f} {unit}"
    return f"{n} B"


def flag_bytes(n: int) -> str:
    """The shortest spelling of at least ``n`` bytes that ``parse_bytes`` reads back: whole MiB, rounded up."""
    return f"{-(-n // MIB)}MiB"


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``n``."""
    return -(-n // multiple) * multiple
