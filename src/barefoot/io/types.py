"""Storage types of model files, and what a header says about one tensor.

The table is the one place for the sizes of stored types: a type is blocks of ``n_elements`` values in ``n_bytes``
bytes, laid along the last axis. GGUF ids are those of ggml's ``ggml_type``; safetensors names those of its format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from barefoot.core.errors import CorruptFile


@dataclass(frozen=True)
class FileType:
    """``n_elements`` values in ``n_bytes`` bytes; the codes of the type in the two containers, where it has one."""

    id: str
    n_elements: int
    n_bytes: int
    gguf: int | None = None
    safetensors: str | None = None


FILE_TYPES: dict[str, FileType] = {
    t.id: t
    for t in (
        FileType("f32", 1, 4, 0, "F32"),
        FileType("f16", 1, 2, 1, "F16"),
        FileType("bf16", 1, 2, 30, "BF16"),
        FileType("q4_0", 32, 18, 2),
        FileType("q4_1", 32, 20, 3),
        FileType("q5_0", 32, 22, 6),
        FileType("q5_1", 32, 24, 7),
        FileType("q8_0", 32, 34, 8),
        FileType("q2_k", 256, 84, 10),
        FileType("q3_k", 256, 110, 11),
        FileType("q4_k", 256, 144, 12),
        FileType("q5_k", 256, 176, 13),
        FileType("q6_k", 256, 210, 14),
        FileType("tq1_0", 256, 54, 34),
        FileType("tq2_0", 256, 66, 35),
        FileType("f64", 1, 8, 28, "F64"),
        FileType("i8", 1, 1, 24, "I8"),
        FileType("i16", 1, 2, 25, "I16"),
        FileType("i32", 1, 4, 26, "I32"),
        FileType("i64", 1, 8, 27, "I64"),
        FileType("u8", 1, 1, None, "U8"),
        FileType("u16", 1, 2, None, "U16"),
        FileType("u32", 1, 4, None, "U32"),
        FileType("u64", 1, 8, None, "U64"),
        FileType("bool", 1, 1, None, "BOOL"),
        FileType("f8_e4m3", 1, 1, None, "F8_E4M3"),
        FileType("f8_e5m2", 1, 1, None, "F8_E5M2"),
    )
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: ``type`` is a key of ``FILE_TYPES``, ``shape`` in numpy order (last axis contiguous),
    ``offset`` and ``n_bytes`` in bytes from the start of the file, ``shard`` the index of that file in the model."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int
    shard: int = 0

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_rows(self) -> int:
        """Rows along all axes but the last; 1 for vectors and scalars."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.n_bytes // self.n_rows if self.n_rows else 0


def stored_bytes(file_type: FileType, shape: tuple[int, ...], name: str) -> int:
    """Bytes of a tensor of that type and shape (numpy order).

    Raises
    ------
    CorruptFile : the last axis does not hold whole blocks.
    """
    n_cols = shape[-1] if shape else 1
    if n_cols % file_type.n_elements:
        raise CorruptFile(
            f"tensor {name!r}: rows of {n_cols} values are not whole {file_type.id} blocks of {file_type.n_elements}"
        )
    return math.prod(shape) // file_type.n_elements * file_type.n_bytes


def refuse_overlap(tensors: tuple[TensorInfo, ...]) -> None:
    """Raise CorruptFile when two tensors of one file share bytes; gaps between them are padding."""
    end, last = 0, ""
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.n_bytes)):
        if tensor.n_bytes and tensor.offset < end:
            raise CorruptFile(f"tensors {last!r} and {tensor.name!r} overlap at byte {tensor.offset}")
        if tensor.n_bytes:
            end, last = tensor.offset + tensor.n_bytes, tensor.name
