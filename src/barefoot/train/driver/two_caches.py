"""Decoding with a side network (:mod:`barefoot.adapters.qst`): a cache for the base, and a thin one for what is beside.

Both hold keys, turned, and values of all layers, float32 (1, positions, KV heads, channels of a head); the second has
1/r of the first's channels. A token passes both networks once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from barefoot.core.errors import InvalidInput
from barefoot.core.model import ModelSpec
from barefoot.train import MicroBatch
from barefoot.train.driver.decoder import turns_of
from barefoot.train.driver.layer import LayerPass, StreamLayer
from barefoot.train.driver.side_decoder import SideDecoder
from barefoot.weights.training.layer import LayerFunction


class Cache:
    """Keys and values of ``n_positions``, of which so many are ``filled``, a layer after the other."""

    def __init__(self, spec: ModelSpec, n_positions: int) -> None:
        shape = spec.n_layers, 1, n_positions, spec.n_kv_heads, spec.head_dim
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        self.filled = 0

    def extended(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All of a layer's so far, with those of new positions."""
        end = self.filled + k.shape[1]
        for held, new in ((self.keys, k), (self.values, v)):
            held[layer, :, self.filled : end] = new
        return self.keys[layer, :, :end].to(k.dtype), self.values[layer, :, :end].to(v.dtype)


@dataclass(frozen=True)
class CachedLayer(StreamLayer):
    """Over the next tokens of one document, whose earlier ones are in ``cache``."""

    cache: Cache | None = None

    def _mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.cache is not None
        return LayerFunction._mix(self, q, *self.cache.extended(self.layer, k, v))


class TwoCaches:
    """A document of at most ``n_positions`` that grows token by token."""

    def __init__(self, decoder: SideDecoder, n_positions: int) -> None:
        self.decoder, self.n_positions = decoder, n_positions
        self.base, self.side = Cache(decoder.spec, n_positions), Cache(decoder.side, n_positions)

    @torch.no_grad()
    def append(self, ids: list[int]) -> Tensor:
        """Logits behind each of some more tokens, float32 (n, vocabulary).

        Raises
        ------
        InvalidInput : no tokens, or more than there are positions.
        """
        decoder, n, first = self.decoder, len(ids), self.base.filled
        if not 0 < n <= self.n_positions - first:
            raise InvalidInput(f"{n} tokens behind {first} in a cache of {self.n_positions}")
        lengths, array = (n,), np.asarray(ids, np.int64)
        x = decoder.embedded(MicroBatch(array, array, lengths))
        turns, thin_turns = (turns_of(spec, lengths, first) for spec in (decoder.spec, decoder.side))
        thin = decoder.narrowed(0, x)
        for index in range(decoder.spec.n_layers):
            x = _cached(decoder.layer(index, turns, lengths), self.base)(x)
            thin = _cached(decoder.beside(index, thin_turns, lengths), self.side)(decoder.fused(index, x, thin))
        self.base.filled = self.side.filled = first + n
        return decoder.logits(decoder.joined(x, thin))

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        """The ``n`` likeliest tokens behind a prompt, one after the other."""
        found, coming = [], prompt
        for _ in range(n):
            coming = [int(self.append(coming)[-1].argmax())]
            found += coming
        return found


def _cached(layer: LayerPass, cache: Cache) -> LayerPass:
    """The same layer with a cache."""
    fields = {name: getattr(layer.function, name) for name in StreamLayer.__dataclass_fields__}
    return LayerPass(CachedLayer(**fields, cache=cache), layer.vectors)
