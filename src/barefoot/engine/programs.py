"""A layer as a recorded program: its ops on the arrays of a pass, run without Python between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot import ops
from barefoot.core.model import LayerSpec, ModelSpec, WeightSpec
from barefoot.engine.buffers import Views
from barefoot.engine.config import EngineConfig
from barefoot.engine.weights import Sum

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Layer:
    """One layer's weights, and the keys and values of all sequences; None where a policy rules them. ``matrices`` are
    q, k, v, o, gate, up, down; those of a streamed layer are bound to a buffer when it is run, in the order of
    ``streamed``. ``key_order``: of the channels of queries and keys, (n_kv_heads, head_dim), where they are sorted."""

    spec: LayerSpec
    rope: int
    capacity: int
    keys: U8 | None
    values: U8 | None
    qkv: list[Sum]
    o: list[Sum]
    gate_up: list[Sum]
    down: list[Sum]
    vectors: dict[str, F32]
    key_order: U16 | None
    streamed: tuple[tuple[WeightSpec, Sum], ...]


@dataclass(frozen=True)
class Recorder:
    """Records layers on ``views`` of all rows of a pass."""

    spec: ModelSpec
    config: EngineConfig
    views: Views
    scratch: U8

    def whole(self, layers: Sequence[Layer]) -> ops.Program:
        """These layers on the residual stream ``x``."""
        program = ops.Program()
        for layer in layers:
            self._heads(program, layer)
            self._attention(program, layer)
            self._rest(program, layer)
        return program

    def around_attention(self, layer: Layer) -> tuple[ops.Program, ops.Program]:
        """What makes q, k and v of the residual stream, and what takes ``attn_out``."""
        before, behind = ops.Program(), ops.Program()
        self._heads(before, layer)
        self._rest(behind, layer)
        return before, behind

    def _heads(self, program: ops.Program, layer: Layer) -> None:
        spec, vectors, views = self.spec, layer.vectors, self.views
        q, k, v = views.q, views.k, views.v
        program.rmsnorm(views.x, vectors["attn_norm"], spec.norm_eps, views.attn_in)
        self._product(program, views.attn_in, layer.qkv, [q, k, v])
        if "q_bias" in vectors:
            program.add_(q, vectors["q_bias"])
            program.add_(k, vectors["k_bias"])
            program.add_(v, vectors["v_bias"])
        if "q_norm" in vectors:
            program.head_rmsnorm(q, spec.n_heads, spec.head_dim, vectors["q_norm"], spec.norm_eps)
            program.head_rmsnorm(k, spec.n_kv_heads, spec.head_dim, vectors["k_norm"], spec.norm_eps)
        cos, sin = views.rope[layer.rope]
        program.rope(q, spec.n_heads, spec.head_dim, cos, sin, interleaved=layer.spec.rope.interleaved)
        program.rope(k, spec.n_kv_heads, spec.head_dim, cos, sin, interleaved=layer.spec.rope.interleaved)
        if layer.key_order is not None:
            program.reorder(q, layer.key_order)
            program.reorder(k, layer.key_order)

    def _attention(self, program: ops.Program, layer: Layer) -> None:
        spec, views, row_format = self.spec, self.views, self.config.kv.row_format
        assert layer.keys is not None
        assert layer.values is not None
        program.kv_append(views.k, views.v, layer.keys, layer.values, row_format, layer.capacity)
        program.attention(
            views.q,
            layer.keys,
            layer.values,
            row_format,
            views.attn_out,
            n_heads=spec.n_heads,
            n_kv_heads=spec.n_kv_heads,
            head_dim=spec.head_dim,
            capacity=layer.capacity,
            scale=spec.attn_scale,
            window=layer.spec.window or 0,
            softcap=spec.attn_softcap,
            activations=self.config.activations,
            scratch=self.scratch,
        )

    def _rest(self, program: ops.Program, layer: Layer) -> None:
        views, vectors = self.views, layer.vectors
        self._project(program, views.attn_out, layer.o, views.o, vectors.get("post_attn_norm"))
        program.rmsnorm(views.x, vectors["ffn_norm"], self.spec.norm_eps, views.ffn_in)
        self._product(program, views.ffn_in, layer.gate_up, [views.gate, views.up])
        program.glu(views.gate, views.up, views.gate, activation=self.spec.activation)
        self._project(program, views.gate, layer.down, views.down, vectors.get("post_ffn_norm"))

    def _product(self, program: ops.Program, x: F32, weights: list[Sum], outs: list[F32], *, add: bool = False) -> None:
        activations, scratch = self.config.activations, self.scratch
        dense = [(w.blocks, out) for w, out in zip(weights, outs, strict=True) if w.blocks.format != "zero"]
        if dense:
            matrices, their_outs = map(list, zip(*dense, strict=True))
            program.matmul(x, matrices, their_outs, activations=activations, add=add, scratch=scratch)
        for weight, out in zip(weights, outs, strict=True):
            further = add or weight.blocks.format != "zero"
            for part in weight.parts:
                program.part_matmul(x, part, out, add=further, scratch=scratch)
                further = True
            if weight.stack is not None:
                program.sign_matmul(x, weight.stack, out, activations=activations, add=further, scratch=scratch)

    def _project(
        self, program: ops.Program, inputs: F32, weight: list[Sum], between: F32 | None, norm: F32 | None
    ) -> None:
        """Add a projection to the residual stream, through a norm where the model has one."""
        if norm is None or between is None:
            self._product(program, inputs, weight, [self.views.x], add=True)
            return
        self._product(program, inputs, weight, [between])
        program.rmsnorm(between, norm, self.spec.norm_eps, between)
        program.add_(self.views.x, between)
