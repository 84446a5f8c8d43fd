"""Fine-tuning with learned step sizes: weights and inputs of any PyTorch modules rounded in every forward pass.

A Survey of Quantization Methods for Efficient Neural Network Inference (Gholami et al. 2021, arXiv:2103.13630), section
III.G: quantization-aware training with the straight-through estimator, steps learned beside the weights as in LSQ
(Learned Step Size Quantization, Esser et al. 2020, arXiv:1902.08153). With q levels above 0::

    x̂ = s l,  l = clip(round(x / s), -q - 1 or 0, q)
    dx̂/dx = 1 inside, 0 where clipped        dx̂/ds = l - x / s inside, l where clipped

Weights have a step for each row, inputs one for the whole array, without a sign where none was seen. *Differs from
LSQ*: what is learned is the logarithm of s over where it began, so that no step reaches 0 and a learning rate is a
relative change, for which LSQ divides its gradients; inside reaches half a step beyond the last levels, where rounding
moves as far as elsewhere; steps begin where the squared error is least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from barefoot.core.errors import InvalidInput
from barefoot.weights import bitstream
from barefoot.weights.affine import Affine
from barefoot.weights.ranges import least_error
from barefoot.weights.taxonomy import Encoded, Quantizer
from barefoot.weights.training.grids import Levels
from barefoot.weights.training.modules import replaced

SAMPLE = 1 << 16  # values of an input on which its first step is chosen


class Bits(NamedTuple):
    """Of a module: of its weight, and of its input (None leaves it as it is)."""

    weight: int
    inputs: int | None = 8


class Steps(nn.Module):
    """Rounds arrays to ``bits``, learning the ``growth`` of the step of each of their rows from ``start``, (n_rows, 1).

    Computes in float32, whatever the array's type.
    """

    start: Tensor

    def __init__(self, bits: int, signed: bool, start: Tensor) -> None:
        super().__init__()
        zero = 1 << (bits - 1) if signed else 0
        codes = range(1 << bits)
        self.levels = Levels(tuple(float(code - zero) for code in codes), tuple(codes), True, False)
        self.bits, self.growth = bits, nn.Parameter(torch.zeros_like(start))
        self.register_buffer("start", start)

    @property
    def steps(self) -> Tensor:
        return self.start * self.growth.exp()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(self.start), -1).float()
        return self.levels.rounded(rows, self.steps, torch.zeros_like(self.start)).reshape(x.shape).to(x.dtype)


@contextmanager
def rounding(modules: Mapping[nn.Module, Bits], calibrate: Callable[[], object]) -> Iterator[None]:
    """While this lasts, the ``weight`` of each module and the input of its ``forward`` are rounded.

    ``calibrate`` runs the model on typical inputs, once or more. Steps are parameters of the modules, so any training
    loop learns them with the weights; optimizers must be made inside. Afterwards the modules hold their masters again:
    take ``stored`` before.

    Raises
    ------
    InvalidInput : weights of fewer than 2 bits or more than 8, inputs of fewer than 1 or more than 8, or of 1 where
        some are negative; ``calibrate`` leaves a module out whose inputs are to be rounded, or names them.
    """
    seen: dict[nn.Module, Tensor] = {}

    def measure(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not inputs:
            raise InvalidInput(f"{module} was called without a positional argument, which is what is rounded")
        x = inputs[0].detach().float().reshape(1, -1)
        x = torch.cat([seen.get(module, x[:, :0]), x], dim=1)
        # Thinned out, but not of what tells whether there is a sign.
        seen[module] = torch.cat([x[:, :: -(-x.shape[1] // SAMPLE)], x.min().reshape(1, 1)], dim=1)

    for bits in modules.values():
        Affine(bits.weight, "full")
        if bits.inputs is not None:
            Affine(bits.inputs)
    rounds_inputs = [module for module, bits in modules.items() if bits.inputs is not None]
    hooks = [module.register_forward_pre_hook(measure) for module in rounds_inputs]
    try:
        with torch.no_grad():
            calibrate()
    finally:
        for hook in hooks:
            hook.remove()
    missed = [module for module in rounds_inputs if module not in seen]
    if missed:
        raise InvalidInput(f"calibration met no input of {missed[0]}", cure="run all of the model in it")
    inputs: dict[nn.Module, Steps] = {}
    for module, x in seen.items():
        n_bits, signed = modules[module].inputs or 0, bool((x < 0).any())
        if signed and n_bits < 2:
            raise InvalidInput("1 bit has no level below 0", cure="give inputs with a sign at least 2 bits")
        inputs[module] = Steps(n_bits, signed, _start(x, n_bits, signed))
    weights: dict[nn.Module, nn.Module] = {}
    for module, bits in modules.items():
        rows = module.weight.detach().reshape(len(module.weight), -1)  # type: ignore[arg-type, operator]
        weights[module] = Steps(bits.weight, True, _start(rows, bits.weight, True))
    try:
        for module, steps in inputs.items():
            module.register_module("input_steps", steps)  # so that optimizers find them
        with replaced(weights, inputs):
            yield
    finally:
        for module in inputs:
            if hasattr(module, "input_steps"):
                del module.input_steps


def _start(rows: Tensor, bits: int, signed: bool) -> Tensor:
    """The steps (n, 1) of least squared error of ``rows`` (n, k)."""
    grid = Affine(bits, "full" if signed else "asymmetric")
    low, high = least_error(rows.float(), grid)
    return grid.parameters(low if signed else torch.zeros_like(high), high)[0]


def stored(module: nn.Module) -> Encoded:
    """The bytes of a module's rounded weight, a matrix of as many rows: what it multiplies by, inside ``rounding``."""
    weight: Tensor = module.parametrizations.weight.original  # type: ignore[union-attr, assignment]
    steps: Steps = module.parametrizations.weight[0]  # type: ignore[union-attr, index, assignment]
    rows, scales = weight.detach().float().reshape(len(weight), -1).cpu(), steps.steps.detach().cpu()
    shape = (rows.shape[0], rows.shape[1])
    solution = steps.levels.solution(rows, scales, torch.zeros_like(scales), shape)
    codes = bitstream.pack(solution.codes.astype(np.uint16).reshape(-1), steps.bits)
    stored_scales = solution.params.reshape(-1).astype(np.float16)
    return Encoded(Quantizer(steps.bits, symmetry="full"), shape, codes, stored_scales, None, None)
