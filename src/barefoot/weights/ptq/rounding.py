"""Learned rounding: up or down for each weight, by what the layer computes, on any grid with known neighbours.

Up or Down? Adaptive Rounding for Post-Training Quantization (Nagel et al. 2020, arXiv:2004.10568), on the grids of
minifloats as in Aggarwal et al. 2023 (arXiv:2311.12359, section III), where the gap between the two candidates depends
on the exponent. With V free, h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1) lies between the candidates::

    ŵ = floor(w) + h(V) (ceil(w) - floor(w))
    loss = mean (f(x; w) - f(x; ŵ))² + λ Σ (1 - |2 h(V) - 1|^β)

β falls from 20 to 2 over the last four fifths of the steps, which drives every h to 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from barefoot.weights.minifloat import Minifloat

if TYPE_CHECKING:
    import torch

F32 = npt.NDArray[np.float32]
WARM_UP = 0.2  # share of the steps without the regularizer


def neighbours(y: F32, fmt: Minifloat) -> tuple[F32, F32]:
    """The levels below and above each element; the same one twice where an element is a level or beyond the last."""
    spacing = fmt.spacing(y)
    least = 0.0 if fmt.unsigned else -fmt.largest
    low, high = (np.clip(side(y / spacing) * spacing, least, fmt.largest) for side in (np.floor, np.ceil))
    return low, high


def learn_rounding(
    low: F32,
    high: F32,
    weight: F32,
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    n_steps: int = 400,
    rate: float = 3e-2,
    strength: float = 0.1,
    batch: int = 32,
    seed: int = 0,
) -> F32:
    """The rounded weights, each ``low`` or ``high``, in the shape of ``weight``.

    ``forward`` : weights and inputs → outputs; ``targets`` what the original weights make of the original inputs.
    Never a larger error on the whole calibration set than nearest rounding has.
    """
    import torch

    below, above = torch.from_numpy(low), torch.from_numpy(high)
    gap = above - below
    share = torch.where(gap > 0, (torch.from_numpy(weight) - below) / torch.where(gap > 0, gap, 1), 0).clip(0, 1)
    v = -torch.log(1.2 / (share + 0.1) - 1)
    v.requires_grad_()
    optimizer = torch.optim.Adam([v], lr=rate)
    generator = torch.Generator().manual_seed(seed)
    scale = float((targets**2).mean())
    for step in range(n_steps):
        picked = torch.randint(0, len(inputs), (min(batch, len(inputs)),), generator=generator)
        h = (1.2 * torch.sigmoid(v) - 0.1).clip(0, 1)
        loss = ((forward(below + h * gap, inputs[picked]) - targets[picked]) ** 2).mean() / scale
        progress = step / n_steps
        if progress >= WARM_UP:
            beta = 2 + 18 * (1 - (progress - WARM_UP) / (1 - WARM_UP))
            loss = loss + strength * (1 - (2 * h - 1).abs() ** beta).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    with torch.no_grad():
        candidates = [torch.where(choice, above, below) for choice in (v > 0, share > 0.5)]
        errors = [sum(_errors(forward, w, inputs, targets, batch)) for w in candidates]
        return candidates[int(errors[1] < errors[0])].numpy()


def _errors(
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    weight: torch.Tensor,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    batch: int,
) -> list[float]:
    import torch

    parts = zip(torch.split(inputs, batch), torch.split(targets, batch), strict=True)
    return [float(((forward(weight, x) - y) ** 2).sum()) for x, y in parts]
