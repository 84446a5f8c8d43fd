"""The attention of models that a cache watches: transformers' own sdpa, and then what policies ask of it.

No matrix of all queries by all keys is there at any time: the shares of attention are computed again from the queries
and keys that sdpa got, in tiles of queries, as far as a policy asks for them, and only their sums stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from barefoot.core.errors import Incompatible
from barefoot.kv.policies import Observation

NAME = "barefoot"
TILE_BYTES = 16 << 20  # of scores, float32


class Watcher(Protocol):
    """A layer of a cache that wants to know when its keys have been attended to."""

    def bias(self, n: int) -> Tensor | None: ...
    def attended(self, query: Tensor, key: Tensor, scale: float) -> None: ...


#: Keys that a layer gave to the attention that follows. By identity: the attention gets the tensor, and no cache.
awaited: WeakIdKeyDictionary = WeakIdKeyDictionary()


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """query (batch, n_heads, q, dim), key and value (batch, n_kv_heads, n, dim), the last q of them the queries' own.

    Raises
    ------
    Incompatible : a mask that hides more than what comes later.
    """
    watcher: Watcher | None = awaited.pop(key, None)
    if watcher is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **more)
        return found
    own = causal(query.shape[2], key.shape[2], key.device)
    if mask is not None:
        _check(mask, own)
    bias = watcher.bias(key.shape[2])
    if bias is None:
        found = sdpa_attention_forward(module, query, key, value, own, scaling=scaling, **more)
    else:
        parts = [
            sdpa_attention_forward(module, part, key, value, added, scaling=scaling, **more)[0]
            for part, added in _biased(query, key, bias)
        ]
        found = torch.cat(parts, dim=1), None
    watcher.attended(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return found


def _biased(query: Tensor, key: Tensor, bias: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Tiles of queries, and what is added to their scores, (batch, n_heads, t, n)."""
    n_before, sharing = key.shape[2] - query.shape[2], query.shape[1] // key.shape[1]
    added = bias.to(query.dtype).repeat_interleave(sharing, dim=1)[:, :, None]
    for start, stop in _steps(query, key):
        seen = torch.ones((stop - start, key.shape[2]), dtype=torch.bool, device=key.device).tril(n_before + start)
        yield query[:, :, start:stop], torch.where(seen, added, -torch.inf)


def causal(q: int, n: int, device: torch.device) -> Tensor | None:
    """Which of n entries the last q see, bool (1, 1, q, n); None where sdpa knows."""
    if q in (1, n):
        return None
    return torch.ones((1, 1, q, n), dtype=torch.bool, device=device).tril(n - q)


def _check(mask: Tensor, own: Tensor | None) -> None:
    """Entries have gone since the mask's columns were counted, so it can't say more than what causal attention does."""
    q = mask.shape[2]
    seen = mask if mask.dtype == torch.bool else mask == 0
    between = torch.ones((q, q), dtype=torch.bool, device=mask.device).tril()
    if not (seen[..., :-q].all() and (seen[..., -q:] == between).all()):
        raise Incompatible(
            "a cache with entries of its own for each layer and head can't follow a mask: all tokens must be there",
            cure="give sequences of the same length together, without padding, or one at a time",
        )


def observe(what: Observation, query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """What attention tells of each entry: :data:`barefoot.kv.policies.Observation`, of all these queries.

    query (batch, n_heads, q, dim), key (batch, n_kv_heads, n, dim), the last q of them the queries' own, bias
    (batch, n_kv_heads, n). Returns float32 (batch, n_kv_heads, n), for votes (batch, n_heads, n).
    """
    (batch, n_heads, _, _), (_, n_kv_heads, n, _) = query.shape, key.shape
    rows = n_heads if what == "votes" else n_kv_heads
    found = torch.zeros((batch, rows, n), device=key.device)
    for shares, seen in _tiles(query, key, scale, bias):
        there = shares.shape[-1]
        if what in ("mass", "sums"):
            found[..., :there] += shares.sum(dim=(2, 3))
        elif what == "votes":
            found[..., :there] += shares.sum(dim=3).flatten(1, 2)
        else:
            even = 1 / seen.sum(dim=-1, keepdim=True)  # (t, 1)
            found[..., :there] += (seen & ~(shares.amax(dim=2) >= even)).sum(dim=2)
    return found


def _steps(query: Tensor, key: Tensor) -> Iterator[tuple[int, int]]:
    """Tiles of queries whose scores take ``TILE_BYTES`` at most, or one query."""
    step = max(1, TILE_BYTES // (4 * len(query) * query.shape[1] * key.shape[2]))
    for start in range(0, query.shape[2], step):
        yield start, min(query.shape[2], start + step)


def _tiles(query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Shares (batch, n_kv_heads, sharing, t, seen by the last) of t queries after t, and which entries each sees."""
    (batch, n_heads, q, dim), (_, n_kv_heads, n, _) = query.shape, key.shape
    sharing, n_before = n_heads // n_kv_heads, n - q
    grouped = query.detach().view(batch, n_kv_heads, sharing, q, dim)
    for start, stop in _steps(query, key):
        there = n_before + stop
        part = grouped[:, :, :, start:stop].reshape(batch, n_kv_heads, -1, dim).float()
        scores = part @ key.detach()[:, :, :there].float().transpose(2, 3) * scale
        scores = scores.view(batch, n_kv_heads, sharing, stop - start, there)
        if bias is not None:
            scores += bias[:, :, None, None, :there]
        seen = torch.ones((stop - start, there), dtype=torch.bool, device=key.device).tril(n_before + start)
        yield scores.masked_fill_(~seen, -torch.inf).softmax(dim=-1), seen


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
