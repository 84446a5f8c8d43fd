"""Numbers that files say: checked before they are used for anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from barefoot.core.errors import CorruptFile


def count(header: Mapping[str, Any], name: str, most: int) -> int:
    """A number of a header, 0 to ``most``.

    Raises
    ------
    CorruptFile : it is none.
    """
    value = header.get(name)
    if type(value) is not int or not 0 <= value <= most:
        raise CorruptFile(f"{name} must be 0 to {most}, got {value!r}")
    return value


def counts(header: Mapping[str, Any], name: str, n: int, most: int | Iterable[int]) -> list[int]:
    """``n`` numbers of a header, each 0 to ``most``.

    Raises
    ------
    CorruptFile : they are others.
    """
    values = header.get(name)
    limits = [most] * n if isinstance(most, int) else list(most)
    if not isinstance(values, list) or len(values) != n:
        raise CorruptFile(f"{name} must be {n} numbers")
    for value, limit in zip(values, limits, strict=True):
        if type(value) is not int or not 0 <= value <= limit:
            raise CorruptFile(f"{name} must be 0 to {limit}, got {value!r}")
    return values


def numbers(header: Mapping[str, Any], name: str, shape: tuple[int, int]) -> list[list[float]]:
    """Finite numbers of a header, in rows.

    Raises
    ------
    CorruptFile : they are others.
    """
    rows: Any = header.get(name)
    fits = isinstance(rows, list) and len(rows) == shape[0]
    if not fits or not all(isinstance(row, list) and len(row) == shape[1] for row in rows):
        raise CorruptFile(f"{name} must be {shape[0]} rows of {shape[1]} numbers")
    if not all(type(x) in (int, float) and math.isfinite(x) for row in rows for x in row):
        raise CorruptFile(f"{name} must be finite numbers")
    found: list[list[float]] = rows
    return found
