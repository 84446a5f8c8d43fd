"""The numerical ops of barefoot: one schema per op, compiled kernels behind it, numpy where they are missing.

Arrays are C-contiguous numpy arrays. Activations are float32 [n_tokens, d]; weights and KV buffers are uint8 in the
formats of ``barefoot.ops.blocks``, ``barefoot.ops.planes`` and ``barefoot.ops.kvrows``. Nothing is allocated inside an
op: outputs and scratch are the caller's, and ``matmul_scratch_bytes``, ``plane_scratch_bytes`` and
``attention_scratch_bytes`` say how much. Wrong shapes, dtypes or sizes raise TypeError or ValueError before anything is
read.

The instruction set is chosen once at import from what the processor has; the environment variable ``BAREFOOT_ISA`` or
``set_isa`` overrides it. For a given number of threads results are the same from run to run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import BackendMissing, unknown_name
from barefoot.ops import blocks, kvblocks, lut, panels, parts, planes, reference, rounding
from barefoot.ops import csr as _csr  # noqa: F401  a kind of parts
from barefoot.ops import lowrank as _lowrank  # noqa: F401  kinds of parts
from barefoot.ops.grids import LANES, Grid, Levels
from barefoot.ops.kvrows import row_bytes as kv_row_bytes
from barefoot.ops.scratch import (
    attention_scratch_bytes,
    flash_scratch_bytes,
    matmul_scratch_bytes,
    plane_scratch_bytes,
    sign_scratch_bytes,
)
from barefoot.ops.threads import get as n_threads
from barefoot.ops.threads import loaded_openmp, on_change, set_threads

try:
    from barefoot.ops import _native  # type: ignore[attr-defined]
except ImportError:
    _native = None

__all__ = [
    "PackedWeight",
    "Part",
    "Program",
    "Segment",
    "SignStack",
    "add_",
    "argmax",
    "attend_segment",
    "attention",
    "attention_each",
    "attention_mass",
    "attention_scratch_bytes",
    "available_isas",
    "backend",
    "embed",
    "encode",
    "feedback_round",
    "fit_groups",
    "flash_backward",
    "flash_forward",
    "flash_scratch_bytes",
    "glu",
    "group_errors",
    "head_rmsnorm",
    "isa",
    "kv_append",
    "kv_append_each",
    "kv_row_bytes",
    "kv_write",
    "kvblocks",
    "lowest_before",
    "lut",
    "matmul",
    "matmul_scratch_bytes",
    "n_threads",
    "pack_lut",
    "pack_panels",
    "panels",
    "part_matmul",
    "parts",
    "plane_matmul",
    "plane_scratch_bytes",
    "planes",
    "populate",
    "read_at",
    "reorder",
    "rmsnorm",
    "rope",
    "round_groups",
    "set_isa",
    "set_threads",
    "share_openmp",
    "sign_matmul",
    "sign_scratch_bytes",
    "top_k",
]

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

_impl: Any = reference if _native is None else _native

#: A matrix [rows, cols] in one of the formats of ``barefoot.ops.blocks``, read from a caller's uint8 buffer.
#: ``PackedWeight(format, rows, cols, buffer=None, layout="rows")``; ``bind(buffer)`` points it at another buffer of
#: exactly ``n_bytes`` bytes, of any alignment, and keeps that array alive. ``layout="panels"`` reads what
#: ``pack_panels`` wrote, ``layout="lut"`` what ``pack_lut`` wrote. Attributes: format, rows, cols, layout, n_bytes,
#: buffer.
if TYPE_CHECKING:
    from barefoot.ops.reference import PackedWeight
else:
    PackedWeight = _impl.PackedWeight


#: An addend [rows, cols] of one of the kinds of ``barefoot.ops.parts``: ``Part(kind, rows, cols, buffer=None)``.
#: ``bind(buffer)`` looks the bytes over, raises ValueError if they don't describe such a matrix, and keeps that array
#: alive; ``unbind()`` lets go of it, and nothing is added from then on. Attributes: kind, rows, cols, buffer.
if TYPE_CHECKING:
    from barefoot.ops.reference import Part
else:
    Part = _impl.Part


#: A matrix as a sum of blocks of signs and low rank, ``barefoot.ops.signs.SignStack``.
if TYPE_CHECKING:
    from barefoot.ops.signs import SignStack
else:
    SignStack = _impl.SignStack


#: A part of a KV store, ``barefoot.ops.segments.Segment``.
if TYPE_CHECKING:
    from barefoot.ops.segments import Segment
else:
    Segment = _impl.Segment


#: A sequence of ops recorded once and run many times, without Python between them. ``Program()`` has the methods
#: ``matmul``, ``part_matmul``, ``sign_matmul``, ``rmsnorm``, ``head_rmsnorm``, ``rope``, ``reorder``, ``glu``,
#: ``add_``, ``kv_append`` and ``attention``, which take what the functions below take, with arrays of as many rows as
#: it will ever have tokens, and KV buffers of all sequences, uint8 [n_sequences, n_kv_heads, capacity, kv_row_bytes];
#: they record, and keep the arrays alive. ``run(n_tokens, n_past, sequence=0)`` calls them in order on the first
#: ``n_tokens`` rows, tokens of one sequence of which the first has position ``n_past``. ``run_each(sequences,
#: positions)`` calls them on one token of each of several sequences, ``kv_append_each`` and ``attention_each`` in place
#: of their namesakes. Arguments are checked op by op as it runs; weights, parts and stacks may be bound between runs.
if TYPE_CHECKING:
    from barefoot.ops.reference import Program
else:
    Program = _impl.Program


def matmul(
    x: F32,
    weights: Sequence[PackedWeight],
    outs: Sequence[F32],
    *,
    activations: str = "int8",
    add: bool = False,
    scratch: U8,
) -> None:
    """outs[i] = x @ W_i^T, or outs[i] += x @ W_i^T with ``add``, for several weights that share one input.

    Parameters
    ----------
    x : float32 [n_tokens, cols]
    weights : each [rows_i, cols], any formats
    outs : float32 [n_tokens, rows_i] each
    activations : ``"int8"`` rounds x once to int8, one scale per token and 32 columns, symmetric. On ``amx``, from 24
        tokens on, x and the decoded weights are rounded to bfloat16 instead, which is finer: each errs by at most 2^-9
        of itself (below 2^-126 it becomes zero), and sums are float32. Either way a token that holds NaN or infinity
        (in bfloat16 from 2^128 - 2^119 on) gives NaN in all its outputs. ``"float32"`` keeps x, decodes the weights
        block by block and sums in float32. Dense weights (f32, f16, bf16) always take float32.
    scratch : uint8, at least ``matmul_scratch_bytes(n_tokens, cols, activations)``; with ``looks_up=True`` if a weight
        has the layout ``"lut"``, whose products round tables of sums instead of x (``barefoot.ops.lut``)
    """
    _impl.matmul(x, weights, outs, activations=activations, add=add, scratch=scratch)


def part_matmul(x: F32, part: Part, out: F32, *, add: bool = False, scratch: U8) -> None:
    """out = x @ P^T, or out += x @ P^T with ``add``, of a part; one that is not bound counts as zero.

    Parameters
    ----------
    x : float32 [n_tokens, cols]; out : float32 [n_tokens, rows]
    scratch : uint8, at least ``parts.lookup(kind).scratch_bytes(n_tokens, rows, cols, n_bytes, n_threads)``
    """
    _impl.part_matmul(x, part, out, add=add, scratch=scratch)


def pack_panels(format: str, rows: U8, n_rows: int, n_cols: int, out: U8) -> None:
    """Rewrite row-major ``rows`` as panels (``barefoot.ops.panels``), from which products read several times faster.

    Parameters
    ----------
    rows : uint8, n_rows * row_bytes: any whole panels of a matrix, n_rows a multiple of 16, so that a loader can
        convert piece by piece
    out : uint8 of the same size, not overlapping

    Raises
    ------
    ValueError : ``panels.supports(format, n_rows, n_cols)`` is false, or sizes differ.
    """
    _impl.pack_panels(format, rows, n_rows, n_cols, out)


def pack_lut(format: str, rows: U8, n_rows: int, n_cols: int, out: U8) -> None:
    """Rewrite row-major ``rows`` in the layout ``"lut"`` (``barefoot.ops.lut``), whose products are table look-ups.

    Parameters
    ----------
    rows : uint8, n_rows * row_bytes: any whole panels of a matrix, n_rows a multiple of 64
    out : uint8 of the same size, not overlapping

    Raises
    ------
    ValueError : ``lut.supports(format, n_rows, n_cols)`` is false, or sizes differ.
    """
    _impl.pack_lut(format, rows, n_rows, n_cols, out)


def plane_matmul(
    x: F32, weight: planes.PlaneWeight, out: F32, *, activation_bits: int, add: bool = False, scratch: U8
) -> None:
    """out = x @ W^T, or out += x @ W^T with ``add``, of bit planes (``barefoot.ops.planes``).

    Sums within a group of columns are exact integers, sums of groups float32. The result does not depend on threads.

    Parameters
    ----------
    x : float32 [n_tokens, cols]; out : float32 [n_tokens, rows]
    activation_bits : 1 to 8; x is rounded to so many bits, one scale per token and group of the weight. A token that
        holds NaN or infinity gives NaN in all its outputs.
    scratch : uint8, at least ``plane_scratch_bytes(n_tokens, cols, activation_bits, weight.format.group)``
    """
    if x.shape[1:] != (weight.cols,) or out.shape != (len(x), weight.rows):
        raise ValueError(
            f"planes [{weight.rows}, {weight.cols}] take x [n_tokens, {weight.cols}] and out [n_tokens, "
            f"{weight.rows}], got {x.shape} and {out.shape}"
        )
    fmt = weight.format
    _impl.plane_matmul(
        x,
        weight.buffer,
        out,
        weight_bits=fmt.bits,
        group=fmt.group,
        zero=fmt.zero,
        has_minimum=fmt.has_minimum,
        activation_bits=activation_bits,
        add=add,
        scratch=scratch,
    )


def sign_matmul(
    x: F32, stack: SignStack, out: F32, *, activations: str = "int8", add: bool = False, scratch: U8
) -> None:
    """out = x @ W^T, or out += x @ W^T with ``add``, of a stack of signed blocks (``barefoot.ops.signs``).

    Rounding and what NaN and infinity do are described there. The result depends on neither threads nor, up to 6
    tokens, on which tokens come together.

    Parameters
    ----------
    x : float32 [n_tokens, cols]; out : float32 [n_tokens, rows]
    scratch : uint8, at least ``sign_scratch_bytes(n_tokens, cols, rank, n_blocks, activations)``
    """
    _impl.sign_matmul(x, stack, out, activations=activations, add=add, scratch=scratch)


def rmsnorm(x: F32, weight: F32, eps: float, out: F32, *, plus_one: bool = False) -> None:
    """out = x / sqrt(mean(x²) + eps) * weight over the last axis, or * (1 + weight) with ``plus_one``.

    x, out : float32 [n_tokens, d], may be the same array; weight : float32 [d]
    """
    _impl.rmsnorm(x, weight, eps, out, plus_one=plus_one)


def head_rmsnorm(x: F32, n_heads: int, head_dim: int, weight: F32, eps: float, *, plus_one: bool = False) -> None:
    """``rmsnorm`` of each head in place. x : float32 [n_tokens, n_heads * head_dim]; weight : float32 [head_dim]"""
    _impl.head_rmsnorm(x, n_heads, head_dim, weight, eps, plus_one=plus_one)


def rope(x: F32, n_heads: int, head_dim: int, cos: F32, sin: F32, *, interleaved: bool) -> None:
    """Rotate pairs of each head in place: (a, b) → (a cos - b sin, a sin + b cos).

    x : float32 [n_tokens, n_heads * head_dim]
    cos, sin : float32 [n_tokens, rot_dim / 2], for the positions of these tokens; rot_dim ≤ head_dim, the rest stays
    interleaved : pairs are elements (2i, 2i + 1) when true, (i, i + rot_dim / 2) when false
    """
    _impl.rope(x, n_heads, head_dim, cos, sin, interleaved=interleaved)


def reorder(x: F32, orders: npt.NDArray[np.uint16]) -> None:
    """Channels of each head in another order, in place: channel c becomes what was channel ``orders[its key head, c]``.

    x : float32 [n_tokens, n_heads * head_dim], queries or keys
    orders : uint16 [n_kv_heads, head_dim], each of all channels; head_dim is at most 1,024
    """
    _impl.reorder(x, orders)


def glu(gate: F32, up: F32, out: F32, *, activation: str = "silu") -> None:
    """out = activation(gate) * up; float32 arrays of one shape, out may be gate. activation : silu or gelu_tanh"""
    _impl.glu(gate, up, out, activation=activation)


def add_(x: F32, y: F32) -> None:
    """x += y; float32 arrays of one shape, or y [d] for every row of x [n_tokens, d]."""
    _impl.add_(x, y)


def embed(ids: npt.NDArray[np.int32], weight: PackedWeight, out: F32, *, scale: float = 1.0) -> None:
    """out[i] = scale * row ids[i] of ``weight``. ids : int32 [n]; out : float32 [n, cols]"""
    _impl.embed(ids, weight, out, scale=scale)


def kv_append(k: F32, v: F32, k_buf: U8, v_buf: U8, fmt: str, capacity: int, start: int) -> None:
    """Store the keys and values of positions start, start + 1, … ; position p goes to slot p % capacity.

    k, v : float32 [n_tokens, n_kv_heads * head_dim]; n_tokens ≤ capacity
    k_buf, v_buf : uint8 [n_kv_heads, capacity, kv_row_bytes(fmt, head_dim)]
    fmt : one of ``barefoot.ops.kvrows.FORMATS``
    """
    _impl.kv_append(k, v, k_buf, v_buf, fmt, capacity, start)


def attention(
    q: F32,
    k_buf: U8,
    v_buf: U8,
    fmt: str,
    out: F32,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    capacity: int,
    n_past: int,
    n_tokens: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    activations: str = "float32",
    scratch: U8,
) -> None:
    """Causal attention over the store: query i sits at position n_past + i and sees the positions up to its own.

    Sums in float32 of the rows as they decode, with one exception: a single token over q8 or q4 rows whose head_dim is
    a multiple of 32 (and at most 32 queries share a key head) works on the codes. Queries are then rounded to 32,384
    levels to either side of zero per 32 elements, and probabilities times value scales to 32,767 levels per 64 keys
    and 32 elements. For a given number of tokens the result does not depend on the number of threads.

    q, out : float32 [n_tokens, n_heads * head_dim], not the same array
    k_buf, v_buf : uint8 [n_kv_heads, capacity, kv_row_bytes(fmt, head_dim)], already holding these tokens
    window : how many positions a query sees, its own included; 0 = all. The store must hold every position that a
        query sees: min(n_past + n_tokens, window - 1 + n_tokens) ≤ capacity.
    scale : factor of the scores; softcap : c > 0 puts them through c * tanh(score / c) before the softmax
    activations : ``"float32"`` as above. ``"int8"`` lets several tokens' attention round where the instruction set
        gains by it: "amx" rounds queries times scale, keys, values and probabilities to bfloat16, once each, and
        multiplies those; scores, softmax and sums stay float32. It changes nothing elsewhere, nor for a single token.
    scratch : uint8, at least ``attention_scratch_bytes(n_tokens, n_heads, n_kv_heads, head_dim, activations)``
    """
    _impl.attention(
        q,
        k_buf,
        v_buf,
        fmt,
        out,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        capacity=capacity,
        n_past=n_past,
        n_tokens=n_tokens,
        window=window,
        scale=scale,
        softcap=softcap,
        activations=activations,
        scratch=scratch,
    )


def kv_write(rows: F32, buffer: U8, fmt: str, slots: npt.NDArray[np.int32]) -> None:
    """Rows into slots of their own for each key head.

    rows : float32 [n_tokens, n_kv_heads * dim]
    buffer : uint8 [n_kv_heads, capacity, kv_row_bytes(fmt, dim)]
    slots : int32 [n_kv_heads, n_tokens], those of a head distinct
    """
    _impl.kv_write(rows, buffer, fmt, slots)


def attend_segment(
    q: F32,
    segment: Segment,
    sums: F32,
    tops: F32,
    totals: F32,
    *,
    n_before: int = -1,
    scale: float,
    softcap: float = 0.0,
    scores: F32 | None = None,
    scratch: U8,
) -> None:
    """Take one segment into the state of an attention pass (:mod:`barefoot.ops.segments`).

    A single token works on codes where ``attention`` does, and on blocks whose key_dim (at most 256) or value_dim is a
    multiple of 32: queries, or weights, times the scales of what they meet are then rounded to 16 bits, anew for every
    block of keys and every 64 values. The result does not depend on the number of threads.

    q : float32 [n_tokens, n_heads * key_dim]
    sums, tops, totals : the state, float32 [n_tokens, n_heads, value_dim], [n_tokens, n_heads] twice
    n_before : entries in front of the first token's own: token t sees n_before + t + 1 of them; -1: all
    scale, softcap : as in ``attention``; an entry's key_scale comes before the softcap, its bias behind
    scores : float32 [n_heads, n_tokens, segment.stride] gets the scores of all entries, -inf for those not seen
    scratch : uint8, at least ``attention_scratch_bytes(n_tokens, n_heads, n_kv_heads, max(key_dim, value_dim))``
    """
    _impl.attend_segment(
        q,
        segment,
        sums,
        tops,
        totals,
        n_before=n_before,
        scale=scale,
        softcap=softcap,
        scores=scores,
        scratch=scratch,
    )


def attention_mass(
    scores: F32,
    tops: F32,
    totals: F32,
    counts: npt.NDArray[np.int32],
    mass: F32,
    *,
    thresholds: F32 | None = None,
) -> None:
    """Add to ``mass``, float32 [n_kv_heads, counts or more], how much each entry of a segment was attended to.

    Rows of ``mass`` may lie anywhere, their numbers side by side.

    The attention probability exp(score - top) / total, summed over tokens and the query heads that share the key head;
    or, with ``thresholds``, float32 [n_tokens], the number of tokens for which it is below the token's threshold in all
    of these heads (NaN is), tokens that don't see the entry among them.

    scores, tops, totals : of ``attend_segment``, once it has taken all segments
    counts : int32 [n_kv_heads], entries of the segment
    """
    _impl.attention_mass(scores, tops, totals, counts, mass, thresholds=thresholds)


def flash_forward(
    q: F32,
    k: F32,
    v: F32,
    lengths: npt.NDArray[np.int64],
    out: F32,
    lse: F32,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    scratch: U8,
) -> None:
    """Causal attention within documents that lie one behind the other, and what its gradients need besides (L).

    ``barefoot.ops.flash`` has the equations. The result does not depend on the number of threads.

    q, out : float32 [n, n_heads, head_dim]; k, v : float32 [n, n_kv_heads, head_dim]; lse : float32 [n_heads, n]
    lengths : int64, tokens of each document, at most n in all; rows behind them get 0, and -infinity in ``lse``
    window : how many tokens a query sees, its own included; 0 = all
    scale : factor of the scores; softcap : c > 0 puts them through c * tanh(score / c) before the softmax
    scratch : uint8, at least ``flash_scratch_bytes(lengths, n_heads, n_kv_heads, head_dim)``
    """
    _impl.flash_forward(q, k, v, lengths, out, lse, scale=scale, window=window, softcap=softcap, scratch=scratch)


def flash_backward(
    d_out: F32,
    q: F32,
    k: F32,
    v: F32,
    out: F32,
    lse: F32,
    lengths: npt.NDArray[np.int64],
    dq: F32,
    dk: F32,
    dv: F32,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    scratch: U8,
) -> None:
    """The gradients of ``flash_forward``'s inputs, from the gradient of ``out`` and what it wrote.

    The result does not depend on the number of threads.

    d_out, dq : shaped as q; dk, dv : as k; all filled; the rest as in ``flash_forward``
    scratch : uint8, at least ``flash_scratch_bytes([n], n_heads, n_kv_heads, head_dim, backward=True)``
    """
    _impl.flash_backward(
        d_out,
        q,
        k,
        v,
        out,
        lse,
        lengths,
        dq,
        dk,
        dv,
        scale=scale,
        window=window,
        softcap=softcap,
        scratch=scratch,
    )


def kv_append_each(
    k: F32, v: F32, k_buf: U8, v_buf: U8, fmt: str, capacity: int, sequences: list[int], positions: list[int]
) -> None:
    """``kv_append`` of one token of each of several sequences: row i belongs to ``sequences[i]`` at ``positions[i]``.

    k, v : float32 [n, n_kv_heads * head_dim]
    k_buf, v_buf : uint8 [n_sequences, n_kv_heads, capacity, kv_row_bytes(fmt, head_dim)]
    sequences, positions : n ints each; no sequence twice
    """
    _impl.kv_append_each(k, v, k_buf, v_buf, fmt, capacity, sequences, positions)


def attention_each(
    q: F32,
    k_buf: U8,
    v_buf: U8,
    fmt: str,
    out: F32,
    *,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    capacity: int,
    sequences: list[int],
    positions: list[int],
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    scratch: U8,
) -> None:
    """``attention`` of one token of each of several sequences: exactly what each gives alone, in one parallel region.

    q, out : float32 [n, n_heads * head_dim], not the same array; row i sits at ``positions[i]`` of ``sequences[i]``
    k_buf, v_buf, sequences, positions : as in ``kv_append_each``, already holding these tokens
    scratch : uint8, at least ``attention_scratch_bytes(n, n_heads, n_kv_heads, head_dim, each=True)``
    """
    _impl.attention_each(
        q,
        k_buf,
        v_buf,
        fmt,
        out,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        capacity=capacity,
        sequences=sequences,
        positions=positions,
        window=window,
        scale=scale,
        softcap=softcap,
        scratch=scratch,
    )


def argmax(logits: F32) -> int:
    """The index of the largest of float32 [n]; the first one on a tie, and the first NaN if there is any."""
    return int(_impl.argmax(logits))


def lowest_before(scores: F32, position: npt.NDArray[np.int32], end: int, out: npt.NDArray[np.int32]) -> None:
    """The column of least score in each row, of those whose position is below ``end``; 0 where there is none.

    Of equal ones the first; scores are in IEEE 754's total order, so NaN without a sign follow all numbers.

    scores, position : float32, int32 [rows, n], each row's numbers side by side
    out : int32 [rows]
    """
    _impl.lowest_before(scores, position, end, out)


def top_k(logits: F32, values: F32, ids: npt.NDArray[np.int32]) -> None:
    """The k largest of ``logits`` and where they stand, largest first, without sorting the others.

    Equal ones come by index; NaN precede all numbers, so that the first id is what ``argmax`` returns.

    logits : float32 [n]; values : float32 [k]; ids : int32 [k]; 1 ≤ k ≤ n
    """
    _impl.top_k(logits, values, ids)


def encode(format: str, weights: F32, out: U8) -> None:
    """Round to the nearest codes, with parameters that span the range of each group: ``blocks.encode`` into ``out``.

    weights : float32 [n_rows, cols]; out : uint8 [n_rows, row_bytes]

    Raises
    ------
    InvalidInput, Incompatible : as ``blocks.encode``.
    """
    fmt = blocks.lookup(format)
    levels = None if fmt.grid is None else _levels(fmt.grid)
    if levels is None or levels.rule is None or fmt.group is None:
        rounding.encode(format, weights, out)
        return
    blocks.row_bytes(format, weights.shape[1])
    if not _native.encode_groups(weights, levels, fmt.group.bits, fmt.group.signed, out):
        raise blocks.not_finite(format)


def fit_groups(x: F32, grid: Grid, params: F32, *, importance: F32 | None = None) -> None:
    """Parameters of least squared error for each group of ``x``, on its own.

    Tries shrunken ranges, then moves each end of the best one, then alternates rounding and least squares; a step that
    doesn't help is not taken, so the result is never worse than the whole range.

    x : float32 [rows, cols], finite; params : float32 [rows, cols / group, p], is filled
    importance : how much each element's squared error counts, float32 [cols] or [rows, cols], ≥ 0
    """
    levels = _levels(grid)
    if levels is None or levels.rule is None:
        rounding.fit_groups(x, grid, params, importance)
    else:
        _native.fit_groups(x, levels, importance, rounding.SHRINKS, rounding.STEPS, rounding.REFITS, params)


def group_errors(x: F32, grid: Grid, params: F32, errors: F32, *, importance: F32 | None = None) -> None:
    """The squared error of each group, rounded with ``params``.

    x : float32 [rows, cols]; params : float32 [rows, cols / group, p]; errors : float32 [rows, cols / group], is filled
    importance : as in ``fit_groups``
    """
    levels = _levels(grid)
    if levels is None:
        rounding.group_errors(x, grid, params, errors, importance)
    else:
        _native.group_errors(x, levels, params, importance, errors)


def round_groups(x: F32, grid: Grid, params: F32, codes: U8) -> None:
    """The code of the nearest level of each element. x : float32 [rows, cols]; codes : uint8 [rows, cols], is filled"""
    levels = _levels(grid)
    if levels is None:
        rounding.round_groups(x, grid, params, codes)
    else:
        _native.round_groups(x, levels, params, codes)


def feedback_round(
    weights: F32,
    targets: F32,
    grid: Grid,
    params: F32,
    groups: npt.NDArray[np.int32],
    mixing: F32,
    codes: U8,
) -> None:
    """Round columns one after the other, passing each error on: target k += error j × mixing[j, k] for all j < k.

    Parameters
    ----------
    weights : float32 [rows, n], n ≤ 512; a column's error is its weight less what is stored
    targets : float32 [rows, n], what the codes shall come close to; replaced by the errors
    params : float32 [rows, n_groups, p]; groups : int32 [n], the group whose parameters a column has
    mixing : float32 [n, n]; what is on and below the diagonal is not read
    codes : uint8 [rows, n], is filled
    """
    levels = _levels(grid)
    if levels is None:
        rounding.feedback_round(weights, targets, grid, params, groups, mixing, codes)
    else:
        _native.feedback_round(weights, targets, levels, params, groups, mixing, codes)


def _levels(grid: Grid) -> Levels | None:
    """The grid as compiled kernels take it; None where numpy must do."""
    levels = grid.levels
    return levels if _native is not None and levels is not None and levels.group % LANES == 0 else None


def read_at(fd: int, offset: int, array: U8) -> None:
    """Fill ``array`` (contiguous uint8) from byte ``offset`` of the open file ``fd``, without holding the GIL.

    Works on files opened with O_DIRECT when offset, address and length are aligned. OSError if the file is shorter.
    """
    _impl.read_at(fd, offset, array)


def populate(array: U8) -> None:
    """Make every page of ``array`` (contiguous uint8, writable) resident now; its contents stay."""
    _impl.populate(array)


def available_isas() -> tuple[str, ...]:
    """Instruction sets that this build and this processor have, slowest first; ``("numpy",)`` without kernels."""
    return ("numpy",) if _native is None else tuple(_native.available_isas())


def isa() -> str:
    """The instruction set in use: numpy, portable, avx2, avx512, avx512-vnni, amx or neon."""
    return "numpy" if _native is None else str(_native.isa())


def set_isa(name: str) -> None:
    """Use another of ``available_isas()``; BackendMissing if this machine or build lacks it."""
    known = ("numpy", "portable", "avx2", "avx512", "avx512-vnni", "amx", "neon")
    if name not in known:
        raise unknown_name("instruction set", name, known)
    if name not in available_isas():
        raise BackendMissing(f"no {name} kernels here", cure=f"choose one of {', '.join(available_isas())}")
    if _native is not None:
        _native.set_isa(name)


def backend() -> str:
    """What computes: ``"native:avx512-vnni"``, or ``"reference:numpy"`` when the compiled kernels are missing."""
    return f"{'reference' if _native is None else 'native'}:{isa()}"


def share_openmp(wanted: bool = True) -> bool:
    """Have the kernels work on the threads of the OpenMP that PyTorch brought along, as many as ``set_threads`` says;
    whether they do now.

    Those stay awake between two of PyTorch's own ops, on the cores that threads of the kernels' own would have to wait
    for. Both should be told the same number. Results are the same.
    """
    parallel = loaded_openmp() if wanted and _native is not None else None
    if _native is not None:
        _native.use_openmp(parallel or 0)
    return parallel is not None


if _native is not None:
    on_change(_native.set_threads)
if os.environ.get("BAREFOOT_ISA"):
    set_isa(os.environ["BAREFOOT_ISA"])
