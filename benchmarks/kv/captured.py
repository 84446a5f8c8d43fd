"""Queries, keys and values of a model along a text, as its attention gets them: what policies are tried on by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.specs import model_spec
from barefoot.io.inventory import Checkpoint
from barefoot.kv.policies import Policy, Seen
from barefoot.kv.policies.sinks import Sinks
from barefoot.kv.ruled import Ruled
from barefoot.kv.stores.f16 import HalfStore

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Attended:
    """A layer's queries (n_heads, n, head_dim), keys and values (n_kv_heads, n, head_dim), rotated, and the factor of
    their products."""

    q: F32
    k: F32
    v: F32
    scale: float

    @property
    def sharing(self) -> int:
        return len(self.q) // len(self.k)

    def shares(self, head: int, first: int = 0) -> F64:
        """Attention of a query head's tokens from ``first`` on, (tokens, entries), causal."""
        q, k = self.q[head, first:].astype(np.float64), self.k[head // self.sharing].astype(np.float64)
        scores = q @ k.T * self.scale
        scores[np.arange(len(k)) > np.arange(first, first + len(q))[:, None]] = -np.inf
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))

    def prompt(self, n: int) -> Attended:
        return Attended(self.q[:, :n], self.k[:, :n], self.v[:, :n], self.scale)

    def seen(self, policy: Policy, layer: int) -> Seen:
        """What a policy sees of these tokens, all of them a prompt."""
        sums = [self.shares(head).sum(axis=0) for head in range(len(self.q))]
        mass = np.array(sums).reshape(len(self.k), self.sharing, -1).sum(axis=1).astype(np.float32)
        n = self.k.shape[1]
        position = np.tile(np.arange(n, dtype=np.int32), (len(self.k), 1))
        return Seen(
            position, n, mass, layer, n_prompt=n, carried=np.zeros(policy.n_carried, np.float32),
            keys=lambda head: self.k[head].astype(np.float16).astype(np.float32),
        )  # fmt: skip


def attended(model: str, ids: Sequence[int], n_threads: int = 1) -> list[Attended]:
    """Of each layer that sees all positions."""
    with Checkpoint(model) as checkpoint:
        kv = Ruled(Sinks(keep=len(ids)), HalfStore())  # keeps everything
        config = EngineConfig(context=len(ids), kv=kv, activations="float32", n_threads=n_threads)
        with Engine(checkpoint, model_spec(checkpoint), config) as engine:
            with capturing(engine) as found:
                engine.prefill(list(ids))
            return found


@contextmanager
def capturing(engine: Engine) -> Iterator[list[Attended]]:
    """What is prefilled inside the context, in the first sequence, of each layer that a policy rules: filled in when
    it ends."""
    assert engine._by_layer is not None
    cache, spec = engine._by_layer.caches[0], engine.spec
    got: dict[int, list[tuple[F32, ...]]] = {}
    found: list[Attended] = []
    prefill = cache.prefill

    def look(layer: int, q: F32, k: F32, v: F32, out: F32) -> None:
        got.setdefault(layer, []).append((q.copy(), k.copy(), v.copy()))
        prefill(layer, q, k, v, out)

    cache.prefill = look  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del cache.prefill
    for layer in sorted(got):
        parts = (np.concatenate(each) for each in zip(*got[layer], strict=True))
        q, k, v = (part.reshape(len(part), -1, spec.head_dim).swapaxes(0, 1).copy() for part in parts)
        found.append(Attended(q, k, v, spec.attn_scale))
