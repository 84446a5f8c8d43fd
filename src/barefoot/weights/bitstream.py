"""Codes of any width in a row of bytes: bit j of code i is bit ``i * bits + j`` of the stream, low bits first.

The formats of the engine lay their codes out for its kernels (:mod:`barefoot.ops.payload`); a stream wastes nothing at
any width, and is what the methods that run in PyTorch store.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import CorruptFile, InvalidInput

MAX_BITS = 16


def n_bytes(n_codes: int, bits: int) -> int:
    """``ceil(n_codes * bits / 8)``"""
    return -(-n_codes * bits // 8)


def pack(codes: npt.ArrayLike, bits: int) -> npt.NDArray[np.uint8]:
    """Codes 0..2^bits - 1, in any shape, to ``n_bytes(size, bits)`` bytes.

    Raises
    ------
    InvalidInput : ``bits`` is not 1 to 16, or a code does not fit.
    """
    values = np.asarray(codes).reshape(-1)
    if not 1 <= bits <= MAX_BITS:
        raise InvalidInput(f"codes have 1 to {MAX_BITS} bits, got {bits}")
    if values.size and not 0 <= values.min() <= values.max() < 1 << bits:
        raise InvalidInput(f"codes of {bits} bits are 0 to {(1 << bits) - 1}, got {values.min()} to {values.max()}")
    pairs = values.astype("<u2").view(np.uint8).reshape(-1, 2)
    return np.packbits(np.unpackbits(pairs, axis=1, bitorder="little")[:, :bits].reshape(-1), bitorder="little")


def unpack(stream: npt.NDArray[np.uint8], bits: int, n_codes: int) -> npt.NDArray[np.uint16]:
    """The inverse of ``pack``.

    Raises
    ------
    CorruptFile : the stream is not as long as ``n_codes`` need.
    """
    if stream.size != n_bytes(n_codes, bits):
        raise CorruptFile(f"{n_codes} codes of {bits} bits take {n_bytes(n_codes, bits)} bytes, got {stream.size}")
    fields = np.unpackbits(stream, count=n_codes * bits, bitorder="little").reshape(n_codes, bits)
    padded = np.zeros((n_codes, MAX_BITS), np.uint8)
    padded[:, :bits] = fields
    return np.packbits(padded, axis=1, bitorder="little").view("<u2")[:, 0].astype(np.uint16)
