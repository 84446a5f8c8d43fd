"""The differentiable side of ``barefoot.ops.grids``: values of rounded weights, with gradients straight through.

A group's weights w become ŵ = s × level((w − m) / s) + m, level(u) being the nearest level to u, s the scale and m the
minimum, 0 where a grid has none. Backwards, rounding passes gradients on as if it were not there, but only for weights
that the levels reach: clipped ones have none. So, as in LSQ (Esser et al. 2020, arXiv:1902.08153),

    dŵ/dw = 1 inside, 0 outside      dŵ/ds = level − u inside, level outside      dŵ/dm = 0 inside, 1 outside

Scales and minimums are rounded to f16, as they will be stored, with gradients straight through. Weights may come as
*positions*: t with w = s₀ t + m₀ for fixed s₀ and m₀, so that one learning rate suits groups of any scale.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from barefoot.core.errors import Incompatible
from barefoot.ops.grids import F16_MAX, Grid, Table, Uniform
from barefoot.weights.solvers import Solution
from barefoot.weights.training import TILE


@dataclass(frozen=True)
class Levels:
    """The levels of a grid in units of its scale, ascending, with their codes, and whether a group has a minimum."""

    values: tuple[float, ...]
    codes: tuple[int, ...]
    is_uniform: bool
    has_minimum: bool

    @classmethod
    def of(cls, grid: Grid) -> Levels:
        """
        Raises
        ------
        Incompatible : a grid that is neither uniform nor a table.
        """
        if isinstance(grid, Uniform):
            codes = range(grid.most + 1)
            return cls(tuple(float(code - grid.zero) for code in codes), tuple(codes), True, not grid.symmetric)
        if isinstance(grid, Table):
            levels, of_levels = grid.ascending
            return cls(tuple(levels.tolist()), tuple(of_levels.tolist()), False, False)
        raise Incompatible(f"{type(grid).__name__} has no levels to learn on", cure="use a solver that does not learn")

    @property
    def reach(self) -> tuple[float, float]:
        """The least and the largest u that are rounded, not clipped: half a step beyond the ends."""
        v = self.values
        return v[0] - (v[1] - v[0]) / 2, v[-1] + (v[-1] - v[-2]) / 2

    @property
    def narrowest(self) -> float:
        """The least distance of two levels."""
        return min(b - a for a, b in itertools.pairwise(self.values))

    def of_codes(self, codes: Tensor) -> Tensor:
        """The levels that codes, integers, stand for."""
        by_code = torch.zeros(max(self.codes) + 1)
        by_code[list(self.codes)] = torch.tensor(self.values)
        return by_code[codes]

    def nearest(self, u: Tensor) -> Tensor:
        if self.is_uniform:
            return u.round().clamp_(self.values[0], self.values[-1])
        return torch.tensor(self.values)[self._index(u)]

    def _index(self, u: Tensor) -> Tensor:
        if self.is_uniform:
            return self.nearest(u) - self.values[0]
        table = torch.tensor(self.values)
        return torch.bucketize(u, (table[1:] + table[:-1]) / 2)

    def spanning(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and minimum whose levels reach from ``low`` to ``high``, not yet rounded to f16."""
        first, last = self.values[0], self.values[-1]
        if self.has_minimum:
            return (high - low) / (last - first), low
        if self.is_uniform:
            scale = torch.where(-low > high, low, high) / first
        else:
            scale = torch.maximum(high.clamp(min=0) / last, low.clamp(max=0) / first)
        return scale, torch.zeros_like(scale)

    def rounded(
        self,
        t: Tensor,
        scale: Tensor,
        minimum: Tensor,
        origin: tuple[Tensor, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """What is stored for weights or positions t (groups, group), as ``dtype``.

        scale, minimum : (groups, 1). origin : s₀ and m₀, where t are positions.
        """
        origin = origin if origin is not None else _itself(scale)
        minimum = to_f16(minimum) if self.has_minimum else torch.zeros_like(scale)
        result: Tensor = _Rounded.apply(t, to_f16(scale), minimum, *origin, self, dtype)  # type: ignore[no-untyped-call]
        return result

    def solution(
        self,
        t: Tensor,
        scale: Tensor,
        minimum: Tensor,
        shape: tuple[int, ...],
        origin: tuple[Tensor, Tensor] | None = None,
    ) -> Solution:
        """The codes of ``rounded``, and the parameters that they mean it with."""
        with torch.no_grad():
            scale, minimum = to_f16(scale), to_f16(minimum) if self.has_minimum else torch.zeros_like(scale)
            origin = origin if origin is not None else _itself(scale)
            by_level, codes = torch.tensor(self.codes, dtype=torch.uint8), torch.empty(t.shape, dtype=torch.uint8)
            for rows in _tiles(t):
                u = _position(t[rows], scale[rows], minimum[rows], *(each[rows] for each in origin))
                codes[rows] = by_level[self._index(u).int()]
            params = torch.cat([scale, minimum], dim=1) if self.has_minimum else scale
        return Solution(codes.reshape(shape).numpy(), params.reshape(shape[0], -1, params.shape[1]).numpy())


def _itself(scale: Tensor) -> tuple[Tensor, Tensor]:
    """The origin of weights that come as they are."""
    return torch.ones_like(scale), torch.zeros_like(scale)


def to_f16(x: Tensor) -> Tensor:
    """Rounded to f16 and clipped to its range, as float32, with gradients straight through."""
    rounded = x.detach().clamp(-F16_MAX, F16_MAX).half().float()
    return x + (rounded - x.detach())


class _Rounded(torch.autograd.Function):
    """Tile by tile, and once more in the backward pass, so that nothing of the weights' size is kept between."""

    @staticmethod
    def forward(
        ctx: Any, t: Tensor, s: Tensor, m: Tensor, s0: Tensor, m0: Tensor, levels: Levels, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(t, s, m, s0, m0)
        ctx.levels = levels
        out = torch.empty(t.shape, dtype=dtype, device=t.device)
        for rows in _tiles(t):
            u = _position(t[rows], s[rows], m[rows], s0[rows], m0[rows])
            out[rows] = levels.nearest(u).mul_(s[rows]).add_(m[rows])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        t, s, m, s0, m0 = ctx.saved_tensors
        low, high = ctx.levels.reach
        to_t = torch.empty_like(t) if ctx.needs_input_grad[0] else None
        to_s, to_m = torch.empty_like(s), torch.empty_like(m)
        for rows in _tiles(t):
            g = grads[0][rows].float()
            u = _position(t[rows], s[rows], m[rows], s0[rows], m0[rows])
            inside = g * ((u >= low) & (u <= high))
            # Of ``inside``, g × (level − u); of the rest, g × level.
            to_s[rows] = ((g * ctx.levels.nearest(u)).sub_(u.mul_(inside))).sum(dim=1, keepdim=True)
            to_m[rows] = (g - inside).sum(dim=1, keepdim=True)
            if to_t is not None:
                to_t[rows] = inside.mul_(s0[rows])
        return to_t, to_s, to_m, None, None, None, None


def _tiles(t: Tensor) -> Iterator[slice]:
    step = max(1, TILE // t.shape[1])
    return (slice(start, start + step) for start in range(0, len(t), step))


def _position(t: Tensor, s: Tensor, m: Tensor, s0: Tensor, m0: Tensor) -> Tensor:
    """u = (s₀ t + m₀ − m) / s; 0 in groups without a scale, which have one level only."""
    reciprocal = torch.where(s == 0, torch.zeros_like(s), 1 / torch.where(s == 0, torch.ones_like(s), s))
    return (t * (s0 * reciprocal)).add_((m0 - m) * reciprocal)
