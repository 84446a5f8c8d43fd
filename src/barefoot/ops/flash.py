"""Attention that trains: exact, forward and backward, with no array of all queries by all keys; in numpy.

FlashAttention (Dao et al. 2022, arXiv:2205.14135) and FlashAttention-2 (Dao 2023, arXiv:2307.08691). Scores are made
tile by tile, met with a running maximum m and total l, and forgotten; the backward pass makes them again. Of a query i
and the keys j that it sees, with c the soft cap::

    S_ij = c tanh(scale q_i·k_j / c)     L_i = m_i + ln l_i = ln sum_j exp S_ij     P_ij = exp(S_ij - L_i)
    out_i = sum_j P_ij v_j
    D_i = d_out_i·out_i                  dS_ij = P_ij (d_out_i·v_j - D_i) (1 - (S_ij / c)²)
    dv_j = sum_i P_ij d_out_i            dk_j = scale sum_i dS_ij q_i               dq_i = scale sum_j dS_ij k_j

without a cap S_ij = scale q_i·k_j, and the last factor of dS_ij is 1. Of the forward pass only ``out`` and L are kept.

**Documents** lie one behind the other in q, k and v, without padding. A token sees those of its own document up to
itself, with a ``window`` at most so many of them, itself included. Rows behind the last document see nothing: their
outputs and gradients are 0, their L is -infinity. Query head h meets key head ``h // (n_heads / n_kv_heads)``, whose
gradients sum over the heads that share it.

**The compiled kernels** take the second paper's order. Forward, a task is a tile of 96 queries (of all heads that share
a key head); it meets tiles of 64 keys from the first one that it sees to the diagonal, keeps its unnormalised outputs,
and divides them once. Only in tiles that a diagonal or a window's edge crosses is anything masked. Backward, a task is
a tile of 64 keys, whose dk and dv stay with it. What it adds to dq waits until the tiles of keys before it have added
theirs, which they have unless threads keep step: every sum has one order, so results depend on no number of threads
and scores are made again only once. All is float32.

*Differs from the papers*: dq in a fixed order where theirs adds atomically; no dropout, no block-sparse form.

What is not finite reaches whatever sees it. It may reach more of its own document, since 0 times infinity is NaN in
sums over values, keys and queries that are masked; other documents it does not reach.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]


def flash_forward(
    q: F32,
    k: F32,
    v: F32,
    lengths: I64,
    out: F32,
    lse: F32,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    scratch: U8 | None = None,
) -> None:
    out[:], lse[:] = 0, -np.inf
    for own, head, key_head in _parts(q, k, lengths):
        scores, _ = _scores(q[own, head], k[own, key_head], scale, window, softcap)
        top = scores.max(axis=1, keepdims=True)
        with np.errstate(invalid="ignore", over="ignore"):
            weights = np.exp(scores - top)
            total = weights.sum(axis=1, keepdims=True)
            out[own, head] = (weights @ v[own, key_head].astype(np.float64)) / total
            lse[head, own] = (top + np.log(total))[:, 0]


def flash_backward(
    d_out: F32,
    q: F32,
    k: F32,
    v: F32,
    out: F32,
    lse: F32,
    lengths: I64,
    dq: F32,
    dk: F32,
    dv: F32,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    scratch: U8 | None = None,
) -> None:
    sums_k, sums_v = np.zeros(k.shape), np.zeros(v.shape)
    dq[:] = 0
    for own, head, key_head in _parts(q, k, lengths):
        queries, keys, values, outs, gradient = (
            x.astype(np.float64)
            for x in (q[own, head], k[own, key_head], v[own, key_head], out[own, head], d_out[own, head])
        )
        with np.errstate(invalid="ignore", over="ignore"):
            scores, slopes = _scores(queries, keys, scale, window, softcap)
            weights = np.exp(scores - lse[head, own, None].astype(np.float64))
            mean = (gradient * outs).sum(axis=1, keepdims=True)
            d_scores = np.where(np.isneginf(scores), 0, weights * (gradient @ values.T - mean) * slopes)
            dq[own, head] = scale * (d_scores @ keys)
            sums_k[own, key_head] += scale * (d_scores.T @ queries)
            sums_v[own, key_head] += weights.T @ gradient
    dk[:], dv[:] = sums_k, sums_v


def _parts(q: F32, k: F32, lengths: I64) -> Iterator[tuple[slice, int, int]]:
    """Rows, query head and key head of every head of every document."""
    n_heads, n_kv_heads = q.shape[1], k.shape[1]
    if (lengths < 0).any() or lengths.sum() > len(q):
        raise ValueError(f"lengths must not be negative, nor more than {len(q)} in all")
    ends = np.cumsum(lengths)
    for begin, end in zip(ends - lengths, ends, strict=True):
        for head in range(n_heads) if end > begin else ():
            yield slice(begin, end), head, head // (n_heads // n_kv_heads)


def _scores(
    q: npt.NDArray[np.floating], k: npt.NDArray[np.floating], scale: float, window: int, softcap: float
) -> tuple[F64, F64 | float]:
    """S of one head of a document, -infinity where a query doesn't see a key, and its slope by the uncapped score."""
    with np.errstate(invalid="ignore", over="ignore"):
        scores = scale * (q.astype(np.float64) @ k.astype(np.float64).T)
    slopes: F64 | float = 1.0
    if softcap:
        part = np.tanh(scores / softcap)
        scores, slopes = softcap * part, 1 - part**2
    ahead = np.arange(len(q))[:, None] - np.arange(len(k))  # how far back a key lies
    seen = (ahead >= 0) & (ahead < (window or len(k)))
    return np.where(seen, scores, -np.inf), slopes
