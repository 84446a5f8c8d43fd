"""A decoder that is only passed forward, and the thin network beside it that learns (:mod:`barefoot.adapters.qst`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from barefoot.adapters import Factor
from barefoot.adapters.folders import read_arrays, write_arrays
from barefoot.adapters.qst import QST
from barefoot.core.errors import Incompatible
from barefoot.core.model import ModelSpec, WeightGroup
from barefoot.io.inventory import Checkpoint
from barefoot.train import MicroBatch
from barefoot.train.driver.cross_entropy import cross_entropy
from barefoot.train.driver.decoder import Frozen, Turns, turns_of
from barefoot.train.driver.elementwise import rms_norm
from barefoot.train.driver.layer import LayerPass, StreamLayer
from barefoot.train.footprint import Compute
from barefoot.train.losses import Loss
from barefoot.weights.formats import WeightFormat
from barefoot.weights.recycling import Recycler

NORM_EPS = 1e-5  # of the norms behind the narrowing


class SideDecoder(Frozen):
    """
    Parameters
    ----------
    seed : of the side network's first values.
    compute : of the base's products, and of those that narrow its hidden states; the side network is in float32.
    """

    recycler: Recycler | None = None  # PyTorch itself allocates what the side network keeps

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        adapter: QST,
        *,
        formats: Mapping[WeightGroup, WeightFormat] | None = None,
        seed: int = 0,
        compute: Compute = "float32",
    ) -> None:
        super().__init__(checkpoint, spec, formats=formats, compute=compute)
        self.adapter, self.side = adapter, adapter.side(spec)
        random = torch.Generator().manual_seed(seed)
        self._learned = {f.name: nn.Parameter(_first(f, random)) for f in adapter.factors(spec)}
        self.own = nn.ParameterList(self._learned.values())
        self._roles: list[dict[str, nn.Parameter]] = [{} for _ in spec.layers]
        for weight in self.side.weights:
            assert weight.layer is not None
            self._roles[weight.layer][weight.name.rpartition(".")[2]] = self._learned[weight.name]

    def adapters(self) -> dict[str, nn.Parameter]:
        """What learns, by the names of the adapter's factors."""
        return dict(self._learned)

    def settled(self) -> dict[str, Tensor]:
        return {}

    def advance(self, step: int, steps: int) -> dict[str, slice]:
        """All of it learns to the end."""
        return {}

    def write(self, folder: Path, base: str | None = None) -> None:
        """Write what learns."""
        arrays = {name: parameter.detach().numpy() for name, parameter in self._learned.items()}
        write_arrays(folder, self.adapter, self.spec, arrays, base=base)

    def read(self, folder: Path) -> None:
        """Take up what was written, in place of what was learned: another task over the same base.

        Raises
        ------
        Incompatible : it has another form than this side network.
        BarefootError : as :func:`barefoot.adapters.folders.read_arrays`.
        """
        adapter, arrays = read_arrays(folder, self.spec)
        if adapter != self.adapter:
            raise Incompatible(f"{folder} holds {adapter}, this side network is {self.adapter}")
        with torch.no_grad():
            for name, parameter in self._learned.items():
                parameter.copy_(torch.from_numpy(arrays[name]))

    def hidden(self, batch: MicroBatch) -> Tensor:
        """What meets the head, float32 (N, d_model)."""
        with torch.no_grad():
            x, turns = self.embedded(batch), turns_of(self.spec, batch.lengths)
        thin, thin_turns = self.narrowed(0, x), turns_of(self.side, batch.lengths)
        for index in range(self.spec.n_layers):
            with torch.no_grad():
                x = self.layer(index, turns, batch.lengths)(x)
            thin = self.beside(index, thin_turns, batch.lengths)(self.fused(index, x, thin))
        return self.joined(x, thin)

    def loss(self, batch: MicroBatch, loss: Loss) -> Tensor:
        """The mean over the tokens that predict something."""
        labels = torch.from_numpy(batch.labels)
        cap, taught = self.spec.logit_softcap, batch.taught
        return cross_entropy(loss, self.hidden(batch), self.head, labels, softcap=cap, taught=taught)

    # --- the side network ---

    def narrowed(self, index: int, x: Tensor) -> Tensor:
        """n_i (1, N, s) of the hidden states (1, N, d_model) behind a layer."""
        kind, width = self.adapter.downsample, self.side.d_model
        if kind in ("max", "average"):
            groups = x.unflatten(-1, (width, self.adapter.r))
            return groups.amax(-1) if kind == "max" else groups.mean(-1)
        own = self._learned
        prefix = f"layers.{index}.narrow"
        first = own[prefix if kind == "linear" else f"{prefix}_A"]
        thin = F.linear(x.to(self.compute), first.to(self.compute)).float()
        if kind != "linear":
            thin = F.linear(F.silu(thin) if kind == "adapter" else thin, own[f"{prefix}_B"])
        return F.layer_norm(thin, (width,), own[f"{prefix}_norm"][0], own[f"{prefix}_shift"][0], NORM_EPS)

    def fused(self, index: int, x: Tensor, thin: Tensor) -> Tensor:
        """What a layer of the side network meets: (1 - β) n_i + β g_(i-1)."""
        return torch.lerp(self.narrowed(index, x), thin, torch.sigmoid(self._learned[f"layers.{index}.gamma"]))

    def beside(self, index: int, turns: Turns, lengths: tuple[int, ...]) -> LayerPass:
        """A layer of the side network as a function of (1, N, s)."""
        roles, turn = self._roles[index], turns[self.side.layers[index].rope]
        products = {role: partial(F.linear, weight=weight) for role, weight in roles.items() if len(weight) > 1}
        return LayerPass(StreamLayer(self.side, index, *turn, lengths=lengths, products=products), roles)

    def joined(self, x: Tensor, thin: Tensor) -> Tensor:
        """α norm(h) + (1 - α) (norm_g(g) Uᵀ + b), (N, d_model); exactly norm(h) where α is 1."""
        with torch.no_grad():
            base = self.normed(x)
        own = self._learned
        normed = rms_norm(thin.flatten(0, 1), own["norm"][0], self.spec.norm_eps)
        return torch.lerp(F.linear(normed, own["widen"], own["widen_bias"][0]), base, own["alpha"])


def _first(factor: Factor, random: torch.Generator) -> Tensor:
    """α and norms from 1, γ and what is added from 0, matrices uniform in ± 1 / sqrt(inputs)."""
    role = factor.name.rpartition(".")[2]
    if role == "alpha" or role.endswith("norm"):
        return torch.ones(factor.rows, factor.cols)
    if role.endswith(("gamma", "shift", "bias")):
        return torch.zeros(factor.rows, factor.cols)
    bound = factor.cols**-0.5
    return torch.empty(factor.rows, factor.cols).uniform_(-bound, bound, generator=random)
