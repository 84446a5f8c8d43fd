"""How sharply a loss bends along some of a model's weights: the top eigenvalue of its Hessian, and how much it varies.

Q-BERT (Shen et al. 2019, arXiv:1909.05840), section 3.1. For the weights W of one layer, H = ∂²L/∂W² is never formed:
power iteration only multiplies by it, v ← H v / ‖H v‖ with H v = ∂(gᵀv)/∂W for the gradient g, until the Rayleigh
quotient vᵀ H v, which tends to the eigenvalue λ of largest magnitude (its sign kept), changes by less than 0.1 %.

One batch gives one λ. Over many batches, of about a tenth of the training set,

    Ω = |mean(λ)| + std(λ)

ranks the layers: on language tasks the curvature varies so much over the data that the mean alone misleads. The sign
tells whether the model is at a minimum at all: the paper traces its worst results to negative curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from barefoot.core.errors import InvalidInput
from barefoot.weights.arrays import Array

if TYPE_CHECKING:
    import torch


def top_eigenvalue(
    product: Callable[[Array], Array], start: Array, tolerance: float = 1e-3, n_iterations: int = 100
) -> float:
    """The eigenvalue of largest magnitude of a symmetric matrix that is known by its products.

    ``product`` : v (n,) → H v (n,). ``start`` : any vector (n,) that is not orthogonal to the eigenvector; random.
    """
    value, v = 0.0, start / (start @ start) ** 0.5
    for _ in range(n_iterations):
        image = product(v)
        before, value = value, float(v @ image)
        norm = float(image @ image) ** 0.5
        if norm == 0 or abs(value - before) <= tolerance * abs(value):
            break
        v = image / norm
    return value


def hessian_product(loss: torch.Tensor, parameters: Sequence[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """v → H v, on the concatenation (n,) of ``parameters``, for a scalar ``loss`` that was computed from them.

    Raises
    ------
    InvalidInput : the loss does not depend on the parameters, or not twice: the gradient of fused operations can't be
        differentiated again.
    """
    import torch

    gradients = torch.autograd.grad(loss, list(parameters), create_graph=True, allow_unused=True)
    if any(g is None or not g.requires_grad for g in gradients):
        raise InvalidInput(
            "the gradient of the loss can't be differentiated again",
            cure="compute the loss from these parameters, by operations that have second derivatives (eager attention)",
        )
    flat = torch.cat([g.reshape(-1) for g in gradients])

    def product(v: torch.Tensor) -> torch.Tensor:
        images = torch.autograd.grad(flat, list(parameters), v, retain_graph=True, materialize_grads=True)
        return torch.cat([image.reshape(-1) for image in images])

    return product


def sensitivity(eigenvalues: Sequence[float]) -> float:
    """Ω = |mean| + standard deviation of one layer's top eigenvalues over batches (equation 3 of the paper).

    Raises
    ------
    InvalidInput : there are fewer than two, which have no spread.
    """
    if len(eigenvalues) < 2:
        raise InvalidInput(f"the spread of {len(eigenvalues)} eigenvalue is unknown", cure="measure on more batches")
    return float(abs(np.mean(eigenvalues)) + np.std(eigenvalues))
