"""One softmax over all parts of a layer's entries, and what it tells of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from barefoot import ops
from barefoot.kv.layout import Workspace
from barefoot.kv.storage import F32, Heads, Part


def attend(
    work: Workspace,
    heads: Heads,
    parts: Sequence[Part],
    q: F32,
    out: F32,
    *,
    observed: F32 | None = None,
    n_before: int = -1,
    even: F32 | None = None,
) -> None:
    """Attend to all parts, to the last one causally from ``n_before`` on: q, out float32 (n, n_heads × head_dim).

    ``observed`` : float32 (rows, entries of the parts that a policy chooses among), gets added what is observed of each
    by the query heads that share a row: mass; or strikes, where ``even``, float32 (n,), are the shares below which an
    entry has one.
    """
    n = len(q)
    sums, tops, totals = work.sums[:n], work.tops[:n], work.totals[:n]
    sums[...], tops[...], totals[...] = 0, -np.inf, 0
    kept: list[tuple[Part, F32]] = []
    used = 0
    for i, part in enumerate(parts):
        scores = None
        if observed is not None and part.chosen:
            stride = part.segment.stride
            size = heads.n_heads * n * stride
            scores = work.scores[used : used + size].reshape(heads.n_heads, n, stride)
            used += size
            kept.append((part, scores))
        ops.attend_segment(
            q if part.query is None else part.query(q), part.segment, sums, tops, totals,
            n_before=n_before if i + 1 == len(parts) else -1,
            scale=heads.scale, softcap=heads.softcap, scores=scores, scratch=work.scratch,
        )  # fmt: skip
    np.divide(sums, totals[..., None], out=out.reshape(sums.shape))
    at = 0
    for part, scores in kept:
        assert observed is not None
        counts = part.counts
        if len(observed) != len(counts):
            counts = np.repeat(counts, len(observed) // len(counts))
        ops.attention_mass(scores, tops, totals, counts, observed[:, at:], thresholds=even)
        at += int(counts[0])
