"""Products of two thin matrices beside a matrix: what an adapter adds to it, scale × B A, kept in its factors.

A [rank, cols] and B [rows, rank] are numbers of one dense type, f32, f16 or bf16 (the kinds ``lowrank_f32`` …). Columns
of A and rows of B are filled up with zeros to whole sixteens, so that vectors of them can be read whole::

    bytes 0-3    scale, f32; then zeros up to byte 64
    A            rank rows of cols numbers, filled up
    B            panels of 16 of its rows: for each rank 16 numbers, one of each row

so 64 + size × rank × (cols' + rows') bytes, from which the rank follows. Little-endian. Example: [19, 20] of rank 2 in
f16 has 32 columns and 2 panels, 64 + 2 × 2 × (32 + 32) = 320 bytes; B[18, 1] is in panel 1, at byte
64 + 2 × (2 × 32 + (1 × 2 + 1) × 16 + 2).

The scale stands by itself, so that numbers are the file's own: rounding B times the scale anew would not be.

A product is taken in float32, scale × (x Aᵀ) first. A sum's order depends neither on threads nor on the number of
tokens. Scratch are rank numbers a token: of all tokens up to 15, of 16 for each thread from 16 tokens on.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput
from barefoot.core.units import round_up
from barefoot.ops import blocks, parts
from barefoot.ops.scratch import ALIGN

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

TYPES = ("f32", "f16", "bf16")
HEADER_BYTES = 64
FILL = 16  # numbers that rows are filled up to a multiple of
TOKENS = 16  # that meet the factors together, where there are as many


def kind(type_id: str) -> str:
    """The kind of parts whose numbers are of that type."""
    return f"lowrank_{type_id}"


def number_bytes(kind: str) -> int:
    """Bytes of a number of that kind of parts."""
    return blocks.block_bytes(kind.removeprefix("lowrank_"))


def n_numbers(kind: str, size: int) -> int:
    """Numbers that a part of ``size`` bytes holds, those included that fill rows up."""
    return (size - HEADER_BYTES) // number_bytes(kind)


def n_bytes(type_id: str, rows: int, cols: int, rank: int) -> int:
    """Bytes of factors of a matrix [rows, cols]."""
    return HEADER_BYTES + rank * _rank_bytes(type_id, rows, cols)


def _rank_bytes(type_id: str, rows: int, cols: int) -> int:
    return blocks.block_bytes(type_id) * (round_up(rows, FILL) + round_up(cols, FILL))


def rank_of(type_id: str, rows: int, cols: int, size: int) -> int | None:
    """The rank of a part of ``size`` bytes; None if it can't be one."""
    rank, rest = divmod(size - HEADER_BYTES, _rank_bytes(type_id, rows, cols))
    return rank if rank >= 1 and not rest else None


def encode(type_id: str, a: F32, b: F32, scale: float) -> U8:
    """The part scale × B A of A (rank, cols) and B (rows, rank), whose numbers are rounded to the type."""
    data = np.zeros(n_bytes(type_id, len(b), a.shape[1], len(a)), np.uint8)
    encode_into(data, type_id, a, b, scale)
    return data


def encode_into(data: U8, type_id: str, a: F32, b: F32, scale: float) -> None:
    """The same into ``data``, uint8 of as many zeros."""
    (rank, cols), rows, size = a.shape, len(b), blocks.block_bytes(type_id)
    data[:4] = np.array([scale], "<f4").view(np.uint8)
    of_a, of_b = _factors(type_id, rows, cols, data)
    of_a[:, : cols * size] = blocks.encode(type_id, a)
    encoded = blocks.encode(type_id, b).reshape(rows, rank, size)
    whole = rows // FILL
    of_b[:whole] = encoded[: whole * FILL].reshape(whole, FILL, rank, size).swapaxes(1, 2)
    of_b[whole:, :, : rows % FILL] = encoded[whole * FILL :].swapaxes(0, 1)


def factors(type_id: str, rows: int, cols: int, data: U8) -> tuple[F32, F32, float]:
    """A (rank, cols), B (rows, rank) and the scale of a part."""
    a, b = _factors(type_id, rows, cols, data)
    by_row = np.ascontiguousarray(b.swapaxes(1, 2)).reshape(round_up(rows, FILL), -1)
    found = blocks.decode(type_id, a, round_up(cols, FILL))[:, :cols], blocks.decode(type_id, by_row, len(a))[:rows]
    return *found, float(data[:4].view("<f4")[0])


def _factors(type_id: str, rows: int, cols: int, data: U8) -> tuple[U8, U8]:
    """The bytes of A (rank, bytes of a row), and of B (panels, rank, rows of a panel, bytes of a number)."""
    rank, size = rank_of(type_id, rows, cols, data.size), blocks.block_bytes(type_id)
    assert rank is not None
    a_bytes = rank * size * round_up(cols, FILL)
    numbers = data[HEADER_BYTES:]
    return numbers[:a_bytes].reshape(rank, -1), numbers[a_bytes:].reshape(-1, rank, FILL, size)


def _decode(type_id: str, rows: int, cols: int, data: U8) -> F32:
    wrong = _flaw(type_id, rows, cols, data)
    if wrong:
        raise InvalidInput(f"{kind(type_id)} [{rows}, {cols}]: {wrong}")
    a, b, scale = factors(type_id, rows, cols, data)
    dense: F32 = (scale * (b.astype(np.float64) @ a)).astype(np.float32)
    return dense


def _flaw(type_id: str, rows: int, cols: int, data: U8) -> str | None:
    data = np.ascontiguousarray(data).reshape(-1)
    if rank_of(type_id, rows, cols, data.size) is None:
        return "bytes of no rank"
    numbers = blocks.decode(
        type_id, data[None, HEADER_BYTES:], (data.size - HEADER_BYTES) // blocks.block_bytes(type_id)
    )
    finite = math.isfinite(data[:4].view("<f4")[0]) and np.isfinite(numbers).all()
    return None if finite else "NaN or infinity"


def _scratch_bytes(type_id: str, n_tokens: int, rows: int, cols: int, size: int, n_threads: int) -> int:
    rank = rank_of(type_id, rows, cols, size) or 0
    return ALIGN + 4 * rank * (n_tokens if n_tokens < TOKENS else n_threads * TOKENS)


for _type in TYPES:
    parts.add(
        parts.PartKind(
            kind(_type),
            functools.partial(_decode, _type),
            functools.partial(_flaw, _type),
            functools.partial(_scratch_bytes, _type),
        )
    )
