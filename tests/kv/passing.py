"""What passes take for a while, as numpy allocates for it."""

from __future__ import annotations

import numpy as np
from test_cache import arrays, make

from barefoot import ops
from barefoot.core.measure import TracedPeak


def taken_and_stated(policy, store, heads):
    """The most bytes of a prompt that leaves some of the context, a second one behind it, and tokens; those stated."""
    n, rng = 3000, np.random.default_rng(1)
    cache = make(policy, store, heads, n_layers=1, context=n + 200, chunk=64)
    q, k, v = arrays(rng, 64, heads)
    out, peaks = np.empty_like(q), []
    for n_prompt in (n, 130):
        cache.begin(n_prompt)
        for start in range(0, n_prompt, 64):
            part = slice(0, min(64, n_prompt - start))
            if 64 <= start < n_prompt - 64 and n_prompt == n:  # attention here is not looked at
                ops.kv_append(k, v, cache._work.keys, cache._work.values, "f16", n + 200, start)
                cache._staged[:] = start + 64
                continue
            with TracedPeak() as passing:
                cache.prefill(0, q[part], k[part], v[part], out[part])
            peaks.append(passing)
        cache._work.observed[...] = rng.random(cache._work.observed.shape)
        with TracedPeak() as settling:
            cache.settle(0)
        peaks.append(settling)
    for _ in range(3):
        with TracedPeak() as step:
            cache.step(0, q[:1], k[:1], v[:1], out[:1])
            cache.stepped()
        peaks.append(step)
    return max(each.result.peak - each.result.before for each in peaks), cache.layout.passing().bytes
