"""Panels: the layout of resident weights, 16 rows interleaved, in which a vector register holds a column block of each.

A row-major matrix makes every row its own stream and every product a sum across a register. A panel holds 16 rows such
that lane r of a 64-byte vector belongs to row r: 4 columns of 8 bits (a *quad*) meet 4 activations that all lanes
share, and sums stay in their lanes. The bytes are exactly those of the row-major blocks, in another order.

It exists for the formats with one scale per block (``blocks.Group``: q4_0, q4_1, q5_0, q5_1, q8_0, int*_g*) and whole
panels (rows a multiple of 16). A matrix is panel after panel; a panel is group after group along the columns; a group:

======= ============================================================================================================
bytes   content
======= ============================================================================================================
32      the scales of rows 0..15, f16
32      their minimums, f16; only where the format has them
rest    one chunk of 32 columns after the other, ``64 * bits`` bytes each: the planes of the codes' bits, low bits first
======= ============================================================================================================

Codes of 8, 4, 2 and 1 bits are one plane; of 5 bits a plane of 4 and a plane of 1; of 3 bits a plane of 2 and one of 1.
A plane of w bits is w vectors of 64 bytes with 8 / w quads each: bits ``w f .. w f + w - 1`` of byte ``4 r + j`` of
vector v belong to row r, column ``4 (8 / w v + f) + j`` of the chunk. So in a 4-bit plane byte 4r + j of vector v holds
column 8v + j in its low half and 8v + 4 + j in its high half. Codes are unsigned: q8_0 stores q + 128.

Example: ``q4_0`` [16, 32] takes 16 * 18 = 288 bytes; the code of row 3, column 21 = 8 * 2 + 4 + 1 is
``panel[32 + 64 * 2 + 4 * 3 + 1] >> 4``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from barefoot.core.errors import Incompatible
from barefoot.ops import blocks

U8 = npt.NDArray[np.uint8]

ROWS = 16  # rows of a panel
CHUNK = 32  # columns whose planes lie together
QUADS = CHUNK // 4
PLANES = {
    8: (8,),
    5: (4, 1),
    4: (4,),
    3: (2, 1),
    2: (2,),
    1: (1,),
}  # bits of a code: of its planes, low ones first


def supports(format_id: str, n_rows: int, n_cols: int) -> bool:
    """Whether a matrix of that format and shape has a panel layout."""
    fmt = blocks.lookup(format_id)
    return fmt.group is not None and n_rows > 0 and n_rows % ROWS == 0 and n_cols % fmt.block_elements == 0


def panel_bytes(format_id: str, n_cols: int) -> int:
    """Bytes of one panel of 16 rows: those of the rows themselves."""
    return ROWS * blocks.row_bytes(format_id, n_cols)


def pack(format_id: str, rows: U8, n_cols: int) -> U8:
    """Row-major ``rows`` uint8 (n_rows, row_bytes) as panels, uint8 (n_rows / 16, panel_bytes)."""
    group, n_groups = _group(format_id, len(rows), n_cols)
    fmt = blocks.lookup(format_id)
    blocked = rows.reshape(-1, ROWS, n_groups, fmt.block_bytes)
    header, payload = blocked[..., : group.header_bytes], blocked[..., group.header_bytes :]
    header = header.reshape(*header.shape[:3], -1, 2).transpose(0, 2, 3, 1, 4)
    codes = blocks.unpack_chunks(payload.reshape(*payload.shape[:3], -1, 4 * group.bits), group.bits)
    if group.signed:
        codes = codes ^ np.uint8(0x80)
    n_panels, _, _, n_chunks, _ = codes.shape
    quads = codes.reshape(n_panels, ROWS, n_groups, n_chunks, QUADS, 4).transpose(0, 2, 3, 4, 1, 5)
    planes, low = [], 0
    for width in PLANES[group.bits]:
        fields = (quads >> np.uint8(low)) & np.uint8((1 << width) - 1)
        fields = fields.reshape(n_panels, n_groups, n_chunks, width, 8 // width, ROWS, 4) << _shifts(width)
        planes.append(np.bitwise_or.reduce(fields, axis=4).reshape(n_panels, n_groups, n_chunks, -1))
        low += width
    payload = np.concatenate(planes, axis=-1).reshape(n_panels, n_groups, -1)
    return np.concatenate([header.reshape(n_panels, n_groups, -1), payload], axis=-1).reshape(n_panels, -1)


def unpack(format_id: str, packed: U8, n_cols: int) -> U8:
    """The inverse of ``pack``: panels uint8 (n_panels, panel_bytes) as rows uint8 (16 n_panels, row_bytes)."""
    n_panels = len(packed)
    group, n_groups = _group(format_id, ROWS * n_panels, n_cols)
    n_header = ROWS * group.header_bytes
    grouped = packed.reshape(n_panels, n_groups, -1)
    header = grouped[..., :n_header].reshape(n_panels, n_groups, -1, ROWS, 2).transpose(0, 3, 1, 2, 4)
    vectors = grouped[..., n_header:].reshape(n_panels, n_groups, -1, group.bits, 1, ROWS, 4)
    quads, low = np.zeros((*vectors.shape[:3], QUADS, ROWS, 4), np.uint8), 0
    for width in PLANES[group.bits]:
        fields = (vectors[:, :, :, low : low + width] >> _shifts(width)) & np.uint8((1 << width) - 1)
        quads |= fields.reshape(quads.shape) << np.uint8(low)
        low += width
    codes = quads.transpose(0, 4, 1, 2, 3, 5).reshape(n_panels, ROWS, n_groups, -1, CHUNK)
    if group.signed:
        codes = codes ^ np.uint8(0x80)
    payload = blocks.pack_chunks(codes, group.bits).reshape(n_panels, ROWS, n_groups, -1)
    header = header.reshape(n_panels, ROWS, n_groups, -1)
    return np.concatenate([header, payload], axis=-1).reshape(ROWS * n_panels, -1)


def _shifts(width: int) -> U8:
    return np.arange(0, 8, width, dtype=np.uint8).reshape(-1, 1, 1)


def _group(format_id: str, n_rows: int, n_cols: int) -> tuple[blocks.Group, int]:
    fmt = blocks.lookup(format_id)
    if fmt.group is None or not supports(format_id, n_rows, n_cols):
        raise Incompatible(
            f"{format_id} [{n_rows}, {n_cols}] has no panel layout: it needs one scale per block, whole blocks and a "
            f"multiple of {ROWS} rows",
            cure='keep the layout "rows"',
        )
    return fmt.group, n_cols // fmt.block_elements
