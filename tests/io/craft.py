"""GGUF and safetensors files byte by byte, so that each field can be made wrong on purpose."""

from __future__ import annotations

import json
import struct
from typing import Any


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, code: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", code) + payload


def tensor(name: str, axes: tuple[int, ...], code: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, code, offset)


def gguf_file(
    pairs: list[bytes],
    tensors: list[bytes],
    data: bytes,
    *,
    version: int = 3,
    alignment: int = 32,
    magic: bytes = b"GGUF",
) -> bytes:
    head = magic + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + data


def safetensors_file(header: Any, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data
