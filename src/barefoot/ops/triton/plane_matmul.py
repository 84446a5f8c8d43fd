"""Few bits times few bits: weights of 1 to 8 bipolar planes, activations of 1 to 8 bits, in whole numbers.

Efficient Arbitrary Precision Acceleration for Large Language Models on GPU Tensor Cores (Ma et al. 2024,
arXiv:2409.17870). Format, layout and arithmetic are those of ``barefoot.ops.planes``, byte for byte: weights of n bits
are read as n bits each, activations are rounded per token and group, and for each row, token and group::

    y += step / 2 * s * sum_k V(w_k) V(x_k) + offset * sum_k x_k          V(q) = 2 q - (2^n - 1)

**What multiplies.** The paper multiplies plane by plane with 1-bit tensor-core instructions (XOR and population
count), of which Ampere had eight times as many as of 8 bits; Hopper dropped them, and Triton has none. What is left for
1-bit products is the population count of the ordinary cores: 16 numbers of 32 bits a clock and multiprocessor, or 512
products for one of the nw * nx pairs of planes. The 8-bit tensor cores do 4,096 whatever the bits are, so here planes
are joined to codes in registers, once for all tokens of a tile, and V meets V as 8-bit numbers in 32-bit sums: eight
times as fast already at 1 bit by 1 bit. The values of 8 bits reach 255; being sums over planes, they are two numbers of
4 bits, ``V = 16 V(q div 16) + V(q mod 16)``, and two products.

Nothing is counted, so padding needs no equal bits: activations past the last column meet weights as 0.

**Joining planes.** A number of a plane holds one bit of 32 columns. Shifted by s = 0 .. 7 and masked with 0x01010101 it
holds the bits of columns s, 8 + s, 16 + s and 24 + s, one in each byte, and so do four codes once all planes are added,
each shifted by its place.

*Differs from the paper*: the instructions, as above; no plane of the activations is ever made; scales are per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from barefoot.ops.planes import MAX_BITS, SMALLEST, WORD, PlaneFormat, PlaneWeight
from barefoot.ops.triton.tiles import FEW_TOKENS, check_input, half, n_splits, tuned

STEP_WORDS = 4  # of 32 columns, multiplied at a time; 128 products of 255 by 255 are exact in float32


@dataclass(frozen=True, eq=False)
class DevicePlanes:
    """A matrix [rows, cols] as planes in ``buffer``, a uint8 tensor of ``format.n_bytes(rows, cols)``."""

    format: PlaneFormat
    rows: int
    cols: int
    buffer: torch.Tensor

    def __post_init__(self) -> None:
        n_bytes = self.format.n_bytes(self.rows, self.cols)
        if self.buffer.dtype != torch.uint8 or not self.buffer.is_contiguous() or self.buffer.numel() != n_bytes:
            raise ValueError(
                f"planes [{self.rows}, {self.cols}] need {n_bytes} contiguous uint8, got {self.buffer.numel()} of "
                f"{self.buffer.dtype}"
            )

    @classmethod
    def of(cls, weight: PlaneWeight, device: torch.device | str) -> DevicePlanes:
        """A copy on ``device``."""
        buffer = torch.from_numpy(weight.buffer.copy()).to(device)
        return cls(weight.format, weight.rows, weight.cols, buffer)


def quantize_activations(x: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """V, s and the sums of x as ``planes`` defines them.

    V is int8 (1, n_tokens, cols); of 8 bits (2, n_tokens, cols), the V of the high and of the low 4 bits. s and sums
    are float32 (groups, n_tokens).
    """
    n_tokens, n_cols = x.shape
    n_groups = triton.cdiv(n_cols, group)
    values = torch.empty((1 + (bits == MAX_BITS), *x.shape), dtype=torch.int8, device=x.device)
    scales = torch.empty((n_groups, n_tokens), dtype=torch.float32, device=x.device)
    sums = torch.empty_like(scales)
    _quantize[(n_tokens, n_groups)](
        x,
        values,
        scales,
        sums,
        n_cols,
        GROUP=group,
        BITS=bits,
        SMALLEST=float(SMALLEST),
        BLOCK=triton.next_power_of_2(group),
    )
    return values, scales, sums


def plane_matmul(x: torch.Tensor, weight: DevicePlanes, activation_bits: int) -> torch.Tensor:
    """x @ W^T, (n_tokens, rows) in the dtype of ``x``, with x rounded to ``activation_bits`` (1 to 8) bits.

    Parameters
    ----------
    x : float16, bfloat16 or float32 (n_tokens, cols), contiguous, on the device of the weight. A group that holds NaN
        or infinity makes the token's outputs NaN.
    """
    check_input(x, weight.cols, weight.buffer)
    if not 1 <= activation_bits <= MAX_BITS:
        raise ValueError(f"activations have 1 to {MAX_BITS} bits, got {activation_bits}")
    fmt, n_tokens = weight.format, len(x)
    values, scales, sums = quantize_activations(x, activation_bits, fmt.group)
    n_groups = len(scales)
    splits = n_splits(n_tokens, weight.rows, n_groups)
    out = x.new_empty((splits, n_tokens, weight.rows), dtype=x.dtype if splits == 1 else torch.float32)
    n_words = fmt.group // WORD

    def grid(tile: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(weight.rows, tile["BLOCK_ROWS"]), triton.cdiv(n_tokens, tile["BLOCK_TOKENS"]), splits

    _tuned_kernel[grid](
        values,
        scales,
        sums,
        weight.buffer.view(torch.int32),
        out,
        n_tokens,
        weight.rows,
        weight.cols,
        n_groups,
        triton.cdiv(n_groups, splits),
        FEW=n_tokens <= FEW_TOKENS,
        W_BITS=fmt.bits,
        X_BITS=activation_bits,
        GROUP_WORDS=n_words,
        WORDS=min(n_words & -n_words, STEP_WORDS),
        HAS_MINIMUM=fmt.has_minimum,
        OFFSET=fmt.levels / 2 - fmt.zero,
    )
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)


@triton.jit
def _value(codes, bits: tl.constexpr):
    return (2 * codes - ((1 << bits) - 1)).to(tl.int8)


@triton.jit
def _quantize(
    x,
    values,
    scales,
    sums,
    n_cols,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    LEVELS: tl.constexpr = (1 << BITS) - 1
    token, group, n_tokens = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0)
    i = tl.arange(0, BLOCK)
    column = group * GROUP + i
    some = (i < GROUP) & (column < n_cols)
    number = tl.load(x + token * n_cols + column, mask=some, other=0).to(tl.float32)
    finite = tl.min((tl.abs(number) < float("inf")).to(tl.int32), axis=0) == 1
    largest = tl.max(tl.where(finite, tl.abs(number), 0.0), axis=0)
    used = largest >= SMALLEST
    number = tl.where(used, number, 0.0)
    inverse = 0.5 * LEVELS / tl.where(used, largest, 1.0)
    code = tl.floor(number * inverse + (1 << (BITS - 1))).to(tl.int32)
    place = token * n_cols + column
    if BITS < 8:
        tl.store(values + place, _value(code, BITS), mask=some)
    else:
        tl.store(values + place, _value(code >> 4, 4), mask=some)
        tl.store(values + n_tokens.to(tl.int64) * n_cols + place, _value(code & 15, 4), mask=some)
    place = group * n_tokens + token
    tl.store(scales + place, tl.where(finite, tl.where(used, largest / LEVELS, 0.0), float("nan")))
    tl.store(sums + place, tl.where(finite, tl.sum(number, axis=0), float("nan")))


@triton.jit
def _codes(words, n_left, some, count: tl.constexpr, bits: tl.constexpr, rows: tl.constexpr):
    """Codes int32 [rows, 32 count] of neighbouring words of columns, of which ``n_left`` are there."""
    w = tl.arange(0, count)[None, :]
    mask = some[:, None] & (w < n_left)
    packed = tl.zeros((rows, count, 2, 2, 2), tl.int32)
    for plane in tl.static_range(bits):
        number = tl.load(words[:, None] + (w * bits + plane) * 16, mask=mask, other=0)
        spread = tl.join(number, number >> 4)
        spread = tl.join(spread, spread >> 2)
        spread = tl.join(spread, spread >> 1)
        packed |= (spread & 0x01010101) << plane
    four = tl.join(packed, packed >> 16)
    four = tl.join(four, four >> 8)
    by_shift = tl.reshape(four, (rows, count, 8, 4))
    return tl.reshape(tl.permute(by_shift, (0, 1, 3, 2)), (rows, 32 * count)) & 255


@triton.jit
def _product(codes, x, bits: tl.constexpr):
    """V of ``codes`` [rows, columns] times ``x`` int8 [columns, tokens], int32."""
    if bits < 8:
        return tl.dot(_value(codes, bits), x, out_dtype=tl.int32)
    high = tl.dot(_value(codes >> 4, 4), x, out_dtype=tl.int32)
    return 16 * high + tl.dot(_value(codes & 15, 4), x, out_dtype=tl.int32)


@triton.jit
def _kernel(
    values,  # of x, int8 (1 or 2, n_tokens, n_cols)
    scales,  # float32 (n_groups, n_tokens)
    sums,
    words,  # the planes, as numbers of 32 bits
    out,
    n_tokens,
    n_rows,
    n_cols,
    n_groups,
    split_groups,
    FEW: tl.constexpr,
    W_BITS: tl.constexpr,
    X_BITS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    WORDS: tl.constexpr,  # of a step; divides GROUP_WORDS
    HAS_MINIMUM: tl.constexpr,
    OFFSET: tl.constexpr,  # in steps
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    HEADER: tl.constexpr = 16 if HAS_MINIMUM else 8
    STEPS: tl.constexpr = GROUP_WORDS // WORDS
    GROUP_NUMBERS: tl.constexpr = HEADER + 16 * W_BITS * GROUP_WORDS
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    split = tl.program_id(2)
    lane = row % 16
    n_words = (n_cols + 31) // 32
    tile = words + (row // 16).to(tl.int64) * (n_groups * HEADER + 16 * W_BITS * n_words)
    is_row, is_token = row < n_rows, (token < n_tokens)[None, :]
    column = tl.arange(0, 32 * WORDS)[:, None]
    inputs = values + token.to(tl.int64)[None, :] * n_cols + column
    total = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), tl.float32)
    stop = tl.minimum(tl.minimum((split + 1) * split_groups, n_groups) * STEPS, (n_words + WORDS - 1) // WORDS)
    for i in tl.range(split * split_groups * STEPS, stop, num_stages=STAGES):
        g = i // STEPS
        header = tile + g * GROUP_NUMBERS
        payload = header + HEADER + lane + (i % STEPS) * (16 * W_BITS * WORDS)
        w = _codes(payload, n_words - i * WORDS, is_row, WORDS, W_BITS, BLOCK_ROWS)
        here = is_token & (column < n_cols - i * 32 * WORDS)
        x = tl.load(inputs + i * 32 * WORDS, mask=here, other=0)
        whole = _product(w, x, W_BITS)
        if X_BITS == 8:
            low = tl.load(inputs + n_tokens.to(tl.int64) * n_cols + i * 32 * WORDS, mask=here, other=0)
            whole = 16 * whole + _product(w, low, W_BITS)
        step = half(header, lane, is_row)
        s = tl.load(scales + g * n_tokens + token[None, :], mask=is_token, other=0)
        total += whole.to(tl.float32) * (0.5 * step * s)
        if HAS_MINIMUM or OFFSET != 0:
            offset = OFFSET * step
            if HAS_MINIMUM:
                offset += half(header + 8, lane, is_row)
            added = tl.load(sums + g * n_tokens + token[None, :], mask=is_token & (i % STEPS == 0), other=0)
            total += offset * added
    places = out + (split.to(tl.int64) * n_tokens + token)[None, :] * n_rows + row[:, None]
    tl.store(places, total.to(out.dtype.element_ty), mask=is_token & is_row[:, None])


_tuned_kernel = tuned(_kernel, key=("n_rows", "n_cols", "GROUP_WORDS", "W_BITS", "X_BITS"))
