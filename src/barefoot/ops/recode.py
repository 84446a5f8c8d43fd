"""The same weights in another block format, bit for bit, where one can hold them: what exports are made of.

Blocks of one group (``blocks.Group``) mean scale × (code − zero), or scale × code + minimum. They go without loss into
a format of more bits, or of smaller groups, which repeats their scales: codes are moved so that zero meets zero. The
decoded float32 values are equal bit for bit, since the same two numbers are multiplied.

    int4_g64_sym → q4_0     codes as they are, each scale twice: 4.5 bits a weight for 4.25
    int3_g32_sym → q4_0     codes + 4
    int2_g32_asym → q4_1    codes as they are
    ternary_g128 → q4_0     codes + 7, each scale four times
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from barefoot.core.errors import Incompatible
from barefoot.ops import blocks
from barefoot.ops.blocks import Group
from barefoot.ops.grids import Ternary
from barefoot.ops.payload import U8


def holds(target: str, source: str) -> bool:
    """Whether ``target`` can hold whatever ``source`` stores, bit for bit."""
    if target == source:
        return True
    to, of = _group(target), _group(source)
    if to is None or of is None or to.has_minimum != of.has_minimum:
        return False
    if blocks.block_elements(source) % blocks.block_elements(target):
        return False
    highest = 2 if isinstance(blocks.lookup(source).grid, Ternary) else (1 << of.bits) - 1
    shift = _shift(to, of)
    return shift >= 0 and highest + shift < 1 << to.bits


def target_for(source: str, targets: Iterable[str]) -> str:
    """The smallest of ``targets`` that holds ``source`` bit for bit.

    Raises
    ------
    Incompatible : none does; the message names the formats that one of them holds.
    """
    targets = tuple(targets)
    fitting = [target for target in targets if holds(target, source)]
    if not fitting:
        held = sorted(name for name in blocks.names() if any(holds(target, name) for target in targets))
        raise Incompatible(
            f"nothing holds {source} without loss; what can be held: {', '.join(held)}",
            cure="fit the model again with one of these",
        )
    return min(fitting, key=blocks.bits_per_weight)


def recode(target: str, source: str, rows: U8) -> U8:
    """Rows of ``source``, uint8 (n, row_bytes), as rows of ``target``, which ``holds`` them."""
    if target == source:
        return rows
    to, of = _group(target), _group(source)
    assert to is not None
    assert of is not None
    numbers, scales, codes = of.split(rows.reshape(-1, blocks.block_bytes(source)))
    size = blocks.block_elements(target)
    repeats = blocks.block_elements(source) // size
    moved = codes.reshape(-1, size) + np.uint8(_shift(to, of))
    return to.join(np.repeat(numbers, repeats, axis=0), np.repeat(scales, repeats, axis=0), moved).reshape(
        len(rows), -1
    )


def _group(format_id: str) -> Group | None:
    """The group of a format whose codes count equal steps; None for all others."""
    group = blocks.lookup(format_id).group
    return group if group is not None and group.is_affine else None


def _shift(to: Group, of: Group) -> int:
    """What is added to a code so that the one that stands for 0 stays that."""
    return _zero(to) - _zero(of)


def _zero(group: Group) -> int:
    return 0 if group.has_minimum else 128 if group.signed else group.zero
