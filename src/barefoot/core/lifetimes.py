"""Static memory planning: buffers with known lifetimes share one block.

Offsets are found greedily, largest buffer first, each at the lowest offset that overlaps no buffer alive at the same
time (greedy-by-size; Pisarchyk and Lee 2020, arXiv:2001.03288, section 5). The block can be larger than the bound
``live_peak`` when the rectangles do not pack; the ledger carries the block, because the block is what is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from barefoot.core.units import round_up

ALIGNMENT = 64  # bytes; a cache line, and the width of the widest vector register


@dataclass(frozen=True)
class Buffer:
    """``bytes`` bytes alive from step ``start`` to step ``end``, both included."""

    name: str
    bytes: int
    start: int
    end: int

    def overlaps(self, other: Buffer) -> bool:
        return self.start <= other.end and other.start <= self.end


@dataclass(frozen=True)
class Arrangement:
    """Where each buffer lies in the block, and how large the block is, in bytes."""

    offsets: dict[str, int]
    bytes: int


def live_peak(buffers: Sequence[Buffer]) -> int:
    """The largest sum of aligned buffers alive at one step: no arrangement can be smaller."""
    steps = {b.start for b in buffers}
    return max((sum(round_up(b.bytes, ALIGNMENT) for b in buffers if b.start <= s <= b.end) for s in steps), default=0)


def arrange(buffers: Sequence[Buffer]) -> Arrangement:
    """Give each buffer an offset so that no two that are alive together overlap."""
    placed: list[tuple[int, Buffer]] = []
    for buffer in sorted(buffers, key=lambda b: (-b.bytes, b.start, b.name)):
        offset = 0
        for other_offset, other in sorted((p for p in placed if p[1].overlaps(buffer)), key=lambda p: p[0]):
            if offset + buffer.bytes <= other_offset:
                break
            offset = max(offset, round_up(other_offset + other.bytes, ALIGNMENT))
        placed.append((offset, buffer))
    total = max((round_up(offset + b.bytes, ALIGNMENT) for offset, b in placed), default=0)
    return Arrangement({b.name: offset for offset, b in placed}, total)
