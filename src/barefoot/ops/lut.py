"""Look-up tables: the layout whose products are looked up instead of multiplied, one bit plane of the codes at a time.

T-MAC: CPU Renaissance via Table Lookup for Low-Bit LLM Deployment on Edge (Wei et al. 2025, arXiv:2407.00088), and the
software part of LUT Tensor Core (Mo et al. 2025, arXiv:2408.06003). Four weights of one bit, each read as -1 or +1, can
only make 16 sums with the four activations they meet (a *run*); these are tabulated once for all rows, and a weight's
four bits become the index of a byte shuffle. Time is proportional to the bits of a code.

With bit i of a code q read as beta_i = 2 bit_i - 1, and levels = 2^b - 1::

    q                     = 1/2 sum_i 2^i beta_i + levels / 2
    sum_k (q_k - zero) x_k = 1/2 sum_i 2^i sum_k beta_ik x_k + (levels / 2 - zero) sum_k x_k

For ``sym`` codes (zero = 2^(b-1)) the last factor is -1/2: without that term the product is wrong by half a step times
the sum of the activations. Minimums are multiplied with the same exact sum.

**Tables.** ``T[j] = sum_t ±x_t``, plus where bit t of j is set. T[15 - j] = -T[j], so eight are computed. They are
rounded to int8 with one scale per 32 activations, ``max over 8 runs of (|x0| + |x1| + |x2| + |x3|) / 127``: the sums
are rounded, not the activations, and the sum of x in the formula above is exact. Stored as 128 + q in a byte. So the
product is exact, up to float32, when x is an integer multiple of each group's scale: for integers, when the largest of
the 8 sums of magnitudes is exactly 127.

**Layout.** The bytes of the row-major blocks in another order, for the formats with one scale per block and codes of 1
to 4 bits, and whole panels of 64 rows. A panel is group after group along the columns; a group of b-bit codes:

======= ============================================================================================================
bytes   content
======= ============================================================================================================
128     the scales of rows 0..63, f16
128     their minimums, f16; only where the format has them
rest    for each pair of runs (8 columns) 64 b bytes: planes 0 and 1 (128 bytes), planes 2 and 3 (128), where b is odd
        the last plane alone (64)
======= ============================================================================================================

A byte holds the index of the pair's first run in its low half and of the second in its high half; bit t of an index is
the plane's bit of column t of the run. Of planes 2s and 2s + 1, byte ``2 r + (plane - 2s)`` belongs to row r, so that
one multiply-add of neighbouring bytes with (1, 2) joins the two planes. A plane alone has row r < 32 in byte 2r and row
32 + r in byte 2r + 1. In registers of any width, sums of 16 bits then stand for consecutive rows.

Example: ``int2_g32_asym`` [64, 32] takes 64 * 12 = 768 bytes; bit 1 of the code of row 3, column 13 (run 3 of the
chunk: second of pair 1; t = 1) is bit 4 + 1 of byte ``256 + 128 * 1 + 2 * 3 + 1``.

*Differs from the papers*: one order for every width of register instead of tiles tuned per shape; the planes are joined
in integers before the scales; no pairwise rounding averages ("fast aggregation"); tables hold all 16 entries in memory,
as the shuffle reads them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import Incompatible
from barefoot.ops import blocks
from barefoot.ops.payload import pack_chunks, unpack_chunks
from barefoot.ops.scratch import LUT_TOKENS

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

ROWS = 64  # rows of a panel
RUN = 4  # activations of a table
SPAN = 32  # activations whose tables share a scale
FEW_TOKENS = LUT_TOKENS  # beyond, codes are unpacked and multiplied
SMALLEST = np.float32(2.0**-100)  # tables of smaller magnitude count as zero
MAX_BITS = 4
_SIGNS = (2 * ((np.arange(16)[:, None] >> np.arange(RUN)) & 1) - 1).astype(np.float32)  # [entry, activation]


def supports(format_id: str, n_rows: int, n_cols: int) -> bool:
    """Whether a matrix of that format and shape has this layout."""
    fmt = blocks.lookup(format_id)
    few_bits = fmt.group is not None and fmt.group.is_affine and fmt.group.bits <= MAX_BITS
    return few_bits and n_rows > 0 and n_rows % ROWS == 0 and n_cols % fmt.block_elements == 0


def panel_bytes(format_id: str, n_cols: int) -> int:
    """Bytes of one panel of 64 rows: those of the rows themselves."""
    return ROWS * blocks.row_bytes(format_id, n_cols)


def pack(format_id: str, rows: U8, n_cols: int) -> U8:
    """Row-major ``rows`` uint8 (n_rows, row_bytes) in this layout, uint8 (n_rows / 64, panel_bytes)."""
    group, n_groups = _group(format_id, len(rows), n_cols)
    blocked = rows.reshape(-1, ROWS, n_groups, blocks.block_bytes(format_id))
    header, payload = blocked[..., : group.header_bytes], blocked[..., group.header_bytes :]
    n_panels = len(blocked)
    header = header.reshape(n_panels, ROWS, n_groups, -1, 2).transpose(0, 2, 3, 1, 4)
    codes = unpack_chunks(payload.reshape(n_panels, ROWS, n_groups, -1, 4 * group.bits), group.bits)
    # [panel, row, group, pair of runs, run, activation] → [panel, group, pair, row, run, activation]
    codes = codes.reshape(n_panels, ROWS, n_groups, -1, 2, RUN).transpose(0, 2, 3, 1, 4, 5)
    weights = (1 << np.arange(2 * RUN, dtype=np.uint8)).reshape(2, RUN)
    planes = [
        (((codes >> np.uint8(i)) & np.uint8(1)) * weights).sum(axis=(-2, -1), dtype=np.uint8) for i in range(group.bits)
    ]
    joined = [np.stack(planes[i : i + 2], axis=-1).reshape(*planes[0].shape[:-1], -1) for i in _pairs(group.bits)]
    if group.bits % 2:
        halves = planes[-1].reshape(*planes[-1].shape[:-1], 2, ROWS // 2)
        joined.append(halves.swapaxes(-1, -2).reshape(planes[-1].shape))
    packed = np.concatenate(joined, axis=-1).reshape(n_panels, n_groups, -1)
    return np.concatenate([header.reshape(n_panels, n_groups, -1), packed], axis=-1).reshape(n_panels, -1)


def unpack(format_id: str, packed: U8, n_cols: int) -> U8:
    """The inverse of ``pack``: panels uint8 (n_panels, panel_bytes) as rows uint8 (64 n_panels, row_bytes)."""
    n_panels = len(packed)
    group, n_groups = _group(format_id, ROWS * n_panels, n_cols)
    indices = _indices(packed, group, n_groups)  # [panel, plane, row, group, run]
    bits = (indices[..., None] >> np.arange(RUN, dtype=np.uint8)) & np.uint8(1)
    codes = np.bitwise_or.reduce(bits << np.arange(group.bits, dtype=np.uint8).reshape(-1, 1, 1, 1, 1), axis=1)
    payload = pack_chunks(codes.reshape(n_panels, ROWS, n_groups, -1, SPAN), group.bits)
    header = packed.reshape(n_panels, n_groups, -1)[..., : ROWS * group.header_bytes]
    header = header.reshape(n_panels, n_groups, -1, ROWS, 2).transpose(0, 3, 1, 2, 4)
    parts = [part.reshape(n_panels, ROWS, n_groups, -1) for part in (header, payload)]
    return np.concatenate(parts, axis=-1).reshape(ROWS * n_panels, -1)


def exact_tables(x: F32) -> F32:
    """The 16 sums of each run of four, float32 (n_tokens, n_cols / 4, 16), eight of them computed."""
    runs = x.reshape(len(x), -1, RUN)
    half = runs[..., :3] @ _SIGNS[:8, :3].T - runs[..., 3:]
    return np.concatenate([half, -half[..., ::-1]], axis=-1)


def tables(x: F32) -> tuple[npt.NDArray[np.int8], F32, F32]:
    """Tables int8 (n_tokens, n_cols / 4, 16), their scales and the sums of x, float32 (n_tokens, n_cols / 32).

    32 activations that hold NaN or infinity, or of which four overflow float32 together, get scale and sum NaN.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        reach = np.abs(x).reshape(len(x), -1, RUN).sum(axis=2, dtype=np.float32)
        largest = reach.reshape(len(x), -1, SPAN // RUN).max(axis=2)
    finite = np.isfinite(largest)
    used = finite & (largest >= SMALLEST)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=used)
    kept = np.where(np.repeat(used, SPAN, axis=1), x, np.float32(0))
    codes = np.rint(exact_tables(kept * np.repeat(inverse, SPAN, axis=1))).astype(np.int8)
    scales = np.where(used, largest / np.float32(127), np.float32(0))
    sums = kept.reshape(len(x), -1, SPAN).sum(axis=2, dtype=np.float32)
    scales[~finite] = sums[~finite] = np.nan
    return codes, scales, sums


def product(x: F32, weight: Any) -> npt.NDArray[np.float64]:
    """x @ W^T float64 (n_tokens, rows) from rounded tables, as the kernels take it; ``weight`` has this layout."""
    group, n_groups = _group(weight.format, weight.rows, weight.cols)
    packed = weight.buffer.reshape(-1, panel_bytes(weight.format, weight.cols))
    indices = _indices(packed, group, n_groups)
    n_panels = len(packed)
    indices = indices.reshape(n_panels, group.bits, ROWS, -1).transpose(1, 0, 2, 3).reshape(group.bits, weight.rows, -1)
    table, table_scales, sums = tables(x)
    out = np.empty((len(x), weight.rows))
    scales, offsets = _scales(weight, packed, group, n_groups)  # [row, group]
    spans = x.shape[1] // SPAN // n_groups
    for t in range(len(x)):
        entries = table[t, np.arange(table.shape[1]), indices].astype(np.int64)  # [plane, row, run]
        signed = np.einsum("i,irk->rk", 1 << np.arange(group.bits), entries)
        spanwise = signed.reshape(weight.rows, -1, SPAN // RUN).sum(axis=2) * (0.5 * table_scales[t].astype(np.float64))
        groupwise = spanwise.reshape(weight.rows, n_groups, spans).sum(axis=2)
        x_sums = sums[t].astype(np.float64).reshape(n_groups, spans).sum(axis=1)
        out[t] = (scales * groupwise + offsets * x_sums).sum(axis=1)
    return out


def _scales(weight: Any, packed: U8, group: blocks.Group, n_groups: int) -> tuple[Any, Any]:
    """What the two sums of a group are multiplied with, float64 (rows, groups) each."""
    header = packed.reshape(len(packed), n_groups, -1)[..., : ROWS * group.header_bytes]
    halves = np.ascontiguousarray(header).view(np.float16).astype(np.float64).reshape(len(packed), n_groups, -1, ROWS)
    scales, *minimums = halves.transpose(2, 0, 3, 1).reshape(-1, weight.rows, n_groups)
    offsets = scales * (((1 << group.bits) - 1) / 2 - group.zero)
    return scales, offsets + minimums[0] if minimums else offsets


def _pairs(bits: int) -> range:
    return range(0, bits // 2 * 2, 2)


def _indices(packed: U8, group: blocks.Group, n_groups: int) -> U8:
    """Table indices uint8 (panels, planes, 64 rows, groups, runs)."""
    n_panels = len(packed)
    payload = packed.reshape(n_panels, n_groups, -1)[..., ROWS * group.header_bytes :]
    paired = payload.reshape(n_panels, n_groups, -1, ROWS * group.bits)  # [..., pair of runs, bytes]
    planes = []
    for i in _pairs(group.bits):
        both = paired[..., ROWS * i : ROWS * (i + 2)].reshape(*paired.shape[:-1], ROWS, 2)
        planes += [both[..., 0], both[..., 1]]
    if group.bits % 2:
        last = paired[..., ROWS * (group.bits - 1) :].reshape(*paired.shape[:-1], ROWS // 2, 2)
        planes.append(last.swapaxes(-1, -2).reshape(*paired.shape[:-1], ROWS))
    both = np.stack(planes, axis=1)  # [panel, plane, group, pair, row]
    indices = np.stack([both & np.uint8(15), both >> np.uint8(4)], axis=-1)  # [..., row, run of the pair]
    return indices.transpose(0, 1, 4, 2, 3, 5).reshape(n_panels, group.bits, ROWS, n_groups, -1)


def _group(format_id: str, n_rows: int, n_cols: int) -> tuple[blocks.Group, int]:
    fmt = blocks.lookup(format_id)
    if fmt.group is None or not supports(format_id, n_rows, n_cols):
        raise Incompatible(
            f"{format_id} [{n_rows}, {n_cols}] has no look-up layout: it needs one scale per block, codes of up to "
            f"{MAX_BITS} bits, whole blocks and a multiple of {ROWS} rows",
            cure='keep the layout "rows"',
        )
    return fmt.group, n_cols // fmt.block_elements
