"""Attention that trains, on a GPU: FlashAttention-2's order over documents that lie one behind the other.

The equations, the shapes and what is kept are those of ``barefoot.ops.flash``; inputs are float16, bfloat16 or float32,
scores, sums and L are float32, and probabilities meet values in the type of the inputs. Three kernels:

* forward, a program for each tile of queries and query head: tiles of keys up to the diagonal, unnormalised outputs
  that are divided once;
* dq, for each tile of queries and query head, which also writes the sums of d_out times out;
* dk and dv, for each tile of keys and key head, over the tiles of queries of all heads that share it.

So nothing is added atomically and results are the same from run to run; scores are made again twice. A tile is masked
only where the diagonal or the window's edge crosses it: the loops over others have no masks. Exponentials are powers of
two, with log2(e) in the factor of the scores.

Tiles of documents come in a table int32 (n_tiles, 3): the document's first row, the tile's, and the document's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from barefoot.core.errors import BackendMissing
from barefoot.ops.triton.tiles import FLOATS, interpreted, multiplied

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def flash_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out`` as q, in its dtype, and L, float32 (n_heads, n), as ``barefoot.ops.flash_forward`` writes them.

    q : (n, n_heads, head_dim); k, v : (n, n_kv_heads, head_dim); of one dtype, contiguous, on one CUDA device
    """
    _check(q, k, v, lengths)
    n, n_heads, head_dim = q.shape
    empty = _empty(sum(lengths) == n)
    out, lse = empty(q), torch.full((n_heads, n), -torch.inf, dtype=torch.float32, device=q.device)
    tile = _tile(head_dim, q.dtype)
    tiles = _table(lengths, tile["BLOCK_Q"], q.device)
    if len(tiles):
        given = _given(q, k, scale, window, softcap) | tile
        _forward[len(tiles), n_heads](q, k, v, out, lse, tiles, n, **given)
    return out, lse


def flash_backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, shaped as q, k and v, in their dtype. ``d_out`` : as ``out``, contiguous."""
    _check(q, k, v, lengths)
    n, n_heads, head_dim = q.shape
    empty = _empty(sum(lengths) == n)
    dq, dk, dv, delta = empty(q), empty(k), empty(v), torch.empty_like(lse)
    tile = _tile(head_dim, q.dtype)
    of_queries, of_keys = (_table(lengths, tile[name], q.device) for name in ("BLOCK_Q", "BLOCK_K"))
    if len(of_queries):
        given = _given(q, k, scale, window, softcap) | tile
        _backward_queries[len(of_queries), n_heads](q, k, v, out, lse, d_out, dq, delta, of_queries, n, **given)
        _backward_keys[len(of_keys), k.shape[1]](q, k, v, lse, d_out, dk, dv, delta, of_keys, n, **given)
    return dq, dk, dv


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int]) -> None:
    if q.dtype not in FLOATS or {k.dtype, v.dtype} != {q.dtype}:
        raise TypeError(f"q, k and v must be all float16, bfloat16 or float32, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.ndim != 3 or k.shape != v.shape or (len(k), k.shape[-1]) != (len(q), q.shape[-1]) or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q must be (n, n_heads, head_dim), k and v (n, n_kv_heads, head_dim) with n_heads a multiple of "
            f"n_kv_heads, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not all(x.is_contiguous() for x in (q, k, v)):
        raise ValueError("q, k and v must be contiguous")
    if min(lengths, default=0) < 0 or sum(lengths) > len(q):
        raise ValueError(f"lengths must not be negative, nor more than {len(q)} in all")
    if not q.is_cuda and not interpreted():
        raise BackendMissing(
            f"Triton computes on a CUDA device, the tensors are on {q.device}",
            cure="move them, or use barefoot.ops, which computes on CPUs",
        )


def _empty(is_filled: bool) -> Any:
    """Rows behind the documents are zeros."""
    return torch.empty_like if is_filled else torch.zeros_like


def _tile(head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Queries and keys of a tile, as many as a multiprocessor's registers and memory hold of that width."""
    width = max(16, triton.next_power_of_2(head_dim)) * (2 if dtype == torch.float32 else 1)
    block_q, block_k, warps = (128, 64, 4) if width <= 64 else (64, 64, 4) if width <= 128 else (32, 32, 4)
    return {"BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": warps, "num_stages": 2}


def _table(lengths: Sequence[int], size: int, device: torch.device) -> torch.Tensor:
    rows, begin = [], 0
    for length in lengths:
        rows += [(begin, first, begin + length) for first in range(begin, begin + length, size)]
        begin += length
    return torch.tensor(rows, dtype=torch.int32, device=device).reshape(-1, 3)


def _given(q: torch.Tensor, k: torch.Tensor, scale: float, window: int, softcap: float) -> dict[str, Any]:
    return {
        "scale": scale,
        "window": window if window < len(q) else 0,
        "softcap": softcap,
        "n_kv_heads": k.shape[1],
        "SHARING": q.shape[1] // k.shape[1],
        "DIM": q.shape[2],
        "WIDTH": max(16, triton.next_power_of_2(q.shape[2])),
        "CAPPED": softcap > 0,
        "WINDOWED": 0 < window < len(q),
        "TYPE": multiplied(q.dtype),
    }


@triton.jit
def _places(row, head, n_heads, DIM: tl.constexpr, WIDTH: tl.constexpr):
    return (row.to(tl.int64)[:, None] * n_heads + head) * DIM + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _load(x, row, end, head, n_heads, DIM: tl.constexpr, WIDTH: tl.constexpr):
    some = (row < end)[:, None] & (tl.arange(0, WIDTH) < DIM)[None, :]
    return tl.load(x + _places(row, head, n_heads, DIM, WIDTH), mask=some, other=0)


@triton.jit
def _store(x, value, row, end, head, n_heads, DIM: tl.constexpr, WIDTH: tl.constexpr):
    some = (row < end)[:, None] & (tl.arange(0, WIDTH) < DIM)[None, :]
    tl.store(x + _places(row, head, n_heads, DIM, WIDTH), value.to(x.dtype.element_ty), mask=some)


@triton.jit
def _product(a, b, TYPE: tl.constexpr):
    return tl.dot(a.to(TYPE), b.to(TYPE), input_precision="ieee")


@triton.jit
def _scores(queries, keys, scale, softcap, CAPPED: tl.constexpr, TYPE: tl.constexpr):
    """S times log2(e) [queries, keys], and its slope by the uncapped score (a number, 1, without a cap)."""
    raw = _product(queries, tl.trans(keys), TYPE)
    if CAPPED:
        # tanh: near 0 the ratio would be the difference of neighbours
        x = raw * (scale / softcap)
        square = x * x
        series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835)))))
        ratio = 1 - 2 / (tl.exp2(tl.minimum(x, 40.0) * (2 * LOG2E)) + 1)
        part = tl.where(square < 0.04, series, ratio)
        scores, slope = part * (softcap * LOG2E), 1 - part * part
    else:
        scores, slope = raw * (scale * LOG2E), 1.0
    return scores, slope


@triton.jit
def _seen(row, key, window, WINDOWED: tl.constexpr):
    seen = key[None, :] <= row[:, None]
    if WINDOWED:
        seen = seen & (key[None, :] > row[:, None] - window)
    return seen


@triton.jit
def _key_ranges(begin, first, end, window, WINDOWED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Of a tile of queries: where its keys begin, where tiles of keys that all queries see do and end, and the end."""
    stop = tl.minimum(first + BLOCK_Q, end)
    start, whole = begin, begin
    if WINDOWED:
        start = tl.maximum(begin, first - window + 1)
        edge = tl.maximum(stop - window - start, 0)
        whole = tl.minimum(start + (edge + BLOCK_K - 1) // BLOCK_K * BLOCK_K, stop)
    diagonal = whole + tl.maximum(first + 1 - whole, 0) // BLOCK_K * BLOCK_K
    return start, whole, diagonal, stop


@triton.jit
def _take(
    queries, k, v, base, row, end, head, n_kv_heads, scale, window, softcap, top, total, sums,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, TYPE: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax."""
    key = base + tl.arange(0, BLOCK_K)
    scores, _ = _scores(queries, _load(k, key, end, head, n_kv_heads, DIM, WIDTH), scale, softcap, CAPPED, TYPE)
    if MASKED:
        scores = tl.where(_seen(row, key, window, WINDOWED), scores, -float("inf"))
    highest = tl.maximum(top, tl.max(scores, axis=1))
    shift = tl.where(highest == -float("inf"), 0.0, highest)  # of rows that have seen nothing yet
    weights, keep = tl.exp2(scores - shift[:, None]), tl.exp2(top - shift)
    values = _load(v, key, end, head, n_kv_heads, DIM, WIDTH)
    return highest, total * keep + tl.sum(weights, axis=1), sums * keep[:, None] + _product(weights, values, TYPE)


@triton.jit
def _forward(
    q, k, v, out, lse, tiles, n, scale, window, softcap, n_kv_heads, SHARING: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, TYPE: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, head, n_heads = tiles + 3 * tl.program_id(0), tl.program_id(1), n_kv_heads * SHARING
    begin, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    row, of = first + tl.arange(0, BLOCK_Q), head // SHARING
    queries = _load(q, row, end, head, n_heads, DIM, WIDTH)
    top = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    sums = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    start, whole, diagonal, stop = _key_ranges(begin, first, end, window, WINDOWED, BLOCK_Q, BLOCK_K)
    if WINDOWED:
        for base in tl.range(start, whole, BLOCK_K):
            top, total, sums = _take(
                queries, k, v, base, row, end, of, n_kv_heads, scale, window, softcap, top, total, sums,
                True, CAPPED, WINDOWED, TYPE, DIM, WIDTH, BLOCK_K,
            )  # fmt: skip
    for base in tl.range(whole, diagonal, BLOCK_K):
        top, total, sums = _take(
            queries, k, v, base, row, end, of, n_kv_heads, scale, window, softcap, top, total, sums,
            False, CAPPED, WINDOWED, TYPE, DIM, WIDTH, BLOCK_K,
        )  # fmt: skip
    for base in tl.range(diagonal, stop, BLOCK_K):
        top, total, sums = _take(
            queries, k, v, base, row, end, of, n_kv_heads, scale, window, softcap, top, total, sums,
            True, CAPPED, WINDOWED, TYPE, DIM, WIDTH, BLOCK_K,
        )  # fmt: skip
    total = tl.where(row < end, total, 1.0)
    _store(out, sums / total[:, None], row, end, head, n_heads, DIM, WIDTH)
    tl.store(lse + head * n + row.to(tl.int64), (top + tl.log2(total)) * LN2, mask=row < end)


@triton.jit
def _gradients(
    queries, keys, values, d_out, lse, delta, row, key, scale, window, softcap,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """P and dS [queries, keys]."""
    scores, slope = _scores(queries, keys, scale, softcap, CAPPED, TYPE)
    d_weights = (_product(d_out, tl.trans(values), TYPE) - delta[:, None]) * slope
    if MASKED:
        seen = _seen(row, key, window, WINDOWED)
        scores, d_weights = tl.where(seen, scores, -float("inf")), tl.where(seen, d_weights, 0.0)
    weights = tl.exp2(scores - lse[:, None] * LOG2E)
    return weights, weights * d_weights


@triton.jit
def _add_queries(
    dq, queries, k, v, d_out, lse, delta, base, row, end, head, n_kv_heads, scale, window, softcap,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, TYPE: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    key = base + tl.arange(0, BLOCK_K)
    keys = _load(k, key, end, head, n_kv_heads, DIM, WIDTH)
    values = _load(v, key, end, head, n_kv_heads, DIM, WIDTH)
    _, d_scores = _gradients(
        queries, keys, values, d_out, lse, delta, row, key, scale, window, softcap, MASKED, CAPPED, WINDOWED, TYPE
    )
    return dq + _product(d_scores, keys, TYPE)


@triton.jit
def _backward_queries(
    q, k, v, out, lse, d_out, dq, delta, tiles, n, scale, window, softcap, n_kv_heads, SHARING: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, head, n_heads = tiles + 3 * tl.program_id(0), tl.program_id(1), n_kv_heads * SHARING
    begin, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    row, of = first + tl.arange(0, BLOCK_Q), head // SHARING
    queries = _load(q, row, end, head, n_heads, DIM, WIDTH)
    gradient = _load(d_out, row, end, head, n_heads, DIM, WIDTH)
    outs = _load(out, row, end, head, n_heads, DIM, WIDTH)
    mean = tl.sum(gradient.to(tl.float32) * outs.to(tl.float32), axis=1)
    tl.store(delta + head * n + row.to(tl.int64), mean, mask=row < end)
    norm = tl.load(lse + head * n + row.to(tl.int64), mask=row < end, other=0)
    sums = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    start, whole, diagonal, stop = _key_ranges(begin, first, end, window, WINDOWED, BLOCK_Q, BLOCK_K)
    if WINDOWED:
        for base in tl.range(start, whole, BLOCK_K):
            sums = _add_queries(
                sums, queries, k, v, gradient, norm, mean, base, row, end, of, n_kv_heads, scale, window, softcap,
                True, CAPPED, WINDOWED, TYPE, DIM, WIDTH, BLOCK_K,
            )  # fmt: skip
    for base in tl.range(whole, diagonal, BLOCK_K):
        sums = _add_queries(
            sums, queries, k, v, gradient, norm, mean, base, row, end, of, n_kv_heads, scale, window, softcap,
            False, CAPPED, WINDOWED, TYPE, DIM, WIDTH, BLOCK_K,
        )  # fmt: skip
    for base in tl.range(diagonal, stop, BLOCK_K):
        sums = _add_queries(
            sums, queries, k, v, gradient, norm, mean, base, row, end, of, n_kv_heads, scale, window, softcap,
            True, CAPPED, WINDOWED, TYPE, DIM, WIDTH, BLOCK_K,
        )  # fmt: skip
    _store(dq, sums * scale, row, end, head, n_heads, DIM, WIDTH)


@triton.jit
def _add_keys(
    dk, dv, q, keys, values, lse, d_out, delta, n, base, key, end, head, n_heads, scale, window, softcap,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, TYPE: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    row = base + tl.arange(0, BLOCK_Q)
    queries = _load(q, row, end, head, n_heads, DIM, WIDTH)
    gradient = _load(d_out, row, end, head, n_heads, DIM, WIDTH)  # rows behind the document add zeros
    place = head * n + row.to(tl.int64)
    norm = tl.load(lse + place, mask=row < end, other=0)
    mean = tl.load(delta + place, mask=row < end, other=0)
    weights, d_scores = _gradients(
        queries, keys, values, gradient, norm, mean, row, key, scale, window, softcap, MASKED, CAPPED, WINDOWED, TYPE
    )
    return dk + _product(tl.trans(d_scores), queries, TYPE), dv + _product(tl.trans(weights), gradient, TYPE)


@triton.jit
def _backward_keys(
    q, k, v, lse, d_out, dk, dv, delta, tiles, n, scale, window, softcap, n_kv_heads, SHARING: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, of, n_heads = tiles + 3 * tl.program_id(0), tl.program_id(1), n_kv_heads * SHARING
    first, end = tl.load(tile + 1), tl.load(tile + 2)
    key = first + tl.arange(0, BLOCK_K)
    keys = _load(k, key, end, of, n_kv_heads, DIM, WIDTH)
    values = _load(v, key, end, of, n_kv_heads, DIM, WIDTH)
    sums_k = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    sums_v = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    # From row `whole` on queries see all of these keys, from `edge` on some of them have left the window.
    last = tl.minimum(first + BLOCK_K, end) - 1
    whole = first + (last - first + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
    edge, stop = end, end
    if WINDOWED:
        stop = tl.minimum(end, last + window)
        edge = tl.minimum(whole + tl.maximum(first + window - whole, 0) // BLOCK_Q * BLOCK_Q, stop)
    for head in tl.range(of * SHARING, (of + 1) * SHARING):
        for base in tl.range(first, tl.minimum(whole, stop), BLOCK_Q):
            sums_k, sums_v = _add_keys(
                sums_k, sums_v, q, keys, values, lse, d_out, delta, n, base, key, end, head, n_heads, scale, window,
                softcap, True, CAPPED, WINDOWED, TYPE, DIM, WIDTH, BLOCK_Q,
            )  # fmt: skip
        for base in tl.range(whole, edge, BLOCK_Q):
            sums_k, sums_v = _add_keys(
                sums_k, sums_v, q, keys, values, lse, d_out, delta, n, base, key, end, head, n_heads, scale, window,
                softcap, False, CAPPED, WINDOWED, TYPE, DIM, WIDTH, BLOCK_Q,
            )  # fmt: skip
        if WINDOWED:
            for base in tl.range(tl.maximum(edge, whole), stop, BLOCK_Q):
                sums_k, sums_v = _add_keys(
                    sums_k, sums_v, q, keys, values, lse, d_out, delta, n, base, key, end, head, n_heads, scale,
                    window, softcap, True, CAPPED, WINDOWED, TYPE, DIM, WIDTH, BLOCK_Q,
                )  # fmt: skip
    _store(dk, sums_k * scale, key, end, of, n_kv_heads, DIM, WIDTH)
    _store(dv, sums_v, key, end, of, n_kv_heads, DIM, WIDTH)
