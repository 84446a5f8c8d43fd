"""A decoder layer over a stream of documents, its matrices frozen in blocks and adapted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from barefoot.adapters.driver.adapted import AdaptedLinear
from barefoot.train.driver.attention import attend
from barefoot.train.driver.elementwise import gated, rms_norm, turned
from barefoot.weights.training.layer import LayerFunction

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerPass:
    """A layer as a function of hidden states (1, N, d_model), with ``vectors``, its norms and biases."""

    function: StreamLayer
    vectors: Mapping[str, Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(self.vectors, x)

    def again(self, x: Tensor) -> Tensor:
        """The same for its gradients alone: without the last product, where no norm behind it meets its value."""
        last = self.function.products["down"]
        if not isinstance(last, AdaptedLinear) or "post_ffn_norm" in self.vectors:
            return self(x)
        last.only_for_gradients = True
        try:
            return self(x)
        finally:
            last.only_for_gradients = False


@dataclass(frozen=True)
class StreamLayer(LayerFunction):
    """
    Attributes
    ----------
    cos, sin : of each token's position in its document, float32 (N, rot_dim / 2).
    lengths : of the documents, N in all.
    products : by role, what multiplies by a matrix.
    """

    lengths: tuple[int, ...] = ()
    products: Mapping[str, Product] = field(default_factory=dict)

    def _product(self, weights: Mapping[str, Tensor], role: str, x: Tensor) -> Tensor:
        y = self.products[role](x).float()
        return y + weights[f"{role}_bias"].reshape(-1) if f"{role}_bias" in weights else y

    def _norm(self, factors: Tensor, x: Tensor) -> Tensor:
        return rms_norm(x, factors.reshape(-1), self.spec.norm_eps)

    def _turn(self, x: Tensor) -> Tensor:
        interleaved = self.spec.layers[self.layer].rope.interleaved
        return turned(x, self.cos, self.sin, interleaved) if self.cos.shape[1] else x

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return gated(gate, up, self.spec.activation)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spec, window = self.spec, self.spec.layers[self.layer].window
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        scale, softcap = spec.attn_scale, spec.attn_softcap
        return attend(q, k, v, self.lengths, scale=scale, window=window or 0, softcap=softcap)[None]
