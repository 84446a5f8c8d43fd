"""Parts: matrices stored otherwise than by rows of blocks, which are added to one another and to blocks.

A matrix may be a sum: few exact outliers beside coarse blocks, or a stack of residuals. Each addend that is not rows of
blocks is a *part* of some kind: bytes that describe a matrix [rows, cols] by themselves, of a size that may depend on
what they hold. The module of a kind documents its layout bit by bit and adds it here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import unknown_name

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PartKind:
    """One way of storing an addend.

    Attributes
    ----------
    decode : (rows, cols, data uint8) → the matrix, float32 (rows, cols).
    flaw : (rows, cols, data) → what is wrong with data, or None: a product reads whatever the data point at, so they
        are looked at before.
    scratch_bytes : (n_tokens, rows, cols, bytes of the data, n_threads) → bytes that a product needs.
    """

    name: str
    decode: Callable[[int, int, U8], F32]
    flaw: Callable[[int, int, U8], str | None]
    scratch_bytes: Callable[[int, int, int, int, int], int]


_KINDS: dict[str, PartKind] = {}


def add(kind: PartKind) -> PartKind:
    """Make a kind known; called by the module that defines it."""
    _KINDS[kind.name] = kind
    return kind


def names() -> tuple[str, ...]:
    return tuple(_KINDS)


def lookup(kind: str) -> PartKind:
    """The kind of that name; InvalidInput with the nearest names if there is none."""
    try:
        return _KINDS[kind]
    except KeyError:
        raise unknown_name("part kind", kind, _KINDS) from None
