"""Panels: the layout of resident weights, 16 rows interleaved, in which a vector register holds a column block of each.

A row-major matrix makes every row its own stream and every product a sum across a register. A panel holds 16 rows such
that lane r of a 64-byte vector belongs to row r: 4 columns of 8 bits (a *quad*) meet 4 activations that all lanes
share, and sums stay in their lanes. The bytes are exactly those of the row-major blocks, in another order.

It exists for the formats whose blocks can be taken apart into scales and codes (``blocks.BlockFormat.anatomy``: all
quantized ones but tq1_0) and whole panels (rows a multiple of 16). A matrix is panel after panel; a panel is group
after group along the columns, each a block of every row:

======= ============================================================================================================
bytes   content
======= ============================================================================================================
32      the scales of rows 0..15, f16 (16 bytes: their exponents, where the format stores these); not in bilevel formats
32      their minimums (K-quants: the scales of the minimums), f16; only where the format has them
80-256  the sub-scales of the K-quants, 12 bytes a row in q3_k, q4_k and q5_k, 16 bytes in q2_k and q6_k, and of the
        bilevel formats, 5 bytes: byte i of row r is byte 16 i + r
rest    one chunk of 32 columns after the other, ``64 * bits`` bytes each: the planes of the codes' bits, low bits first
======= ============================================================================================================

The sub-scales of a row are as ``barefoot.ops.superblocks`` describes them, with those of q4_k and q5_k in the order of
q3_k: sixteen numbers of 6 bits, eight scales and then eight minimums. So 16 neighbouring bytes hold the same sub-scale
(or two, half and half) of all rows.

Codes of 8, 4, 2 and 1 bits are one plane; of 6 bits planes of 4 and 2; of 5 bits planes of 4 and 1; of 3 bits planes of
2 and 1. A plane of w bits is w vectors of 64 bytes with 8 / w quads each: bits ``w f .. w f + w - 1`` of byte
``4 r + j`` of vector v belong to row r, column ``4 (8 / w v + f) + j`` of the chunk. So in a 4-bit plane byte 4r + j of
vector v holds column 8v + j in its low half and 8v + 4 + j in its high half. Codes are unsigned: q8_0 stores q + 128.

Example: ``q4_0`` [16, 32] takes 16 * 18 = 288 bytes; the code of row 3, column 21 = 8 * 2 + 4 + 1 is
``panel[32 + 64 * 2 + 4 * 3 + 1] >> 4``. ``q4_k`` [16, 256] takes 16 * 144 = 2,304 bytes; the scale of columns 160..191
(number 5) of row 3 is ``(panel[64 + 16 * 5 + 3] & 15) | (panel[64 + 16 * 9 + 3] >> 2 & 3) << 4``.
"""

from __future__ import annotations

import numpy as np

from barefoot.core.errors import Incompatible
from barefoot.ops import blocks
from barefoot.ops.bilevel import Bilevel
from barefoot.ops.payload import U8
from barefoot.ops.superblocks import SuperBlock

ROWS = 16  # rows of a panel
CHUNK = 32  # columns whose planes lie together
QUADS = CHUNK // 4
PLANES = {
    8: (8,),
    6: (4, 2),
    5: (4, 1),
    4: (4,),
    3: (2, 1),
    2: (2,),
    1: (1,),
}  # bits of a code: of its planes, low ones first


def supports(format_id: str, n_rows: int, n_cols: int) -> bool:
    """Whether a matrix of that format and shape has a panel layout."""
    fmt = blocks.lookup(format_id)
    return fmt.anatomy is not None and n_rows > 0 and n_rows % ROWS == 0 and n_cols % fmt.block_elements == 0


def panel_bytes(format_id: str, n_cols: int) -> int:
    """Bytes of one panel of 16 rows: those of the rows themselves."""
    return ROWS * blocks.row_bytes(format_id, n_cols)


def pack(format_id: str, rows: U8, n_cols: int) -> U8:
    """Row-major ``rows`` uint8 (n_rows, row_bytes) as panels, uint8 (n_rows / 16, panel_bytes)."""
    anatomy, n_groups = _anatomy(format_id, len(rows), n_cols)
    n_panels = len(rows) // ROWS
    numbers, scales, codes = anatomy.split(rows.reshape(-1, blocks.block_bytes(format_id)))
    header = [_interleave(numbers.reshape(n_panels, ROWS, n_groups, -1, _number_bytes(anatomy)))]
    header.append(_interleave(scales.reshape(n_panels, ROWS, n_groups, -1, 1)))
    quads = codes.reshape(n_panels, ROWS, n_groups, -1, QUADS, 4).transpose(0, 2, 3, 4, 1, 5)
    planes, low = [], 0
    for width in PLANES[anatomy.bits]:
        fields = (quads >> np.uint8(low)) & np.uint8((1 << width) - 1)
        fields = fields.reshape(*quads.shape[:3], width, 8 // width, ROWS, 4) << _shifts(width)
        planes.append(np.bitwise_or.reduce(fields, axis=4).reshape(*quads.shape[:3], -1))
        low += width
    payload = np.concatenate(planes, axis=-1).reshape(n_panels, n_groups, -1)
    return np.concatenate([*header, payload], axis=-1).reshape(n_panels, -1)


def unpack(format_id: str, packed: U8, n_cols: int) -> U8:
    """The inverse of ``pack``: panels uint8 (n_panels, panel_bytes) as rows uint8 (16 n_panels, row_bytes)."""
    n_panels = len(packed)
    anatomy, n_groups = _anatomy(format_id, ROWS * n_panels, n_cols)
    n_numbers, n_scales = (ROWS * n for n in (anatomy.numbers_bytes, anatomy.scales_bytes))
    numbers, scales, payload = np.split(packed.reshape(n_panels, n_groups, -1), [n_numbers, n_numbers + n_scales], -1)
    vectors = payload.reshape(n_panels, n_groups, -1, anatomy.bits, 1, ROWS, 4)
    quads, low = np.zeros((*vectors.shape[:3], QUADS, ROWS, 4), np.uint8), 0
    for width in PLANES[anatomy.bits]:
        fields = (vectors[:, :, :, low : low + width] >> _shifts(width)) & np.uint8((1 << width) - 1)
        quads |= fields.reshape(quads.shape) << np.uint8(low)
        low += width
    codes = quads.transpose(0, 4, 1, 2, 3, 5).reshape(ROWS * n_panels * n_groups, -1)
    joined = anatomy.join(_rows_of(numbers, _number_bytes(anatomy)), _rows_of(scales, 1), codes)
    return joined.reshape(ROWS * n_panels, -1)


def _number_bytes(anatomy: blocks.Group | SuperBlock | Bilevel) -> int:
    return anatomy.scale_bytes if isinstance(anatomy, blocks.Group) else 2


def _interleave(values: U8) -> U8:
    """Values of each row (n_panels, 16, n_groups, n, width) to each value of 16 rows: (n_panels, n_groups, bytes)."""
    return values.transpose(0, 2, 3, 1, 4).reshape(values.shape[0], values.shape[2], -1)


def _rows_of(interleaved: U8, width: int) -> U8:
    """The inverse, one row for each block: (16 n_panels n_groups, n width)."""
    n_panels, n_groups, n_bytes = interleaved.shape
    values = interleaved.reshape(n_panels, n_groups, -1, ROWS, width).transpose(0, 3, 1, 2, 4)
    return values.reshape(ROWS * n_panels * n_groups, n_bytes // ROWS)


def _shifts(width: int) -> U8:
    return np.arange(0, 8, width, dtype=np.uint8).reshape(-1, 1, 1)


def _anatomy(format_id: str, n_rows: int, n_cols: int) -> tuple[blocks.Group | SuperBlock | Bilevel, int]:
    fmt = blocks.lookup(format_id)
    if fmt.anatomy is None or not supports(format_id, n_rows, n_cols):
        raise Incompatible(
            f"{format_id} [{n_rows}, {n_cols}] has no panel layout: it needs a format of scales and codes, whole "
            f"blocks and a multiple of {ROWS} rows",
            cure='keep the layout "rows"',
        )
    return fmt.anatomy, n_cols // fmt.block_elements
