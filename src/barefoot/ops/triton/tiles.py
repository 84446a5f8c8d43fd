"""What the kernels share: checks of their input, sizes of tiles, and the reading of headers.

A tile is ``BLOCK_ROWS`` rows of a weight by ``BLOCK_TOKENS`` tokens; ``STAGES`` steps along the columns are in flight.
Both layouts hold 16 rows interleaved, so a tile has whole sixteens of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from barefoot.core.errors import BackendMissing

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
FEW_TOKENS = 16  # fill one tile of the smallest kind
PROGRAMS, FEW_ROWS = 512, 16  # of this many rows each keep a device's memory busy


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def computes(x: torch.Tensor) -> bool:
    """Whether kernels take a tensor of this type on this device."""
    return x.dtype in FLOATS and (x.is_cuda or interpreted()) and x.numel() > 0


def check_input(x: torch.Tensor, cols: int, weight: torch.Tensor) -> None:
    """Raise TypeError, ValueError or BackendMissing unless ``x`` is (n, cols) floats, contiguous, beside the weight."""
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float16, bfloat16 or float32, got {x.dtype}")
    if x.ndim != 2 or x.shape[1] != cols or not x.is_contiguous() or len(x) == 0:
        raise ValueError(f"x must be contiguous (n_tokens, {cols}), got {tuple(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.device}")
    if not x.is_cuda and not interpreted():
        raise BackendMissing(
            f"Triton computes on a CUDA device, the tensors are on {x.device}",
            cure="move them, or use barefoot.ops, which computes on CPUs",
        )


def n_splits(n_tokens: int, n_rows: int, n_groups: int) -> int:
    """Into how many runs of groups the columns are cut: a power of two, with at least 4 groups in each.

    A weight that meets few tokens is read by programs of few rows; where those are too few, several share the rows.
    """
    splits = 1
    while n_tokens <= FEW_TOKENS and splits * n_rows < PROGRAMS * FEW_ROWS and 8 * splits <= n_groups:
        splits *= 2
    return splits


def _few_or_many(configs: list[triton.Config], arguments: dict[str, Any], **meta: Any) -> list[triton.Config]:
    few = (meta | arguments)["FEW"]
    return [config for config in configs if (config.kwargs["BLOCK_TOKENS"] == FEW_TOKENS) == few]


#: Tokens, rows, stages and warps of the tiles that are tried.
TILES = (
    (16, 16, 4, 1),
    (16, 16, 4, 2),
    (16, 32, 4, 2),
    (16, 64, 4, 4),
    (64, 64, 4, 4),
    (64, 128, 3, 4),
    (128, 128, 3, 8),
    (256, 128, 3, 8),
)


def configuration(tokens: int, rows: int, stages: int, warps: int) -> triton.Config:
    return triton.Config({"BLOCK_TOKENS": tokens, "BLOCK_ROWS": rows, "STAGES": stages}, num_warps=warps)


def tuned(kernel: Any, key: Sequence[str]) -> Any:
    """``kernel`` with the fastest tile, timed once for each value of ``key``; with a middling one where interpreted.

    Of its arguments ``FEW`` says whether the tokens fill only one small tile.
    """
    configs = [configuration(*tile) for tile in TILES]
    if interpreted():
        return triton.autotune(configs[4:5], key=[])(kernel)
    return triton.autotune(configs, key=[*key, "FEW"], prune_configs_by={"early_config_prune": _few_or_many})(kernel)


def multiplied(dtype: torch.dtype) -> Any:
    """The Triton type in which tiles of ``dtype`` are multiplied; the interpreter would multiply bfloat16's bits."""
    if dtype == torch.float16:
        return tl.float16
    return tl.bfloat16 if dtype == torch.bfloat16 and not interpreted() else tl.float32


@triton.jit
def half(words, lane, some):
    """f16 number ``lane`` [rows] of those at ``words``, float32 [rows, 1]; 0 where not ``some``.

    It is read with its neighbour: copies to shared memory, which run ahead of the products, take 4 bytes or more.
    """
    pair = tl.load((words + lane // 2)[:, None], mask=some[:, None], other=0)
    return (pair >> (lane % 2 * 16)[:, None]).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
