"""qst — a thin network beside the frozen one reads its hidden states; no gradient passes through the model.

Quantized Side Tuning (Zhang et al. 2024, arXiv:2401.07159). The model runs forward only, and nothing of it is kept but
the hidden state h_i behind each layer. Beside it runs g, as many layers of the same kind with all sizes divided by r
(hidden channels, feed-forward, channels of a head; the numbers of heads stay), s = d / r::

    n_i = narrow_i(h_i)                                        behind layer i, i = 0 … L - 1; n_e = narrow_0(embedding)
    g_i = layer_i((1 - β_i) n_i + β_i g_(i-1))                 g_(-1) = n_e,  β_i = sigmoid(γ_i), γ_i from 0
    logits = head(α norm(h_(L-1)) + (1 - α) (norm_g(g_(L-1)) Uᵀ + b))                            α from 1

α is exactly 1 at first, so that training begins with the model as it is: what begins elsewhere repeats itself
when it generates. Until α has moved, in the first step, all other gradients are 0.

``downsample``: ``adapter``, silu(h Aᵀ) Bᵀ with A (rank, d) and B (s, rank), and a layer norm; ``lora``, the same
without silu; ``linear``, one matrix (s, d), most of all that learns, and the norm; ``max`` and ``average`` over each r
channels, which learn nothing and keep nothing d wide.

Arrays of a Llama's layer, K channels of keys: 2 s² + 2 s K/r + 3 s f/r + 2 s + rank (d + s) + 2 s + 1; besides them
s + d s + d + 1. Kept for the backward pass, in numbers a token and layer: d, the input of A, once more for the
embedding; 9 s + 5 Q/r + 4 f/r + H + 2 rank + 4 of g, whose attention has all H heads; 2 d + 3 s + 1 at the head. While
it generates there are two caches, the second of 1/r of the bytes of the first.

Differs from the paper: g turns its queries by every r-th of the model's frequencies, in the order of halves whatever
the file's is. The released code starts α at sigmoid(1) and β at sigmoid(0.5), one for each channel; here they are as
the paper has them. g computes in float32. Nothing can be merged, and the engine doesn't run g.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from barefoot.adapters import Aside, Factor, Passing
from barefoot.core.errors import Incompatible, InvalidInput
from barefoot.core.ledger import Term
from barefoot.core.model import LayerSpec, ModelSpec, Rope
from barefoot.ops.scratch import flash_scratch_bytes

Downsample = Literal["adapter", "lora", "linear", "max", "average"]
POOLED: tuple[Downsample, ...] = ("max", "average")


@dataclass(frozen=True)
class QST(Aside, name="qst", papers=(8,)):
    """``r`` divides the sizes of the side network; ``rank`` is that of ``adapter`` and ``lora``."""

    r: int = 16
    downsample: Downsample = "adapter"
    rank: int = 16

    def __post_init__(self) -> None:
        for knob, value in (("r", self.r), ("rank", self.rank)):
            if value < 1:
                raise InvalidInput(f"qst: {knob} must be 1 or more, got {value}")
        if self.downsample not in get_args(Downsample):
            known = ", ".join(get_args(Downsample))
            raise InvalidInput(f"qst: downsample must be one of {known}, got {self.downsample!r}")

    def side(self, spec: ModelSpec) -> ModelSpec:
        """The side network's shapes; its weights are those of the layers, by the model's names.

        Raises
        ------
        Incompatible : r doesn't divide a size of the model, or leaves a head an odd number of channels to turn.
        """
        self._check(spec)
        r = self.r
        thin = [
            replace(w, rows=w.rows // r if w.rows > 1 else 1, cols=w.cols // r, format="f32", source="", parts=())
            for w in spec.weights
            if w.layer is not None
        ]
        return replace(
            spec,
            d_model=spec.d_model // r,
            head_dim=spec.head_dim // r,
            d_ff=spec.d_ff // r,
            layers=tuple(LayerSpec(self._rope(layer.rope), layer.window) for layer in spec.layers),
            weights=tuple(thin),
            attn_scale=spec.attn_scale * math.sqrt(r),
            attn_softcap=0.0,
            norm_plus_one=False,
        )

    def _rope(self, rope: Rope) -> Rope:
        """Of every r-th pair of channels."""
        short, long = rope.short_factors[:: self.r], rope.long_factors[:: self.r]
        return replace(rope, dim=rope.dim // self.r, interleaved=False, short_factors=short, long_factors=long)

    def _check(self, spec: ModelSpec) -> None:
        turned = min(layer.rope.dim for layer in spec.layers)
        common = math.gcd(spec.d_model, spec.d_ff, spec.head_dim, *(layer.rope.dim // 2 for layer in spec.layers))
        if common % self.r:
            possible = ", ".join(str(r) for r in range(2, common + 1) if common % r == 0) or "none but 1"
            raise Incompatible(
                f"qst: r {self.r} must divide the hidden channels ({spec.d_model}), the feed-forward ({spec.d_ff}) and "
                f"a head's channels ({spec.head_dim}), and leave an even number of those that are turned ({turned})",
                cure=f"for {spec.name}, r can be {possible}",
            )

    def factors(self, spec: ModelSpec, step: int = 0, steps: int = 1) -> tuple[Factor, ...]:
        side, d = self.side(spec), spec.d_model
        found: list[Factor] = []
        for index in range(spec.n_layers):
            found += self._narrowing(f"layers.{index}", d, side.d_model)
            found.append(Factor(f"layers.{index}.gamma", 1, 1))
            found += [Factor(w.name, w.rows, w.cols) for w in side.weights if w.layer == index]
        head = Factor("widen", d, side.d_model), Factor("widen_bias", 1, d), Factor("alpha", 1, 1)
        return (*found, Factor("norm", 1, side.d_model), *head)

    def _narrowing(self, layer: str, d: int, s: int) -> Iterator[Factor]:
        if self.downsample in POOLED:
            return
        if self.downsample == "linear":
            yield Factor(f"{layer}.narrow", s, d)
        else:
            yield Factor(f"{layer}.narrow_A", self.rank, d)
            yield Factor(f"{layer}.narrow_B", s, self.rank)
        yield Factor(f"{layer}.narrow_norm", 1, s)
        yield Factor(f"{layer}.narrow_shift", 1, s)

    def _kept(self, spec: ModelSpec) -> tuple[int, int]:
        """Numbers a token that stay of what narrows hidden states, and of a layer of the side network."""
        side = self.side(spec)
        s, f, heads = side.d_model, side.d_ff, (spec.n_heads + spec.n_kv_heads) * side.head_dim
        thin = {"adapter": 2 * self.rank, "lora": self.rank}.get(self.downsample, 0)
        layer = 6 * s + 2 * heads + spec.n_heads + 3 * f + 2
        roles = {w.name.rpartition(".")[2] for w in side.weights}
        if "q_norm" in roles:
            layer += heads + spec.n_heads + spec.n_kv_heads
        layer += (s + 1) * len(roles & {"post_attn_norm", "post_ffn_norm"})
        return 0 if self.downsample in POOLED else thin + s + 2, layer

    def passing(self, spec: ModelSpec, n_tokens: int, length: int, width: int) -> Passing:
        n, side, d, layers = n_tokens, self.side(spec), spec.d_model, spec.n_layers
        narrowed, layer = self._kept(spec)
        read = 0 if self.downsample in POOLED else d
        turned, thin_turned = (sum(rope.dim for rope in {each.rope for each in of.layers}) for of in (spec, side))
        kept = (
            Term("hidden states that are read", (layers + 1) * n * read, width),
            Term("narrowed hidden states", (layers + 1) * n * narrowed, 4),
            Term("the side network", layers * n * layer, 4),
            Term("gates", layers, 4),
            Term("its turns of positions", n * thin_turned, 4),
        )
        head = Term("what meets the head", n * (2 * d + 2 * side.d_model + 1), 4)
        # Before the last product of a layer all that it has computed is still there; beside the last one, of the side
        # network, nothing is yet but its input.
        queries, keys = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        copied = 0 if width == 4 else queries + 2 * keys + (queries + 2 * keys) // 2  # attention computes in float32
        attending, gating = 4 * d + 3 * (queries + keys) + copied, 7 * d + queries + 2 * keys + 3 * spec.d_ff
        passed = max(attending, gating) + turned - (read + narrowed + layer - side.d_model)
        base = Term("the last layer of the base", n * max(passed, 0), 4)
        lengths = (*(length,) * (n // length), n % length)
        shape = spec.n_heads, spec.n_kv_heads, spec.head_dim
        scratch = Term("scratch of attention", flash_scratch_bytes(lengths, *shape), 1)
        hidden = Term("gradients of hidden states", n * 3 * d, 4)
        back = Term("a layer of the side network, back", n * (4 * side.d_model + 4 * side.d_ff), 4)
        return Passing(kept, (head,), (base, scratch), (hidden, back))

    def cache_terms(self, spec: ModelSpec, n_positions: int) -> tuple[Term, Term]:
        """Keys and values while it generates, float32: the base's, and the side network's."""
        side = self.side(spec)
        both = 2 * n_positions * spec.n_layers * spec.n_kv_heads
        return Term("the base's cache", both * spec.head_dim, 4), Term("the side's cache", both * side.head_dim, 4)
