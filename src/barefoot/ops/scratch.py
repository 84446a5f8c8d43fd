"""Scratch bytes of the ops: closed forms that the planner, the callers and the kernels share.

The kernels lay out exactly these regions and refuse a shorter array; the numpy reference needs none.
"""

from __future__ import annotations

from collections.abc import Iterable

from barefoot.core.units import round_up
from barefoot.ops import threads

ALIGN = 64  # bytes; each region starts on a cache line
COLUMN_BLOCK = 1024  # columns of a weight tile that are unpacked at a time
ROW_TILE = 32  # rows of an unpacked int8 tile
FLOAT_ROW_TILE = 8  # rows of an unpacked float tile
LUT_TOKENS = 8  # up to so many tokens products are looked up
BFLOAT16_TOKENS = 24  # from so many tokens on products are taken in bfloat16 where the processor has tiles
BFLOAT16_COLUMNS = 256  # columns of bfloat16 weights that are held at a time
BFLOAT16_BLOCK = 128  # tokens whose sums are held at a time
SIGN_TOKENS = 6  # up to so many tokens meet the sign bits themselves
SIGN_GROUP = 128  # columns whose rounded products share a scale
SIGN_COLUMNS = 256  # of the decoded weights of a stack that are held at a time
KEY_TILE = 64  # keys of one step of the online softmax
QUERY_TILE = 96  # queries (tokens × heads that share a key head) of one attention task
BFLOAT16_QUERIES = 32  # queries that attention in bfloat16 multiplies at a time
MAX_SPLITS = 16  # ranges of keys that a single token's attention is split into


def matmul_scratch_bytes(
    n_tokens: int, n_cols: int, activations: str = "int8", *, n_threads: int | None = None, looks_up: bool = False
) -> int:
    """Bytes that ``matmul`` needs for ``n_tokens`` inputs of ``n_cols``; ``n_threads`` None means the current number.

    int8: the quantized input (a byte each, one scale and two sums per 32, one sum per 16, 4 bytes each), and per thread
    a tile of 32 rows × up to 1,024 columns of codes (a byte each, scale and offset per 16). From 24 tokens on either is
    at least what bfloat16 takes (whether or not the processor has tiles): 2 bytes for each input of a multiple of 16
    tokens, and per thread 32 rows × up to 256 columns of codes and of bfloat16 and × up to 128 tokens, a multiple of
    16, of float32. ``looks_up``: any of the weights has the layout "lut"; up to 8 tokens of int8 then also take their
    tables, 16 bytes for 4 inputs, and a scale and a sum per 32. float32: for each thread 8 rows × up to 1,024 columns
    of float32.
    """
    n_threads = threads.get() if n_threads is None else n_threads
    block = min(round_up(n_cols, 32), COLUMN_BLOCK)
    if activations == "float32":
        return ALIGN + n_threads * FLOAT_ROW_TILE * block * 4
    groups = -(-n_cols // 32)
    quantized = round_up(n_tokens * n_cols, ALIGN) + 3 * round_up(n_tokens * groups * 4, ALIGN)
    quantized += round_up(n_tokens * groups * 8, ALIGN)
    tile = block + block // 16 * 8
    if n_tokens >= BFLOAT16_TOKENS:
        quantized = max(quantized, round_up(n_tokens, 16) * groups * 32 * 2)
        width = min(block, BFLOAT16_COLUMNS)
        tile = max(tile, width + width // 16 * 8 + 2 * width + 4 * min(round_up(n_tokens, 16), BFLOAT16_BLOCK))
    if looks_up and n_tokens <= LUT_TOKENS:
        quantized += round_up(4 * n_tokens * groups * 32, ALIGN) + 2 * round_up(n_tokens * groups * 4, ALIGN)
    return ALIGN + quantized + n_threads * ROW_TILE * tile


def plane_scratch_bytes(n_tokens: int, n_cols: int, activation_bits: int, group: int) -> int:
    """Bytes that ``plane_matmul`` needs, whatever the rows of the weight and the threads.

    The planes of the activations, 4 bytes for 32 columns each, and per group of columns a scale and a sum of 4 bytes.
    """
    planes = round_up(4 * n_tokens * activation_bits * -(-n_cols // 32), ALIGN)
    return ALIGN + planes + 2 * round_up(4 * n_tokens * -(-n_cols // group), ALIGN)


def sign_scratch_bytes(
    n_tokens: int,
    n_cols: int,
    rank: int,
    n_blocks: int,
    activations: str = "int8",
    *,
    n_threads: int | None = None,
) -> int:
    """Bytes that ``sign_matmul`` needs with a stack of ``n_blocks`` blocks, whatever its rows.

    Up to 6 tokens of int8: for each block and rank one token's rounded products, a byte each and 8 bytes for 128. Else
    for each thread 32 rows × 256 columns of decoded weights, factors of those rows and columns, 4 bytes each; and from
    24 tokens of int8 on (whether or not the processor has tiles) 2 bytes for each of these weights, 4 for 32 rows × up
    to 128 tokens, a multiple of 16, and, once, 2 for each input of a multiple of 16 tokens.
    """
    n_threads = threads.get() if n_threads is None else n_threads
    if activations == "int8" and n_tokens <= SIGN_TOKENS:
        groups = n_blocks * rank * -(-n_cols // SIGN_GROUP)
        return ALIGN + groups * SIGN_GROUP + 2 * round_up(4 * groups, ALIGN)
    tile = 4 * (ROW_TILE * (SIGN_COLUMNS + rank) + rank * SIGN_COLUMNS)
    if activations != "int8" or n_tokens < BFLOAT16_TOKENS:
        return ALIGN + n_threads * tile
    tile += 2 * ROW_TILE * SIGN_COLUMNS + 4 * ROW_TILE * min(round_up(n_tokens, 16), BFLOAT16_BLOCK)
    return ALIGN + n_threads * tile + 2 * round_up(n_tokens, 16) * round_up(n_cols, 32)


def attention_scratch_bytes(
    n_tokens: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    activations: str = "float32",
    *,
    n_threads: int | None = None,
    each: bool = False,
) -> int:
    """Bytes that ``attention`` needs for ``n_tokens`` queries, whatever the number of keys; with ``each``, those of
    ``attention_each``.

    For each thread, float32: its queries and their outputs (up to 96, or the heads of one token that share a key head),
    a tile of 64 keys or values and another of transposed keys, scores, maxima and sums. A token that is the only one of
    its sequence also holds up to 16 partial outputs per head. Several tokens with ``activations="int8"`` may instead
    take, on any instruction set: queries (2 bytes), outputs (4), maxima, totals and positions; 64 keys and values (2),
    once more as they decode (4) and a part of them on its way to be transposed (1), and the scores (4) and
    probabilities (2) of 32 queries.
    """
    n_threads = threads.get() if n_threads is None else n_threads
    sharing = n_heads // n_kv_heads
    together = 1 if each else n_tokens
    n_queries = min(max(1, QUERY_TILE // sharing), together) * sharing
    width = round_up(head_dim, 16)
    floats = 2 * n_queries * width + 2 * KEY_TILE * width + n_queries * KEY_TILE + 2 * n_queries
    thread_bytes = round_up(4 * floats, ALIGN)
    if activations == "int8" and together > 1:
        deep = round_up(head_dim, 32)
        queries = round_up(n_queries, BFLOAT16_QUERIES) * (6 * deep + 12)
        tile = KEY_TILE * ((2 + 2 + 4 + 1) * deep + 6 * BFLOAT16_QUERIES)
        thread_bytes = max(thread_bytes, round_up(queries + tile, ALIGN))
    partial = round_up(4 * n_tokens * MAX_SPLITS * n_heads * (width + 2), ALIGN) if together == 1 else 0
    return ALIGN + n_threads * thread_bytes + partial


def flash_scratch_bytes(
    lengths: Iterable[int],
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    *,
    backward: bool = False,
    n_threads: int | None = None,
) -> int:
    """Bytes that ``flash_forward``, or ``flash_backward``, needs for documents of ``lengths`` tokens, none behind them.

    Forward: 40 for each tile of up to 96 queries (tokens × heads that share a key head), and for each thread, float32:
    queries and outputs of a tile, 64 keys or values twice, scores, maxima and totals. Backward: 40 for each tile of 64
    keys, 4 for each query and head and for each tile of queries and key head, and for each thread queries, gradients of
    outputs and of queries, 64 keys, twice, values, their two gradients, scores and theirs.
    """
    n_threads = threads.get() if n_threads is None else n_threads
    sharing = n_heads // n_kv_heads
    tokens = max(1, QUERY_TILE // sharing)
    lengths = tuple(lengths)
    n_query_tiles, n_key_tiles = (sum(-(-n // size) for n in lengths) for size in (tokens, KEY_TILE))
    queries, width = tokens * sharing, round_up(head_dim, 16)
    if not backward:
        floats = (2 * queries + 2 * KEY_TILE) * width + queries * KEY_TILE + 2 * queries
        return ALIGN + round_up(40 * n_query_tiles, ALIGN) + n_threads * round_up(4 * floats, ALIGN)
    floats = (3 * queries + 5 * KEY_TILE) * width + 2 * queries * KEY_TILE + 2 * queries
    shared = round_up(40 * n_key_tiles, ALIGN) + round_up(4 * n_heads * sum(lengths), ALIGN)
    shared += round_up(4 * n_query_tiles * n_kv_heads, ALIGN)
    return ALIGN + shared + n_threads * round_up(4 * floats, ALIGN)
