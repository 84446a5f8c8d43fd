"""The ops in numpy: the specification that the compiled kernels are tested against. Sums are taken in float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot.ops import blocks, kvrows, lut, panels, parts, planes, signs
from barefoot.ops.flash import flash_backward, flash_forward  # noqa: F401  ops of this module
from barefoot.ops.scratch import BFLOAT16_TOKENS, SIGN_TOKENS
from barefoot.ops.segments import Segment, attend_segment, attention_mass, kv_write  # noqa: F401  ops of this module
from barefoot.ops.signs import SignStack

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

GROUP = 32  # activations that share a scale
SMALLEST = np.float32(2.0**-100)  # groups of smaller magnitude count as zero
ROWS_AT_A_TIME = 512
LAYOUTS: dict[str, Any] = {"panels": panels, "lut": lut}  # beside rows


class PackedWeight:
    """A matrix [rows, cols] in one of the formats of ``barefoot.ops.blocks``, read from a caller's buffer.

    ``layout``: ``"rows"``, or ``"panels"`` (``barefoot.ops.panels``) or ``"lut"``
    (``barefoot.ops.lut``) where the format and shape have it.
    """

    __slots__ = ("buffer", "cols", "format", "layout", "rows")

    def __init__(self, format: str, rows: int, cols: int, buffer: U8 | None = None, layout: str = "rows") -> None:
        blocks.row_bytes(format, cols)
        if layout != "rows" and not (layout in LAYOUTS and LAYOUTS[layout].supports(format, rows, cols)):
            raise ValueError(f"a {format} [{rows}, {cols}] weight has no layout {layout!r}")
        self.format, self.rows, self.cols, self.layout = format, rows, cols, layout
        self.buffer: U8 | None = None
        if buffer is not None:
            self.bind(buffer)

    @property
    def n_bytes(self) -> int:
        return self.rows * blocks.row_bytes(self.format, self.cols)

    def bind(self, buffer: U8) -> None:
        if buffer.dtype != np.uint8 or not buffer.flags.c_contiguous or buffer.size != self.n_bytes:
            raise ValueError(
                f"a {self.format} [{self.rows}, {self.cols}] weight needs {self.n_bytes} contiguous uint8, "
                f"got {buffer.size} of {buffer.dtype}"
            )
        self.buffer = buffer


def decode_rows(weight: Any, rows: npt.ArrayLike | slice) -> F32:
    """The weights float32 (n, cols) of the chosen rows."""
    if weight.buffer is None:
        raise ValueError(f"the {weight.format} [{weight.rows}, {weight.cols}] weight is not bound to a buffer")
    if weight.layout == "rows":
        packed = weight.buffer.reshape(weight.rows, -1)[rows]
        return blocks.decode(weight.format, packed, weight.cols)
    ids = np.arange(weight.rows)[rows if isinstance(rows, slice) else np.asarray(rows)]
    layout = LAYOUTS[weight.layout]
    wanted, at = np.unique(ids // layout.ROWS, return_inverse=True)
    chosen = weight.buffer.reshape(weight.rows // layout.ROWS, -1)[wanted]
    packed = layout.unpack(weight.format, chosen, weight.cols)[at * layout.ROWS + ids % layout.ROWS]
    return blocks.decode(weight.format, packed, weight.cols)


def pack_panels(format_id: str, rows: U8, n_rows: int, n_cols: int, out: U8) -> None:
    packed = panels.pack(format_id, rows.reshape(n_rows, -1), n_cols)
    out.reshape(-1)[:] = packed.reshape(-1)


def pack_lut(format_id: str, rows: U8, n_rows: int, n_cols: int, out: U8) -> None:
    out.reshape(-1)[:] = lut.pack(format_id, rows.reshape(n_rows, -1), n_cols).reshape(-1)


def quantize_activations(x: F32) -> tuple[npt.NDArray[np.int8], F32]:
    """Codes int8 (n_tokens, cols) and scales float32 (n_tokens, cols / 32): symmetric, largest magnitude = 127.

    Codes are rint(x * (127 / largest)), to the nearest even. A token that holds NaN or infinity gets NaN scales.
    """
    grouped = x.reshape(len(x), -1, GROUP)
    finite = np.logical_and.reduce(np.isfinite(x), axis=1, keepdims=True)
    grouped = np.where(finite[..., None], grouped, np.float32(0))
    largest = np.abs(grouped).max(axis=2)
    used = largest >= SMALLEST
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=used)
    codes = np.rint(grouped * inverse[..., None]).astype(np.int8).reshape(x.shape)
    scales = np.where(used, largest / np.float32(127), np.float32(0))
    scales[~finite[:, 0]] = np.nan
    return codes, scales


def arithmetic(isa: str, n_tokens: int, activations: str) -> str:
    """What ``activations`` means for quantized weights on an instruction set: itself, or bfloat16 in place of int8."""
    return "bfloat16" if isa == "amx" and activations == "int8" and n_tokens >= BFLOAT16_TOKENS else activations


def round_bfloat16(x: F32) -> F32:
    """The nearest numbers of 8 significant bits, to even; what is below 2^-126 counts as zero."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.abs(x) < np.float32(2.0**-126), np.float32(0), rounded.view(np.float32))


def round_activations(x: F32) -> F32:
    """x in bfloat16; a token that holds NaN, infinity or what rounds to it becomes NaN."""
    finite = np.abs(x).max(axis=1, keepdims=True, initial=0) < 2.0**128 - 2.0**119
    return np.where(finite, round_bfloat16(np.where(finite, x, 0)), np.float32(np.nan))


def matmul(
    x: F32,
    weights: Sequence[Any],
    outs: Sequence[F32],
    *,
    activations: str = "int8",
    add: bool = False,
    scratch: U8 | None = None,
) -> None:
    """``activations`` takes "bfloat16" besides (``arithmetic``): quantized weights are rounded to it as well."""
    exact = x.astype(np.float64)
    rounded = exact
    if activations == "int8" and not all(blocks.lookup(w.format).in_float for w in weights):
        codes, scales = quantize_activations(x)
        rounded = codes.astype(np.float64) * np.repeat(scales.astype(np.float64), GROUP, axis=1)
    elif activations == "bfloat16":
        rounded = round_activations(x).astype(np.float64)
    for weight, out in zip(weights, outs, strict=True):
        if weight.layout == "lut" and activations == "int8" and len(x) <= lut.FEW_TOKENS:
            looked_up = lut.product(x, weight).astype(np.float32)
            out[...] = out + looked_up if add else looked_up
            continue
        in_float = blocks.lookup(weight.format).in_float
        inputs = exact if in_float else rounded
        for start in range(0, weight.rows, ROWS_AT_A_TIME):
            chunk = slice(start, min(start + ROWS_AT_A_TIME, weight.rows))
            decoded = decode_rows(weight, chunk)
            if activations == "bfloat16" and not in_float:
                decoded = round_bfloat16(decoded)
            with np.errstate(invalid="ignore", over="ignore"):
                product = (inputs @ decoded.astype(np.float64).T).astype(np.float32)
            if add:
                out[:, chunk] += product
            else:
                out[:, chunk] = product


def plane_matmul(
    x: F32,
    weight: U8,
    out: F32,
    *,
    weight_bits: int,
    group: int,
    zero: float,
    has_minimum: bool,
    activation_bits: int,
    add: bool,
    scratch: U8 | None = None,
) -> None:
    fmt = planes.PlaneFormat(weight_bits, group, zero, has_minimum)
    product = planes.product(x, planes.PlaneWeight(fmt, out.shape[1], x.shape[1], weight), activation_bits)
    out[...] = out + product if add else product


def sign_matmul(
    x: F32,
    stack: SignStack,
    out: F32,
    *,
    activations: str = "int8",
    add: bool = False,
    scratch: U8 | None = None,
) -> None:
    if not stack.buffers:
        raise ValueError(f"the stack [{stack.rows}, {stack.cols}] has no blocks")
    product = signs.product(x, stack, rounds=activations == "int8" and len(x) <= SIGN_TOKENS).astype(np.float32)
    out[...] = out + product if add else product


class Part:
    """An addend [rows, cols] of a kind of ``barefoot.ops.parts``, read from a caller's buffer."""

    __slots__ = ("buffer", "cols", "kind", "rows")

    def __init__(self, kind: str, rows: int, cols: int, buffer: U8 | None = None) -> None:
        parts.lookup(kind)
        self.kind, self.rows, self.cols = kind, rows, cols
        self.buffer: U8 | None = None
        if buffer is not None:
            self.bind(buffer)

    def bind(self, buffer: U8) -> None:
        flaw = parts.lookup(self.kind).flaw(self.rows, self.cols, buffer)
        if flaw:
            raise ValueError(f"{self.kind} [{self.rows}, {self.cols}]: {flaw}")
        self.buffer = buffer

    def unbind(self) -> None:
        self.buffer = None


def part_matmul(x: F32, part: Any, out: F32, *, add: bool = False, scratch: U8 | None = None) -> None:
    if part.buffer is None:
        product: Any = np.float32(0)
    else:
        decoded = parts.lookup(part.kind).decode(part.rows, part.cols, part.buffer)
        with np.errstate(invalid="ignore", over="ignore"):
            product = (x.astype(np.float64) @ decoded.astype(np.float64).T).astype(np.float32)
    out[...] = out + product if add else product


def rmsnorm(x: F32, weight: F32, eps: float, out: F32, *, plus_one: bool = False) -> None:
    wide = x.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        factor = 1.0 / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + eps)
        out[...] = wide * factor * (weight.astype(np.float64) + (1.0 if plus_one else 0.0))


def head_rmsnorm(x: F32, n_heads: int, head_dim: int, weight: F32, eps: float, *, plus_one: bool = False) -> None:
    heads = x.reshape(len(x) * n_heads, head_dim)
    rmsnorm(heads, weight, eps, heads, plus_one=plus_one)


def rope(x: F32, n_heads: int, head_dim: int, cos: F32, sin: F32, *, interleaved: bool) -> None:
    half = cos.shape[1]
    heads = x.reshape(len(x), n_heads, head_dim)
    first = heads[..., 0 : 2 * half : 2] if interleaved else heads[..., :half]
    second = heads[..., 1 : 2 * half : 2] if interleaved else heads[..., half : 2 * half]
    c, s = cos[:, None, :], sin[:, None, :]
    a, b = first * c - second * s, first * s + second * c
    first[...], second[...] = a, b


def reorder(x: F32, orders: npt.NDArray[np.uint16]) -> None:
    heads = x.reshape(len(x), len(orders), -1, orders.shape[1])
    heads[...] = np.take_along_axis(heads, orders[None, :, None].astype(np.int64), axis=-1)


def glu(gate: F32, up: F32, out: F32, *, activation: str = "silu") -> None:
    x = gate.astype(np.float64)
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"activation must be silu or gelu_tanh, got {activation!r}")
    inner = x if activation == "silu" else 2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = x / (1.0 + np.exp(-inner)) * up


def add_(x: F32, y: F32) -> None:
    x += y


def embed(ids: npt.NDArray[np.int32], weight: Any, out: F32, *, scale: float = 1.0) -> None:
    if ids.size and (ids.min() < 0 or ids.max() >= weight.rows):
        raise ValueError(f"token ids must be 0 to {weight.rows - 1}, got {ids.min()} to {ids.max()}")
    np.multiply(decode_rows(weight, ids), np.float32(scale), out=out)


def kv_append(k: F32, v: F32, k_buf: U8, v_buf: U8, fmt: str, capacity: int, start: int) -> None:
    n_kv_heads, _, n_bytes = k_buf.shape
    slots = (start + np.arange(len(k))) % capacity
    for rows, buffer in ((k, k_buf), (v, v_buf)):
        heads = rows.reshape(len(rows), n_kv_heads, -1)
        encoded = kvrows.encode(fmt, heads)
        assert encoded.shape[-1] == n_bytes
        buffer[:, slots] = encoded.transpose(1, 0, 2)


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
    scratch: U8 | None = None,
) -> None:
    if activations not in ("int8", "float32"):
        raise ValueError(f"activations must be int8 or float32, got {activations!r}")
    first = max(0, n_past - window + 1) if window else 0
    positions = np.arange(first, n_past + n_tokens)
    if len(positions) > capacity:
        raise ValueError(f"{len(positions)} positions are needed at once, and the store keeps {capacity}")
    keys, values = (
        kvrows.decode(fmt, buffer[:, positions % capacity], head_dim).astype(np.float64) for buffer in (k_buf, v_buf)
    )
    queries = n_past + np.arange(n_tokens)
    visible = positions[None, :] <= queries[:, None]
    if window:
        visible &= positions[None, :] > queries[:, None] - window
    heads = q.reshape(n_tokens, n_kv_heads, n_heads // n_kv_heads, head_dim).astype(np.float64)
    scores = np.einsum("tgrd,gpd->tgrp", heads, keys) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(visible[:, None, None, :], scores, -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
    out[...] = np.einsum("tgrp,gpd->tgrd", weights, values).reshape(n_tokens, -1)


def kv_append_each(
    k: F32,
    v: F32,
    k_buf: U8,
    v_buf: U8,
    fmt: str,
    capacity: int,
    sequences: Sequence[int],
    positions: Sequence[int],
) -> None:
    for i, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
        kv_append(k[i : i + 1], v[i : i + 1], k_buf[sequence], v_buf[sequence], fmt, capacity, position)


def attention_each(
    q: F32,
    k_buf: U8,
    v_buf: U8,
    fmt: str,
    out: F32,
    *,
    sequences: Sequence[int],
    positions: Sequence[int],
    **options: Any,
) -> None:
    for i, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
        keys, values, row = k_buf[sequence], v_buf[sequence], slice(i, i + 1)
        attention(q[row], keys, values, fmt, out[row], n_past=position, n_tokens=1, **options)


@dataclass(frozen=True)
class _Run:
    """The tokens that a program runs on: ``n`` of one sequence, or one of each of several, whose ``spots`` are the
    arguments ``sequences`` and ``positions``."""

    n: int
    n_past: int = 0
    sequence: int = 0
    spots: Mapping[str, Any] | None = None


class Program:
    """A recorded sequence of ops; ``run`` calls them on the first rows of their arrays."""

    def __init__(self) -> None:
        self._calls: list[Callable[[_Run], None]] = []

    def matmul(self, x: F32, weights: Sequence[Any], outs: Sequence[F32], **options: Any) -> None:
        self._calls.append(lambda run: matmul(x[: run.n], weights, [out[: run.n] for out in outs], **options))

    def sign_matmul(self, x: F32, stack: SignStack, out: F32, **options: Any) -> None:
        self._calls.append(lambda run: sign_matmul(x[: run.n], stack, out[: run.n], **options))

    def part_matmul(self, x: F32, part: Any, out: F32, **options: Any) -> None:
        self._calls.append(lambda run: part_matmul(x[: run.n], part, out[: run.n], **options))

    def rmsnorm(self, x: F32, weight: F32, eps: float, out: F32, **options: Any) -> None:
        self._calls.append(lambda run: rmsnorm(x[: run.n], weight, eps, out[: run.n], **options))

    def head_rmsnorm(self, x: F32, n_heads: int, head_dim: int, weight: F32, eps: float, **options: Any) -> None:
        self._calls.append(lambda run: head_rmsnorm(x[: run.n], n_heads, head_dim, weight, eps, **options))

    def rope(self, x: F32, n_heads: int, head_dim: int, cos: F32, sin: F32, *, interleaved: bool) -> None:
        def call(run: _Run) -> None:
            rope(x[: run.n], n_heads, head_dim, cos[: run.n], sin[: run.n], interleaved=interleaved)

        self._calls.append(call)

    def reorder(self, x: F32, orders: npt.NDArray[np.uint16]) -> None:
        self._calls.append(lambda run: reorder(x[: run.n], orders))

    def glu(self, gate: F32, up: F32, out: F32, *, activation: str = "silu") -> None:
        self._calls.append(lambda run: glu(gate[: run.n], up[: run.n], out[: run.n], activation=activation))

    def add_(self, x: F32, y: F32) -> None:
        self._calls.append(lambda run: add_(x[: run.n], y if y.ndim == 1 else y[: run.n]))

    def kv_append(self, k: F32, v: F32, k_buf: U8, v_buf: U8, fmt: str, capacity: int) -> None:
        def call(run: _Run) -> None:
            rows = k[: run.n], v[: run.n]
            if run.spots is not None:
                kv_append_each(*rows, k_buf, v_buf, fmt, capacity, **run.spots)
            else:
                kv_append(*rows, k_buf[run.sequence], v_buf[run.sequence], fmt, capacity, run.n_past)

        self._calls.append(call)

    def attention(self, q: F32, k_buf: U8, v_buf: U8, fmt: str, out: F32, **options: Any) -> None:
        def call(run: _Run) -> None:
            rows, outs = q[: run.n], out[: run.n]
            if run.spots is not None:
                attention_each(rows, k_buf, v_buf, fmt, outs, **run.spots, **options)
            else:
                store = k_buf[run.sequence], v_buf[run.sequence]
                attention(rows, *store, fmt, outs, n_past=run.n_past, n_tokens=run.n, **options)

        self._calls.append(call)

    def run(self, n_tokens: int, n_past: int, sequence: int = 0) -> None:
        self._run(_Run(n_tokens, n_past, sequence))

    def run_each(self, sequences: Sequence[int], positions: Sequence[int]) -> None:
        self._run(_Run(len(sequences), spots={"sequences": sequences, "positions": positions}))

    def _run(self, run: _Run) -> None:
        for call in self._calls:
            call(run)


def argmax(logits: F32) -> int:
    return int(np.argmax(logits))


def lowest_before(scores: F32, position: npt.NDArray[np.int32], end: int, out: npt.NDArray[np.int32]) -> None:
    bits = np.ascontiguousarray(scores).view(np.int32)
    ordinal = np.where(bits < 0, bits ^ np.iinfo(np.int32).max, bits).astype(np.int64)
    out[...] = np.where(position < end, ordinal, np.iinfo(np.int64).max).argmin(axis=1)


def top_k(logits: F32, values: F32, ids: npt.NDArray[np.int32]) -> None:
    order = np.lexsort((-logits, ~np.isnan(logits)))[: len(values)]
    values[:], ids[:] = logits[order], order


def read_at(fd: int, offset: int, array: U8) -> None:
    view = array.reshape(-1).data
    done = 0
    while done < len(view):
        if hasattr(os, "preadv"):  # straight into the array: direct reads need its alignment
            n_read = os.preadv(fd, [view[done:]], offset + done)
        else:
            os.lseek(fd, offset + done, os.SEEK_SET)
            piece = os.read(fd, len(view) - done)
            n_read = len(piece)
            view[done : done + n_read] = piece
        if not n_read:
            raise OSError(f"the file ends after {done} of {len(view)} bytes at offset {offset}")
        done += n_read


def populate(array: U8) -> None:
    flat = array.reshape(-1).view(np.uint8)
    flat[::4096] |= 0
