"""The cases that tests and benchmarks of the ops share: shapes that are odd on purpose, and data to fill them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from barefoot.ops import blocks, kvrows, reference

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class MatmulCase:
    """One product: ``n_tokens`` inputs of ``cols`` numbers with a weight [rows, cols]."""

    format: str
    rows: int
    cols: int
    n_tokens: int


def _columns(format_id: str) -> tuple[int, int]:
    """One block, and more than one tile of 1,024 columns with a partial last tile."""
    elements = blocks.block_elements(format_id)
    return (7, 1331) if elements == 1 else (elements, 1024 + 2 * max(elements, 64))


#: Rows below, at and beyond tiles of 4, 8 and 32; tokens for both the few-token and the tile kernels, with remainders.
MATMUL = tuple(
    MatmulCase(name, rows, cols, n_tokens)
    for name in blocks.names()
    for cols in _columns(name)
    for rows, n_tokens in ((1, 1), (37, 3), (66, 1), (33, 5), (3, 19))
)


@dataclass(frozen=True)
class AttentionCase:
    """Queries at positions n_past .. n_past + n_tokens - 1 over a store of ``capacity`` slots."""

    format: str
    n_heads: int
    n_kv_heads: int
    head_dim: int
    capacity: int
    n_past: int
    n_tokens: int
    window: int = 0
    softcap: float = 0.0


_HEADS = ((9, 3, 64), (4, 1, 256), (8, 8, 80), (32, 8, 96), (2, 1, 128), (4, 2, 34), (34, 1, 16))
_RANGES = (
    # capacity, n_past, n_tokens, window, softcap
    (1, 0, 1, 0, 0.0),
    (200, 0, 70, 0, 0.0),
    (200, 100, 33, 0, 5.0),
    (1500, 1400, 1, 0, 0.0),  # several ranges of keys
    (64, 300, 1, 40, 0.0),  # a ring that has wrapped
    (100, 300, 61, 40, 2.0),
    (10, 0, 10, 3, 0.0),
)
ATTENTION = tuple(
    AttentionCase(fmt, *heads, capacity, n_past, n_tokens, window, softcap)
    for fmt, heads, (capacity, n_past, n_tokens, window, softcap) in product(kvrows.FORMATS, _HEADS, _RANGES)
    if heads[2] % kvrows.whole(fmt) == 0
)

_F16_AT = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,),
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
    "tq2_0": (64,), "tq1_0": (52,),
}  # fmt: skip


def random_packed(format_id: str, rows: int, cols: int, rng: np.random.Generator) -> U8:
    """Rows uint8 (rows, row_bytes): all codes random, the f16 scales of GGUF blocks of either sign and finite."""
    if format_id.startswith("bilevel"):
        raw = rng.integers(0, 256, (rows, blocks.row_bytes(format_id, cols)), dtype=np.uint8)
        raw.reshape(-1, blocks.block_bytes(format_id))[:, 0] %= 128  # of d: up to 1 / 128
        return raw
    if format_id not in _F16_AT:
        return blocks.encode(format_id, rng.standard_normal((rows, cols)).astype(np.float32))
    n_blocks = rows * cols // blocks.block_elements(format_id)
    raw = rng.integers(0, 256, (n_blocks, blocks.block_bytes(format_id)), dtype=np.uint8)
    for at in _F16_AT[format_id]:
        raw[:, at : at + 2] = (0.1 * rng.standard_normal((n_blocks, 1))).astype(np.float16).view(np.uint8)
    return raw.reshape(rows, blocks.row_bytes(format_id, cols))


def filled_store(case: AttentionCase, rng: np.random.Generator) -> tuple[U8, U8]:
    """K and V buffers that hold the last ``capacity`` of the case's positions, written by the reference."""
    n_positions = case.n_past + case.n_tokens
    first = max(0, n_positions - case.capacity)
    shape = (case.n_kv_heads, case.capacity, kvrows.row_bytes(case.format, case.head_dim))
    k_buf, v_buf = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    k, v = (
        rng.standard_normal((n_positions - first, case.n_kv_heads * case.head_dim)).astype(np.float32) for _ in range(2)
    )
    reference.kv_append(k, v, k_buf, v_buf, case.format, case.capacity, first)
    return k_buf, v_buf
