"""KV row formats: how the ``head_dim`` numbers of one key or value head at one position are stored.

Groups of 32 elements; the last group of a head_dim that is not a multiple of 32 is shorter (g elements).

* ``f32``: head_dim × f32, the reference.
* ``f16``: head_dim × f16.
* ``q8``: per group: scale f16, then g signed bytes; x = scale * q, scale = f16(largest magnitude / 127).
* ``q4``: per group: scale f16, minimum f16, then g / 2 bytes: the low half of byte j is element j, the high half is
  element g / 2 + j; x = scale * q + minimum, scale = f16((maximum - minimum) / 15).

Codes are chosen after the scale was rounded to f16: q = rint(x * (1 / scale)), clipped to the range. A group that holds
NaN or infinity (or overflows f16) gets a NaN scale and zero codes, so it reads back as NaN.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import InvalidInput, unknown_name

GROUP = 32
FORMATS = ("f32", "f16", "q8", "q4")


def row_bytes(fmt: str, head_dim: int) -> int:
    """Bytes of one row of ``head_dim`` (even) numbers."""
    if head_dim <= 0 or head_dim % 2:
        raise InvalidInput(f"head_dim must be a positive even number, got {head_dim}")
    n_groups = -(-head_dim // GROUP)
    if fmt == "f32":
        return 4 * head_dim
    if fmt == "f16":
        return 2 * head_dim
    if fmt == "q8":
        return head_dim + 2 * n_groups
    if fmt == "q4":
        return head_dim // 2 + 4 * n_groups
    raise unknown_name("KV format", fmt, FORMATS)


def _groups(head_dim: int) -> list[slice]:
    return [slice(at, min(at + GROUP, head_dim)) for at in range(0, head_dim, GROUP)]


def _inverse(scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    usable = np.isfinite(scale) & (scale != 0)
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=usable)


def encode(fmt: str, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """float32 (..., head_dim) to uint8 (..., row_bytes)."""
    head_dim = rows.shape[-1]
    n_bytes = row_bytes(fmt, head_dim)
    if fmt == "f32":
        return np.array(rows, np.float32, order="C").view(np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):
        if fmt == "f16":
            return np.ascontiguousarray(rows.astype(np.float16)).view(np.uint8)
        parts: list[npt.NDArray[np.uint8]] = []
        for group in _groups(head_dim):
            x = rows[..., group]
            finite = np.isfinite(x).all(axis=-1, keepdims=True)
            x = np.where(finite, x, np.float32(0))
            if fmt == "q8":
                low = np.zeros_like(x[..., :1])
                span, top, bottom = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127), 127, -127
            else:
                low16 = x.min(axis=-1, keepdims=True).astype(np.float16)
                low = low16.astype(np.float32)
                span = (x.max(axis=-1, keepdims=True) - x.min(axis=-1, keepdims=True)) / np.float32(15)
                top, bottom = 15, 0
            scale = span.astype(np.float16)
            finite &= np.isfinite(scale) & np.isfinite(low)
            scale = np.where(finite, scale, np.float16(np.nan))
            steps = np.where(finite, (x - low) * _inverse(scale.astype(np.float32)), np.float32(0))
            codes = np.clip(np.rint(steps), bottom, top).astype(np.int8).view(np.uint8)
            parts.append(scale.view(np.uint8))
            if fmt == "q4":
                parts.append(np.where(finite, low16, np.float16(0)).view(np.uint8))
                half = codes.shape[-1] // 2
                codes = codes[..., :half] | (codes[..., half:] << np.uint8(4))
            parts.append(codes)
    out = np.concatenate(parts, axis=-1)
    assert out.shape[-1] == n_bytes
    return out


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
        size = group.stop - group.start
        scale = np.ascontiguousarray(rows[..., at : at + 2]).view(np.float16).astype(np.float32)
        if fmt == "q8":
            out[..., group] = scale * rows[..., at + 2 : at + 2 + size].view(np.int8).astype(np.float32)
            at += 2 + size
        else:
            low = np.ascontiguousarray(rows[..., at + 2 : at + 4]).view(np.float16).astype(np.float32)
            packed = rows[..., at + 4 : at + 4 + size // 2]
            codes = np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.float32)
            out[..., group] = scale * codes + low
            at += 4 + size // 2
    return out
