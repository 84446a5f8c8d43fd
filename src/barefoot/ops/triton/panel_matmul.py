"""Floats times integer groups: W4A16, W2A16 and every other width from 1 to 8 bits, from panels.

``y = x @ W^T`` with ``w = scale * (q - zero) + minimum``, one scale (and minimum) for each row and group. A program
computes a tile of tokens and rows, group by group along the columns::

    y += scale * (x @ (q - zero)) + minimum * sum(x)          x, q over the columns of the group

Codes meet the activations as whole numbers of at most 8 bits, which float16 and bfloat16 hold exactly, so weights are
never rounded: the tensor cores' products are exact, and sums and scales are float32. Float32 activations are
multiplied as such, without tensor cores.

**Reading panels.** The bytes are those of ``barefoot.ops.panels``. As numbers of 32 bits, a plane of w bits is, for
each chunk of 32 columns, w times 16 numbers, one for each row; the number of vector v and row r holds columns
``32 / w * v + c``, c = 0 .. 32 / w - 1, at bits ``8 (c mod 4) + w (c div 4)`` and up. So a tile of numbers
[n, rows], shifted by 32 / w amounts, is a tile of codes [32 / w * n, rows] in the order of the columns.

**Few tokens.** The columns are split among several programs, or too few of them would read the weight; their sums are
float32 (n_splits, n_tokens, rows) in a workspace, and are added in order: results are the same from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from barefoot.core.errors import Incompatible
from barefoot.ops import PackedWeight, blocks, panels
from barefoot.ops.triton.tiles import FEW_TOKENS, check_input, computes, half, multiplied, n_splits, tuned

__all__ = ["PanelWeight", "computes", "panel_matmul", "supports"]


@dataclass(frozen=True, eq=False)
class PanelWeight:
    """A matrix [rows, cols] as panels in ``buffer``, a uint8 tensor of rows * ``blocks.row_bytes(format, cols)``.

    Raises
    ------
    Incompatible : codes are no integers with one scale a group, or the matrix has no panels (rows no multiple of 16).
    """

    format: str
    rows: int
    cols: int
    buffer: torch.Tensor

    def __post_init__(self) -> None:
        if not supports(self.format, self.rows, self.cols):
            raise Incompatible(
                f"{self.format} [{self.rows}, {self.cols}] has no product here: it needs integers with one scale for "
                f"each group and a multiple of {panels.ROWS} rows",
                cure="decode the weight, or use an int*_g* format",
            )
        n_bytes = self.rows * blocks.row_bytes(self.format, self.cols)
        if self.buffer.dtype != torch.uint8 or not self.buffer.is_contiguous() or self.buffer.numel() != n_bytes:
            raise ValueError(
                f"panels {self.format} [{self.rows}, {self.cols}] need {n_bytes} contiguous uint8, got "
                f"{self.buffer.numel()} of {self.buffer.dtype}"
            )

    @classmethod
    def of(cls, weight: PackedWeight, device: torch.device | str) -> PanelWeight:
        """A copy on ``device`` of a weight in rows or panels."""
        assert weight.buffer is not None
        buffer = weight.buffer
        if weight.layout == "rows" and supports(weight.format, weight.rows, weight.cols):
            buffer = panels.pack(weight.format, buffer.reshape(weight.rows, -1), weight.cols)
        return cls(weight.format, weight.rows, weight.cols, torch.from_numpy(buffer.reshape(-1).copy()).to(device))


def supports(format_id: str, n_rows: int, n_cols: int) -> bool:
    """Whether a matrix of that format and shape can be multiplied here: integers around a zero or above a minimum."""
    group = blocks.lookup(format_id).group
    return group is not None and group.is_affine and panels.supports(format_id, n_rows, n_cols)


def panel_matmul(x: torch.Tensor, weight: PanelWeight) -> torch.Tensor:
    """x @ W^T, (n_tokens, rows) in the dtype of ``x``.

    Parameters
    ----------
    x : float16, bfloat16 or float32 (n_tokens, cols), contiguous, on the device of the weight
    """
    check_input(x, weight.cols, weight.buffer)
    group = blocks.lookup(weight.format).group
    assert group is not None
    size = blocks.block_elements(weight.format)
    n_tokens, n_groups = len(x), weight.cols // size
    few = n_tokens <= FEW_TOKENS
    splits = n_splits(n_tokens, weight.rows, n_groups)
    out = x.new_empty((splits, n_tokens, weight.rows), dtype=x.dtype if splits == 1 else torch.float32)
    sums = (
        x
        if few or not group.has_minimum
        else x.view(n_tokens, n_groups, size).sum(2, dtype=torch.float32).t().contiguous()
    )

    def grid(tile: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(weight.rows, tile["BLOCK_ROWS"]), triton.cdiv(n_tokens, tile["BLOCK_TOKENS"]), splits

    _tuned_kernel[grid](
        x,
        sums,
        weight.buffer.view(torch.int32),
        out,
        n_tokens,
        weight.rows,
        weight.cols,
        triton.cdiv(n_groups, splits),
        FEW=few,
        GROUP=size,
        BITS=group.bits,
        LOW_BITS=panels.PLANES[group.bits][0],
        HAS_MINIMUM=group.has_minimum,
        ZERO=128 if group.signed else group.zero,
        TYPE=multiplied(x.dtype),
    )
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)


@triton.jit
def _codes(words, some, chunks: tl.constexpr, chunk_words: tl.constexpr, width: tl.constexpr, rows: tl.constexpr):
    """The codes of a plane of ``width`` bits, int32 [rows, 32 chunks]; ``words`` are its first numbers, one a row.

    Each ``join`` adds a last axis of two, so the last one is the lowest bit of the column.
    """
    v = tl.arange(0, chunks * width)[None, :]
    number = tl.load(words[:, None] + (v // width * chunk_words + v % width) * 16, mask=some[:, None], other=0)
    if width < 8:
        number = tl.join(number, number >> 4)
    if width < 4:
        number = tl.join(number, number >> 2)
    if width < 2:
        number = tl.join(number, number >> 1)
    number = tl.join(number, number >> 16)
    number = tl.join(number, number >> 8)
    return tl.reshape(number, (rows, 32 * chunks)) & ((1 << width) - 1)


@triton.jit
def _kernel(
    x,
    sums,  # of x in each group, float32 (n_groups, n_tokens); not read where FEW
    words,  # the panels, as numbers of 32 bits
    out,
    n_tokens,
    n_rows,
    n_cols,
    split_groups,
    FEW: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    LOW_BITS: tl.constexpr,  # of the first plane; fewer than BITS where there is a second one
    HAS_MINIMUM: tl.constexpr,
    ZERO: tl.constexpr,
    TYPE: tl.constexpr,  # in which codes meet activations
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    CHUNKS: tl.constexpr = GROUP // 32
    HEADER: tl.constexpr = 16 if HAS_MINIMUM else 8  # in numbers of 32 bits
    GROUP_WORDS: tl.constexpr = HEADER + 16 * CHUNKS * BITS
    n_groups = n_cols // GROUP
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    split = tl.program_id(2)
    lane = row % 16
    panel = words + (row // 16).to(tl.int64) * (n_groups * GROUP_WORDS)
    is_row, is_token = row < n_rows, (token < n_tokens)[None, :]
    inputs = x + token.to(tl.int64)[None, :] * n_cols + tl.arange(0, GROUP)[:, None]
    total = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    stop = tl.minimum((split + 1) * split_groups, n_groups)
    for g in tl.range(split * split_groups, stop, num_stages=STAGES):
        header = panel + g * GROUP_WORDS
        payload = header + HEADER + lane
        codes = _codes(payload, is_row, CHUNKS, BITS, LOW_BITS, BLOCK_ROWS)
        if LOW_BITS < BITS:
            high = _codes(payload + 16 * LOW_BITS, is_row, CHUNKS, BITS, BITS - LOW_BITS, BLOCK_ROWS)
            codes += high << LOW_BITS
        a = tl.load(inputs + g * GROUP, mask=is_token, other=0).to(TYPE)
        whole = tl.dot((codes - ZERO).to(TYPE), a, input_precision="ieee")
        total += whole * half(header, lane, is_row)
        if HAS_MINIMUM:
            if FEW:
                added = tl.sum(a.to(tl.float32), axis=0)[None, :]
            else:
                added = tl.load(sums + g * n_tokens + token[None, :], mask=is_token, other=0)
            total += added * half(header + 8, lane, is_row)
    places = out + (split.to(tl.int64) * n_tokens + token)[None, :] * n_rows + row[:, None]
    tl.store(places, total.to(out.dtype.element_ty), mask=is_token & is_row[:, None])


_tuned_kernel = tuned(_kernel, key=("n_rows", "n_cols", "GROUP", "BITS"))
