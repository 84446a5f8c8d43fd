"""KV row formats: how the ``head_dim`` numbers of one key or value head at one position are stored.

Groups of 32 elements; the last group of a head_dim that is not a multiple of 32 is shorter (g elements).

* ``f32``: head_dim × f32, the reference.
* ``f16``: head_dim × f16.
* ``q8``: per group: scale f16, then g signed bytes; x = scale * q, scale = f16(largest magnitude / 127).
* ``q4``, ``q3``, ``q2``: per group: scale f16, minimum f16, then codes of b bits; x = scale * q + minimum,
  scale = f16((maximum - minimum) / (2^b - 1)). Codes of 4 bits: g / 2 bytes, the low half of byte j is element j, the
  high half is element g / 2 + j. Of 2 bits: g / 4 bytes, bits 2i and 2i + 1 of byte j are element i * g / 4 + j. Of 3
  bits: the low two of each as above, then g / 8 bytes, bit i of byte j is the third of element 8j + i.
* ``bfp4``: block floating point: per group: exponent e, a byte, then g / 2 bytes as in q4 of q + 8; x = 2^(e - 127) * q
  with q in -7..7 (0 where e is 0), e - 127 = floor(log2 of the largest magnitude) - 2.

Codes are chosen after the scale was rounded to f16: q = rint(x * (1 / scale)), clipped to the range. A group that holds
NaN or infinity (or overflows f16) gets a NaN scale and zero codes (of bfp4: exponent 255), so it reads back as NaN.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput, unknown_name

GROUP = 32
_AFFINE = {"q4": 4, "q3": 3, "q2": 2}  # bits of codes above a minimum
_WHOLE = {"q4": 2, "q3": 8, "q2": 4, "bfp4": 2}  # head_dim is a multiple of this
FORMATS = ("f32", "f16", "q8", "q4", "q3", "q2", "bfp4")
INTEGERS = ("q8", *_AFFINE)  # one token's queries meet these as integers
BIAS, NOT_FINITE = 127, 255  # of bfp4's exponents


def whole(fmt: str) -> int:
    """What head_dim must be a multiple of."""
    return _WHOLE.get(fmt, 2)


def row_bytes(fmt: str, head_dim: int) -> int:
    """Bytes of one row of ``head_dim`` numbers, a multiple of ``whole(fmt)``."""
    if head_dim <= 0 or head_dim % whole(fmt):
        raise InvalidInput(f"head_dim must be a positive multiple of {whole(fmt)}, got {head_dim}")
    n_groups = -(-head_dim // GROUP)
    if fmt == "f32":
        return 4 * head_dim
    if fmt == "f16":
        return 2 * head_dim
    if fmt == "q8":
        return head_dim + 2 * n_groups
    if fmt in _AFFINE:
        return _AFFINE[fmt] * head_dim // 8 + 4 * n_groups
    if fmt == "bfp4":
        return head_dim // 2 + n_groups
    raise unknown_name("KV format", fmt, FORMATS)


def _groups(head_dim: int) -> list[slice]:
    return [slice(at, min(at + GROUP, head_dim)) for at in range(0, head_dim, GROUP)]


def _inverse(scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    usable = np.isfinite(scale) & (scale != 0)
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=usable)


def pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes (..., g) of 2, 3 or 4 bits to bytes (..., g * bits / 8)."""
    if bits == 3:
        high = np.packbits(codes >> 2, axis=-1, bitorder="little")
        return np.concatenate([pack_codes(codes & np.uint8(3), 2), high], axis=-1)
    share = 8 // bits
    parts = codes.reshape(*codes.shape[:-1], share, -1)
    out = np.zeros_like(parts[..., 0, :])
    for i in range(share):
        out |= parts[..., i, :] << np.uint8(bits * i)
    return out


def unpack_codes(packed: npt.NDArray[np.uint8], bits: int, n: int) -> npt.NDArray[np.uint8]:
    """Bytes (..., n * bits / 8) to codes (..., n): the opposite of :func:`pack_codes`."""
    if bits == 3:
        high = np.unpackbits(packed[..., n // 4 :], axis=-1, count=n, bitorder="little")
        return unpack_codes(packed[..., : n // 4], 2, n) | (high << np.uint8(2))
    mask = np.uint8(2**bits - 1)
    return np.concatenate([packed >> np.uint8(shift) & mask for shift in range(0, 8, bits)], axis=-1)


def encode(fmt: str, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """float32 (..., head_dim) to uint8 (..., row_bytes)."""
    head_dim = rows.shape[-1]
    n_bytes = row_bytes(fmt, head_dim)
    if fmt == "f32":
        return np.array(rows, np.float32, order="C").view(np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):
        if fmt == "f16":
            return np.ascontiguousarray(rows.astype(np.float16)).view(np.uint8)
        encode_group = _encode_float_block if fmt == "bfp4" else _encode_integers
        out = np.concatenate([part for g in _groups(head_dim) for part in encode_group(fmt, rows[..., g])], axis=-1)
    assert out.shape[-1] == n_bytes
    return out


def _encode_integers(fmt: str, x: npt.NDArray[np.float32]) -> list[npt.NDArray[np.uint8]]:
    finite = np.isfinite(x).all(axis=-1, keepdims=True)
    x = np.where(finite, x, np.float32(0))
    if fmt == "q8":
        low = np.zeros_like(x[..., :1])
        span, bottom, top = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127), -127, 127
    else:
        bottom, top = 0, 2 ** _AFFINE[fmt] - 1
        low16 = x.min(axis=-1, keepdims=True).astype(np.float16)
        low = low16.astype(np.float32)
        span = (x.max(axis=-1, keepdims=True) - x.min(axis=-1, keepdims=True)) / np.float32(top)
    scale = span.astype(np.float16)
    finite &= np.isfinite(scale) & np.isfinite(low)
    scale = np.where(finite, scale, np.float16(np.nan))
    steps = np.where(finite, (x - low) * _inverse(scale.astype(np.float32)), np.float32(0))
    codes = np.clip(np.rint(steps), bottom, top).astype(np.int8).view(np.uint8)
    if fmt == "q8":
        return [scale.view(np.uint8), codes]
    return [
        scale.view(np.uint8),
        np.where(finite, low16, np.float16(0)).view(np.uint8),
        pack_codes(codes, _AFFINE[fmt]),
    ]


def _encode_float_block(fmt: str, x: npt.NDArray[np.float32]) -> list[npt.NDArray[np.uint8]]:
    largest = np.abs(x).max(axis=-1, keepdims=True)
    finite = np.isfinite(largest)
    exponent = np.frexp(np.where(finite, largest, np.float32(1)))[1] - 3 + BIAS  # frexp's is of 0.5 to 1
    used = finite & (largest > 0) & (exponent > 0)
    step = np.ldexp(np.float32(1), np.where(used, exponent - BIAS, 0))
    codes = np.clip(np.rint(np.where(used, x, np.float32(0)) / step), -7, 7)
    stored = np.where(used, exponent, np.where(finite, 0, NOT_FINITE)).astype(np.uint8)
    return [stored, pack_codes((codes + 8).astype(np.uint8), 4)]


def decode(fmt: str, rows: npt.NDArray[np.uint8], head_dim: int) -> npt.NDArray[np.float32]:
    """uint8 (..., row_bytes) to float32 (..., head_dim)."""
    n_bytes = row_bytes(fmt, head_dim)
    if rows.shape[-1] != n_bytes:
        raise InvalidInput(f"{fmt} rows of {head_dim} numbers have {n_bytes} bytes, got {rows.shape[-1]}")
    rows = np.ascontiguousarray(rows)
    if fmt == "f32":
        return rows.view(np.float32)
    if fmt == "f16":
        return rows.view(np.float16).astype(np.float32)
    out = np.empty((*rows.shape[:-1], head_dim), np.float32)
    at = 0
    for group in _groups(head_dim):
        stop = at + row_bytes(fmt, group.stop - group.start)
        out[..., group] = _decode_group(fmt, rows[..., at:stop], group.stop - group.start)
        at = stop
    return out


def _decode_group(fmt: str, group: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.float32]:
    if fmt == "bfp4":
        exponent, codes = group[..., :1].astype(np.int32), unpack_codes(group[..., 1:], 4, size).astype(np.float32)
        step = np.ldexp(np.float32(1), np.minimum(exponent, NOT_FINITE - 1) - BIAS)
        step = np.where(exponent == NOT_FINITE, np.float32(np.nan), np.where(exponent == 0, np.float32(0), step))
        return np.asarray(step * (codes - np.float32(8)), np.float32)
    scale = np.ascontiguousarray(group[..., :2]).view(np.float16).astype(np.float32)
    if fmt == "q8":
        return np.asarray(scale * group[..., 2:].view(np.int8).astype(np.float32))
    low = np.ascontiguousarray(group[..., 2:4]).view(np.float16).astype(np.float32)
    return np.asarray(scale * unpack_codes(group[..., 4:], _AFFINE[fmt], size).astype(np.float32) + low)
