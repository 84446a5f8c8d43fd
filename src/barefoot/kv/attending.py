"""One softmax over all parts of a layer's entries, and what it tells of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    observe: bool,
    n_before: int = -1,
    even: F32 | None = None,
) -> Iterator[tuple[int, F32]]:
    """Attend to all parts, to the last one causally from ``n_before`` on: q, out float32 (n, n_heads × head_dim).

    Gives what is observed of each part that a policy chooses among: how many entries, and rows (n_observed, entries)
    that are valid until the next. ``even`` : float32 (n,), shares below which an entry has a strike; None for mass.
    """
    n = len(q)
    sums, tops, totals = work.sums[:n], work.tops[:n], work.totals[:n]
    sums[...], tops[...], totals[...] = 0, -np.inf, 0
    kept: list[tuple[Part, F32]] = []
    used = 0
    for i, part in enumerate(parts):
        scores = None
        if observe and part.chosen:
            shape = (heads.n_heads, n, part.segment.stride)
            size = int(np.prod(shape))
            scores = work.scores[used : used + size].reshape(shape)
            used += size
            kept.append((part, scores))
        ops.attend_segment(
            q if part.query is None else part.query(q), part.segment, sums, tops, totals,
            n_before=n_before if i + 1 == len(parts) else -1,
            scale=heads.scale, softcap=heads.softcap, scores=scores, scratch=work.scratch,
        )  # fmt: skip
    np.divide(sums, totals[..., None], out=out.reshape(sums.shape))
    return _observations(work, kept, tops, totals, even)


def _observations(
    work: Workspace, kept: Sequence[tuple[Part, F32]], tops: F32, totals: F32, even: F32 | None
) -> Iterator[tuple[int, F32]]:
    for part, scores in kept:
        seen, count = work.now(scores.shape[2]), int(part.counts[0])
        counts = np.full(len(seen), count, np.int32)
        ops.attention_mass(scores, tops, totals, counts, seen, thresholds=even)
        yield count, seen[:, :count]
