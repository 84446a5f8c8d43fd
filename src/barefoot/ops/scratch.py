"""Scratch bytes of the ops: closed forms that the planner, the callers and the kernels share.

The kernels lay out exactly these regions and refuse a shorter array; the numpy reference needs none.
"""

from __future__ import annotations

from barefoot.core.units import round_up
from barefoot.ops import threads

ALIGN = 64  # bytes; each region starts on a cache line
COLUMN_BLOCK = 1024  # columns of a weight tile that are unpacked at a time
ROW_TILE = 32  # rows of an unpacked int8 tile
FLOAT_ROW_TILE = 8  # rows of an unpacked float tile
LUT_TOKENS = 8  # up to so many tokens products are looked up
KEY_TILE = 64  # keys of one step of the online softmax
QUERY_TILE = 96  # queries (tokens × heads that share a key head) of one attention task
MAX_SPLITS = 16  # ranges of keys that a single token's attention is split into


def matmul_scratch_bytes(
    n_tokens: int, n_cols: int, activations: str = "int8", *, n_threads: int | None = None, looks_up: bool = False
) -> int:
    """Bytes that ``matmul`` needs for ``n_tokens`` inputs of ``n_cols``; ``n_threads`` None means the current number.

    int8: the quantized input (a byte each, one scale and two sums per 32, one sum per 16, 4 bytes each), and per thread
    a tile of 32 rows × up to 1,024 columns of codes (a byte each, scale and offset per 16). float32: for each thread
    8 rows × up to 1,024 columns of float32. ``looks_up``: any of the weights has the layout "lut"; up to 8
    tokens of int8 then also take their tables, 16 bytes for 4 inputs, and a scale and a sum per 32.
    """
    n_threads = threads.get() if n_threads is None else n_threads
    block = min(round_up(n_cols, 32), COLUMN_BLOCK)
    if activations == "float32":
        return ALIGN + n_threads * FLOAT_ROW_TILE * block * 4
    groups = -(-n_cols // 32)
    quantized = round_up(n_tokens * n_cols, ALIGN) + 3 * round_up(n_tokens * groups * 4, ALIGN)
    quantized += round_up(n_tokens * groups * 8, ALIGN)
    if looks_up and n_tokens <= LUT_TOKENS:
        quantized += round_up(4 * n_tokens * groups * 32, ALIGN) + 2 * round_up(n_tokens * groups * 4, ALIGN)
    return ALIGN + quantized + n_threads * ROW_TILE * (block + block // 16 * 8)


def plane_scratch_bytes(n_tokens: int, n_cols: int, activation_bits: int, group: int) -> int:
    """Bytes that ``plane_matmul`` needs, whatever the rows of the weight and the threads.

    The planes of the activations, 4 bytes for 32 columns each, and per group of columns a scale and a sum of 4 bytes.
    """
    planes = round_up(4 * n_tokens * activation_bits * -(-n_cols // 32), ALIGN)
    return ALIGN + planes + 2 * round_up(4 * n_tokens * -(-n_cols // group), ALIGN)


def attention_scratch_bytes(
    n_tokens: int, n_heads: int, n_kv_heads: int, head_dim: int, *, n_threads: int | None = None
) -> int:
    """Bytes that ``attention`` needs for ``n_tokens`` queries, whatever the number of keys.

    For each thread, float32: its queries and their outputs (up to 96, or the heads of one token that share a key head),
    a tile of 64 keys or values and another of transposed keys, scores, maxima and sums. A single token also holds up to
    16 partial outputs per head.
    """
    n_threads = threads.get() if n_threads is None else n_threads
    sharing = n_heads // n_kv_heads
    n_queries = min(max(1, QUERY_TILE // sharing), n_tokens) * sharing
    width = round_up(head_dim, 16)
    each = round_up(4 * (2 * n_queries * width + 2 * KEY_TILE * width + n_queries * KEY_TILE + 2 * n_queries), ALIGN)
    partial = round_up(4 * MAX_SPLITS * n_heads * (width + 2), ALIGN) if n_tokens == 1 else 0
    return ALIGN + n_threads * each + partial
