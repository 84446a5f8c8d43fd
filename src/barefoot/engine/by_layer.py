"""Passes that take layers one by one: what caches need whose entries a policy rules.

A prompt's hidden states are kept between layers, float32 (context, d_model), so that each layer takes the whole prompt
and its cache is compressed before the next layer begins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from barefoot.core.model import ModelSpec
from barefoot.engine.arena import Arena
from barefoot.engine.buffers import Buffers, Views
from barefoot.engine.config import EngineConfig
from barefoot.engine.programs import Layer, Recorder
from barefoot.engine.rope import inverse_frequencies
from barefoot.kv.cache import Cache
from barefoot.kv.layout import Workspace
from barefoot.kv.ruled import Ruled
from barefoot.kv.turning import Turning

U8 = npt.NDArray[np.uint8]


class ByLayer:
    """The layers' programs, and for each sequence a cache of the layers that the policy rules."""

    def __init__(
        self,
        spec: ModelSpec,
        config: EngineConfig,
        rule: Ruled,
        arena: Arena,
        buffers: Buffers,
        recorder: Recorder,
        layers: Sequence[Layer],
    ) -> None:
        layout = rule.layout(spec, config.context, config.chunk, config.activations)
        self._buffers = buffers
        self._hidden = arena.floats("prompt", config.context, spec.d_model)

        def own(n_bytes: int) -> U8:
            return arena.take("kv", n_bytes)

        def shared(n_bytes: int) -> U8:
            return arena.take("kv workspace", n_bytes)

        workspace = Workspace(layout, shared, config.n_threads)
        ropes = [spec.layers[layer].rope for layer in rule.ruled(spec)]
        turnings = {rope: Turning(inverse_frequencies(rope, config.context), rope.interleaved) for rope in ropes}
        of_layers = [turnings[rope] for rope in ropes]
        self.caches = [Cache(layout, workspace, own, of_layers) for _ in range(config.n_sequences)]
        self._number = {layer: i for i, layer in enumerate(rule.ruled(spec))}
        self._around = {i: recorder.around_attention(layers[i]) for i in self._number}
        self._whole = {i: recorder.whole([layer]) for i, layer in enumerate(layers) if i not in self._number}

    # --- a prompt ---

    def begin(self, sequence: int, n_tokens: int) -> None:
        self.caches[sequence].begin(n_tokens)

    def put(self, start: int, views: Views) -> None:
        """Keep the hidden states of the prompt's tokens from ``start`` on."""
        self._hidden[start : start + views.n] = views.x

    def take(self, start: int, n: int) -> Views:
        views = self._buffers.views(n)
        views.x[...] = self._hidden[start : start + n]
        return views

    def chunk(self, layer: int, sequence: int, views: Views, position: int) -> None:
        """Some tokens of the prompt, the first at ``position``, in one layer."""
        self._buffers.tables.fill(position, views.n)
        if layer in self._whole:
            self._whole[layer].run(views.n, position, sequence)
            return
        before, behind = self._around[layer]
        before.run(views.n, 0)
        self.caches[sequence].prefill(self._number[layer], views.q, views.k, views.v, views.attn_out)
        behind.run(views.n, 0)

    def settle(self, layer: int, sequence: int) -> None:
        if layer in self._number:
            self.caches[sequence].settle(self._number[layer])

    # --- decoding ---

    def check(self, sequences: Sequence[int]) -> None:
        """Refuse a token that some sequence has no slot for; nothing has changed then."""
        for sequence in sequences:
            self.caches[sequence].check_step()

    def step(self, layer: int, sequences: Sequence[int], positions: Sequence[int], views: Views) -> None:
        """One token of each sequence in one layer."""
        if layer in self._whole:
            self._whole[layer].run_each(sequences, positions)
            return
        before, behind = self._around[layer]
        before.run(views.n, 0)
        for i, sequence in enumerate(sequences):
            row = slice(i, i + 1)
            cache = self.caches[sequence]
            cache.step(self._number[layer], views.q[row], views.k[row], views.v[row], views.attn_out[row])
        behind.run(views.n, 0)

    def stepped(self, sequences: Sequence[int]) -> None:
        for sequence in sequences:
            self.caches[sequence].stepped()
